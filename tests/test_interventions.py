"""What is cut is cut, what is patched is restored, and attributions add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_attention_families import family
from test_edits import CLOSE, toy_timeline
from trajectory_example import PAPER, RICH, toy_batch, toy_model

from trajlm.errors import TrajlmError
from trajlm.interpret.attribution import baseline_of, integrated_gradients
from trajlm.interpret.edits import Ablation, ablate
from trajlm.interpret.interventions import (
    activations,
    edges_of_events,
    knock_out,
    knock_out_effects,
    last_beliefs,
    patched,
    patching_effects,
)
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel
from trajlm.tree_readout import as_tensors

READINGS = [PAPER, RICH]


def one_of(batch: TrajectoryBatch, *events: int) -> torch.Tensor:
    chosen = torch.zeros_like(batch.present)
    chosen[:, list(events)] = True
    return chosen


def readouts(model: TrajectoryModel, batch: TrajectoryBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch).readouts


# Knock-out


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_an_edge_that_carries_nothing_changes_nothing(name):
    model, batch = family(name), toy_batch([7, 3])
    before = readouts(model, batch)[batch.present]
    nothing = torch.zeros(2, 14, 14, dtype=torch.bool)
    future = nothing | torch.ones(14, 14, dtype=torch.bool).triu(1)
    padding = nothing.clone()
    padding[1, :, 6:] = True
    padding[1, range(6, 14), range(6, 14)] = False
    for blocked in (nothing, future, padding):
        torch.testing.assert_close(knock_out(model, batch, blocked).readouts[batch.present], before, **CLOSE)
    if name == "mistral":  # beyond its window nothing is carried either
        old = torch.ones(14, 14, dtype=torch.bool).tril(-5)[None]
        torch.testing.assert_close(knock_out(model, batch, old).readouts[batch.present], before, **CLOSE)
    real = nothing.clone()
    real[0, 13, 10] = True
    after = knock_out(model, batch, real).readouts[batch.present]
    assert torch.equal(after[7:], before[7:])
    torch.testing.assert_close(after[:6], before[:6], **CLOSE)
    assert not torch.allclose(after[6], before[6], atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gemma2"])
def test_an_event_cut_off_is_as_if_it_had_never_been_read(name):
    """In the paper's reading; the reference is the same trunk on the sequence without its two positions."""
    model, batch = family(name), toy_batch([6])
    cut = 2
    found = knock_out(model, batch, edges_of_events(batch, one_of(batch, cut)))
    changed = toy_batch([6])
    changed.latents[0, cut] = 50.0
    again = knock_out(model, changed, edges_of_events(batch, one_of(batch, cut)))
    rest = [s for s in range(6) if s != cut]
    assert torch.equal(found.readouts[:, rest], again.readouts[:, rest])
    assert not torch.allclose(readouts(model, batch)[:, rest], readouts(model, changed)[:, rest], atol=1e-4)
    if name.startswith("gemma"):
        return  # their windows count places, which the reference closes up
    places = torch.tensor([p for p in range(12) if p // 2 != cut])
    with torch.no_grad():
        sequence = model(batch).embeddings[:, places]
        # With a mask, or gaps in the places would be taken for the seams of packed sequences.
        mask = torch.ones(1, 10, dtype=torch.long)
        found_hidden = model.backbone(inputs_embeds=sequence, position_ids=places[None], attention_mask=mask)
        hidden = found_hidden.last_hidden_state
        expected = torch.cat([model.heads[t](hidden[:, 1::2]) for t in model.targets], dim=-1)
    torch.testing.assert_close(found.readouts[:, rest], expected, **CLOSE)


def test_some_layers_can_be_cut_alone():
    model, batch = family("llama"), toy_batch([5])
    edges = edges_of_events(batch, one_of(batch, 1))
    last, every = (knock_out(model, batch, edges, layers).readouts for layers in ([-1], None))
    assert not torch.allclose(last, every, atol=1e-6)
    assert torch.equal(last[:, 0], readouts(model, batch)[:, 0])
    with pytest.raises(TrajlmError, match="layers 0 to 2"):
        knock_out(model, batch, edges, [3])
    with pytest.raises(TrajlmError, match="leaves position 3 nothing to attend to"):
        knock_out(model, batch, torch.ones(10, 10, dtype=torch.bool).tril()[None] & (torch.arange(10) == 3)[:, None])
    with pytest.raises(TrajlmError, match=r"edges of shape \[1 or 1, 10, 10\]"):
        knock_out(model, batch, edges[:, :4])


def test_effects_are_those_of_single_cuts():
    model, batch = family("phi3"), toy_batch([5])
    table = knock_out_effects(model, batch)
    whole = last_beliefs(model, model(batch), batch)
    for event in range(5):
        output = knock_out(model, batch, edges_of_events(batch, one_of(batch, event)))
        for target, belief in last_beliefs(model, output, batch).items():
            assert table[f"effect_{target}"][event] == pytest.approx(float(belief - whole[target]), rel=1e-3, abs=1e-5)
    assert table["event_index"].to_list() == list(range(5))
    assert table["effect_mortality"].abs().min() > 0


def test_where_nothing_can_be_cut_it_is_said():
    mamba = family("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=8)
    with pytest.raises(TrajlmError, match="ablation and integrated gradients work for every backbone"):
        knock_out_effects(mamba, toy_batch([3]))


# Patching


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_patching_everything_restores_the_full_belief(reading, at):
    model = toy_model(**reading)
    whole = toy_batch([6, 4])
    gone = (whole.modality == 2) & whole.present
    ablated = ablate(model, whole, gone, "missing_token", "kept")
    full, less = readouts(model, whole), readouts(model, ablated)
    assert not torch.allclose(full, less, atol=1e-3)
    found = patched(model, ablated, whole, whole.present, at).readouts
    torch.testing.assert_close(found[whole.present], full[whole.present], **CLOSE)
    same = patched(model, ablated, whole, torch.zeros_like(gone), at).readouts
    torch.testing.assert_close(same[whole.present], less[whole.present], **CLOSE)
    if at == 0:
        some = patched(model, ablated, whole, gone, 0).readouts
        if reading is PAPER:  # nothing else was touched, so the ablated events' embeddings are all it takes
            torch.testing.assert_close(some[whole.present], full[whole.present], **CLOSE)


def test_a_removed_stay_is_patched_event_for_event():
    model, timeline = family("llama"), toy_timeline(1)
    whole = model.encode_timeline(timeline)
    ablation = Ablation("labs", ("labs",))
    ablated = ablation.apply(model, whole)
    table = patching_effects(model, whole, ablated)
    left = ablated.event_index[0].tolist()
    assert table.height == 4 * len(left)
    assert table["event_index"].to_list() == left * 4
    before, after = (last_beliefs(model, model(one), one)["mortality"] for one in (whole, ablated))
    # The last read-out alone carries the belief out of the last layer.
    out = table.filter(table["depth"] == 3)
    last = out.row(-1, named=True)
    assert last["restored_mortality"] == pytest.approx(1, abs=1e-3)
    assert out["restored_mortality"].to_list()[:-1] == pytest.approx([0.0] * (len(left) - 1), abs=1e-3)
    assert last["belief_mortality"] == pytest.approx(float(before), abs=1e-5)
    one = patched(model, ablated, whole, one_of(ablated, 1), 2)
    row = table.filter(table["depth"] == 2).row(1, named=True)
    belief = float(last_beliefs(model, one, ablated)["mortality"])
    assert row["belief_mortality"] == pytest.approx(belief, abs=1e-5)
    assert row["restored_mortality"] == pytest.approx((belief - float(after)) / float(before - after), abs=1e-3)
    with pytest.raises(TrajlmError, match="does not hold"):
        patched(model, whole, ablated, whole.present, 1)
    with pytest.raises(TrajlmError, match="depths 0 to 3"):
        activations(model, whole, 4)


# Integrated gradients


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("target", ["mortality", "length_of_stay_hours"])
def test_attributions_sum_to_the_change_in_belief(reading, target):
    model, timeline = toy_model(**reading), toy_timeline(2)
    batch = model.encode_timeline(timeline)
    found = integrated_gradients(model, batch, target)
    whole, nothing = (
        float(last_beliefs(model, model(one), one)[target])
        for one in (batch, baseline_of(model, batch, "missing_token"))
    )
    assert (found.belief, found.baseline) == pytest.approx((whole, nothing))
    change = whole - nothing
    assert abs(change) > 1e-3
    assert found.events["attribution"].sum() == pytest.approx(change, abs=0.01 * abs(change))
    assert found.error == pytest.approx(found.events["attribution"].sum() - change, abs=1e-6)
    assert found.events["event_index"].to_list() == list(range(len(timeline.events)))


def test_attributions_equal_a_plain_sum_along_the_way():
    """Against finite differences of each event's share of the way."""
    model = toy_model(**PAPER)
    batch = model.encode_timeline(toy_timeline(2, 6))
    start = baseline_of(model, batch, "missing_token")
    found = integrated_gradients(model, batch, "mortality", tolerance=1e-4)

    def belief(latents: torch.Tensor) -> float:
        moved = TrajectoryBatch(**{**vars(batch), "latents": latents})
        return float(last_beliefs(model, model(moved), moved)["mortality"])

    step, points, expected = 0.02, 40, np.zeros(batch.present.shape[1])
    way = batch.latents - start.latents
    with torch.no_grad():
        for point in range(points):
            here = start.latents + (point + 0.5) / points * way
            for event in range(batch.present.shape[1]):
                nudge = torch.zeros_like(way)
                nudge[0, event] = step * way[0, event]
                expected[event] += (belief(here + nudge) - belief(here - nudge)) / (2 * step) / points
    assert found.events["attribution"].to_numpy() == pytest.approx(expected, abs=0.01 * np.abs(expected).sum())


def test_events_after_the_belief_add_nothing_to_it():
    model, batch = toy_model(**PAPER), toy_batch([6])
    found = integrated_gradients(model, batch, "mortality", event=3).events["attribution"]
    assert found[4:].to_list() == [0.0, 0.0]
    assert found[:4].abs().min() > 0


def test_every_backbone_can_be_attributed():
    mamba = family("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=8)
    found = integrated_gradients(mamba, toy_batch([4]), "mortality", baseline="nothing")
    assert found.events["attribution"].sum() == pytest.approx(found.belief - found.baseline, rel=0.01)
    with pytest.raises(TrajlmError, match="came 'death'"):
        integrated_gradients(mamba, toy_batch([4]), "death")


@pytest.mark.parametrize("event", [-1, 3])
def test_the_jump_of_a_tree_goes_to_the_event_that_crosses_its_threshold(event):
    """One tree, on the last value of the first laboratory feature; network and regression count for nothing."""
    model, batch = toy_model(**RICH), toy_batch([7])
    batch.state[0, :, 3:6] = 1.0  # every laboratory feature was measured
    labs = model.encoders.modalities.index("labs")
    column = (
        model.trees.width - 8 - 1 - 9
    )  # before the note's latent and age: means, times and values of three features
    step = {"split_feature": column, "threshold": 0.2, "default_left": True, "missing_type": "NaN"}
    tree = step | {"left_child": {"leaf_value": -1.0}, "right_child": {"leaf_value": 1.0}}
    for name, tensor in as_tensors([tree], [0]).items():
        model.trees.set(name, tensor)
    model.shares.copy_(torch.tensor([[0.0], [0.0], [1.0]]))
    at = [s for s in range(7)[: event + 1 or None] if batch.modality[0, s] == labs][-1]
    batch.state[0, at, 0] = 1.0
    found = integrated_gradients(model, batch, "mortality", event=event, baseline="nothing")
    shares = found.events["attribution"].to_list()
    assert shares[at] == pytest.approx(found.belief - found.baseline)
    assert abs(shares[at]) > 0.05
    assert [share for place, share in enumerate(shares) if place != at] == [0.0] * 6


def test_what_does_not_add_up_is_refused(monkeypatch):
    monkeypatch.setattr("trajlm.interpret.attribution.MOST_STEPS", 16)
    model, batch = toy_model(**RICH), toy_batch([6])
    with pytest.raises(TrajlmError, match="after 16 steps the attributions sum to"):
        integrated_gradients(model, batch, "mortality", tolerance=1e-9)
