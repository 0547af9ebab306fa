"""What stands beside the network, through a whole run: fitted, weighed, saved, loaded, and the same when cut short."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from conftest import FINETUNING

from trajlm import finetuning
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.fusions import FUSIONS
from trajlm.trajectory import TrajectoryModel
from trajlm.variants import FUSIONS_READ, SUMMARY_MODELS_READ

SHORT = ["--finetuning.epochs", "1", "--finetuning.baselines", "[]", "--finetuning.modality_dropout", "0.5"]


class PowerCutError(Exception):
    """The machine went away."""


def recipe(prepared_folder, encoders_run, out, *flags):
    places = ["--data", str(prepared_folder), "--encoders", str(encoders_run), "--out", str(out)]
    return parse_recipe(recipe_parser("finetune.py", ""), [*FINETUNING, *SHORT, *flags, *places])


@pytest.fixture(scope="module")
def whole(prepared_folder, encoders_run, tmp_path_factory):
    """A run that nothing interrupted."""
    return finetuning.finetune(recipe(prepared_folder, encoders_run, tmp_path_factory.mktemp("beside") / "run"))


def test_shares_are_written_saved_and_used(whole, prepared):
    model = TrajectoryModel.from_pretrained(whole)
    told = json.loads((whole / "shares.json").read_text())
    assert list(told) == model.targets
    for k, shares in enumerate(told.values()):
        assert list(shares) == model.components == ["network", "linear_readout", "tree_readout"]
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares.values()) >= 0.1
        np.testing.assert_allclose(list(shares.values()), model.shares[:, k].numpy(), atol=1e-6)
    grown = json.loads((whole / "tree_readout.json").read_text())["targets"]
    for k, target in enumerate(model.targets):
        groups = [grown[target], *grown[target]["after"].values()]
        assert [group["trees"] for group in groups] == torch.bincount(model.trees.group[model.trees.task == k]).tolist()
    assert torch.equal(model.trees.starts, torch.tensor([[-torch.inf, 16.0]] * len(model.targets)))
    said = pl.read_parquet(whole / "beliefs.parquet")
    stay = said["stay_id"][0]
    beliefs = ["belief_mortality", "belief_length_of_stay_hours"]
    again = model.beliefs(prepared.timeline(stay)).select(beliefs)
    np.testing.assert_allclose(
        again.to_numpy(), said.filter(pl.col("stay_id") == stay).select(beliefs).to_numpy(), rtol=1e-5, atol=1e-5
    )


def test_the_network_alone_is_an_arm(whole, prepared):
    """What the saved model says once all else counts for nothing."""
    said = pl.read_parquet(whole / "network" / "beliefs.parquet")
    mixed = pl.read_parquet(whole / "beliefs.parquet")
    assert said.drop("^belief_.*$").equals(mixed.drop("^belief_.*$"))
    assert np.abs((said["belief_mortality"] - mixed["belief_mortality"]).to_numpy()).max() > 1e-3
    model = TrajectoryModel.from_pretrained(whole)
    model.shares.copy_(torch.tensor([[1.0], [0.0], [0.0]]).expand_as(model.shares))
    beliefs = ["belief_mortality", "belief_length_of_stay_hours"]
    for stay in said["stay_id"].unique().sort()[:5]:
        own = said.filter(pl.col("stay_id") == stay).select(beliefs).to_numpy()
        np.testing.assert_allclose(model.beliefs(prepared.timeline(stay)).select(beliefs).to_numpy(), own, rtol=1e-4)
    arms = json.loads((whole / "metrics.json").read_text())["arms"]["held_out"]
    assert list(arms) == ["sequence", "network"]


@pytest.mark.parametrize("cut", ["fit_trees", "best_shares"])
def test_a_run_cut_short_ends_as_one_that_was_not(cut, whole, prepared_folder, encoders_run, tmp_path, monkeypatch):
    """Before the trees are grown, when the regression is fitted; and once the network has learned."""
    asked = recipe(prepared_folder, encoders_run, tmp_path / "run")

    def fail(*_, **__):
        raise PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(finetuning, cut, fail)
        with pytest.raises(PowerCutError):
            finetuning.finetune(asked)
    resumed = finetuning.finetune(asked)
    for name in ("shares.json", "tree_readout.json", "linear_readout.json"):
        assert (resumed / name).read_text() == (whole / name).read_text()
    ours, theirs = (pl.read_parquet(run / "beliefs.parquet") for run in (resumed, whole))
    assert ours.equals(theirs)


def test_trees_are_the_same_without_a_regression(whole, prepared_folder, encoders_run, tmp_path):
    alone = recipe(prepared_folder, encoders_run, tmp_path / "run", "--finetuning.linear_readout", "false")
    out = finetuning.finetune(alone)
    assert not (out / "linear_readout.json").exists()
    assert (out / "tree_readout.json").read_text() == (whole / "tree_readout.json").read_text()
    assert "averaged with gradient-boosted trees of what" in (out / "README.md").read_text()


def test_baselines_that_are_done_are_not_fitted_again(prepared_folder, encoders_run, tmp_path, monkeypatch):
    given = ["--finetuning.baselines", '["mlp", "logistic"]', "--finetuning.baseline_trials", "1"]
    asked = recipe(prepared_folder, encoders_run, tmp_path / "run", *given, "--finetuning.baseline_epochs", "1")

    def fail(*_, **__):
        raise PowerCutError

    with monkeypatch.context() as patched:
        patched.setattr(finetuning, "train_sequence", fail)
        with pytest.raises(PowerCutError):
            finetuning.finetune(asked)
    done = {arm: (tmp_path / "run" / arm / "beliefs.parquet").read_bytes() for arm in ("static_mlp", "logistic")}
    monkeypatch.setattr(finetuning, "FusionArm", fail)
    monkeypatch.setattr(finetuning, "tabular_beliefs", fail)
    out = finetuning.finetune(asked)
    arms = json.loads((out / "metrics.json").read_text())["arms"]["held_out"]
    assert {"sequence", "static_mlp", "logistic"} <= set(arms)
    for arm, before in done.items():
        assert pl.read_parquet(out / arm / "beliefs.parquet").equals(pl.read_parquet(before))


def test_baselines_read_no_setting_but_those_that_variants_share_them_by(
    prepared_folder, encoders_run, tmp_path, monkeypatch
):
    """A grid fits a baseline once for all variants that set nothing it reads."""
    read: dict[str, set[str]] = {}

    class Watched:
        def __init__(self, config, name):
            self.config, self.name = config, name

        def __getattr__(self, key):
            read.setdefault(self.name, set()).add(f"finetuning.{key}")
            return getattr(self.config, key)

    def one_by_one(work, known):
        config, found = work.recipe.finetuning, {}
        for name in ("mlp", "lstm", "logistic", "lightgbm"):
            own = replace(config, baselines=[name])
            work.recipe.finetuning = Watched(own, name)
            found |= train(work, known)
        work.recipe.finetuning = config
        raise PowerCutError

    train = finetuning.train_baselines
    monkeypatch.setattr(finetuning, "train_baselines", one_by_one)
    given = ["--finetuning.baseline_trials", "1", "--finetuning.baseline_epochs", "1"]
    with pytest.raises(PowerCutError):
        finetuning.finetune(recipe(prepared_folder, encoders_run, tmp_path / "run", *given))
    before = {"finetuning.stays"}  # says who learns, before any baseline is asked
    assert set(read) == {"mlp", "lstm", "logistic", "lightgbm"}
    for name, keys in read.items():
        shared = FUSIONS_READ if name in FUSIONS else SUMMARY_MODELS_READ
        expected = {key for key in shared if key.startswith("finetuning.")} - before
        assert keys - {"finetuning.baselines"} == expected, name
