"""Runs side by side: held-out figures with intervals, in the shape of the paper's tables 2 and 3 (method 7 and 8)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.checkpoint import read_run, write_text
from trajlm.errors import TrajlmError
from trajlm.report.tables import NOT_DEFINED, count, interval, metric_title
from trajlm.schema import HELD_OUT

SEQUENCE = "sequence"
ARM_TITLES = {SEQUENCE: "Sequence model", "static_mlp": "Static MLP (late fusion)"}
PERFORMANCE = {"probability": ("auroc", "auprc"), "hours": ("mae", "pearson", "spearman")}
CALIBRATION = {"probability": ("adaptive_calibration_error", "brier_skill_score"), "hours": ()}
LOWER_IS_BETTER = {"mae", "mse", "adaptive_calibration_error"}
END = "end of window"
BOLD = "Bold is the best value of a column; where intervals overlap widely, the data do not tell two rows apart."
CSV_SCHEMA = {
    "run": pl.String, "arm": pl.String, "target": pl.String, "landmark": pl.String, "metric": pl.String,
    "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "stays": pl.Int64, "positives": pl.Int64,
}  # fmt: skip
TEX_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$",
    "<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}", "]": "{]}", "|": r"\textbar{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning run as read from its folder; ``name`` tells it from the others compared."""

    name: str
    backbone: str
    initialisation: str  # of the encoders: scratch or contrastive
    data: str  # hash of the prepared folder
    metrics: dict[str, Any]
    known: pl.DataFrame  # stay_id and target_<name> of every held-out stay, sorted


@dataclass(frozen=True)
class Arm:
    """A row of a table: one arm of a run, or a baseline that several runs share."""

    labels: tuple[str, str, str]  # model, encoders, run
    rows: list[dict[str, Any]]  # of metrics.json

    def at(self, target: str, metric: str, landmark: float | None) -> dict[str, Any] | None:
        """The row of that metric; None where the arm has none."""
        wanted = (target, metric, landmark)
        return next((r for r in self.rows if (r["target"], r["metric"], r["landmark"]) == wanted), None)


