"""One page of what grids found: every arm against every other, by landmark, and in words who is ahead (method 8)."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.checkpoint import read_run, write_text
from trajlm.errors import TrajlmError
from trajlm.experiment import RECORD, SPLIT_FOLDER
from trajlm.pooled_arms import ALL_SEEDS, GridRun, is_sequence_title, kind_of
from trajlm.pooling import POOLED, Pool
from trajlm.report.tables import number, signed
from trajlm.result_tables import (
    LOWER_IS_BETTER,
    MAIN,
    at_landmark,
    calibration_table,
    difference_table,
    each_table,
    figures_table,
    measure,
    sizes_table,
    split_table,
)
from trajlm.typeset import markdown

HEAD = """# Results

    {command}

writes this page from finished grids; [evidence.md](evidence.md) says how to read it. Every figure is a mean over
patient splits, and over seeds where these are not averaged, on held-out stays, with a 95 % interval from resampling
patients. The static arm that a sequence model is compared with is, at each landmark, the one that was best on the
tuning stays of all splits; so are the sequence arms that the sentences speak of. Length of stay is that in hospital.
[{table}]({table}) holds every figure, [splits/](splits/) who was held out where.
"""


@dataclass(frozen=True)
class Found:
    """What a finished grid left: its folder, its record, and its figures with their resamples."""

    folder: Path
    record: dict[str, Any]
    runs: list[GridRun]
    pool: Pool

    @property
    def name(self) -> str:
        """Of the grid's file."""
        return self.record["name"]


def results(folders: Sequence[Path], out: Path) -> None:
    """Write the page, a ``.csv`` of every figure beside it, and each grid's splits below ``splits/NAME/``.

    Args:
        folders: that `trajlm experiment` filled.
        out: the page, a ``.md`` file.

    Raises:
        TrajlmError: a folder holds no finished grid, or two have one name.
    """
    grids = [read_found(Path(folder)) for folder in folders]
    names = [grid.name for grid in grids]
    if len(set(names)) < len(names):
        raise TrajlmError(f"results: expected grids of different names, came {', '.join(names)}")
    frames = [everything(grid.pool) for grid in grids]
    table = out.with_suffix(".csv")
    command = " ".join(["trajlm results", *(f"runs/{name}" for name in names), "--out", f"docs/{out.name}"])
    sections = [section(grid, frame) for grid, frame in zip(grids, frames, strict=True)]
    out.parent.mkdir(parents=True, exist_ok=True)
    for grid in grids:
        shutil.copytree(grid.folder / SPLIT_FOLDER, out.parent / SPLIT_FOLDER / grid.name, dirs_exist_ok=True)
    told = [frame.select(pl.lit(name).alias("grid"), pl.all()) for name, frame in zip(names, frames, strict=True)]
    write_text(table, pl.concat(told).write_csv())
    write_text(out, "\n".join([HEAD.format(command=command, table=table.name), *sections]))


def read_found(folder: Path) -> Found:
    """A grid's folder, as its ``grid.json`` tells.

    Raises:
        TrajlmError: no such folder, a grid that is not finished, or a run of it that is gone.
    """
    path = folder / RECORD
    if not folder.is_dir():
        raise TrajlmError(f"{folder}: no such folder; name the --out of a finished `trajlm experiment`")
    if not path.is_file():
        raise TrajlmError(
            f"{folder}: expected {RECORD} of a finished grid; run the same `trajlm experiment` again to go on with it"
        )
    record = json.loads(path.read_text())
    runs = [
        GridRun(run["split"], run["seed"], run["arm"], folder / run["path"], run.get("settings", {}))
        for run in record["runs"]
    ]
    gone = [run.path for run in runs if not run.path.is_dir()]
    if gone:
        raise TrajlmError(f"{gone[0]}: no such run any more; run the same `trajlm experiment` again to make it anew")
    resamples = min(read_run(run.path)["recipe"]["finetuning"]["bootstrap_resamples"] for run in runs)
    return Found(folder, record, runs, Pool(runs, resamples))


def everything(pool: Pool) -> pl.DataFrame:
    """POOLED_COLUMNS and ``what``: the value, or a sequence arm's difference to the best static arm."""
    figures, moved = pool.figures(), pool.differences()
    return pl.concat([figures.with_columns(what=pl.lit("value")), moved.with_columns(what=pl.lit("difference"))])


def section(grid: Found, frame: pl.DataFrame) -> str:
    """All of one grid, as Markdown."""
    values, moved = (frame.filter(pl.col("what") == what) for what in ("value", "difference"))
    lines = [f"## {grid.name}", "", about(grid), "", "In words:", ""]
    lines += [f"- {told}" for told in beside(grid.pool)]
    lines += [f"- {said}" for target in grid.pool.targets for said in verdicts(grid.pool, target, moved)]
    metrics = {run.split: json.loads((run.path / "metrics.json").read_text()) for run in grid.runs}
    tables = [sizes_table(grid.pool, metrics)]
    for target in grid.pool.targets:
        tables += [figures_table(values, target, metric) for metric in POOLED[target["kind"]]]
        tables += [difference_table(grid.pool, moved, target), each_table(grid.pool, target)]
        tables.append(split_table(grid.pool, target))
    tables.append(calibration_table(values, grid.pool))
    return "\n".join([*lines, "", *(markdown(table) for table in tables if table.rows)])


