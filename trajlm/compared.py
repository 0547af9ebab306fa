"""Runs as a comparison reads them: figures and beliefs of their arms, on the same held-out stays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.arms import arm_title, beliefs_path, is_sequence
from trajlm.checkpoint import GRID_DONE, GRID_RECORD, read_run
from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.metrics import Kind
from trajlm.schema import HELD_OUT
from trajlm.subgroups import STAYS

POOLING = "name runs of one split; `trajlm results GRID --out PAGE.md` pools the splits of a grid"


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run as read from its folder; ``name`` tells it from the others compared."""

    name: str
    path: Path
    recipe: dict[str, Any]
    data: str  # hash of the prepared folder
    metrics: dict[str, Any]
    known: pl.DataFrame  # stay_id and target_<name> of every held-out stay, sorted
    stays: pl.DataFrame  # what stay_attributes gives, tuning and held-out stays at least

    @property
    def backbone(self) -> str:
        """Name of the causal model."""
        return self.recipe["backbone"]["name"]

    @property
    def initialisation(self) -> str:
        """Of the encoders: scratch or contrastive."""
        return "scratch" if self.recipe["encoders"] == "scratch" else "contrastive"

    @property
    def resamples(self) -> int:
        """Of the bootstrap."""
        return self.recipe["finetuning"]["bootstrap_resamples"]

    @property
    def targets(self) -> list[tuple[str, Kind]]:
        """(name, kind) of every target that stands alone; those of a group are reported by their macro mean."""
        return [(t["name"], t["kind"]) for t in self.metrics["targets"] if t.get("group") is None]

    def beliefs(self, arm: str, split: str) -> pl.DataFrame:
        """Of an arm, in one split."""
        return _table(beliefs_path(self.path, arm)).filter(pl.col("split") == split)


@dataclass(frozen=True)
class Arm:
    """One arm of a run, or a baseline that several runs share figure by figure.

    Attributes:
        labels: model, encoders and runs, as printed.
        rows: its held-out rows of metrics.json.
        tuning: its tuning rows.
        name: of the arm in its run.
        run: the run it is read from, the first of those that share it.
    """

    labels: tuple[str, str, str]
    rows: list[dict[str, Any]]
    tuning: list[dict[str, Any]]
    name: str
    run: Run

    def at(self, target: str, metric: str, landmark: float | None, tuning: bool = False) -> dict[str, Any] | None:
        """The row of that metric; None where the arm has none."""
        wanted = (target, metric, landmark)
        rows = self.tuning if tuning else self.rows
        return next((r for r in rows if (r["target"], r["metric"], r["landmark"]) == wanted), None)

    @property
    def title(self) -> str:
        """In one line."""
        return f"{self.labels[0]}, {self.labels[1]} ({self.labels[2]})".replace(", – (", " (")


def load_runs(runs: Sequence[Path]) -> list[Run]:
    """Finished runs of finetune.py whose held-out stays and outcomes are the same.

    Raises:
        TrajlmError: a folder is not a finished fine-tuning run, or the held-out stays or known targets of two differ.
    """
    loaded = [_load(Path(path), name) for path, name in zip(runs, _names(runs), strict=True)]
    for other in loaded[1:]:
        _require_same_stays(loaded[0], other)
    return loaded


