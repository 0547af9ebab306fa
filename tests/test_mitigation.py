"""Penalties on drift and on anchoring: what they say, and that training with them does what they ask."""

from __future__ import annotations

import pytest
import torch
from test_attention_families import family
from trajectory_example import PAPER, RICH, toy_batch, toy_model

from trajlm.anchoring import read_with_static_share
from trajlm.config import FinetuningConfig
from trajlm.errors import TrajlmError
from trajlm.mitigation import Penalties, anchoring_penalty, drift_penalty
from trajlm.sequence_objective import SequenceObjective, random_modality

QUIET = {"modality_dropout": 0.0, "dropout": 0.0, "input_dropout": 0.0, "loss_over": "all"}


def test_drift_equals_plain_loops():
    model, batch = toy_model(**RICH), toy_batch([6, 4, 3])
    gone = (batch.modality == 1) & batch.present
    kept = batch.present & ~gone
    weights = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) * batch.present
    with torch.no_grad():
        whole, ablated = model(batch).readouts, model(batch.keep(kept)).readouts
    expected = 0.0
    for stay in range(3):
        places = [s for s in range(6) if kept[stay, s]]
        total = sum(float(weights[stay, s]) for s in places)
        for within, s in enumerate(places):
            change = float(((ablated[stay, within] - whole[stay, s]) ** 2).mean())
            expected += change * float(weights[stay, s]) / total / 3
    assert float(drift_penalty(whole, ablated, kept, weights)) == pytest.approx(expected, rel=1e-4)


def test_penalties_reach_the_loss_in_training_alone():
    batch = toy_batch([6, 5, 4])
    losses = {}
    for name, settings in (("none", {}), ("drift", {"drift_penalty": 2.0}), ("anchor", {"anchoring_penalty": 3.0})):
        objective = SequenceObjective(toy_model(**PAPER), FinetuningConfig(**QUIET, **settings))
        torch.manual_seed(5)
        losses[name] = float(objective.train()(batch))
        losses[f"{name} eval"] = float(objective.eval()(batch))
    assert losses["none eval"] == losses["drift eval"] == losses["anchor eval"]
    model = toy_model(**PAPER)
    torch.manual_seed(5)
    gone = random_modality(batch, 1.0)
    kept = batch.present & ~gone
    with torch.no_grad():
        whole = model(batch).readouts
        readouts, share = anchoring_penalty(model, batch.keep(kept))
        drift = drift_penalty(whole, readouts, kept, batch.present.float())
    assert losses["drift"] - losses["none"] == pytest.approx(2 * float(drift), rel=1e-3)
    assert losses["anchor"] - losses["none"] == pytest.approx(3 * float(share), rel=1e-3)


def test_a_stay_that_can_lose_nothing_counts_for_nothing():
    model, batch = toy_model(**PAPER).train(), toy_batch([4, 3])
    whole = model(batch).readouts
    none = torch.zeros_like(batch.present)
    assert float(Penalties(1.0, 1.0)(model, batch, whole, none, batch.present.float())) == 0
    assert float(Penalties(1.0, 1.0)(model, batch, whole, batch.present, batch.present.float())) == 0


@pytest.mark.parametrize("penalty", ["drift_penalty", "anchoring_penalty"])
def test_training_with_a_penalty_does_what_it_asks(penalty):
    batch = toy_batch([6, 6, 5, 4])
    gone = (batch.modality == 1) & batch.present
    kept = batch.present & ~gone
    found = {}
    for weight in (0.0, 5.0):
        model = toy_model(**PAPER)
        objective = SequenceObjective(model, FinetuningConfig(**QUIET, **{penalty: weight})).train()
        optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        torch.manual_seed(0)
        for _ in range(25):
            optimiser.zero_grad()
            objective(batch).backward()
            optimiser.step()
        model.eval()
        with torch.no_grad():
            ablated, share = read_with_static_share(model, batch.keep(kept))
            drift = drift_penalty(model(batch).readouts, ablated.readouts, kept, batch.present.float())
        found[weight] = float(drift) if penalty == "drift_penalty" else float(share.mean())
    assert found[5.0] < 0.7 * found[0.0]


def test_what_cannot_be_penalised_is_refused():
    mamba = family("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=8)
    with pytest.raises(TrajlmError, match="anchoring_penalty needs attention in the last layer"):
        SequenceObjective(mamba, FinetuningConfig(anchoring_penalty=1.0))
    SequenceObjective(mamba, FinetuningConfig(drift_penalty=1.0))
    model = toy_model()
    model.backbone.gradient_checkpointing_enable()
    with pytest.raises(TrajlmError, match="turn one of them off"):
        SequenceObjective(model, FinetuningConfig(anchoring_penalty=1.0))
    with pytest.raises(TrajlmError, match="drift_penalty must not be negative"):
        FinetuningConfig(drift_penalty=-1.0)
