"""Fusions at landmarks know what was known by then, and stand on the stays of every other arm; severity scores too."""

import copy
import json

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from trajlm.baselines import scores_of, tabular_beliefs
from trajlm.errors import TrajlmError
from trajlm.latents import KnownLatents
from trajlm.schema import SCORE_HOURS
from trajlm.selection import finetuning_splits
from trajlm.tasks import build_tasks

KEYS = ["stay_id", "split", "landmark", "event_index", "hours_since_admission"]


@pytest.mark.parametrize("hours", [0.0, 7.0, 24.0])
def test_a_folder_until_an_hour_holds_the_timelines_until_then(prepared, hours):
    earlier = prepared.until(hours)
    for stay_id in prepared.stays["stay_id"][:25]:
        assert earlier.timeline(stay_id) == prepared.timeline(stay_id).until(hours)
    stays = np.arange(len(prepared.stays))
    names = [m.name for m in prepared.modalities]
    held = earlier.present(stays, names).numpy()
    for i, stay_id in enumerate(prepared.stays["stay_id"][:25]):
        known = {event.modality for event in prepared.timeline(stay_id).until(hours).events}
        assert {name for name, there in zip(names, held[i], strict=True) if there} == known
    assert len(prepared.hours) == sum(len(prepared.timeline(s).events) for s in prepared.stays["stay_id"])


def test_latents_at_a_landmark_do_not_know_what_came_later(prepared, model, cached, tmp_path):
    stays = prepared.positions("held_out")
    hours = 12.0
    latents, present = KnownLatents(prepared, model.encoders, stays, tmp_path / "known", "key").at(hours)
    # Whatever stands in later events, the latents are those of a folder that never held them.
    forged = copy.copy(prepared)
    forged.__dict__.pop("stores", None)
    later = pl.col("hours_since_admission") > hours
    tripled = pl.when(later & pl.col("values").is_not_null()).then(pl.col("values").list.eval(pl.element() * 3 + 1))
    other_text = pl.when(later & pl.col("text").is_not_null()).then(pl.lit("forged"))
    forged._events = prepared._events.with_columns(
        values=tripled.otherwise("values"), text=other_text.otherwise("text")
    )
    before, after = (of._events.select(pl.col("values").explode().sum()).collect().item() for of in (prepared, forged))
    assert before != after
    other, _ = KnownLatents(forged, model.encoders, stays, tmp_path / "forged", "key").at(hours)
    np.testing.assert_array_equal(latents[stays], other[stays])
    whole = cached.latents.stays[cached.latents.places(stays)]
    assert not np.allclose(latents[stays], whole, atol=1e-3)
    absent = ~present[stays]
    assert absent.any()
    tokens = model.encoders.missing_tokens.detach().numpy()
    np.testing.assert_allclose(latents[stays][absent], np.broadcast_to(tokens, latents[stays].shape)[absent], rtol=1e-6)


def test_every_baseline_believes_in_the_same_stays_at_the_same_hours(run):
    fusion, linear = (pl.read_parquet(run / arm / "beliefs.parquet") for arm in ("static_mlp", "logistic"))
    order = ["split", "landmark", "stay_id"]
    assert fusion.select(KEYS).sort(order).equals(linear.select(KEYS).sort(order))
    for target in ("target_mortality", "target_length_of_stay_hours"):
        one, two = (frame.sort(order)[target].to_numpy() for frame in (fusion, linear))
        np.testing.assert_allclose(one, two, rtol=1e-6)
    seen = fusion.filter(pl.col("landmark").is_not_null())
    assert (seen["hours_since_admission"] <= seen["landmark"]).all()


def test_the_setting_of_least_tuning_loss_is_chosen(run):
    told = json.loads((run / "static_mlp" / "tuning.json").read_text())
    losses = [trial["tuning_loss"] for trial in told["trials"]]
    assert len(losses) == 6
    assert told["chosen"] == int(np.argmin(losses))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for i, loss in enumerate(losses):
        assert min(e["tuning_loss"] for e in log if e.get("arm") == f"static_mlp/trial-{i}") == loss


@pytest.fixture(scope="module")
def scored(prepared):
    """The records with a severity score that knows something, unknown for some."""
    died = prepared.stays["target_mortality"].fill_null(0).to_numpy()
    rng = np.random.default_rng(0)
    points = np.where(rng.random(len(died)) < 0.2, np.nan, np.round(10 + 6 * died + rng.normal(0, 4, len(died))))
    there = copy.copy(prepared)
    there.stays = prepared.stays.with_columns(score_sofa=pl.Series(points).fill_nan(None))
    return there


def test_a_severity_score_alone(scored, tmp_path):
    splits = finetuning_splits(scored, "train", 0)
    parts = {name: splits.of(name) for name in ("train", "tuning", "held_out")}
    task = build_tasks(["mortality"])
    targets = scored.stays["target_mortality"].cast(pl.Float64).fill_null(float("nan")).to_numpy()[:, None]
    assert scores_of(scored) == ["score_sofa"]
    found = tabular_beliefs("logistic", scored, parts, task, targets, tmp_path, 1, 0, "score_sofa")
    assert set(found["landmark"].unique()) == {24.0, 48.0, None}
    stays = scored.stays.with_row_index("place")
    last = found.filter(pl.col("landmark").is_null(), pl.col("split") == "held_out").join(stays, on="stay_id")
    early = last.filter(pl.col("hours_in_unit") < SCORE_HOURS)
    unknown = last.filter((pl.col("hours_in_unit") >= SCORE_HOURS) & pl.col("score_sofa").is_null())
    assert early.height
    assert pl.concat([early, unknown])["belief_mortality"].n_unique() == 1
    # At 24 hours: a logistic regression of the score in deviations and of whether it is known.
    at = found.filter(pl.col("landmark") == 24.0, pl.col("split") == "held_out").join(stays, on="stay_id")
    train = stays.filter(pl.col("place").is_in(parts["train"]), pl.col("hours_in_unit") >= 24,
                         pl.col("target_mortality").is_not_null())  # fmt: skip
    mean, std = train["score_sofa"].mean(), train["score_sofa"].std(ddof=0)

    def inputs(frame):
        points = (frame["score_sofa"] - mean) / std
        return np.column_stack([points.fill_null(0.0).clip(-5, 5).to_numpy(), frame["score_sofa"].is_null().to_numpy()])

    own = LogisticRegression(C=0.003, max_iter=2000).fit(inputs(train), train["target_mortality"])
    np.testing.assert_allclose(at["belief_mortality"], own.predict_proba(inputs(at))[:, 1], atol=1e-4)


def test_a_score_is_no_input_of_the_other_arms(scored, prepared):
    from trajlm.summaries import SummaryReader

    assert SummaryReader(scored).names == SummaryReader(prepared).names
    batch = scored.stay_batch(np.arange(5), [m.name for m in prepared.modalities])
    assert torch.equal(batch.present, prepared.stay_batch(np.arange(5), [m.name for m in prepared.modalities]).present)


def test_severity_without_a_score_is_refused(prepared):
    with pytest.raises(TrajlmError, match="no severity score is known there"):
        scores_of(prepared)