def _names(runs: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where those are not unique."""
    places = [Path(run).resolve() for run in runs]
    if not places:
        raise TrajlmError("compare: name at least one run folder")
    twice = next((run for i, run in enumerate(runs) if places[i] in places[:i]), None)
    if twice is not None:
        raise TrajlmError(f"compare: {twice} is named twice")
    short = [place.name for place in places]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _load(path: Path, name: str) -> Run:
    if not (path / "config.yaml").is_file():
        raise TrajlmError(_no_run(path))
    about = read_run(path)
    if about.get("stage") != "finetuning":
        raise TrajlmError(f"{path} is a run of {about.get('stage')}; compare takes runs of finetune.py")
    if not (path / "metrics.json").exists() or not (path / "beliefs.parquet").exists():
        raise TrajlmError(f"{path}: fine-tuning has not finished there; run finetune.py again to resume it")
    if not (path / STAYS).exists():
        raise TrajlmError(f"{path} has no {STAYS}: an earlier version made it; run finetune.py into another folder")
    beliefs = _table(path / "beliefs.parquet").filter(pl.col("split") == HELD_OUT)
    last = beliefs.sort("stay_id", "event_index").unique("stay_id", keep="last", maintain_order=True)
    known = last.select("stay_id", pl.col("^target_.*$").fill_nan(None))
    return Run(name, path, about["recipe"], about["inputs"]["data"], _metrics(path), known, _table(path / STAYS))


def _no_run(path: Path) -> str:
    """What to do about a folder that is no run: of a grid, of several runs, or of nothing known."""
    inside = [file.parent for place in ("*", "*/*") for file in sorted(path.glob(f"{place}/config.yaml"))]
    runs = [folder for folder in inside if (folder / "beliefs.parquet").exists()]
    places = [folder for folder in (path, *path.resolve().parents)
              if any((folder / name).exists() for name in (GRID_DONE, GRID_RECORD))]  # fmt: skip
    if runs:
        pooled = f"; `trajlm results {places[0]} --out PAGE.md` pools all of a grid" if places else ""
        return f"{path} is not a run folder but holds some: name those of one split, such as {runs[0]}{pooled}"
    if places:
        again = f"run the same `trajlm experiment` again to make what the grid in {places[0]} lacks"
        return f"{path} is not a run folder: no config.yaml; {again}"
    return f"{path} is not a run folder: no {'config.yaml' if path.is_dir() else 'such folder'}"


def _table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise _broken(path) from error


def _metrics(path: Path) -> dict[str, Any]:
    file = path / "metrics.json"
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise _broken(file) from error


def _broken(file: Path) -> UnexpectedInput:
    came = "one that cannot be read" if file.exists() else "no such file"
    hint = "put the file back as it was, or delete the run's folder and run finetune.py again"
    return UnexpectedInput(file, expected="a file of a finished run", came=came, hint=hint)


def _require_same_stays(a: Run, b: Run) -> None:
    """Figures on other stays, or against other outcomes, are no comparison of models."""
    refusal = f"{a.name} and {b.name} cannot be compared: "
    lone = sorted(set(a.known["stay_id"]) ^ set(b.known["stay_id"]))
    if lone:
        holder = a if lone[0] in set(a.known["stay_id"]) else b
        raise TrajlmError(
            f"{refusal}stay {lone[0]} is held out in {holder.name} only ({len(lone)} such stays); {POOLING}"
        )
    targets = sorted(set(a.known.columns) ^ set(b.known.columns))
    if targets:
        holder = a if targets[0] in a.known.columns else b
        raise TrajlmError(f"{refusal}only {holder.name} has beliefs on {targets[0].removeprefix('target_')}")
    for column in a.known.columns[1:]:
        differs = a.known[column].ne_missing(b.known[column])
        if differs.any():
            stay = a.known.filter(differs)["stay_id"][0]
            shown = [run.known.filter(pl.col("stay_id") == stay)[column][0] for run in (a, b)]
            one, two = ("unknown" if value is None else f"{value:g}" for value in shown)
            told = f"{one} in {a.name}, {two} in {b.name} ({differs.sum()} such stays)"
            raise TrajlmError(f"{refusal}{column} of held-out stay {stay} is {told}")


def static_arms(runs: Sequence[Run]) -> list[Arm]:
    """Every baseline; one that runs share, figure by figure, stands once. Those without encoders say so."""
    found: dict[str, tuple[tuple[str, str], str, list[Run]]] = {}
    for run in runs:
        for name, rows in run.metrics["arms"][HELD_OUT].items():
            if not is_sequence(name):
                title = arm_title(name)
                encoders = run.initialisation if name.startswith("static_") else "–"
                labels = (_capital(title), encoders)
                found.setdefault(json.dumps([labels, rows]), (labels, name, []))[2].append(run)
    return [_arm((*labels, ", ".join(run.name for run in of)), name, of[0]) for labels, name, of in found.values()]


def sequence_arms(runs: Sequence[Run]) -> list[Arm]:
    """The sequence model of every run, alone and averaged with baselines."""
    return [
        _arm((_capital(f"{arm_title(name)}, {run.backbone}"), run.initialisation, run.name), name, run)
        for run in runs
        for name in run.metrics["arms"][HELD_OUT]
        if is_sequence(name)
    ]


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _arm(labels: tuple[str, str, str], name: str, run: Run) -> Arm:
    return Arm(labels, run.metrics["arms"][HELD_OUT][name], run.metrics["arms"]["tuning"][name], name, run)
