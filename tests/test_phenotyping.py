"""Twenty-five phenotypes through the real commands: one rare, one never seen, some unknown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import RECIPE, TRAJLM, command
from sklearn.metrics import roc_auc_score

import trajlm
from trajlm.tasks import PHENOTYPES

NEVER, RARE = PHENOTYPES[0], PHENOTYPES[1]
FEW = ["--finetuning.epochs", "1", "--finetuning.baseline_epochs", "2", "--finetuning.baseline_trials", "1",
       "--finetuning.bootstrap_resamples", "10"]  # fmt: skip


@pytest.fixture(scope="module")
def phenotyped(prepared_folder, tmp_path_factory) -> Path:
    """The invented stays with made-up phenotypes; a tenth of the stays were never coded."""
    folder = tmp_path_factory.mktemp("phenotypes")
    shutil.copytree(prepared_folder, folder / "prepared")
    path = folder / "prepared" / "stays.parquet"
    stays, rng = pl.read_parquet(path), np.random.default_rng(0)
    uncoded = rng.random(stays.height) < 0.1
    for name in PHENOTYPES:
        share = {NEVER: 0.0, RARE: 0.02}.get(name, 0.3)
        held = rng.random(stays.height) < share
        values = [None if u else int(h) for u, h in zip(uncoded, held, strict=True)]
        stays = stays.with_columns(pl.Series(f"target_phenotype_{name}", values, dtype=pl.Int8))
    stays.write_parquet(path)
    command("finetune.py", *RECIPE, *FEW, "--finetuning.tasks", "[mortality, phenotyping]", "--encoders", "scratch",
            "--finetuning.focal_gamma", "1.0", "--data", folder / "prepared", "--out", folder / "run")  # fmt: skip
    return folder


def test_every_phenotype_is_believed_and_their_mean_reported(phenotyped):
    run = phenotyped / "run"
    rows = json.loads((run / "metrics.json").read_text())["arms"]["held_out"]
    for arm, path in (("sequence", run / "beliefs.parquet"), ("logistic", run / "logistic" / "beliefs.parquet")):
        beliefs = pl.read_parquet(path).filter(pl.col("split") == "held_out")
        if "landmark" in beliefs.columns:
            beliefs = beliefs.filter(pl.col("landmark").is_null())
        last = beliefs.sort("stay_id", "event_index").unique("stay_id", keep="last")
        areas = []
        for name in PHENOTYPES:
            known = last.drop_nulls(f"target_phenotype_{name}")
            assert known[f"belief_phenotype_{name}"].is_between(0, 1).all()
            if known[f"target_phenotype_{name}"].n_unique() == 2:
                pair = (known[f"{what}_phenotype_{name}"] for what in ("target", "belief"))
                areas.append(roc_auc_score(*pair))
        assert 20 <= len(areas) < 25, "the phenotype nobody has is in no mean"
        told = [r["value"] for r in rows[arm] if r["metric"] == "macro_auroc" and r["landmark"] is None]
        assert told == [pytest.approx(np.mean(areas), abs=1e-9)]


def test_a_phenotyping_model_loads_and_believes(phenotyped):
    model = trajlm.TrajectoryModel.from_pretrained(phenotyped / "run")
    prepared = trajlm.load_prepared(phenotyped / "prepared")
    saved = pl.read_parquet(phenotyped / "run" / "beliefs.parquet")
    stay = saved["stay_id"][0]
    column = f"belief_phenotype_{PHENOTYPES[5]}"
    again = model.beliefs(prepared.timeline(stay))[column].to_numpy()
    np.testing.assert_allclose(again, saved.filter(pl.col("stay_id") == stay)[column].to_numpy(), rtol=1e-4)


def test_a_comparison_shows_the_mean_and_not_the_members(phenotyped):
    command(*TRAJLM, "compare", phenotyped / "run", "--out", phenotyped / "tables")
    text = (phenotyped / "tables" / "comparison.md").read_text()
    assert "| Phenotypes, macro AUROC | Phenotypes, macro AUPRC |" in text
    assert PHENOTYPES[5].replace("_", " ") not in text
    assert f"phenotype_{PHENOTYPES[5]}" in (phenotyped / "tables" / "comparison.csv").read_text()


def test_a_grid_of_phenotypes_alone_is_tabulated(phenotyped):
    settings = {flag.removeprefix("--"): int(value) for flag, value in zip(FEW[::2], FEW[1::2], strict=True)}
    settings |= {"finetuning.tasks": ["phenotyping"], "finetuning.readout_at": "landmarks"}
    given = {"recipe": RECIPE[1], "data": str(phenotyped / "prepared"), "encoders": ["scratch"],
             "backbones": ["tiny"], "baselines": ["logistic"], "settings": settings}  # fmt: skip
    (phenotyped / "grid.yaml").write_text(yaml.safe_dump(given))
    out = phenotyped / "grid"
    command(*TRAJLM, "experiment", phenotyped / "grid.yaml", "--out", out)
    rows = json.loads((out / "split-given/scratch-tiny-seed-0/metrics.json").read_text())["arms"]["held_out"]
    summary = pl.read_csv(out / "summary.csv").filter(pl.col("metric") == "macro_auroc")
    for arm, name in (
        ("sequence model, scratch-tiny", "sequence"),
        ("logistic regression (summary features)", "logistic"),
    ):
        told = summary.filter((pl.col("arm") == arm) & pl.col("landmark").is_null())["mean"].to_list()
        assert told == [
            pytest.approx(r["value"]) for r in rows[name] if r["metric"] == "macro_auroc" and r["landmark"] is None
        ]


def test_the_mimic_reader_names_the_phenotypes_as_the_task_does(prepared):
    columns = {name.removeprefix("target_phenotype_") for name in prepared.stays.columns if "_phenotype_" in name}
    assert columns == set(PHENOTYPES)


def test_a_folder_without_phenotypes_says_so(prepared_folder, tmp_path):
    shutil.copytree(prepared_folder, tmp_path / "prepared")
    stays = pl.read_parquet(prepared_folder / "stays.parquet")
    stays.drop([name for name in stays.columns if "_phenotype_" in name]).write_parquet(
        tmp_path / "prepared" / "stays.parquet"
    )
    refused = command("finetune.py", *RECIPE, "--finetuning.tasks", "[phenotyping]", "--encoders", "scratch",
                      "--data", tmp_path / "prepared", "--out", tmp_path / "run", check=False)  # fmt: skip
    assert refused.returncode == 2
    assert f"has no column target_phenotype_{PHENOTYPES[0]}" in refused.stderr
    assert "name a target it has as label:NAME or hours:NAME: mortality, length_of_stay_hours" in refused.stderr
