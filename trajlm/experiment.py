"""A grid of runs: every combination of splits, initialisations, backbones, variants and seeds, one process per stage.

Static arms ride along in the runs (``baselines``), on the stays of the sequence model, each in the first run that would
find what it finds. A stage that is done is skipped, an interrupted one goes on; the comparison of each split and the
summary over all of them come last.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import polars as pl
import yaml

from trajlm.arms import BASELINE_ARMS, SEQUENCE
from trajlm.checkpoint import GRID_DONE, GRID_RECORD, write_text
from trajlm.compare import compare
from trajlm.errors import TrajlmError
from trajlm.grid import Grid, read_grid, require_runnable
from trajlm.locks import locked
from trajlm.pooled_arms import GridRun
from trajlm.summary import summarise
from trajlm.variants import read_by

DONE, RECORD = GRID_DONE, GRID_RECORD
SPLIT_FOLDER = "splits"  # of a grid's out: split-S.csv.gz, as `trajlm prepare --splits` takes them
# Sections of a recipe that stages of a level do not read: preparation, pretraining, fine-tuning.
LATER = ({"encoder", "pretraining", "backbone", "finetuning"}, {"backbone", "finetuning"}, set[str]())
ADDED = ("--finetuning.baselines", "--finetuning.ensembles")  # of these a finished run takes more
SEEDLESS = ("logistic", "severity")  # baselines that draw nothing at random


@dataclass(frozen=True)
class Stage:
    """One process: ``out`` names the folder it fills, ``command`` what runs, ``reads`` the recipe it depends on.

    Stages of one ``level`` need nothing of each other, only what those of lower levels leave. Nor do they read the
    recipe's sections of later stages: to try another fine-tuning costs no second pretraining.
    """

    out: str
    command: tuple[str, ...]
    reads: str
    level: int

    @property
    def identity(self) -> str:
        """Digest of the command and of what it reads of the recipe."""
        return _digest(self.command, self._read())

    def is_noted(self, done: dict[str, str]) -> bool:
        """Whether it is among the done ones; a recipe that is gone cannot tell, and is refused elsewhere."""
        return self.out in done and (not Path(self.reads).is_file() or done[self.out] == self.identity)

    def adds_to(self, identity: str) -> bool:
        """Whether a stage of this identity did the same but for some of the baselines: fine-tuning adds what lacks."""
        places = [self.command.index(flag) + 1 for flag in ADDED if flag in self.command]
        read, command = self._read(), list(self.command)
        for lists in itertools.product(*(_choices(json.loads(self.command[place])) for place in places)):
            for place, chosen in zip(places, lists, strict=True):
                command[place] = json.dumps(chosen)
            if _digest(command, read) == identity:
                return True
        return False

    def _read(self) -> dict[str, Any]:
        recipe = yaml.safe_load(Path(self.reads).read_text()) or {}
        return {name: value for name, value in recipe.items() if name not in LATER[self.level]}


def _digest(command: Sequence[str], read: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([*command, read], sort_keys=True).encode()).hexdigest()


def _choices(names: Sequence[str]) -> list[list[str]]:
    """Every choice of some of the names in any order, all and none among them."""
    return [list(some) for size in range(len(names), -1, -1) for some in itertools.permutations(names, size)]


def plan(grid: Grid, out: Path) -> tuple[list[Stage], list[GridRun]]:
    """Stages in the order they run, and the runs they end in.

    Raises:
        TrajlmError: an encoder, backbone, variant, baseline or seed that the grid lists is in none of its runs.
    """
    stages: list[Stage] = []
    runs: list[GridRun] = []
    fitted: set[tuple[str, ...]] = set()
    taken: set[str] = set()
    for split in grid.splits if grid.data is None else ["given"]:
        # A file that an earlier grid published, split-S.csv.gz, goes by its own name.
        home = "split-" + re.sub(r"\.csv(\.gz)?$", "", Path(str(split)).name).removeprefix("split-")
        data = grid.data or str(out / home / "prepared")
        if grid.data is None:
            stages.append(_stage(grid, f"{home}/prepared", _prepare(grid, split, data), 0))
        for seed, start, backbone, variant in _combinations(grid):
            settings = grid.variants.get(variant, {})
            taken |= {start, backbone, variant, f"seed {seed}"}
            encoders = "scratch"
            if start == "contrastive":
                pretraining = _pretraining(grid, out, home, data, seed, variant, settings)
                if pretraining not in stages:
                    stages.append(pretraining)
                encoders = str(out / pretraining.out)
            arm = "-".join(filter(None, [start, backbone.replace("/", "_"), variant]))
            name = f"{home}/{arm}-seed-{seed}"
            baselines = _baselines(grid, fitted, home, seed, start, settings)
            flags = {"encoders": encoders, "backbone.name": backbone, "finetuning.baselines": baselines,
                     "finetuning.ensembles": [e for e in grid.ensembles if e in baselines]}  # fmt: skip
            command = _script("finetune.py", grid, out=str(out / name), data=data, seed=seed, **flags, **settings)
            stages.append(_stage(grid, name, command, 2))
            taken |= set(baselines)
            runs.append(GridRun(home, seed, arm, out / name, settings))
    listed = {*grid.encoders, *grid.backbones, *grid.variants, *grid.baselines, *(f"seed {s}" for s in grid.seeds)}
    left = sorted(listed - taken)
    if left:
        raise TrajlmError(
            f"{', '.join(left)}: in no run of this grid, by seeds_of, or because what it sets is read by none of its "
            "encoders"
        )
    return sorted(stages, key=lambda stage: stage.level), runs


def _combinations(grid: Grid) -> Iterator[tuple[int, str, str, str]]:
    """Seed, encoders, backbone and variant ("" without any) of every run of a split."""
    for seed, start, backbone in itertools.product(grid.seeds, grid.encoders, grid.backbones):
        # Of variants that a start does not tell apart, the first stands for all.
        apart: dict[str, str] = {}
        for variant, settings in (grid.variants or {"": {}}).items():
            apart.setdefault(json.dumps(read_by(SEQUENCE, settings, start), sort_keys=True), variant)
        for variant in apart.values():
            if grid.takes(seed, start, backbone, variant):
                yield seed, start, backbone, variant


def _pretraining(
    grid: Grid, out: Path, home: str, data: str, seed: int, variant: str, settings: dict[str, Any]
) -> Stage:
    """Of a variant's encoders: its own where it sets something that pretraining reads, else those of all the others."""
    own = _read_by(settings, 1)
    name = "-".join(filter(None, [f"{home}/encoders", variant if own else "", f"seed-{seed}"]))
    settled = dataclasses.replace(grid, settings=_read_by(grid.settings, 1))
    command = _script("pretrain.py", settled, out=str(out / name), data=data, seed=seed, **own)
    return _stage(grid, name, command, 1)


