"""Explanations are of the model that ran: attention is the one it used, ablation is what it would have believed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from trajectory_example import toy_batch, toy_model

from trajlm.anchoring import static_share
from trajlm.errors import TrajlmError
from trajlm.interception import AttentionCall
from trajlm.interpret.ablation import (
    NOTHING,
    ablated_cohort,
    anchoring,
    cohort_ablation,
    most_divergent_stays,
)
from trajlm.interpret.attention import read_with_attention, stay_attention
from trajlm.interpret.beliefs import ablated_timelines, belief_trajectory, most_moving_events, summary
from trajlm.interpret.removal import sequence_without
from trajlm.latents import TrajectoryBatch
from trajlm.report.run import ablation_metrics, stay_findings
from trajlm.schema import Event, FittedFeature, Timeline
from trajlm.trajectory import TrajectoryModel, interleave

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BELIEFS = ["belief_mortality", "belief_length_of_stay_hours"]


def eager_maps(model: TrajectoryModel, batch: TrajectoryBatch) -> list[torch.Tensor]:
    """Every layer's attention as transformers itself returns it, averaged over heads."""
    trunk = model.backbone.get_base_model() if hasattr(model.backbone, "get_base_model") else model.backbone
    before = trunk.config._attn_implementation
    trunk.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            events = model.embed(batch)
            sequence, _ = interleave(events, model.predict)
            mask = batch.present.repeat_interleave(2, dim=1).long()
            output = model.backbone(inputs_embeds=sequence, attention_mask=mask, output_attentions=True)
    finally:
        trunk.set_attn_implementation(before)
    return [layer.mean(dim=1) for layer in output.attentions]


# Attention


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("lengths", [[6], [6, 6], [7, 3, 1]])
def test_recorded_attention_is_what_transformers_returns(lengths, tuning):
    model, batch = toy_model(tuning), toy_batch(lengths)
    _, maps = read_with_attention(model, batch, [0, 1])
    real = batch.present.repeat_interleave(2, dim=1)
    for layer, expected in enumerate(eager_maps(model, batch)):
        assert maps[layer].shape == expected.shape
        torch.testing.assert_close(maps[layer][real], expected[real], **CLOSE)


def test_attention_is_causal_and_sums_to_one():
    model, batch = toy_model(), toy_batch([7, 3])
    _, maps = read_with_attention(model, batch)
    real = batch.present.repeat_interleave(2, dim=1)
    rows = maps[-1][real]
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(len(rows)), **CLOSE)
    assert not maps[-1].triu(1)[real].any()
    assert not maps[-1][1, :6, 6:].any(), "attention on padding"
    assert len(rows[:14].unique(dim=0)) == 14


@pytest.mark.parametrize("lengths", [[6], [7, 3, 1]])
def test_recording_leaves_the_model_as_it_was(lengths):
    model, batch = toy_model(), toy_batch(lengths)
    implementation = model.backbone.config._attn_implementation
    with torch.no_grad():
        before = model(batch)
    output, _ = read_with_attention(model, batch)
    with torch.no_grad():
        after = model(batch)
    assert torch.equal(before.readouts[batch.present], output.readouts[batch.present])
    assert torch.equal(before.readouts, after.readouts)
    assert model.backbone.config._attn_implementation == implementation


def test_only_the_layers_asked_for_are_kept():
    model, batch = toy_model(), toy_batch([5, 2])
    _, both = read_with_attention(model, batch, [0, 1])
    _, last = read_with_attention(model, batch)
    assert set(last) == {-1}
    assert torch.equal(last[-1], both[1])
    assert not torch.allclose(both[0], both[1])
    with pytest.raises(TrajlmError, match=r"layers 0 to 1 .*asked for \[2\]"):
        read_with_attention(model, batch, [2])


