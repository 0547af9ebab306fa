"""Attention beside interventions: what the tables say is what the single analyses say."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
import torch
from scipy.stats import spearmanr
from test_attention_families import family
from test_edits import labs, toy_timeline
from trajectory_example import toy_batch, toy_model

from trajlm.interpret.agreement import agreement
from trajlm.interpret.attention import stay_attention
from trajlm.interpret.attribution import IncompleteAttributionError
from trajlm.interpret.edits import Ablation
from trajlm.interpret.importance import disagreements, event_importance, removal_effects
from trajlm.interpret.interventions import last_beliefs


def test_removal_effects_are_those_of_single_removals():
    model = toy_model()
    batch = model.encode_timeline(toy_timeline(1))
    found = removal_effects(model, batch, "mortality")
    with torch.no_grad():
        whole = float(last_beliefs(model, model(batch), batch)["mortality"])
        for event, effect in enumerate(found):
            one = Ablation("x", events=(event,)).apply(model, batch)
            belief = float(last_beliefs(model, model(one), one)["mortality"])
            assert effect == pytest.approx(belief - whole, abs=1e-6)
        *_, before, last = model.belief_frame(batch, model(batch).readouts)["belief_mortality"]
    assert found[-1] == pytest.approx(before - last, abs=1e-6)


def test_what_is_left_of_the_stay_is_compared_at_one_hour():
    """A last event that says nothing new adds nothing, however long after the one before it was."""
    model, target = toy_model(last_task="remaining_length_of_stay"), "remaining_length_of_stay_hours"
    timeline = toy_timeline(1)
    batch = model.encode_timeline(timeline)
    found = removal_effects(model, batch, target)
    with torch.no_grad():
        *_, before, last = model.belief_frame(batch, model(batch).readouts)[f"belief_{target}"]
    lag = timeline.events[-1].hours_since_admission - timeline.events[-2].hours_since_admission
    assert lag > 0.05
    assert found[-1] == pytest.approx(max(before - lag, 0) - last, abs=1e-4)


def test_the_removal_of_all_there_is_shows_its_token():
    model = toy_model()
    batch = model.encode_timeline(replace(toy_timeline(1), events=toy_timeline(1).events[:1]))
    token = Ablation("x", how="missing_token").apply(model, batch)
    with torch.no_grad():
        whole, belief = (float(last_beliefs(model, model(b), b)["mortality"]) for b in (batch, token))
    assert removal_effects(model, batch, "mortality") == pytest.approx([belief - whole], abs=1e-6)
    assert belief != whole


def test_events_of_one_modality_and_hour_go_together():
    model = toy_model()
    timeline = toy_timeline(1)
    batch, own = model.encode_timeline(timeline), labs(timeline)
    first = next(i for i in own if i + 1 in own)
    pair = [first, first + 1]
    batch.hours[0, first] = batch.hours[0, first + 1]
    found = removal_effects(model, batch, "mortality")
    both = Ablation("x", events=tuple(pair)).apply(model, batch)
    with torch.no_grad():
        whole, belief = (float(last_beliefs(model, model(b), b)["mortality"]) for b in (batch, both))
    assert found[pair] == pytest.approx([belief - whole] * 2, abs=1e-6)


def test_attributions_that_do_not_add_up_are_unknown(monkeypatch):
    def incomplete(*arguments):
        raise IncompleteAttributionError("expected 0.1")

    monkeypatch.setattr("trajlm.interpret.importance.integrated_gradients", incomplete)
    model = toy_model()
    table = event_importance(model, model.encode_timeline(toy_timeline(1)), "mortality")
    assert table["attribution"].null_count() == table.height
    assert agreement(table)["attribution"] is None


def test_importance_and_agreement():
    model = toy_model()
    batch = model.encode_timeline(toy_timeline(2))
    table = event_importance(model, batch, "mortality")
    weights = stay_attention(model, batch).weights
    assert table["attention"].to_list() == [float(w) for w in weights[-1, 0::2]]
    ranks = agreement(table)
    for name in ("knock_out", "removal", "attribution"):
        expected = spearmanr(table["attention"], table[name].abs()).statistic
        assert ranks[name] == pytest.approx(expected)
    perfect = table.with_columns(removal=-pl.col("attention"))
    assert agreement(perfect)["removal"] == pytest.approx(1)
    assert agreement(table.head(2))["removal"] is None
    summary = disagreements(model, [batch], "mortality").row(0, named=True)
    assert summary["most_attended"] == int(weights[-1, 0::2].argmax())
    assert summary["most_moving"] == table["event_index"][int(table["removal"].abs().arg_max())]
    assert summary["disagree"] == (ranks["removal"] < 0.3)


def test_without_attention_the_other_measures_remain():
    mamba = family("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=8)
    batch = toy_batch([4])
    table = event_importance(mamba, batch, "mortality")
    assert table["attention"].null_count() == table["knock_out"].null_count() == 4
    assert table.select("removal", "attribution").null_count().row(0) == (0, 0)
    row = disagreements(mamba, [batch], "mortality").row(0, named=True)
    assert row["disagree"] is None
    assert row["most_moving"] is not None
