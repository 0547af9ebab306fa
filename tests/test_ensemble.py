"""The sequence model averaged with a baseline: the right beliefs meet, and their mean is what a plain loop says."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from conftest import FINETUNING
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from trajlm.arms import ENSEMBLES, is_sequence
from trajlm.compare import compare
from trajlm.config import FinetuningConfig
from trajlm.ensemble import ensemble_beliefs, mean_beliefs
from trajlm.errors import TrajlmError
from trajlm.finetuning import finetune
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.tasks import build_tasks

TASKS = build_tasks(["mortality", "length_of_stay"])


def sequence_of(events: dict[int, list[tuple[int, float, float]]]) -> pl.DataFrame:
    rows = [
        {
            "stay_id": stay,
            "split": "held_out",
            "event_index": i,
            "belief_mortality": p,
            "belief_length_of_stay_hours": h,
        }
        for stay, found in events.items()
        for i, p, h in found
    ]
    return pl.DataFrame(rows)


def baseline_of(rows: list[tuple[int, float | None, int, float, float]]) -> pl.DataFrame:
    names = ["stay_id", "landmark", "event_index", "belief_mortality", "belief_length_of_stay_hours"]
    frame = pl.DataFrame(rows, schema=names, orient="row", schema_overrides={"landmark": pl.Float64})
    return frame.with_columns(pl.lit("held_out").alias("split"), pl.lit(1.0).alias("target_mortality"))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 9999))
def test_beliefs_meet_after_the_same_event_and_are_averaged_as_a_loop_would(seed):
    random = np.random.default_rng(seed)
    events: dict[int, list[tuple[int, float, float]]] = {}
    rows = []
    for stay in random.permutation(9)[:5].tolist():
        count = int(random.integers(1, 8))
        read = sorted({0, *random.choice(count, int(random.integers(1, count + 1)), replace=False).tolist()})
        events[stay] = [(i, float(random.random()), float(random.uniform(0, 300))) for i in read]
        for landmark in (6.0, 48.0, None):
            rows.append((stay, landmark, int(random.integers(0, count)), float(random.random()),
                         float(random.uniform(0, 300))))  # fmt: skip
    baseline = baseline_of(rows)
    found = ensemble_beliefs(sequence_of(events), baseline, TASKS)
    assert found.columns == baseline.columns
    assert found.drop("^belief_.*$").equals(baseline.drop("^belief_.*$"))
    for (stay, _, event, p, h), row in zip(rows, found.iter_rows(named=True), strict=True):
        _, q, g = max(e for e in events[stay] if e[0] <= event)
        odds = math.sqrt(p / (1 - p) * q / (1 - q))
        assert row["belief_mortality"] == pytest.approx(odds / (1 + odds), rel=1e-6, abs=1e-6)
        assert row["belief_length_of_stay_hours"] == pytest.approx(math.sqrt((1 + h) * (1 + g)) - 1, rel=1e-9)


def test_a_certain_arm_does_not_decide_alone():
    sequence, baseline = sequence_of({1: [(0, 0.2, 10.0)]}), baseline_of([(1, None, 0, 1.0, 10.0)])
    found = ensemble_beliefs(sequence, baseline, TASKS)["belief_mortality"][0]
    assert 0.2 < found < 1


def test_arms_that_err_on_other_stays_are_better_together():
    random = np.random.default_rng(0)
    died = random.random(4000) < 0.2
    beliefs = [1 / (1 + np.exp(-(2 * died - 1 + random.normal(0, 2, 4000)))) for _ in range(2)]
    sequence = sequence_of({i: [(0, float(p), 1.0)] for i, p in enumerate(beliefs[0])})
    baseline = baseline_of([(i, None, 0, float(p), 1.0) for i, p in enumerate(beliefs[1])])
    together = roc_auc_score(died, ensemble_beliefs(sequence, baseline, TASKS)["belief_mortality"])
    assert together > max(roc_auc_score(died, b) for b in beliefs) + 0.02


def test_a_stay_without_a_belief_is_named():
    with pytest.raises(TrajlmError, match="stay 2: the sequence model states no belief"):
        ensemble_beliefs(sequence_of({1: [(0, 0.2, 10.0)], 2: [(3, 0.1, 1.0)]}),
                         baseline_of([(1, None, 0, 0.5, 1.0), (2, None, 2, 0.5, 1.0)]), TASKS)  # fmt: skip


def test_an_ensemble_needs_its_baseline_and_counts_as_a_sequence_model():
    with pytest.raises(TrajlmError, match=r"finetuning\.ensembles: lightgbm must stand in finetuning\.baselines"):
        FinetuningConfig(baselines=["mlp"], ensembles=["lightgbm"])
    assert all(is_sequence(name) for name in [*ENSEMBLES.values(), "sequence", "network"])
    assert not any(is_sequence(name) for name in ENSEMBLES)


def test_a_run_reports_and_compares_its_ensemble(prepared_folder, encoders_run, tmp_path):
    """From fine-tuning to the comparison's tables, at every landmark at which the baseline believes."""
    flags = [*FINETUNING, "--finetuning.epochs", "1", "--finetuning.baselines", "[logistic]",
             "--finetuning.ensembles", "[logistic]", "--finetuning.baseline_trials", "1"]  # fmt: skip
    places = ["--data", str(prepared_folder), "--encoders", str(encoders_run), "--out", str(tmp_path / "run")]
    out = finetune(parse_recipe(recipe_parser("finetune.py", ""), [*flags, *places]))
    both, logistic = (pl.read_parquet(out / arm / "beliefs.parquet") for arm in ("sequence_and_logistic", "logistic"))
    assert both.drop("^belief_.*$").equals(logistic.drop("^belief_.*$"))
    compare([out], tmp_path / "tables")
    paired = pl.read_csv(tmp_path / "tables" / "paired.csv")
    assert set(paired["arm"]) == {"sequence", "network", "sequence_and_logistic"}
    row = paired.filter((pl.col("arm") == "sequence_and_logistic") & pl.col("landmark").is_null()
                        & (pl.col("metric") == "auroc")).row(0, named=True)  # fmt: skip
    held = [f.filter((pl.col("split") == "held_out") & pl.col("landmark").is_null()) for f in (both, logistic)]
    known = held[0]["target_mortality"].is_not_null()
    aurocs = [roc_auc_score(f.filter(known)["target_mortality"], f.filter(known)["belief_mortality"]) for f in held]
    assert row["value"] == pytest.approx(aurocs[0] - aurocs[1], abs=1e-9)
    assert "Sequence model and logistic regression, averaged" in (tmp_path / "tables" / "comparison.md").read_text()


def test_models_that_believe_after_other_events_are_not_averaged() -> None:
    one = sequence_of({1: [(0, 0.2, 10.0), (1, 0.4, 20.0)]})
    other = sequence_of({1: [(0, 0.2, 10.0), (2, 0.4, 20.0)]})
    kinds = {task.target: task.kind for task in TASKS}
    # In whatever order the rows come.
    assert mean_beliefs([one, one.reverse()], kinds)["belief_mortality"].to_list() == pytest.approx([0.2, 0.4])
    with pytest.raises(TrajlmError, match="cannot be averaged"):
        mean_beliefs([one, other], kinds)
