"""Modalities removed at test time: what the model would believe of records without them, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import mean_absolute_error

from trajlm.dataset import Prepared
from trajlm.interpret.removal import fusion_without, removal_rows, removals, run_removals, sequence_without
from trajlm.schema import NOTHING
from trajlm.static import load_fusion

TARGETS = [("mortality", "probability"), ("length_of_stay_hours", "hours")]


@pytest.fixture(scope="module")
def stays(prepared: Prepared) -> np.ndarray:
    return prepared.positions("held_out")[:12]


def test_nothing_each_and_each_pair():
    assert removals(["a", "b", "c"]) == [(), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")]


def test_a_removed_modality_is_as_if_it_had_never_been_recorded(prepared, model, cached, stays):
    """The last belief equals that on the timeline without those events, read from the records anew."""
    sets = removals(model.encoders.modalities)[:8]
    batch = cached.latents.trajectories(stays, cached.targets[torch.from_numpy(stays)], model.max_events)
    found = sequence_without(model, [batch], sets)
    checked = 0
    for removed in sets:
        own = found.filter(pl.col("removed") == (" + ".join(removed) or NOTHING))
        for stay in stays:
            whole = prepared.timeline(prepared.stays["stay_id"][int(stay)])
            timeline = whole.without(*removed)
            row = own.filter(pl.col("stay_id") == whole.stay_id)
            assert row.height == bool(timeline.events)
            if row.height:
                last = model.beliefs(timeline).row(-1, named=True)
                for target, _ in TARGETS:
                    assert row[f"belief_{target}"][0] == pytest.approx(last[f"belief_{target}"], rel=1e-4)
                assert row["changed"][0] == (len(timeline.events) < len(whole.events))
                checked += row["changed"][0]
    assert checked > 10


def test_a_fusion_without_a_modality_sees_its_token(run, model, cached, stays):
    fusion = load_fusion(run, "mlp", cached.latents, model.fitted_tasks)
    assert load_fusion(run, "lstm", cached.latents, model.fitted_tasks) is None
    batch = cached.latents.static(stays, cached.targets[torch.from_numpy(stays)])
    gone = model.encoders.modalities[1]
    found = fusion_without(model, fusion, batch, [(), (gone,)])
    whole = found.filter(pl.col("removed") == NOTHING)
    saved = pl.read_parquet(run / "static_mlp" / "beliefs.parquet").filter(pl.col("landmark").is_null())
    both = whole.join(saved, on="stay_id", suffix="_saved")
    assert both.height == len(stays)
    np.testing.assert_allclose(both["belief_mortality"], both["belief_mortality_saved"], rtol=1e-5)
    latents = batch.latents.clone()
    latents[:, 1] = model.encoders.missing_tokens[1].detach()
    with torch.no_grad():
        readouts = fusion.eval().readouts(replace(batch, latents=latents))
    left = batch.present[:, [i for i in range(batch.present.shape[1]) if i != 1]].any(dim=1)
    expected = model.fitted_tasks[0].belief(readouts[:, 0])[left].numpy()
    own = found.filter(pl.col("removed") == gone)
    np.testing.assert_allclose(own["belief_mortality"], expected, rtol=1e-5)
    assert own["changed"].to_list() == batch.present[left, 1].tolist()


def test_rows_compare_the_same_stays():
    rng, n = np.random.default_rng(0), 80
    hours = rng.gamma(2, 40, n)
    columns = {"stay_id": range(n), "belief_los": hours + rng.normal(0, 9, n), "target_los": hours}
    whole = pl.DataFrame(columns).with_columns(removed=pl.lit(NOTHING), changed=pl.lit(False))
    lost = whole.with_columns(removed=pl.lit("labs"), changed=pl.col("stay_id") % 2 == 0, belief_los=pl.lit(80.0))
    lost = lost.filter(pl.col("stay_id") >= 10)  # these had nothing else
    stays = pl.DataFrame({"stay_id": range(n), "subject_id": [str(i // 2) for i in range(n)]})
    rows = removal_rows(pl.concat([whole, lost]), stays, [("los", "hours")], "arm", 50, 0)
    row = rows.filter((pl.col("removed") == "labs") & (pl.col("metric") == "mae")).row(0, named=True)
    after = mean_absolute_error(hours[10:], np.full(n - 10, 80.0))
    before = mean_absolute_error(hours[10:], whole["belief_los"].to_numpy()[10:])
    assert (row["value"], row["difference"]) == pytest.approx((after, after - before), abs=1e-9)
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    assert (row["stays"], row["changed"]) == (n - 10, 35)
    nothing = rows.filter((pl.col("removed") == NOTHING) & (pl.col("metric") == "mae")).row(0, named=True)
    assert (nothing["difference"], nothing["stays"]) == (0.0, n)


def test_a_run_is_read_again_from_its_folder(run, model):
    found = run_removals(run, TARGETS, 20)
    assert set(found["arm"]) == {"sequence", "static_mlp"}
    assert found["removed"].n_unique() == len(removals(model.encoders.modalities))
    beliefs = pl.read_parquet(run / "beliefs.parquet").filter(pl.col("split") == "held_out")
    last = beliefs.sort("stay_id", "event_index").unique("stay_id", keep="last", maintain_order=True)
    known = last.drop_nulls("target_length_of_stay_hours")
    value = mean_absolute_error(known["target_length_of_stay_hours"], known["belief_length_of_stay_hours"])
    own = found.filter((pl.col("arm") == "sequence") & (pl.col("removed") == NOTHING) & (pl.col("metric") == "mae"))
    assert own["value"][0] == pytest.approx(value, rel=1e-4)