def test_weights_with_grouped_keys_equal_plain_loops():
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 3, generator=random), torch.randn(2, 2, 5, 3, generator=random)
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5).clone()
    seen[1, 0, :, 3:] = False
    seen[1, 0, range(3, 5), range(3, 5)] = True
    additive = torch.zeros(2, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = np.zeros((2, 5, 5))
    for stay in range(2):
        for head in range(4):
            for row in range(5):
                allowed = [c for c in range(5) if seen[stay, 0, row, c]]
                scores = [float(query[stay, head, row] @ key[stay, head // 2, c]) * 0.5 for c in allowed]
                weights = np.exp(np.array(scores) - max(scores))
                expected[stay, row, allowed] += weights / weights.sum() / 4
    for mask in (seen, additive):
        assert np.allclose(AttentionCall(query, key, mask, 0.5).mean_weights(), expected, atol=1e-6)
    assert np.allclose(AttentionCall(query, key, None, 0.5).mean_weights()[0], expected[0], atol=1e-6)


def test_the_map_of_a_stay_is_labelled_by_event_and_hour(prepared, beliefs, model):
    timeline = prepared.timeline(beliefs["stay_id"][0])
    found = stay_attention(model, model.encode_timeline(timeline))
    count = len(timeline.events)
    assert found.weights.shape == (2 * count, 2 * count)
    assert found.positions["kind"].to_list() == ["event", "predict"] * count
    assert found.positions["modality"].to_list() == [e.modality for e in timeline.events for _ in range(2)]
    hours = [e.hours_since_admission for e in timeline.events for _ in range(2)]
    assert found.positions["hours_since_admission"].to_list() == hours
    with pytest.raises(ValueError, match="expected one timeline, came 2"):
        stay_attention(toy_model(), toy_batch([2, 2]))


def test_static_share_equals_plain_loops():
    model, batch = toy_model(), toy_batch([6, 3, 2])
    batch.modality[1, 2] = 0  # a second static event
    batch.modality[2, :2] = 1  # a stay without any
    weights = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    share = static_share(model, batch, weights)
    for row, length in enumerate([6, 3, 2]):
        static = [s for s in range(length) if int(batch.modality[row, s]) == 0]
        reads = [sum(float(weights[row, 2 * r + 1, 2 * s]) for s in static) for r in range(length)]
        if static:
            assert float(share[row]) == pytest.approx(np.mean(reads), rel=1e-5)
        else:
            assert torch.isnan(share[row])


def test_with_one_static_event_alone_all_attention_is_on_it_and_its_read_out():
    model, batch = toy_model(), toy_batch([1])
    _, maps = read_with_attention(model, batch)
    assert float(static_share(model, batch, maps[-1])) == pytest.approx(float(maps[-1][0, 1, 0]))
    assert float(maps[-1][0, 1].sum()) == pytest.approx(1)


# Ablation


@pytest.fixture(scope="module")
def cohort(prepared, beliefs, cached):
    """The held-out timelines in batches, and their stay ids."""
    ids = beliefs.filter(pl.col("split") == "held_out")["stay_id"].unique().sort()
    stays = np.array([prepared.position(s) for s in ids])
    batches = [
        cached.latents.trajectories(some, cached.targets[torch.from_numpy(some)], 1000)
        for some in np.split(stays, [7, 12])
    ]
    return batches, ids.to_list()


@pytest.fixture(scope="module")
def ablations(model, cohort):
    return cohort_ablation(model, cohort[0], model.encoders.modalities)


def test_ablated_cohorts_equal_ablated_timelines(ablations, cohort, prepared, model, beliefs):
    assert ablations.filter(pl.col("ablated") == NOTHING)["stay_id"].sort().to_list() == cohort[1]
    compared = 0
    for stay in cohort[1]:
        timeline = prepared.timeline(stay)
        rows = {row["ablated"]: row for row in ablations.filter(pl.col("stay_id") == stay).iter_rows(named=True)}
        held = {event.modality for event in timeline.events}
        assert set(rows) == held | {NOTHING}
        for ablated, row in rows.items():
            rest = timeline if ablated == NOTHING else timeline.without(ablated)
            assert row["events"] == len(rest.events)
            if not rest.events:
                assert row["belief_mortality"] is None
                continue
            last = model.beliefs(rest).tail(1)
            assert row["hours_since_admission"] == rest.events[-1].hours_since_admission
            assert np.allclose([row[b] for b in BELIEFS], last.select(BELIEFS).row(0), **CLOSE)
            compared += ablated != NOTHING
    assert compared > 2 * len(cohort[1])
    whole = beliefs.filter(pl.col("split") == "held_out").group_by("stay_id", maintain_order=True).last()
    unablated = ablations.filter(pl.col("ablated") == NOTHING).sort("stay_id")
    assert np.allclose(unablated.select(BELIEFS), whole.sort("stay_id").select(BELIEFS), **CLOSE)


def test_attention_on_static_events_of_the_cohort(ablations, cohort, prepared, model):
    for stay in cohort[1][:4]:
        timeline = prepared.timeline(stay)
        for ablated in {event.modality for event in timeline.events} | {NOTHING}:
            rest = timeline.without(ablated)
            batch = model.encode_timeline(rest)
            _, maps = read_with_attention(model, batch)
            expected = float(static_share(model, batch, maps[-1])[0])
            row = ablations.filter((pl.col("stay_id") == stay) & (pl.col("ablated") == ablated))
            said = row["static_share"][0]
            if ablated == "demographics":
                assert said is None
            else:
                assert 0 < said < 1
                assert said == pytest.approx(expected, rel=1e-4)


def test_a_stay_that_holds_one_modality_alone_has_no_belief_without_it():
    model, batch = toy_model(), toy_batch([4, 2, 3])
    batch.modality[1, :2] = 1
    only_labs, ids = 1, batch.stay_ids.tolist()
    table = cohort_ablation(model, [batch], ["labs", "age"])
    row = table.filter((pl.col("stay_id") == ids[only_labs]) & (pl.col("ablated") == "labs"))
    assert row["events"].to_list() == [0]
    assert row.select(*BELIEFS, "static_share").row(0) == (None, None, None)
    without = ablated_cohort(table, "labs")
    assert set(without["stay_id"]) == set(ids) - {only_labs}
    assert without["stay_id"].is_unique().all()
    assert only_labs not in set(anchoring(table, model.targets).filter(pl.col("ablated") == "labs")["stay_id"])
    # A stay that never held a modality keeps its belief when that goes missing.
    aged = ablated_cohort(table, "age")
    assert set(aged["stay_id"]) == set(ids)
    kept = aged.filter(pl.col("stay_id") == only_labs)
    assert kept["ablated"].to_list() == [NOTHING]
    changed = aged.filter(pl.col("ablated") == "age")
    assert (changed["events"] < table.filter(pl.col("ablated") == NOTHING)["events"].max()).all()


def test_anchoring_pairs_each_stay_before_and_after(ablations, model):
    pairs = anchoring(ablations, model.targets)
    after = ablations.filter((pl.col("ablated") != NOTHING) & (pl.col("events") > 0))
    assert pairs.height == after.height * len(model.targets)
    for row in pairs.sample(20, seed=0).iter_rows(named=True):
        mine = ablations.filter(pl.col("stay_id") == row["stay_id"])
        before = mine.filter(pl.col("ablated") == NOTHING).row(0, named=True)
        then = mine.filter(pl.col("ablated") == row["ablated"]).row(0, named=True)
        assert row["belief_before"] == before[f"belief_{row['target']}"]
        assert row["belief_after"] == then[f"belief_{row['target']}"]
        assert (row["share_before"], row["share_after"]) == (before["static_share"], then["static_share"])
    moved: dict[int, float] = {}
    for row in pairs.filter(pl.col("target") == "mortality").iter_rows(named=True):
        by = abs(row["belief_after"] - row["belief_before"])
        moved[row["stay_id"]] = max(by, moved.get(row["stay_id"], 0.0))
    expected = sorted(moved, key=lambda stay: (-moved[stay], stay))[:5]
    assert most_divergent_stays(pairs, "mortality", 5) == expected


def test_beliefs_and_targets_are_those_of_one_hour():
    """Of what is left of a stay: a belief stated before the stay's last event is held on, and so is the outcome."""
    model, target = toy_model(last_task="remaining_length_of_stay"), "remaining_length_of_stay_hours"
    batch = toy_batch([9, 7, 8])
    batch.modality[:, 1] = 1
    batch = replace(batch, targets=torch.tensor([[0.0, 60.0], [1.0, 70.0], [0.0, 5.0]]))
    ends = torch.stack([row[here][-1] for row, here in zip(batch.hours, batch.present, strict=True)]).tolist()
    table = cohort_ablation(model, [batch], ["labs", "note"])
    lags = []
    for row in table.iter_rows(named=True):
        stay, end = row["stay_id"], ends[row["stay_id"]]
        left = batch.targets[stay, 1].item() - end
        assert row[f"target_{target}"] == (pytest.approx(left, abs=1e-4) if left >= 0 else None)
        names = model.encoders.modalities
        kept = batch.present[stay] & ~(
            batch.modality[stay] == (names.index(row["ablated"]) if row["ablated"] != NOTHING else -1)
        )
        alone = batch.select(torch.arange(3) == stay).keep(kept[None])
        with torch.no_grad():
            stated = model.belief_frame(alone, model(alone).readouts).row(-1, named=True)
        lag = end - stated["hours_since_admission"]
        assert row["hours_since_admission"] == stated["hours_since_admission"]
        assert row[f"belief_{target}"] == pytest.approx(max(stated[f"belief_{target}"] - lag, 0), abs=1e-4)
        assert row["belief_mortality"] == pytest.approx(stated["belief_mortality"], abs=1e-6)
        lags.append(lag)
    assert max(lags) > 0.5
    removed = sequence_without(model, [batch], [("labs",), ("note",)])
    for row in removed.iter_rows(named=True):
        same = table.filter((pl.col("stay_id") == row["stay_id"]) & (pl.col("ablated") == row["removed"]))
        for name in (f"belief_{target}", f"target_{target}"):
            assert row[name] == (None if same[name][0] is None else pytest.approx(same[name][0], abs=1e-4))
    drift = anchoring(table, model.targets).filter(pl.col("target") == target)
    assert drift.height


def test_what_a_modality_costs_is_told_on_the_stays_that_can_be_read_without_it():
    """One stay holds labs alone: it has a belief with everything, none without labs, and is in neither figure."""
    model, batch = toy_model(), toy_batch([4, 2, 3, 5, 6])
    batch.modality[1, :2] = 1
    prepared = SimpleNamespace(stays=pl.DataFrame({"stay_id": range(5), "subject_id": range(5)}))
    table = cohort_ablation(model, [batch], ["labs"])
    targets = [{"name": "mortality", "kind": "probability"}, {"name": "length_of_stay_hours", "kind": "hours"}]
    recipe = {"seed": 0, "finetuning": {"bootstrap_resamples": 20}}
    figures = ablation_metrics(table, ["labs"], prepared, targets, recipe)
    whole = table.filter(pl.col("ablated") == NOTHING).sort("stay_id")
    without = ablated_cohort(table, "labs")
    assert without["stay_id"].to_list() == [0, 2, 3, 4]

    def error(frame: pl.DataFrame) -> float:
        gaps = frame["belief_length_of_stay_hours"] - frame["target_length_of_stay_hours"]
        return float(gaps.abs().mean())

    rows = {(r["ablated"], r["target"], r["metric"]): r for r in figures.iter_rows(named=True)}
    row = rows["labs", "length_of_stay_hours", "mae"]
    assert (row["stays"], row["positives"]) == (4, None)
    assert row["value"] == pytest.approx(error(without), rel=1e-6)
    same = whole.filter(pl.col("stay_id") != 1)
    assert row["difference"] == pytest.approx(error(without) - error(same), rel=1e-4)
    assert row["difference"] != pytest.approx(error(without) - error(whole), rel=1e-2)
    assert rows[NOTHING, "length_of_stay_hours", "mae"]["value"] == pytest.approx(error(whole), rel=1e-6)
    assert rows["labs", "mortality", "auroc"]["positives"] == 1
    assert rows[NOTHING, "mortality", "auroc"]["positives"] == 2


def test_unknown_targets_stay_unknown():
    model, batch = toy_model(), toy_batch([3, 2])
    batch = replace(batch, targets=torch.tensor([[1.0, float("nan")], [float("nan"), 30.0]]))
    table = cohort_ablation(model, [batch], ["labs"]).filter(pl.col("ablated") == NOTHING)
    assert table["target_mortality"].to_list() == [1.0, None]
    assert table["target_length_of_stay_hours"].to_list() == [None, 30.0]


# Belief trajectories


def test_a_trajectory_tells_changes_and_what_the_event_said(prepared, beliefs, model):
    timeline = prepared.timeline(beliefs["stay_id"][0])
    table = belief_trajectory(model, timeline)
    whole = model.beliefs(timeline)
    assert table.select(BELIEFS).equals(whole.select(BELIEFS))
    for target in model.targets:
        values = whole[f"belief_{target}"].to_list()
        expected = [None] + [b - a for a, b in pairwise(values)]
        assert table[f"change_{target}"].to_list() == expected
    moves = most_moving_events(table, "mortality", 3)["change_mortality"].abs().to_list()
    assert moves == sorted(table["change_mortality"].drop_nulls().abs().to_list(), reverse=True)[:3]


def test_events_of_an_ablated_stay_keep_their_numbers(prepared, beliefs, model):
    timeline = prepared.timeline(beliefs["stay_id"][0])
    found = stay_findings(model, prepared, timeline.stay_id, model.encoders.modalities).own
    assert len(found.ablated) >= 2
    for name, (frame, _) in found.ablated.items():
        assert frame.height == len(timeline.without(name).events)
        for index, hours, modality in frame.select("event_index", "hours_since_admission", "modality").iter_rows():
            event = timeline.events[index]
            assert (event.hours_since_admission, event.modality) == (hours, modality) != (hours, name)


def test_nothing_moves_up_where_a_stay_is_longer_than_is_read(prepared, beliefs, model, monkeypatch):
    timeline = max((prepared.timeline(stay) for stay in beliefs["stay_id"].unique()), key=lambda t: len(t.events))
    monkeypatch.setattr(model, "max_events", len(timeline.events) // 2)
    read = set(model.encode_timeline(timeline).event_index[0].tolist())
    assert len(read) == model.max_events < len(timeline.events)
    found = stay_findings(model, prepared, timeline.stay_id, model.encoders.modalities).own
    assert set(found.trajectory["event_index"]) == read
    for name, (frame, _) in found.ablated.items():
        assert set(frame["event_index"]) == {i for i in read if timeline.events[i].modality != name}


def test_note_text_is_shown_only_when_asked_for(prepared, beliefs, model):
    notes = prepared.stays.filter(pl.col("present_radiology_note") & (pl.col("split") == "held_out"))["stay_id"]
    timeline = prepared.timeline(notes[0])
    text = next(e.text for e in timeline.events if e.text is not None)
    assert text not in "".join(belief_trajectory(model, timeline)["summary"])
    assert text in belief_trajectory(model, timeline, notes=True)["summary"].to_list()


def test_an_event_in_words():
    features = {
        0: FittedFeature("labs", "lactate", unit="mmol/L", feature_id=0),
        1: FittedFeature("labs", "unit=MICU", kind="category", feature_id=1),
    }
    assert summary(Event(0.0, "labs", (0, 1), (2.5, 1.0)), features) == "lactate 2.5 mmol/L, unit=MICU"
    assert summary(Event(0.0, "note", text="no acute change"), features) == "note, 3 words"
    assert summary(Event(0.0, "xray", image=b"."), features) == "picture"
    many = Event(0.0, "labs", (0,) * 15, (1.0,) * 15)
    assert summary(many, features).endswith(" and 3 more")


def test_modalities_a_stay_lacks_or_holds_alone_are_not_ablated():
    labs, note = Event(1.0, "labs", (0,), (1.0,)), Event(2.0, "note", text="x")
    timeline = Timeline(1, "p", "held_out", None, {}, (labs, note))
    found = ablated_timelines(timeline, ["labs", "note", "xray"])
    assert {name: one.events for name, one in found.items()} == {"labs": (note,), "note": (labs,)}
    assert ablated_timelines(timeline.without("note"), ["labs"]) == {}
