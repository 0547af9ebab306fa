"""Attention beside interventions: what the tables say is what the single analyses say."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from scipy.stats import spearmanr
from test_attention_families import family
from test_edits import toy_timeline
from test_trajectory import toy_batch, toy_model

from trajlm.interpret.agreement import agreement, disagreements, event_importance, removal_effects
from trajlm.interpret.attention import stay_attention
from trajlm.interpret.edits import Ablation
from trajlm.interpret.interventions import last_beliefs


def test_removal_effects_are_those_of_single_removals():
    model = toy_model()
    batch = model.encode_timeline(toy_timeline(1))
    found = removal_effects(model, batch, "mortality")
    with torch.no_grad():
        whole = float(last_beliefs(model, model(batch), batch)["mortality"])
        for event, effect in enumerate(found):
            one = Ablation("x", events=(event,), how="missing_token").apply(model, batch)
            belief = float(last_beliefs(model, model(one), one)["mortality"])
            assert effect == pytest.approx(belief - whole, abs=1e-6)


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