def beside(pool: Pool) -> list[str]:
    """What arms are made of, where that is more than one model, and what they are measured against."""
    kinds = {kind_of(arm) for arm in pool.arms if is_sequence_title(arm)}
    told = []
    if "network" in kinds:
        told.append(
            "The sequence model is a mean of its network with what its recipe sets beside it (a regression, trees), of "
            "the same events at the same moments; the network alone is an arm of its own. Both are measured against "
            "single static arms."
        )
    if "averaged" in kinds:
        told.append(
            "*Averaged* is the mean belief of two arms. Such a sequence arm is measured against static arms averaged "
            "in pairs as well."
        )
    if "seeds" in kinds:
        several = {arm.removesuffix(f", {ALL_SEEDS}") for arm in pool.static_arms if kind_of(arm) == "seeds"}
        lone = [arm for arm in pool.static_arms if kind_of(arm) != "seeds" and arm not in several]
        without = f" Static arms of one seed stand as they are: {'; '.join(lone)}." if lone else ""
        told.append(
            "*Seeds averaged* is the mean belief of all seeds of a split. Such a sequence arm is measured against all "
            f"static arms, those with their own seeds averaged included.{without}"
        )
    return told


def verdicts(pool: Pool, target: dict[str, Any], moved: pl.DataFrame) -> list[str]:
    """What is said of the best sequence arm of every kind."""
    if not pool.chosen(target):
        return [f"{measure(target, MAIN[target['kind']])}: no sequence model stands beside a static arm."]
    return [verdict(arm, target, moved) for arm in pool.chosen(target)]


def verdict(arm: str, target: dict[str, Any], moved: pl.DataFrame) -> str:
    """Where a sequence arm is ahead, behind, or neither: two sentences."""
    metric = MAIN[target["kind"]]
    name = measure(target, metric)
    own = moved.filter((pl.col("arm") == arm) & (pl.col("target") == target["name"]) & (pl.col("metric") == metric))
    told: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told from": []}
    lost, unseen = [], []
    for row in own.sort("landmark", nulls_last=True).filter(pl.col("value").is_not_null()).iter_rows(named=True):
        how, at = standing(row["low"], row["high"], metric), at_landmark(row["landmark"])
        ends = "" if row["low"] is None else f", 95 % interval {signed(row['low'])} to {signed(row['high'])}"
        told[how].append(f"{at} ({signed(row['value'])}{ends})")
        lost += [at] if how == "behind" else []
        worst = row["high" if metric in LOWER_IS_BETTER else "low"]
        unseen += [(abs(worst), at)] if how == "not told from" and worst is not None else []
    if not any(told.values()):
        return f"{name}: the {arm} stands beside no static arm."
    parts = [f"{how} the best static arm at {', '.join(where)}" for how, where in told.items() if where]
    if lost:
        end = f"It loses at {', '.join(lost)}."
    elif unseen:
        most, at = max(unseen)
        end = f"No loss is seen; one of {number(most)} at {at} would still agree with these stays."
    else:
        end = "It loses nowhere."
    model, _, how = arm.partition(", ")
    return f"{name}: the {model} ({how}) is {'; '.join(parts)}. {end}"


def standing(low: float | None, high: float | None, metric: str) -> str:
    """How a difference with this interval stands: ahead of, behind or not told from; without one, not told from."""
    if low is None or high is None or low <= 0 <= high:
        return "not told from"
    return "ahead of" if (low > 0) != (metric in LOWER_IS_BETTER) else "behind"


def about(grid: Found) -> str:
    """Release, command, machine, versions and cost, as the runs' own files tell them."""
    facts = [json.loads((run.path / "environment.json").read_text()) for run in grid.runs]
    machines = _listed(_made(fact, lambda by: "{cpu_count} cores, {device}".format(**by["hardware"])) for fact in facts)
    versions = _listed(
        _made(fact, lambda by: "Python {python}, torch {torch}".format(**by["versions"])) for fact in facts
    )
    commits = _listed(_made(fact, lambda by: str(by["git_commit"])[:12]) for fact in facts)
    hours, memory = sum(fact["seconds"] for fact in facts) / 3600, max(fact["peak_memory_gb"] for fact in facts)
    manifest = Path(read_run(grid.runs[0].path)["recipe"]["data"]) / "manifest.json"
    release = json.loads(manifest.read_text())["release"] + ". " if manifest.is_file() else ""
    cost = f"{len(facts)} fine-tuning runs, {hours:.1f} hours of them together, at most {memory:.1f} GB"
    asked = _asked(grid.record["grid"])
    return f"    {grid.record['command']}\n\n{release}{asked}{cost}; {machines}; {versions}; commit {commits}."


def _made(fact: dict[str, Any], tell: Callable[[dict[str, Any]], str]) -> str:
    """What is to be told of a run's environment, and of those in which it was later given more baselines."""
    return ", more arms by ".join(dict.fromkeys(tell(by) for by in [fact, *fact.get("grown_by", [])]))


def _asked(grid: dict[str, Any]) -> str:
    """What was run of a grid, as far as its record tells."""
    of = [f"{name} {', '.join(map(str, seeds))}" for name, seeds in grid.get("seeds_of", {}).items()]
    but = f" (but {'; '.join(of)})" if of else ""
    told = [f"Seeds {', '.join(map(str, grid['seeds']))}{but}"] if "seeds" in grid else []
    told += [f"{name} {', '.join(grid[name])}" for name in ("encoders", "backbones") if name in grid]
    return "; ".join(told) + ". " if told else ""


def _listed(facts: Iterable[str]) -> str:
    """What all share, or each with how many runs have it."""
    counted = Counter(facts)
    alone = len(counted) == 1
    return " and ".join(
        fact if alone else f"{fact} ({number} run{'s' * (number > 1)})" for fact, number in counted.items()
    )