def _baselines(
    grid: Grid, fitted: set[tuple[str, ...]], home: str, seed: int, start: str, settings: dict[str, Any]
) -> list[str]:
    """Those that no earlier run of the split fits alike; ``fitted`` takes them in."""
    own = [name for name in grid.baselines if grid.takes(seed, name)]
    keys = {name: (home, *_depends_on(grid, name, seed, start, settings)) for name in own}
    chosen = [name for name, key in keys.items() if key not in fitted]
    fitted.update(keys.values())
    return chosen


def _depends_on(grid: Grid, baseline: str, seed: int, start: str, settings: dict[str, Any]) -> tuple[str, ...]:
    """What two runs of a split must share for a baseline to come out the same in both."""
    arm = BASELINE_ARMS[baseline]
    variant = json.dumps(read_by(arm, settings, start), sort_keys=True)
    # Which unseen stays train depends on the seed; from the training split a linear model learns the same each time.
    stays = (grid.settings | settings).get("finetuning.stays")
    seedless = baseline in SEEDLESS and stays == "train"
    return baseline, variant, start if arm.startswith("static_") else "", "" if seedless else str(seed)


def _stage(grid: Grid, out: str, command: list[str], level: int) -> Stage:
    return Stage(out, tuple(command), grid.recipe, level)


def _prepare(grid: Grid, split: int | str, data: str) -> list[str]:
    which = ["--seed", str(split)] if isinstance(split, int) else ["--splits", split]
    command = [sys.executable, "-m", "trajlm.cli", "prepare", "--config", grid.recipe, "--raw", str(grid.raw)]
    return [*command, "--out", data, *which]


def _read_by(settings: dict[str, Any], level: int) -> dict[str, Any]:
    """The settings without those of later stages."""
    return {key: value for key, value in settings.items() if key.split(".")[0] not in LATER[level]}


def _script(name: str, grid: Grid, **flags: Any) -> list[str]:
    """A stage script with the grid's settings; what is given here comes last and so prevails."""
    path = Path(__file__).parents[1] / name
    if not path.is_file():
        raise TrajlmError(f"{path} is missing: `trajlm experiment` runs the stage scripts of a checkout")
    words = [sys.executable, str(path), "--config", grid.recipe]
    for key, value in (grid.settings | flags).items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return words


def experiment(path: Path, out: Path, raw: str | None = None, data: str | None = None, jobs: int = 1) -> None:
    """Run a grid into ``out``, or what is left of it, and write its tables.

    ``out`` then holds ``split-S/`` with the prepared folder, its stays (``stays.csv``: stay_id, split), encoders, runs
    and ``tables/`` (:func:`trajlm.compare.compare`), and ``summary.md``, ``.tex`` and ``.csv`` over splits and seeds;
    ``splits/`` the splits packed, ``grid.json`` what was run: :func:`trajlm.results.results` reads it.

    Args:
        path: the grid, a YAML file.
        out: folder to fill.
        raw, data: instead of the grid's.
        jobs: stages to run at a time.

    Raises:
        TrajlmError: the grid is not valid, ``out`` holds another grid's stages, or a stage fails.
    """
    grid = read_grid(path, raw=raw, data=data)
    stages, runs = plan(grid, out)
    with locked(out):
        done = _done(out)
        require_runnable(path, grid, [(s.out, s.level, s.command) for s in stages if not s.is_noted(done)])
        work = _Work(out, len(stages), done)
        work.check(stages)
        out.mkdir(parents=True, exist_ok=True)
        _run_all(stages, work, jobs)
        _write_tables(path, grid, runs, out)


