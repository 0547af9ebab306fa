"""A small grid run by the real command, run again, and refused where it no longer fits."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from conftest import ROOT, TRAJLM, command, last_line

from trajlm.errors import TrajlmError
from trajlm.experiment import experiment, plan
from trajlm.grid import Grid, read_grid, require_runnable
from trajlm.splits import read_splits
from trajlm.summary import spread

SETTINGS = {
    "pretraining.epochs": 1, "finetuning.epochs": 1, "finetuning.baseline_epochs": 2, "finetuning.baseline_trials": 1,
    "finetuning.bootstrap_resamples": 20,
}  # fmt: skip
GRID = {
    "recipe": str(ROOT / "recipes/tiny.yaml"), "encoders": ["scratch", "contrastive"], "backbones": ["tiny"],
    "seeds": [0, 1], "baselines": ["mlp", "logistic"], "settings": SETTINGS,
}  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory, prepared_folder) -> Path:
    path = tmp_path_factory.mktemp("grid") / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | {"data": str(prepared_folder), "seeds": [0]}))
    return path


@pytest.fixture(scope="module")
def ran(grid) -> tuple[Path, str]:
    out = grid.parent / "out"
    return out, command(*TRAJLM, "experiment", grid, "--out", out).stdout


def test_every_arm_runs_and_is_compared(ran, prepared):
    out, printed = ran
    split = out / "split-given"
    assert {path.name for path in split.iterdir()} == {
        "encoders-seed-0", "scratch-tiny-seed-0", "contrastive-tiny-seed-0", "tables", "stays.csv",
    }  # fmt: skip
    assert (split / "tables" / "comparison.md").read_text() in printed
    published = pl.read_csv(split / "stays.csv")
    assert published.rows() == prepared.stays.select("stay_id", "split").sort("stay_id").rows()
    assert (out / "summary.md").read_text() in printed


def test_the_summary_is_that_of_the_runs(ran):
    out, _ = ran
    summary = pl.read_csv(out / "summary.csv", schema_overrides={"landmark": pl.Float64})
    values = summary.filter(pl.col("what") == "value")
    assert set(values["arm"]) == {
        "sequence model, scratch-tiny", "sequence model, contrastive-tiny", "static MLP (late fusion), scratch",
        "static MLP (late fusion), contrastive", "logistic regression (summary features)",
    }  # fmt: skip
    for name in ("scratch", "contrastive"):
        run = out / "split-given" / f"{name}-tiny-seed-0"
        rows = json.loads((run / "metrics.json").read_text())["arms"]["held_out"]["sequence"]
        own = values.filter(pl.col("arm") == f"sequence model, {name}-tiny")
        told = {(r["target"], r["landmark"], r["metric"]): r["mean"] for r in own.iter_rows(named=True)}
        assert told == {
            (r["target"], r["landmark"], r["metric"]): pytest.approx(r["value"]) for r in rows if r["value"] is not None
        }
    moved = summary.filter(pl.col("what") == "difference")
    paired = pl.read_csv(out / "split-given" / "tables" / "paired.csv")
    assert moved["mean"].sum() == pytest.approx(paired["value"].sum())


def test_what_is_done_is_skipped(ran, grid):
    out, _ = ran
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}
    again = command(*TRAJLM, "experiment", grid, "--out", out)
    assert again.stdout.count("is done already") == 3
    assert "finetune.py:" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")} == before


def test_another_grid_does_not_pass_for_done(ran, grid):
    out, _ = ran
    other = grid.with_name("other.yaml")
    other.write_text(grid.read_text().replace("finetuning.epochs: 1", "finetuning.epochs: 2"))
    refused = command(*TRAJLM, "experiment", other, "--out", out, check=False)
    assert refused.returncode == 2
    assert "was made by another grid or recipe" in last_line(refused)


def test_a_baseline_added_to_a_grid_costs_that_baseline_alone(prepared_folder, tmp_path):
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    few = GRID | {"data": str(prepared_folder), "seeds": [0], "encoders": ["scratch"], "baselines": ["logistic"]}
    path.write_text(yaml.safe_dump(few))
    command(*TRAJLM, "experiment", path, "--out", out)
    run = out / "split-given" / "scratch-tiny-seed-0"
    trained = (run / "trajectory.safetensors").stat().st_mtime_ns
    path.write_text(yaml.safe_dump(few | {"baselines": ["mlp", "logistic"], "ensembles": ["mlp"]}))
    again = command(*TRAJLM, "experiment", path, "--out", out)
    assert "is done already" not in again.stdout
    assert (run / "trajectory.safetensors").stat().st_mtime_ns == trained
    arms = set(pl.read_csv(out / "summary.csv", schema_overrides={"landmark": pl.Float64})["arm"])
    assert "static MLP (late fusion), scratch" in arms
    assert any("averaged" in arm for arm in arms)
    assert "is done already" in command(*TRAJLM, "experiment", path, "--out", out).stdout
    path.write_text(yaml.safe_dump(few))
    assert "was made by another grid or recipe" in last_line(
        command(*TRAJLM, "experiment", path, "--out", out, check=False)
    )


@pytest.mark.parametrize(
    ("change", "adds"),
    [
        ({"baselines": ["lightgbm", "mlp", "logistic"]}, True),
        ({"baselines": ["mlp", "logistic"], "ensembles": ["mlp"]}, True),
        ({"baselines": ["mlp"]}, False),
        ({"baselines": ["lightgbm", "mlp", "logistic"], "settings": SETTINGS | {"finetuning.epochs": 2}}, False),
    ],
)
def test_only_more_baselines_add_to_a_run_in_whatever_order(tmp_path, change, adds):
    grids = [Grid(**GRID | more, raw="release") for more in ({"baselines": ["logistic", "mlp"]}, change)]
    before, now = (next(stage for stage in plan(grid, tmp_path)[0] if stage.level == 2) for grid in grids)
    assert before.out == now.out
    assert now.adds_to(before.identity) == adds


def test_a_stage_that_fails_is_named_and_the_rest_waits(grid):
    out = grid.parent / "wrong"
    for start in GRID["encoders"]:
        occupied = out / "split-given" / f"{start}-tiny-seed-0"
        occupied.mkdir(parents=True)
        (occupied / "mine.txt").write_text("no run")
    failed = command(*TRAJLM, "experiment", grid, "--out", out, check=False)
    assert failed.returncode == 2
    assert "is not empty and not a run" in failed.stderr
    assert last_line(failed).endswith(
        "scratch-tiny-seed-0: ended with status 2; once what it told is put right, the same command resumes there"
    )
    assert list(json.loads((out / "stages.json").read_text())) == ["split-given/encoders-seed-0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "nothere.yaml"}, "recipe: no file .*nothere.yaml"),
        ({"settings": {"finetuning.epochs": "many"}}, "scratch-tiny-seed-0: .*finetuning.epochs.*many"),
        ({"settings": {"pretraining.epochs": 0}}, "encoders-seed-0: pretraining.epochs and patience must"),
        ({"settings": {"finetuning.tasks": ["phenotypin"]}}, "'phenotypin' is not known; the nearest is 'phenotyping'"),
        (
            {"variants": {"a": {}, "b": {"finetuning.tasks": ["length_of_stay"], "finetuning.sampling": "balanced"}}},
            "scratch-tiny-b-seed-0: .*balanced needs a task with two outcomes",
        ),
        ({"backbones": ["tiny", "tinny"]}, "scratch-tinny-seed-0: backbone 'tinny' .*the nearest is 'tiny'"),
        ({"settings": {"prepare.bin_hours": 2}}, "prepare.bin_hours: stays are prepared as the recipe says"),
        ({"settings": {"seed": 2}}, "seed is what the grid's own keys say"),
        ({"data": "nowhere"}, "data: nowhere is not a prepared folder"),
        ({"data": None, "raw": "nowhere"}, "raw: there is no nowhere; name the folder of the release, --raw DIR"),
        ({"data": None, "raw": str(ROOT), "splits": [0, "a"]}, "splits: 'a' is neither a seed nor a file"),
        ({"data": None, "raw": str(ROOT)}, "holds no SYNTHETIC.json"),
        ({"backbones": ["a/b", "a_b"]}, "two stages would fill split-given/scratch-a_b-seed-0"),
    ],
)
def test_what_stages_would_refuse_is_told_before_a_folder_is_made(grid, tmp_path, change, message):
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(yaml.safe_load(grid.read_text()) | change))
    with pytest.raises(TrajlmError, match=message) as refused:
        experiment(path, out)
    assert str(refused.value).startswith(f"{path}: ")
    assert "resumes" not in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not out.exists()


def test_a_grid_that_is_done_needs_no_release_any_more(tmp_path):
    grid = Grid(**GRID, raw="nowhere")
    require_runnable(tmp_path / "grid.yaml", grid, [])
    stages = [(stage.out, stage.level, stage.command) for stage in plan(grid, tmp_path)[0]]
    require_runnable(tmp_path / "grid.yaml", grid, stages[1:])
    with pytest.raises(TrajlmError, match="raw: there is no nowhere"):
        require_runnable(tmp_path / "grid.yaml", grid, stages)


def test_the_plan_holds_every_combination_once(tmp_path):
    grid = Grid(**GRID, raw="release", splits=[0, 7], variants={"plain": {}, "focal": {"finetuning.focal_gamma": 2.0}})
    stages, runs = plan(grid, tmp_path)
    assert len(runs) == 2 * 2 * 2 * 1 * 2
    assert len(stages) == len({stage.out for stage in stages}) == 2 + 2 * 2 + len(runs)
    assert len({stage.identity for stage in stages}) == len(stages)
    seen: set[str] = set()
    for stage in stages:
        for word in stage.command:
            if word.startswith(str(tmp_path)) and word != str(tmp_path / stage.out):
                assert word in seen, f"{stage.out} reads {word} before it is made"
        seen.add(str(tmp_path / stage.out))
    focal = [stage for stage in stages if "--finetuning.focal_gamma" in stage.command]
    assert len(focal) == len(runs) / 2
    assert all("-focal-seed-" in stage.out for stage in focal)


@pytest.mark.parametrize(
    ("setting", "anew"),
    [("finetuning.epochs", [2]), ("backbone.tuning", [2]), ("pretraining.epochs", [1, 2]), ("encoder.heads", [1, 2])],
)
def test_only_stages_that_read_a_setting_are_run_anew_for_it(tmp_path, setting, anew):
    """Whether the recipe holds it or the grid does."""
    section, name = setting.split(".")
    recipes = {}
    for value in (2, 3):
        recipes[value] = tmp_path / f"{value}" / "recipe.yaml"
        recipes[value].parent.mkdir()
        recipes[value].write_text(yaml.safe_dump({"seed": 0, section: {name: value}}))
    given = GRID | {"raw": "release"}
    by_recipe = []
    for path in recipes.values():
        shared = tmp_path / "recipe.yaml"
        shared.write_text(path.read_text())
        by_recipe.append([stage.identity for stage in plan(Grid(**given | {"recipe": str(shared)}), tmp_path)[0]])
    fixed = given | {"recipe": str(recipes[2])}
    by_grid = [plan(Grid(**fixed | {"settings": {setting: value}}), tmp_path)[0] for value in (2, 3)]
    levels = [stage.level for stage in by_grid[0]]
    changed = {level for level, *both in zip(levels, *by_recipe, strict=True) if len(set(both)) == 2}
    assert sorted(changed) == anew
    one, other = ([stage.identity for stage in stages] for stages in by_grid)
    assert sorted({level for level, a, b in zip(levels, one, other, strict=True) if a != b}) == anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": [1]}, "'sedes' is not a key of a grid; the nearest is 'seeds'"),
        (
            {"settings": {"finetuning.epoch": 3}},
            "'finetuning.epoch' is not a setting of a recipe; the nearest is 'fine",
        ),
        ({"variants": {"a": {"finetunin.epochs": 3}}}, "the nearest is 'finetuning.epochs'"),
        ({"encoders": ["scrach"]}, "'scrach' is not one of encoders; the nearest is 'scratch'"),
        ({"baselines": ["logisic"]}, "'logisic' is not one of baselines; the nearest is 'logistic'"),
        ({"ensembles": ["lstm"]}, "ensembles: lstm must stand in baselines too"),
        ({"ensembles": ["severity"], "baselines": ["severity"]}, "severity scores are not averaged"),
        ({"variants": {"a": {"backbone.name": "tiny"}}}, "backbone.name is what the grid's own keys say"),
        ({"seeds": []}, "seeds must name at least one"),
        ({"seeds": [1, 1]}, "none twice"),
        ({"raw": "release"}, "either raw, a release, or data"),
    ],
)
def test_grids_that_make_no_sense_are_refused(tmp_path, change, message):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID | {"data": "prepared"} | change))
    with pytest.raises(TrajlmError, match=message) as refused:
        read_grid(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_a_grid_that_is_not_yaml_is_named_with_its_line(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("recipe: tiny.yaml\nseeds: [0\nraw: x\n")
    with pytest.raises(TrajlmError, match=r"grid\.yaml is not YAML: .*line 3"):
        read_grid(path)


def test_a_baseline_is_fitted_once_by_the_runs_that_would_find_the_same(tmp_path):
    settings = SETTINGS | {"finetuning.stays": "train"}
    variants = {"plain": {}, "early": {"finetuning.loss_over": "all"}, "focal": {"finetuning.focal_gamma": 2.0}}
    given = GRID | {"baselines": ["mlp", "logistic", "lightgbm"], "settings": settings, "variants": variants}
    _, runs = plan(Grid(**given, raw="release"), tmp_path)
    stages, _ = plan(Grid(**given, raw="release"), tmp_path)
    fitted = {s.out.split("/")[1]: set(json.loads(s.command[s.command.index("--finetuning.baselines") + 1]))
              for s in stages if "finetune.py" in s.command[1]}  # fmt: skip
    assert len(fitted) == len(runs) == 12
    # A fusion reads the encoders, trees draw at random, a linear model does neither; a focal loss changes fusions.
    assert {name for name, found in fitted.items() if "mlp" in found} == {
        f"{start}-tiny-{variant}-seed-{seed}"
        for start in GRID["encoders"] for variant in ("plain", "focal") for seed in (0, 1)
    }  # fmt: skip
    assert {name for name, found in fitted.items() if "lightgbm" in found} == {
        f"scratch-tiny-{variant}-seed-{seed}" for variant in ("plain", "focal") for seed in (0, 1)
    }
    assert {name for name, found in fitted.items() if "logistic" in found} == {
        "scratch-tiny-plain-seed-0", "scratch-tiny-focal-seed-0",
    }  # fmt: skip
    unseen, _ = plan(Grid(**(given | {"settings": SETTINGS}), raw="release"), tmp_path)
    assert sum("logistic" in str(stage.command) for stage in unseen) == 4


def test_a_variant_of_the_encoders_is_pretrained_for_itself(tmp_path):
    variants = {"plain": {}, "wide": {"encoder.latent_width": 64}, "late": {"finetuning.epochs": 2},
                "brief": {"pretraining.epochs": 2, "finetuning.epochs": 2}}  # fmt: skip
    given = GRID | {"seeds": [0], "raw": "release", "baselines": ["mlp", "lightgbm"], "variants": variants}
    given["settings"] = SETTINGS | {"finetuning.stays": "train"}
    stages, _ = plan(Grid(**given), tmp_path)
    of = {stage.out.removeprefix("split-0/"): stage.command for stage in stages}
    pretrained = {name: command for name, command in of.items() if name.startswith("encoders")}
    assert set(pretrained) == {"encoders-seed-0", "encoders-wide-seed-0", "encoders-brief-seed-0"}
    flags = {name: dict(zip(words[2::2], words[3::2], strict=True)) for name, words in of.items() if words[1] != "-m"}
    own = {name: {key: value for key, value in given.items() if key not in ("--out", "--config")}
           for name, given in flags.items() if name in pretrained}  # fmt: skip
    shared = own["encoders-seed-0"]
    assert shared["--pretraining.epochs"] == "1"
    assert own["encoders-wide-seed-0"] == shared | {"--encoder.latent_width": "64"}
    assert own["encoders-brief-seed-0"] == shared | {"--pretraining.epochs": "2"}
    for variant in variants:
        of_variant = f"encoders-{variant}-seed-0" if variant in ("wide", "brief") else "encoders-seed-0"
        run = flags[f"contrastive-tiny-{variant}-seed-0"]
        assert run["--encoders"] == str(tmp_path / "split-0" / of_variant)
        fitted = json.loads(run["--finetuning.baselines"])
        assert ("mlp" in fitted) == (variant in ("plain", "wide", "brief")), "fusions read these encoders"
        assert "lightgbm" not in fitted, "trees of summary features do not"
    # From scratch nothing is pretrained: there brief is late.
    assert {name for name in of if name.startswith("scratch")} == {
        f"scratch-tiny-{variant}-seed-0" for variant in ("plain", "wide", "late")
    }
    # The one that stands for another does so at every seed, be it run there or not.
    some = given | {"seeds": [0, 1], "seeds_of": {"late": [0]}}
    scratch = {run.path.name for run in plan(Grid(**some), tmp_path)[1] if run.arm.startswith("scratch")}
    assert scratch == {f"scratch-tiny-{variant}-seed-{seed}" for variant in ("plain", "wide") for seed in (0, 1)} | {
        "scratch-tiny-late-seed-0"
    }
    alone = GRID | {"raw": "release", "encoders": ["scratch"], "variants": {"a": {}, "b": {"pretraining.epochs": 9}}}
    with pytest.raises(TrajlmError, match=r"b: in no run of this grid"):
        plan(Grid(**alone), tmp_path)


def test_what_is_dear_takes_some_of_the_seeds(tmp_path):
    given = GRID | {"baselines": ["mlp", "logistic"], "settings": SETTINGS, "raw": "release"}
    every, _ = plan(Grid(**given), tmp_path)
    some, runs = plan(Grid(**given, seeds_of={"scratch": [1], "mlp": [0]}), tmp_path)
    # The plan is the full one without these: what stays is the same command.
    assert {stage.out for stage in every} - {stage.out for stage in some} == {"split-0/scratch-tiny-seed-0"}
    assert [(run.arm, run.seed) for run in runs] == [
        ("contrastive-tiny", 0), ("scratch-tiny", 1), ("contrastive-tiny", 1),
    ]  # fmt: skip
    fitting = {stage.out.split("/")[1] for stage in some if '"mlp"' in str(stage.command)}
    assert fitting == {"contrastive-tiny-seed-0"}
    alone, _ = plan(Grid(**given, seeds_of={"contrastive": [0]}), tmp_path)
    assert not any("encoders-seed-1" in stage.out for stage in alone)
    for nothing, left in (({"contrastive": [0], "mlp": [1], "scratch": [0]}, "mlp"),
                          ({"tiny": [1], "scratch": [0], "contrastive": [0]}, "contrastive, logistic"),
                          ({"scratch": [0], "contrastive": [0]}, "seed 1")):  # fmt: skip
        with pytest.raises(TrajlmError, match=f"{left}.*: in no run of this grid"):
            plan(Grid(**given, seeds_of=nothing), tmp_path)
    for wrong, told in (({"mlp": [7]}, "mlp must take some"), ({"mlp": []}, "mlp must take some"),
                        ({"lstn": [0]}, "nearest")):  # fmt: skip
        with pytest.raises(TrajlmError, match=told):
            Grid(**given, seeds_of=wrong)
    with pytest.raises(TrajlmError, match="mlp names two things"):
        Grid(**given, seeds_of={"mlp": [0]}, variants={"mlp": {}})


def test_help_and_docs_name_every_key_of_a_grid():
    told = command(*TRAJLM, "experiment", "--help").stdout
    docs = (ROOT / "docs/evidence.md").read_text()
    for field in dataclasses.fields(Grid):
        assert re.search(rf"\b{field.name}\b", told)
        assert f"`{field.name}`" in docs


def test_a_split_file_gives_its_name_to_the_folder(tmp_path):
    given = GRID | {"raw": "release", "splits": [3, "published/split-0.csv.gz", "by-hospital.csv", "fold.1.csv"]}
    _, runs = plan(Grid(**given), tmp_path)
    splits = list(dict.fromkeys(run.split for run in runs))
    assert splits == ["split-3", "split-0", "split-by-hospital", "split-fold.1"]


@pytest.mark.parametrize(
    ("name", "splits"), [("physionet2012", 5), ("eicu-demo", 5), ("synthetic", 5), ("ablations", 2)]
)
def test_the_grids_of_the_repository_are_valid(name, splits):
    path = ROOT / f"recipes/grid/{name}.yaml"
    grid = read_grid(path, raw="elsewhere")
    assert (grid.raw, len(grid.splits), grid.seeds[0]) == ("elsewhere", splits, 0)
    assert Path(grid.recipe).is_file()
    assert read_grid(path, data="prepared").raw is None
    with pytest.raises(TrajlmError, match="no grid at"):
        read_grid(path.with_name("nowhere.yaml"))


def test_the_record_and_the_splits_lie_beside_the_runs(ran, grid, prepared):
    out, _ = ran
    record = json.loads((out / "grid.json").read_text())
    assert record["name"] == grid.stem
    assert all((out / run["path"] / "metrics.json").is_file() for run in record["runs"])
    packed = out / "splits" / "split-given.csv.gz"
    stays = prepared.stays.select("stay_id", "subject_id")
    assert read_splits(packed, stays).rows() == prepared.stays.select("stay_id", "split").sort("stay_id").rows()


def test_a_page_is_written_of_the_grid(ran, tmp_path):
    out, _ = ran
    command(*TRAJLM, "results", out, "--out", tmp_path / "results.md")
    page = (tmp_path / "results.md").read_text()
    for arm in ("scratch-tiny", "contrastive-tiny", "Logistic regression"):
        assert arm in page
    pooled = pl.read_csv(tmp_path / "results.csv", schema_overrides={"landmark": pl.Float64})
    told = {(r["arm"], r["target"], r["landmark"], r["metric"]): r["value"]
            for r in pooled.filter(pl.col("what") == "value").iter_rows(named=True)}  # fmt: skip
    rows = json.loads((out / "split-given/scratch-tiny-seed-0/metrics.json").read_text())["arms"]["held_out"][
        "sequence"
    ]
    shared = [r for r in rows if ("sequence model, scratch-tiny", r["target"], r["landmark"], r["metric"]) in told]
    assert len(shared) >= 15
    for r in shared:
        value = told["sequence model, scratch-tiny", r["target"], r["landmark"], r["metric"]]
        assert (value is None and r["value"] is None) or value == pytest.approx(r["value"], abs=1e-6)


def test_spread_is_over_defined_runs():
    rng = np.random.default_rng(0)
    values = [*rng.random(4).tolist(), None]
    frame = pl.DataFrame({"arm": "a", "target": "t", "landmark": None, "metric": "m", "value": values},
                         schema_overrides={"landmark": pl.Float64})  # fmt: skip
    row = spread(frame).row(0, named=True)
    assert (row["mean"], row["deviation"]) == pytest.approx((np.mean(values[:4]), np.std(values[:4], ddof=1)))
    assert (row["runs"], row["least"], row["greatest"]) == (4, min(values[:4]), max(values[:4]))