@dataclass(frozen=True)
class Table:
    """Texts of a table; ``best`` holds the (row, column) of cells to print bold."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    note: str = ""


def compare(runs: Sequence[Path], out: Path) -> None:
    """Write ``comparison.csv``, ``.tex`` and ``.md`` into ``out`` and print the last.

    The CSV is long (CSV_SCHEMA) and holds every held-out figure of every run; the tables hold performance and
    calibration at the end of the window, and the sequence models by landmark, with 95 % intervals.

    Raises:
        TrajlmError: a folder is not a finished fine-tuning run, or the held-out stays or known targets of two differ.
    """
    loaded = [_load(Path(path), name) for path, name in zip(runs, _names(runs), strict=True)]
    for other in loaded[1:]:
        _require_same_stays(loaded[0], other)
    tables = comparison_tables(loaded)
    text = "\n".join(_markdown(table) for table in tables)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "comparison.csv", _long(loaded).write_csv())
        write_text(out / "comparison.tex", "\n".join(_latex(table) for table in tables))
        write_text(out / "comparison.md", text)
    except OSError as error:
        raise TrajlmError(f"cannot write the comparison to {out}: {error.strerror or error}") from error
    print(text)


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
    about = read_run(path)
    if about.get("stage") != "finetuning":
        raise TrajlmError(f"{path} is a run of {about.get('stage')}; compare takes runs of finetune.py")
    if not (path / "metrics.json").exists() or not (path / "beliefs.parquet").exists():
        raise TrajlmError(f"{path}: fine-tuning has not finished there; run finetune.py again to resume it")
    beliefs = pl.read_parquet(path / "beliefs.parquet").filter(pl.col("split") == HELD_OUT)
    known = beliefs.select("stay_id", pl.col("^target_.*$").fill_nan(None)).unique("stay_id").sort("stay_id")
    recipe = about["recipe"]
    initialisation = "scratch" if recipe["encoders"] == "scratch" else "contrastive"
    metrics = json.loads((path / "metrics.json").read_text())
    return Run(name, recipe["backbone"]["name"], initialisation, about["inputs"]["data"], metrics, known)


def _require_same_stays(a: Run, b: Run) -> None:
    """Figures on other stays, or against other outcomes, are no comparison of models."""
    refusal = f"{a.name} and {b.name} cannot be compared: "
    lone = sorted(set(a.known["stay_id"]) ^ set(b.known["stay_id"]))
    if lone:
        holder = a if lone[0] in set(a.known["stay_id"]) else b
        raise TrajlmError(f"{refusal}stay {lone[0]} is held out in {holder.name} only ({len(lone)} such stays)")
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


def _arms(runs: Sequence[Run]) -> list[Arm]:
    """Static baselines first, as in the paper; one that runs share, figure by figure, stands once."""
    found: dict[str, tuple[tuple[str, str], list[dict[str, Any]], list[str]]] = {}
    for run in runs:
        for name, rows in run.metrics["arms"][HELD_OUT].items():
            if name != SEQUENCE:
                labels = (ARM_TITLES.get(name, name), run.initialisation)
                found.setdefault(json.dumps([labels, rows]), (labels, rows, []))[2].append(run.name)
    shared = [Arm((*labels, ", ".join(names)), rows) for labels, rows, names in found.values()]
    return shared + _sequence_arms(runs)


def _sequence_arms(runs: Sequence[Run]) -> list[Arm]:
    return [
        Arm((f"{ARM_TITLES[SEQUENCE]}, {r.backbone}", r.initialisation, r.name), r.metrics["arms"][HELD_OUT][SEQUENCE])
        for r in runs
    ]


def comparison_tables(runs: Sequence[Run]) -> list[Table]:
    """Performance, calibration, and one table per target and metric by landmark."""
    targets = runs[0].metrics["targets"]
    arms, sequences = _arms(runs), _sequence_arms(runs)
    unlike = len({run.data for run in runs}) > 1
    note = "The runs read differently prepared data of the same stays." if unlike else ""
    tables = []
    for title, by_kind in (("Performance", PERFORMANCE), ("Calibration", CALIBRATION)):
        columns = [(t, metric, None, _column(t, metric)) for t in targets for metric in by_kind[t["kind"]]]
        if columns:
            sizes = "; ".join(f"{t['title']}: {_sizes(arms, t['name'], None)}" for t in targets if by_kind[t["kind"]])
            tables.append(_table(f"{title} on held-out stays at the end of the window ({sizes})", arms, columns, note))
    for target in targets:
        landmarks = list(dict.fromkeys(r["landmark"] for arm in sequences for r in arm.rows))
        for metric in PERFORMANCE[target["kind"]]:
            columns = [(target, metric, at, _landmark(at)) for at in landmarks]
            sizes = "; ".join(f"{_landmark(at)}: {_sizes(sequences, target['name'], at)}" for at in landmarks)
            title = f"{_column(target, metric)} by landmark"
            tables.append(_table(title, sequences, columns, f"{note} Counted: {sizes}."))
    return tables


def _column(target: dict[str, str], metric: str) -> str:
    return f"{target['title'].capitalize()}, {metric_title(metric)}{' (h)' if metric == 'mae' else ''}"


def _landmark(hours: float | None) -> str:
    return END if hours is None else f"{hours:g} h"


def _sizes(arms: Sequence[Arm], target: str, landmark: float | None) -> str:
    rows = [r for arm in arms for r in arm.rows if (r["target"], r["landmark"]) == (target, landmark)]
    known = dict.fromkeys((r["stays"], r["positives"]) for r in rows)
    return " or ".join(f"{count(n)} stays" + (f", {count(p)} positive" if p is not None else "") for n, p in known)


def _table(title: str, arms: Sequence[Arm], columns: Sequence[tuple[Any, ...]], note: str) -> Table:
    rows, best = [list(arm.labels) for arm in arms], set()
    for place, (target, metric, landmark, _) in enumerate(columns, start=3):
        cells = [arm.at(target["name"], metric, landmark) for arm in arms]
        for row, cell in zip(rows, cells, strict=True):
            row.append(NOT_DEFINED if cell is None else interval(cell["value"], cell["low"], cell["high"]))
        values = {i: c["value"] for i, c in enumerate(cells) if c is not None and c["value"] is not None}
        if len(values) > 1:
            top = (min if metric in LOWER_IS_BETTER else max)(values.values())
            best |= {(i, place) for i, value in values.items() if value == top}
    note = f"{BOLD if best else ''} {note}".strip()
    return Table(title, ["Model", "Encoders", "Run", *(c[-1] for c in columns)], rows, best, note)


def _markdown(table: Table) -> str:
    def cell(text: str, label: bool = True) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", text) if label else text

    lines = [f"**{cell(table.title)}**", "", "| " + " | ".join(map(cell, table.columns)) + " |"]
    lines.append("|---|---|---|" + "---:|" * (len(table.columns) - 3))
    for i, row in enumerate(table.rows):
        bold = ["**" if (i, j) in table.best else "" for j in range(len(row))]
        shown = [f"{mark}{cell(text, j < 3)}{mark}" for j, (text, mark) in enumerate(zip(row, bold, strict=True))]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", cell(table.note), ""])


def _latex(table: Table) -> str:
    """A table that needs no package."""

    def cell(text: str) -> str:
        return "".join(TEX_SPECIAL.get(character, character) for character in text)

    caption = cell(f"{table.title}. {table.note}".strip())
    lines = [r"\begin{table}[ht]", r"\centering", rf"\caption{{{caption}}}"]
    lines += [rf"\begin{{tabular}}{{lll{'r' * (len(table.columns) - 3)}}}", r"\hline"]
    lines += [" & ".join(map(cell, table.columns)) + r" \\", r"\hline"]
    for i, row in enumerate(table.rows):
        shown = [rf"\textbf{{{cell(text)}}}" if (i, j) in table.best else cell(text) for j, text in enumerate(row)]
        lines.append(" & ".join(shown) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", r"\end{table}", ""])


def _long(runs: Sequence[Run]) -> pl.DataFrame:
    rows = [
        row | {"run": run.name, "arm": arm, "landmark": _landmark(row["landmark"])}
        for run in runs
        for arm, figures in run.metrics["arms"][HELD_OUT].items()
        for row in figures
    ]
    return pl.DataFrame(rows, schema=CSV_SCHEMA)  # other columns are left out
