"""Summary features against a plain loop over timelines; baselines on the stays of the sequence model, nothing later."""

from __future__ import annotations

import json
import math
import statistics as plain
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from trajlm.baselines import known_events, still_there, tabular_beliefs
from trajlm.errors import TrajlmError
from trajlm.finetuning import finetuning_splits
from trajlm.metrics import LANDMARKS, beliefs_at_landmark
from trajlm.summaries import STATISTICS, Measurements, SummaryReader, statistics
from trajlm.tabular_models import CLIP, STRENGTHS, Examples, Standardised, fit_tuned, tuning_loss
from trajlm.tasks import build_tasks

ROWS = st.tuples(st.integers(0, 3), st.integers(0, 2), st.floats(0, 72), st.floats(-1e4, 1e4))
TIMELINES = st.lists(ROWS, max_size=40)


def measured(rows) -> Measurements:
    ordered = sorted(rows, key=lambda row: row[2])
    stay, feature, hours, values = ([row[i] for row in ordered] for i in range(4))
    return Measurements(np.array(stay, int), np.array(feature, int), np.array(hours, float), np.array(values, float),
                        stays=4, features=3)  # fmt: skip


def plain_statistics(values: list[float]) -> dict[str, float]:
    if not values:
        return dict.fromkeys(STATISTICS, math.nan) | {"count": 0}
    return {
        "last": values[-1], "first": values[0], "min": min(values), "max": max(values), "mean": plain.fmean(values),
        "std": plain.pstdev(values), "count": len(values),
    }  # fmt: skip


@given(TIMELINES, st.one_of(st.none(), st.floats(0, 72)))
@settings(max_examples=150, deadline=None)
def test_statistics_equal_a_plain_loop(rows, landmark):
    of = measured(rows)
    found = statistics(of.until(landmark))
    for stay in range(4):
        for feature in range(3):
            mine = (of.stay == stay) & (of.feature == feature)
            seen = [
                v for v, h in zip(of.values[mine], of.hours[mine], strict=True) if landmark is None or h <= landmark
            ]
            for name, expected in plain_statistics(seen).items():
                assert found[name][stay, feature] == pytest.approx(expected, rel=1e-9, abs=1e-6, nan_ok=True), name


@given(TIMELINES, TIMELINES, st.floats(0, 72))
@settings(max_examples=150, deadline=None)
def test_nothing_after_the_landmark_enters(rows, others, landmark):
    """Whatever is added, changed or lost after the landmark, the features are the same bits."""
    early = [row for row in rows if row[2] <= landmark]
    later = [(s, f, landmark + 1e-6 + h, v) for s, f, h, v in others]
    found = (statistics(measured(kept).until(landmark)) for kept in (rows, early, early + later))
    first, *rest = [np.stack(list(tables.values())) for tables in found]
    for other in rest:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("landmark", [6.0, 24.0, None])
def test_features_of_a_prepared_folder_equal_a_loop_over_its_timelines(prepared, landmark):
    reader = SummaryReader(prepared)
    stays = prepared.positions("train")[:25]
    summary = reader.summary(reader.measurements(stays), landmark)
    assert summary.values.shape == (len(stays), len(summary.names))
    assert len(set(summary.names)) == len(summary.names)
    column = {name: i for i, name in enumerate(summary.names)}
    modalities = {m.name: m for m in prepared.modalities}
    checked = 0
    for row, stay in enumerate(stays):
        timeline = prepared.timeline(prepared.stays["stay_id"][int(stay)])
        seen: dict[int, list[float]] = {}
        for event in timeline.events:
            if landmark is None or event.hours_since_admission <= landmark:
                for feature, value in zip(event.feature_ids, event.values, strict=True):
                    seen.setdefault(feature, []).append(value)
        for feature in prepared.features:
            expected = plain_statistics(seen.get(feature.feature_id, []))
            static, category = modalities[feature.modality].static, feature.kind == "category"
            kept = ["count"] if category else ["last"] if static else list(STATISTICS)
            for name in STATISTICS:
                title = f"{feature.modality}: {feature.name}, {name}"
                assert (title in column) == (name in kept)
                if name in kept:
                    value = min(expected[name], 1) if static and category else expected[name]
                    assert summary.values[row, column[title]] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True)
                    checked += 1
    assert checked == summary.values.size


