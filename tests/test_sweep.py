"""A sweep proposes, judges on the tuning split alone, goes on where it was cut off, and ends in a recipe."""

from __future__ import annotations

import json

import polars as pl
import pytest
import yaml
from conftest import ROOT, TRAJLM, command

from trajlm import sweep as sweeping
from trajlm.errors import TrajlmError
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.sweep import DEFAULT_SPACE, Range, read_space, sweep, with_settings

TINY = ROOT / "recipes/tiny.yaml"
SPACE = {
    "pretraining.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "pretraining.batch_size": [32, 64],
    "pretraining.epochs": [1],
}


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    return path


@pytest.fixture(scope="module")
def swept(prepared_folder, space, tmp_path_factory):
    """A sweep of three trials, cut off in the middle of its second and then repeated."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    proposed: list[dict] = []
    real = sweeping.pretrain

    def cut(recipe):
        proposed.append({"rate": recipe.pretraining.learning_rate, "out": recipe.out})
        if len(proposed) == 2:
            raise KeyboardInterrupt
        return real(recipe)

    sweeping.pretrain = cut
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(TINY, prepared_folder, out, 3, space)
        sweep(TINY, prepared_folder, out, 3, space)
    finally:
        sweeping.pretrain = real
    return out, proposed


def test_a_trial_that_was_cut_off_is_proposed_again_and_finds_its_folder(swept):
    out, proposed = swept
    assert len(proposed) == 4
    assert proposed[2] == proposed[1]
    assert len({p["rate"] for p in proposed}) == 3
    assert len(list((out / "trials").iterdir())) == 3


def test_the_best_recipe_is_the_one_with_the_least_tuning_loss(swept, prepared_folder):
    out, _ = swept
    table = pl.read_csv(out / "trials.csv")
    losses = {}
    for run in (out / "trials").iterdir():
        splits = json.loads((run / "metrics.json").read_text())["splits"]
        losses[run.name] = splits["tuning"]["loss"]
        assert splits["held_out"]["loss"] != splits["tuning"]["loss"]
    assert dict(zip(table["run"], table["tuning_loss"], strict=True)) == pytest.approx(losses)
    assert table["tuning_loss"].is_sorted()
    best = parse_recipe(recipe_parser("pretrain.py", ""), ["--config", str(out / "best.yaml")])
    made = yaml.safe_load((out / "trials" / table["run"][0] / "config.yaml").read_text())["recipe"]
    for section in ("encoder", "pretraining"):
        assert vars(getattr(best, section)) == made[section]
    assert best.seed == made["seed"]
    assert (best.data, best.out) == (None, None)


def test_a_sweep_with_all_its_trials_trains_no_more(swept, prepared_folder, space, monkeypatch):
    out, _ = swept

    def never(_):
        raise AssertionError("a trial was run")

    monkeypatch.setattr(sweeping, "pretrain", never)
    before = (out / "best.yaml").read_text()
    assert sweep(TINY, prepared_folder, out, 3, space) == out / "best.yaml"
    assert (out / "best.yaml").read_text() == before
    with pytest.raises(TrajlmError, match="made by another recipe, space or prepared folder"):
        sweep(TINY, prepared_folder, out, 3)


def test_a_trial_that_fails_is_told_and_the_sweep_goes_on(prepared_folder, tmp_path, monkeypatch):
    def diverge(_):
        raise TrajlmError("alignment: the loss became nan")

    monkeypatch.setattr(sweeping, "pretrain", diverge)
    with pytest.raises(TrajlmError, match="every trial failed"):
        sweep(TINY, prepared_folder, tmp_path / "out", 2)
    assert pl.read_csv(tmp_path / "out/trials.csv")["error"].to_list() == ["alignment: the loss became nan"] * 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pretraining.learning_rat": [1e-3]}, "the nearest is 'pretraining.learning_rate'"),
        ({"finetuning.epochs": [1]}, "is no setting to sweep"),
        ({"pretraining.epochs": 3}, "expected a list or low, high and log"),
        ({"pretraining.learning_rate": {"low": 1.0, "high": 0.1}}, "low < high"),
        ({"pretraining.learning_rate": {"low": 0.0, "high": 0.1, "log": True}}, "low > 0"),
        ([1], "expected settings and their ranges"),
    ],
)
def test_a_space_that_is_none_is_refused(given, said, tmp_path):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(given))
    with pytest.raises(TrajlmError, match=said):
        read_space(tmp_path / "space.yaml")


def test_the_default_space_names_settings_in_their_bounds():
    assert read_space(None) is DEFAULT_SPACE
    recipe = parse_recipe(recipe_parser("", ""), [])
    for key, one in DEFAULT_SPACE.items():
        for value in one.choices or (one.low, one.high):
            section, name = key.split(".")
            assert getattr(getattr(with_settings(recipe, {key: value}), section), name) == value
    with pytest.raises(TrajlmError, match=r"pretraining\.batch_size"):
        with_settings(recipe, {"pretraining.batch_size": 1})
    assert Range(choices=(1, 2)).choices == (1, 2)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    done = command(*TRAJLM, "sweep", "--data", tmp_path, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert "is not a prepared folder" in done.stderr
    assert not (tmp_path / "out").exists()
