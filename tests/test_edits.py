"""What is ablated is gone: from the events, and from what later events carry forward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from trajectory_example import HISTORY, PAPER, RICH, toy_model

from trajlm.errors import TrajlmError
from trajlm.interpret.ablation import ablation_trajectories
from trajlm.interpret.beliefs import belief_trajectory, raw_values
from trajlm.interpret.edits import Ablation, ablate, stacked
from trajlm.latents import TrajectoryBatch
from trajlm.schema import NOTHING, Event, Timeline
from trajlm.trajectory import TrajectoryModel

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
BELIEFS = ["belief_mortality", "belief_length_of_stay_hours"]


def toy_timeline(seed: int = 0, events: int = 12, labs_scale: float = 1.0) -> Timeline:
    """A static event, then laboratory events of one to three values and notes, at distinct hours."""
    random = np.random.default_rng(seed)
    found = [Event(0.0, "age", (0,), (70.0,))]
    for hour in np.sort(random.uniform(0.5, 48, events - 1)):
        if random.random() < 0.75:
            ids = tuple(sorted(random.choice([1, 2, 3], random.integers(1, 3), replace=False).tolist()))
            found.append(Event(float(hour), "labs", ids, tuple(labs_scale * random.normal(1, 2, len(ids)))))
        else:
            found.append(Event(float(hour), "note", text=f"note {random.integers(9)} stable"))
    return Timeline(7 + seed, "p", "held_out", 60.0, {}, tuple(found))


def labs(timeline: Timeline) -> list[int]:
    return [i for i, event in enumerate(timeline.events) if event.modality == "labs"]


def assert_same(found: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    assert torch.equal(found.present, expected.present)
    assert torch.equal(found.modality, expected.modality)
    torch.testing.assert_close(found.hours, expected.hours)
    torch.testing.assert_close(found.state, expected.state, **CLOSE)
    torch.testing.assert_close(found.latents, expected.latents, **CLOSE)


def without(timeline: Timeline, gone: list[int]) -> Timeline:
    return replace(timeline, events=tuple(e for i, e in enumerate(timeline.events) if i not in gone))


@pytest.mark.parametrize("reading", [PAPER, RICH, HISTORY])
def test_removed_events_leave_what_the_records_without_them_would_say(reading):
    """Read anew from the raw events: values, states, latents and beliefs all agree."""
    model = toy_model(**reading)
    for seed in range(4):
        timeline = toy_timeline(seed)
        batch = model.encode_timeline(timeline)
        for gone in (labs(timeline)[:1], labs(timeline)[1:3], [0], list(range(2, 7))):
            found = Ablation("some", events=tuple(gone)).apply(model, batch)
            rest = without(timeline, gone)
            assert_same(found, model.encode_timeline(rest))
            with torch.no_grad():
                beliefs = model.belief_frame(found, model(found).readouts)
            assert np.allclose(beliefs.select(BELIEFS), model.beliefs(rest).select(BELIEFS), **CLOSE)


@pytest.mark.parametrize("reading", [PAPER, RICH, HISTORY])
@pytest.mark.parametrize("how", ["removed", "missing_token"])
def test_an_ablated_past_does_not_leak_through_the_state(reading, how):
    """Whatever the ablated events measured, the beliefs are the same to the bit; left carried, they are not."""
    model, timeline = toy_model(**reading), toy_timeline(3)
    gone = labs(timeline)[:3]
    altered = tuple(
        replace(e, values=tuple(50 + 9 * v for v in e.values)) if i in gone else e
        for i, e in enumerate(timeline.events)
    )

    def readouts(events: tuple[Event, ...], carried: str) -> torch.Tensor:
        batch = model.encode_timeline(replace(timeline, events=events))
        ablation = Ablation("early labs", events=tuple(gone), how=how, carried=carried)
        with torch.no_grad():
            return model(ablation.apply(model, batch)).readouts

    assert torch.equal(readouts(timeline.events, "forgotten"), readouts(altered, "forgotten"))
    leaked = readouts(timeline.events, "kept") - readouts(altered, "kept")
    assert leaked.abs().max() > 1e-5
    assert (readouts(timeline.events, "forgotten") - readouts(timeline.events, "kept")).abs().max() > 1e-5


def test_a_replaced_event_keeps_its_place_and_shows_its_token():
    model, timeline = toy_model(), toy_timeline()
    batch = model.encode_timeline(timeline)
    gone = [*labs(timeline)[:2], 0]
    found = Ablation("x", events=tuple(gone), how="missing_token").apply(model, batch)
    assert torch.equal(found.hours, batch.hours)
    for event in gone:
        index = int(batch.modality[0, event])
        assert torch.equal(found.latents[0, event], model.encoders.missing_tokens[index])
        assert not found.state[0, event].any()
    rest = [i for i in range(len(timeline.events)) if i not in gone]
    expected = model.encode_timeline(without(timeline, gone))
    torch.testing.assert_close(found.state[0, rest], expected.state[0], **CLOSE)
    torch.testing.assert_close(found.latents[0, rest], expected.latents[0], **CLOSE)


@pytest.mark.parametrize("reading", [PAPER, RICH, HISTORY])
def test_a_replaced_event_knows_what_was_carried_to_its_hour(reading):
    """As an event that measures something else then would carry it, were the ablated one not there."""
    model, timeline = toy_model(**reading), toy_timeline(3)
    batch, place = model.encode_timeline(timeline), labs(timeline)[-1]
    found = Ablation("x", events=(place,), how="missing_token").apply(model, batch).state[0, place]
    last = timeline.events[place]
    other = next(i for i in (1, 2, 3) if i not in last.feature_ids)
    events = [*timeline.events]
    events[place] = replace(last, feature_ids=(other,), values=(0.0,))
    beside = model.encode_timeline(replace(timeline, events=tuple(events))).state[0, place]
    parts = beside.unflatten(0, (4, -1))
    own = [i for i in range(parts.shape[1]) if (parts[2, i] != 0) | (parts[1, i] == 0)]
    torch.testing.assert_close(found.unflatten(0, (4, -1))[:, own], parts[:, own], **CLOSE)
    assert found.any()


def test_an_ablation_chooses_what_meets_every_condition():
    model, timeline = toy_model(), toy_timeline()
    batch = model.encode_timeline(timeline)
    chosen = Ablation("x", modalities=("labs",), hours=(10.0, 30.0)).chosen(model, batch)[0]
    expected = [e.modality == "labs" and 10 <= e.hours_since_admission <= 30 for e in timeline.events]
    assert chosen.tolist() == expected
    assert 0 < sum(expected) < len(labs(timeline))
    everything = Ablation("all").chosen(model, batch)
    assert torch.equal(everything, batch.present)
    with pytest.raises(TrajlmError, match="never learned 'xray'; it reads age, labs, note"):
        Ablation("x", modalities=("xray",)).chosen(model, batch)
    with pytest.raises(TrajlmError, match="stay 7: no event is left"):
        Ablation("all").apply(model, batch)


def test_events_that_share_an_hour_go_together_or_not_at_all():
    model = toy_model()
    events = (Event(0.0, "age", (0,), (70.0,)), Event(2.0, "labs", (1,), (1.0,)), Event(2.0, "labs", (2,), (5.0,)),
              Event(3.0, "labs", (3,), (2.0,)))  # fmt: skip
    timeline = Timeline(1, "p", "held_out", 60.0, {}, events)
    batch = model.encode_timeline(timeline)
    with pytest.raises(TrajlmError, match="stay 1 holds several labs events at 2 h; ablate all of them or none"):
        Ablation("first", events=(1,)).apply(model, batch)
    assert_same(Ablation("both", events=(1, 2)).apply(model, batch), model.encode_timeline(without(timeline, [1, 2])))


def test_a_cohort_is_ablated_as_each_stay_is_alone():
    model = toy_model()
    timelines = [toy_timeline(seed, events) for seed, events in enumerate((12, 5, 9))]
    batches = [model.encode_timeline(t) for t in timelines]
    ablations = [Ablation("early", hours=(0.5, 20.0)), Ablation("labs", ("labs",)),
                 Ablation("no labs", ("labs",), how="missing_token")]  # fmt: skip
    together = ablation_trajectories(model, stacked(batches), ablations)
    for timeline, batch in zip(timelines, batches, strict=True):
        alone = ablation_trajectories(model, batch, ablations)
        mine = together.filter(pl.col("stay_id") == timeline.stay_id)
        assert mine.drop(*BELIEFS, "^drift_.*$").equals(alone.drop(*BELIEFS, "^drift_.*$"))
        assert np.allclose(mine.select(BELIEFS), alone.select(BELIEFS), **CLOSE)
        whole = model.beliefs(timeline)
        for row in alone.iter_rows(named=True):
            before = whole["belief_mortality"][row["event_index"]]
            assert row["drift_mortality"] == pytest.approx(row["belief_mortality"] - before, abs=1e-6)
        early = [0.5 <= e.hours_since_admission <= 20 for e in timeline.events]
        left = alone.filter(pl.col("ablated") == "early")["event_index"].to_list()
        assert left == [i for i, gone in enumerate(early) if not gone]
        replaced = alone.filter(pl.col("ablated") == "no labs")
        assert replaced["replaced"].to_list() == [e.modality == "labs" for e in timeline.events]
        assert not alone.filter(pl.col("ablated").is_in([NOTHING, "labs"]))["replaced"].any()


def test_nothing_ablated_changes_nothing():
    model = toy_model()
    batch = model.encode_timeline(toy_timeline())
    same = ablate(model, batch, torch.zeros_like(batch.present))
    assert all(torch.equal(getattr(same, n), getattr(batch, n)) for n in ("latents", "state", "hours", "modality"))


def test_an_ablation_reaches_the_carried_state_of_real_timelines(prepared, model: TrajectoryModel, beliefs):
    """On prepared records, with cached and trained encoders."""
    counts = beliefs.group_by("stay_id").len().sort("len", descending=True)
    timeline = prepared.timeline(counts["stay_id"][0])
    batch = model.encode_timeline(timeline)
    middle = timeline.events[len(timeline.events) // 2].hours_since_admission
    ablation = Ablation("first half", hours=(0.01, middle))
    gone = [i for i, e in enumerate(timeline.events) if 0.01 <= e.hours_since_admission <= middle]
    rest = without(timeline, gone)
    assert_same(ablation.apply(model, batch), model.encode_timeline(rest))
    assert len(rest.events) > 3


def test_raw_values_are_those_of_the_records(prepared, beliefs, model):
    timeline = prepared.timeline(beliefs["stay_id"][0])
    table = raw_values(model, timeline)
    trajectory = belief_trajectory(model, timeline)
    units = {f.feature_id: (f.name, f.unit) for f in prepared.features}
    expected = [
        (i, *units[f], v)
        for i, e in enumerate(timeline.events)
        for f, v in zip(e.feature_ids, e.values, strict=True)
    ]  # fmt: skip
    assert table.select("event_index", "feature", "unit", "value").rows() == expected
    assert set(table["event_index"]) <= set(trajectory["event_index"])