def shaped(n: int, seed: int) -> Examples:
    """A risk that a line cannot draw: high at both ends of a feature; another is missing at random."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    y = (rng.random(n) < np.where(np.abs(x[:, 0]) > 0.7, 0.9, 0.1)).astype(float)
    x[rng.random(n) < 0.3, 2] = np.nan
    return Examples(x, y)


def test_the_logistic_model_is_scikit_learn_on_standardised_features():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(300, 4))
    x[:, 2] = 7.0  # says nothing
    x[rng.random(300) < 0.4, 3] = np.nan
    y = (rng.random(300) < 1 / (1 + np.exp(-(x[:, 0] - 3)))).astype(float)
    train, tuning = Examples(x[:200], y[:200]), Examples(x[200:], y[200:])
    fitted = fit_tuned("logistic", "probability", train, tuning, 6, 0)
    mean, std = np.nanmean(x[:200], axis=0), np.nanstd(x[:200], axis=0)
    filled = np.nan_to_num(np.clip((x - mean) / np.where(std > 0, std, 1), -CLIP, CLIP))[:, [0, 1, 3]]
    inputs = np.column_stack([filled, np.isnan(x[:, 3])])
    losses = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=2000).fit(inputs[:200], y[:200])
        losses.append(log_loss(y[200:], model.predict_proba(inputs[200:])[:, 1]))
    assert [trial["tuning_loss"] for trial in fitted.trials] == pytest.approx(losses, abs=1e-6)
    assert fitted.chosen == int(np.argmin(losses))
    assert tuning_loss("probability", tuning.target, fitted.predict(tuning.features)) == pytest.approx(min(losses))


def test_one_indicator_stands_for_all_that_is_missing_together():
    x = np.array([[1.0, 2.0, np.nan, np.nan, 0.0], [2.0, 2.0, 4.0, 5.0, np.nan], [4.0, 2.0, 3.0, 1.0, 1.0]])
    inputs = Standardised(x)(x)
    assert inputs.shape == (3, 4 + 2)
    assert inputs[:, 4:].T.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert np.isfinite(Standardised(x)(np.full((2, 5), np.nan))).all()


@pytest.mark.parametrize("kind", ["probability", "hours"])
def test_trees_learn_what_a_line_cannot(kind):
    train, tuning, test = (shaped(n, seed) for seed, n in enumerate((1500, 400, 800)))
    if kind == "hours":
        train, tuning, test = (Examples(e.features, np.expm1(2 + 2 * e.target)) for e in (train, tuning, test))
    beliefs = {name: fit_tuned(name, kind, train, tuning, 2, 0).predict(test.features)
               for name in ("logistic", "lightgbm")}  # fmt: skip
    positive = test.target > np.median(test.target)
    areas = {name: roc_auc_score(positive, belief) for name, belief in beliefs.items()}
    assert areas["lightgbm"] > 0.75 > 0.6 > areas["logistic"]
    again = fit_tuned("lightgbm", kind, train, tuning, 2, 0)
    np.testing.assert_array_equal(again.predict(test.features), beliefs["lightgbm"])
    assert again.trials[again.chosen]["tuning_loss"] == min(trial["tuning_loss"] for trial in again.trials)


def test_where_nothing_can_be_learned_the_belief_is_the_mean():
    x = np.random.default_rng(0).normal(size=(20, 2))
    alive = Examples(x, np.zeros(20))
    assert fit_tuned("logistic", "probability", alive, alive, 2, 0).predict(x).tolist() == [0.0] * 20
    with pytest.raises(TrajlmError, match="no training stay"):
        fit_tuned("logistic", "hours", Examples(x[:0], x[:0, 0]), alive, 2, 0)
    some = Examples(x, (x[:, 0] > 0).astype(float))
    first = fit_tuned("lightgbm", "probability", some, Examples(x[:0], x[:0, 0]), 2, 0)
    assert (first.chosen, first.trials[0]["tuning_loss"]) == (0, None)


def test_trees_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    some = shaped(50, 0)
    with pytest.raises(TrajlmError, match="the baseline lightgbm needs LightGBM"):
        fit_tuned("lightgbm", "probability", some, some, 1, 0)


@pytest.fixture(scope="module")
def baseline(prepared, tmp_path_factory):
    """Beliefs of the trees on the invented stays, with what they were made of."""
    splits = finetuning_splits(prepared, "train", 0)
    tasks = build_tasks(["mortality", "length_of_stay"])
    columns = [prepared.stays[task.column].cast(pl.Float64).fill_null(float("nan")).to_numpy() for task in tasks]
    of = {name: splits.of(name) for name in ("train", "tuning", "held_out")}
    folder = tmp_path_factory.mktemp("trees")

    def beliefs(targets):
        return tabular_beliefs("lightgbm", prepared, of, tasks, targets, folder, 1, 0)

    return of, np.stack(columns, axis=1), beliefs, folder


def test_baselines_believe_in_the_stays_of_the_splits_that_are_still_there(prepared, baseline):
    splits, targets, make, folder = baseline
    beliefs = make(targets)
    for split in ("tuning", "held_out"):
        mine = beliefs.filter(pl.col("split") == split)
        for landmark in LANDMARKS:
            expected = []
            for stay in splits[split]:
                timeline = prepared.timeline(prepared.stays["stay_id"][int(stay)])
                hours = [e.hours_since_admission for e in timeline.events if landmark is None
                         or e.hours_since_admission <= landmark]  # fmt: skip
                gone = landmark is not None and (timeline.hours_in_unit or math.inf) < landmark
                if hours and not gone:
                    expected.append((timeline.stay_id, len(hours) - 1, hours[-1]))
            at = beliefs_at_landmark(mine, prepared.stays, landmark)
            assert at.select("stay_id", "event_index", "hours_since_admission").rows() == expected
            assert at["landmark"].to_list() == [landmark] * len(expected)
            own = targets[[prepared.position(stay) for stay in at["stay_id"]], 0]
            np.testing.assert_array_equal(at["target_mortality"].cast(pl.Float64).fill_null(np.nan).to_numpy(), own)
    told = json.loads((folder / "tuning.json").read_text())
    assert [(t["landmark"], t["target"]) for t in told] == [
        (at, target) for at in LANDMARKS for target in ("mortality", "length_of_stay_hours")
    ]


def test_held_out_outcomes_never_reach_a_baseline(baseline):
    splits, targets, make, _ = baseline
    other = targets.copy()
    other[splits["held_out"]] = other[splits["held_out"][::-1]]
    first, second = (
        make(of).select("stay_id", "landmark", "belief_mortality", "belief_length_of_stay_hours")
        for of in (targets, other)
    )
    assert first.equals(second)


def test_events_known_by_a_landmark(prepared):
    stays = prepared.positions("held_out")
    for landmark in LANDMARKS:
        known = known_events(prepared, stays, landmark)
        for stay, count in zip(stays, known, strict=True):
            hours = prepared.hours[prepared.bounds[stay] : prepared.bounds[stay + 1]]
            assert count == (len(hours) if landmark is None else (hours <= landmark).sum())
        assert not still_there(prepared, stays, landmark)[known == 0].any()