def _run_all(stages: Sequence[Stage], work: _Work, jobs: int) -> None:
    """Level by level, ``jobs`` at a time."""
    for level in sorted({stage.level for stage in stages}):
        with ThreadPoolExecutor(jobs) as pool:
            mine = [pool.submit(work.do, stage) for stage in stages if stage.level == level]
            # The first that fails is told when the others of its level that have begun are through.
            wait(mine, return_when=FIRST_EXCEPTION)
            pool.shutdown(cancel_futures=True)
            for stage_done in mine:
                if not stage_done.cancelled():
                    stage_done.result()


def _write_tables(path: Path, grid: Grid, runs: Sequence[GridRun], out: Path) -> None:
    """Of the finished runs: the record, each split's stays and comparison, the summary."""
    write_text(out / RECORD, json.dumps(_record(path, grid, runs, out), indent=1))
    for split in dict.fromkeys(run.split for run in runs):
        _publish_stays(grid, out, split)
        compare([run.path for run in runs if run.split == split], out / split / "tables")
    summarise(runs, out)


class _Work:
    """Runs stages and notes which are done, for one or more threads."""

    def __init__(self, out: Path, total: int, done: dict[str, str]) -> None:
        self._out, self._total, self._done = out, total, done
        self._begun = 0
        self._lock = Lock()

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse a folder that another grid or recipe made; one that lacks baselines alone is not done."""
        changed = [stage for stage in stages if self._done.get(stage.out, stage.identity) != stage.identity]
        for stage in changed:
            if not stage.adds_to(self._done[stage.out]):
                raise TrajlmError(
                    f"{self._out / stage.out} was made by another grid or recipe; choose another --out, or delete that "
                    "folder"
                )
        for stage in changed:
            del self._done[stage.out]

    def do(self, stage: Stage) -> None:
        """Run a stage unless it is done."""
        with self._lock:
            self._begun += 1
            done = stage.out in self._done
            print(f"[{self._begun}/{self._total}] {stage.out}{' is done already' if done else ''}", flush=True)
        if not done:
            _run(stage, self._out)
            with self._lock:
                self._done[stage.out] = stage.identity
                write_text(self._out / DONE, json.dumps(self._done, indent=1))


def _done(out: Path) -> dict[str, str]:
    """Identity by folder of the stages that ended well; a folder deleted since is not done."""
    told = json.loads((out / DONE).read_text()) if (out / DONE).exists() else {}
    return {name: identity for name, identity in told.items() if (out / name).exists()}


def _run(stage: Stage, out: Path) -> None:
    (out / stage.out).parent.mkdir(parents=True, exist_ok=True)
    here = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    code = subprocess.run(stage.command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    if code:
        raise TrajlmError(
            f"{stage.out}: ended with status {code}; once what it told is put right, the same command resumes there"
        )


def _publish_stays(grid: Grid, out: Path, split: str) -> None:
    """The split as ``stays.csv`` beside its runs, and packed in the folder of all splits."""
    folder = Path(grid.data) if grid.data is not None else out / split / "prepared"
    stays = pl.read_parquet(folder / "stays.parquet").select("stay_id", "split").sort("stay_id")
    text = stays.write_csv()
    for place in (out / split, out / SPLIT_FOLDER):
        place.mkdir(parents=True, exist_ok=True)
    write_text(out / split / "stays.csv", text)
    (out / SPLIT_FOLDER / f"{split}.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def _record(path: Path, grid: Grid, runs: Sequence[GridRun], out: Path) -> dict[str, Any]:
    """What a reader of ``out`` needs to know of how it came to be; folders of records go by their names alone."""
    place = path.resolve()
    checkout = Path(__file__).parents[1]
    shown = place.relative_to(checkout) if place.is_relative_to(checkout) else Path(place.name)
    source = f"--raw {Path(str(grid.raw)).name}" if grid.data is None else f"--data {Path(grid.data).name}"
    told = [
        {"split": r.split, "seed": r.seed, "arm": r.arm, "path": str(r.path.relative_to(out)), "settings": r.settings}
        for r in runs
    ]
    return {
        "name": path.stem,
        "command": f"trajlm experiment {shown} {source} --out runs/{path.stem}",
        "grid": dataclasses.asdict(grid) | {"recipe": Path(grid.recipe).name, "raw": None, "data": None},
        "runs": told,
    }
