"""Runs side by side: held-out figures with intervals, in the shape of the paper's tables 2 and 3 (method 7 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.arms import ARM_TITLES, SEQUENCE
from trajlm.calibration import CALIBRATION_NOTE
from trajlm.checkpoint import write_text
from trajlm.compared import Arm, Run, load_runs, sequence_arms, static_arms
from trajlm.errors import TrajlmError
from trajlm.evidence import Evidence, gather
from trajlm.report.comparison import write_plots
from trajlm.report.tables import NOT_DEFINED, count, interval, metric_title, signed
from trajlm.schema import HELD_OUT, NOTHING
from trajlm.typeset import Table, latex, markdown

PERFORMANCE = {
    "probability": ("auroc", "auprc"),
    "hours": ("mse", "mae", "pearson", "spearman"),
    "group": ("macro_auroc", "macro_auprc"),
}
PAIRED = {"probability": ("auroc", "auprc"), "hours": ("mae", "spearman")}
MAIN = {"probability": "auroc", "hours": "mae"}
LOWER_IS_BETTER = {"mae", "mse", "adaptive_calibration_error"}
UNITS = {"mae": " (h)", "mse": " (h²)"}
END = "end of window"
BOLD = "Bold is the best value of a column; where intervals overlap widely, the data do not tell two rows apart."
LABELS = ["Model", "Encoders", "Run"]
CSV_SCHEMA = {
    "run": pl.String, "arm": pl.String, "target": pl.String, "landmark": pl.String, "metric": pl.String,
    "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "stays": pl.Int64, "positives": pl.Int64,
}  # fmt: skip


def compare(runs: Sequence[Path], out: Path, remove: bool = False) -> None:
    """Write tables and plots of these runs into ``out`` and print the tables.

    ``comparison.csv`` is long (CSV_SCHEMA) and holds every held-out figure of every run; ``comparison.md`` and ``.tex``
    hold performance and calibration at the end of the window, figures by landmark, the paired differences of the
    sequence models to the best static arm, and subgroups, with 95 % intervals. ``paired.csv``, ``calibration.csv``,
    ``reliability.csv`` and ``subgroups.csv`` hold what is behind these, ``plots.html`` draws it (no network needed).

    Args:
        runs: run folders of finetune.py.
        out: folder to write.
        remove: also remove each modality and each pair of them at test time: ``removals.csv`` and a table. It reads the
            prepared folder and runs the models again.

    Raises:
        TrajlmError: a folder is not a finished fine-tuning run, or the held-out stays or known targets of two differ.
    """
    loaded = load_runs(runs)
    statics, sequences = static_arms(loaded), sequence_arms(loaded)
    evidence = gather(loaded, sequences, statics)
    tables = comparison_tables(loaded, statics, sequences, evidence)
    removed = _removals(sequences) if remove else None
    if removed is not None:
        tables += [table for target in _targets(loaded) for table in _removal_tables(target, removed)]
    text = "\n".join(markdown(table) for table in tables)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "comparison.csv", _long(loaded).write_csv())
        write_text(out / "comparison.tex", "\n".join(latex(table) for table in tables))
        write_text(out / "comparison.md", text)
        for name in ("paired", "calibration", "reliability", "subgroups"):
            write_text(out / f"{name}.csv", getattr(evidence, name).write_csv())
        if removed is not None:
            write_text(out / "removals.csv", removed.write_csv())
        write_plots(out / "plots.html", [*statics, *sequences], _targets(loaded), evidence.reliability)
    except OSError as error:
        raise TrajlmError(f"cannot write the comparison to {out}: {error.strerror or error}") from error
    print(text)


def _removals(sequences: Sequence[Arm]) -> pl.DataFrame:
    """REMOVAL_COLUMNS of every run, ``arm`` its title and the run's name."""
    from trajlm.interpret.removal import run_removals

    frames = []
    for arm in (a for a in sequences if a.name == SEQUENCE):
        found = run_removals(arm.run.path, arm.run.targets, arm.run.resamples)
        named = pl.col("arm").replace_strict(ARM_TITLES) + f" ({arm.run.name})"
        frames.append(found.with_columns(arm=named))
    return pl.concat(frames)


def _removal_tables(target: dict[str, Any], found: pl.DataFrame) -> list[Table]:
    """The main metric without each modality and pair, and what the loss costs."""
    if target["kind"] not in MAIN:
        return []
    metric = MAIN[target["kind"]]
    own = found.filter((pl.col("target") == target["name"]) & (pl.col("metric") == metric))
    rows = []
    for row in own.iter_rows(named=True):
        moved = {"value": row["difference"], "low": row["difference_low"], "high": row["difference_high"]}
        change = NOT_DEFINED if row["removed"] == NOTHING else _difference(moved | {"p_value": None})
        rows.append(
            [row["arm"], row["removed"], f"{count(row['changed'])} of {count(row['stays'])}", _shown(row), change]
        )
    title = f"{_column(target, metric)} with modalities removed at test time, at the end of the window"
    note = "Change: minus the same stays' figure with nothing removed. Stays left without any event are left out."
    return [Table(title, ["Model", "Removed", "Stays that lost events", "Value", "Change"], rows, set(), note)]


def _targets(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """name, kind and title of what has columns: single targets, and groups by their macro means."""
    metrics = runs[0].metrics
    alone = [target for target in metrics["targets"] if target.get("group") is None]
    groups = [{"name": g["name"], "kind": "group", "title": g["title"]} for g in metrics.get("groups", [])]
    return alone + groups


def comparison_tables(
    runs: Sequence[Run], statics: Sequence[Arm], sequences: Sequence[Arm], evidence: Evidence
) -> list[Table]:
    """Performance, calibration, and per target: by landmark, against the best static arm, by subgroup."""
    targets, arms = _targets(runs), [*statics, *sequences]
    unlike = len({run.data for run in runs}) > 1
    note = "The runs read differently prepared data of the same stays." if unlike else ""
    columns = [(t, metric, None, _column(t, metric)) for t in targets for metric in PERFORMANCE[t["kind"]]]
    sizes = "; ".join(f"{t['title']}: {_sizes(arms, t['name'], None)}" for t in targets)
    tables = [_table(f"Performance on held-out stays at the end of the window ({sizes})", arms, columns, note)]
    if not evidence.calibration.is_empty():
        tables.append(_calibration_table(arms, targets, evidence.calibration))
    for target in targets:
        tables += _landmark_tables(arms, target, note)
        if target["kind"] in PAIRED:
            tables += _paired_tables(sequences, target, evidence.paired)
            tables += _subgroup_tables(target, evidence.subgroups)
    return tables


def _landmark_tables(arms: Sequence[Arm], target: dict[str, Any], note: str) -> list[Table]:
    """Of the arms that have figures at more than the end of the window."""
    own = [arm for arm in arms if len({r["landmark"] for r in arm.rows if r["target"] == target["name"]}) > 1]
    landmarks = list(dict.fromkeys(r["landmark"] for arm in own for r in arm.rows))
    sizes = "; ".join(f"{_landmark(at)}: {_sizes(own, target['name'], at)}" for at in landmarks)
    tables = []
    for metric in PERFORMANCE[target["kind"]] if own else ():
        columns = [(target, metric, at, _landmark(at)) for at in landmarks]
        title = f"{_column(target, metric)} by landmark"
        tables.append(_table(title, own, columns, f"{note} Counted: {sizes}."))
    return tables


def _column(target: dict[str, str], metric: str) -> str:
    return f"{target['title'].capitalize()}, {metric_title(metric)}{UNITS.get(metric, '')}"


def _landmark(hours: float | None) -> str:
    return END if hours is None else f"{hours:g} h"


def _sizes(arms: Sequence[Arm], target: str, landmark: float | None) -> str:
    rows = [r for arm in arms for r in arm.rows if (r["target"], r["landmark"]) == (target, landmark)]
    known = dict.fromkeys((r["stays"], r["positives"]) for r in rows)
    return " or ".join(f"{count(n)} stays" + (f", {count(p)} positive" if p is not None else "") for n, p in known)


def _table(title: str, arms: Sequence[Arm], columns: Sequence[tuple[Any, ...]], note: str) -> Table:
    cells = [[arm.at(target["name"], metric, landmark) for arm in arms] for target, metric, landmark, _ in columns]
    best = {
        (row, place)
        for place, (column, (_, metric, _, _)) in enumerate(zip(cells, columns, strict=True), start=len(LABELS))
        for row in _best(column, metric)
    }
    rows = [[*arm.labels, *(_shown(column[i]) for column in cells)] for i, arm in enumerate(arms)]
    return Table(title, [*LABELS, *(c[-1] for c in columns)], rows, best, f"{BOLD if best else ''} {note}".strip())


def _best(cells: Sequence[dict[str, Any] | None], metric: str) -> set[int]:
    values = {i: cell["value"] for i, cell in enumerate(cells) if cell is not None and cell["value"] is not None}
    top = (min if metric in LOWER_IS_BETTER else max)(values.values(), default=None)
    return {i for i, value in values.items() if value == top and len(values) > 1}


def _shown(cell: dict[str, Any] | None) -> str:
    return NOT_DEFINED if cell is None else interval(cell["value"], cell["low"], cell["high"])


def _calibration_table(arms: Sequence[Arm], targets: Sequence[dict[str, Any]], found: pl.DataFrame) -> Table:
    """As believed, and after a temperature fitted on the tuning stays."""
    columns = [
        (target["name"], metric, scaling, f"{_column(target, metric)}{words}")
        for target in targets
        for metric in ("adaptive_calibration_error", "brier_skill_score")
        for scaling, words in (("none", ""), ("temperature", ", scaled"))
        if target["kind"] == "probability"
    ]
    by_key = {(r["arm"], r["target"], r["metric"], r["scaling"]): r for r in found.iter_rows(named=True)}
    cells = [[by_key.get((arm.title, *column[:3])) for arm in arms] for column in columns]
    best = {(row, place) for place, (column, (_, metric, _, _)) in enumerate(zip(cells, columns, strict=True), start=3)
            for row in _best(column, metric)}  # fmt: skip
    rows = [[*arm.labels, *(_shown(column[i]) for column in cells)] for i, arm in enumerate(arms)]
    title = "Calibration on held-out stays at the end of the window"
    note = f"{BOLD if best else ''} {CALIBRATION_NOTE}".strip()
    return Table(title, [*LABELS, *(c[-1] for c in columns)], rows, best, note)


def _paired_tables(sequences: Sequence[Arm], target: dict[str, Any], found: pl.DataFrame) -> list[Table]:
    """Sequence model minus the best static arm, on the same stays."""
    own = found.filter(pl.col("target") == target["name"])
    landmarks = own["landmark"].unique(maintain_order=True).to_list()
    rivals: dict[str, list[str]] = {}
    for at in landmarks:
        rival = own.filter(pl.col("landmark").eq_missing(pl.lit(at, pl.Float64)))["against"][0]
        rivals.setdefault(rival, []).append(_landmark(at))
    words = "; ".join(f"{rival} at {', '.join(at)}" for rival, at in rivals.items())
    note = f"Best on the tuning stays: {words}. An interval that holds 0 does not tell the two apart."
    tables = []
    for metric in PAIRED[target["kind"]] if len(own) else ():
        by_key = {
            (r["run"], r["arm"], r["landmark"]): r for r in own.filter(pl.col("metric") == metric).iter_rows(named=True)
        }
        rows = [
            [*arm.labels, *(_difference(by_key.get((arm.run.name, arm.name, at))) for at in landmarks)]
            for arm in sequences
        ]
        title = f"{_column(target, metric)}: sequence model minus the best static arm"
        tables.append(Table(title, [*LABELS, *map(_landmark, landmarks)], rows, set(), note))
    return tables


def _difference(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["value"] is None:
        return NOT_DEFINED
    ends = "" if cell["low"] is None else f" [{signed(cell['low'])}, {signed(cell['high'])}]"
    p = "" if cell["p_value"] is None else f", p = {cell['p_value']:.3f}".replace("p = 0.000", "p < 0.001")
    return f"{signed(cell['value'])}{ends}{p}"


def _subgroup_tables(target: dict[str, Any], found: pl.DataFrame) -> list[Table]:
    """The main metric by group, with its gap to all other stays."""
    metric = MAIN[target["kind"]]
    own = found.filter((pl.col("target") == target["name"]) & (pl.col("metric") == metric))
    arms = own["arm"].unique(maintain_order=True).to_list()
    by_key = {(r["dimension"], r["group"], r["arm"]): r for r in own.iter_rows(named=True)}
    groups = own.select("dimension", "group", "stays").unique(["dimension", "group"], maintain_order=True).rows()
    rows = []
    for dimension, group, stays in groups:
        row = [dimension, group, count(stays)]
        for arm in arms:
            cell = by_key[dimension, group, arm]
            row += [_shown(cell), _difference(cell | {"value": cell["gap"], "low": cell["gap_low"],
                                                      "high": cell["gap_high"], "p_value": None})]  # fmt: skip
        rows.append(row)
    columns = ["By", "Group", "Stays", *(f"{arm}{part}" for arm in arms for part in ("", ", gap"))]
    note = "Gap: the group minus all other stays. Many groups are looked at: some gaps will be chance."
    title = f"{_column(target, metric)} by subgroup at the end of the window"
    return [Table(title, columns, rows, set(), note)] if rows else []


def _long(runs: Sequence[Run]) -> pl.DataFrame:
    rows = [
        row | {"run": run.name, "arm": arm, "landmark": _landmark(row["landmark"])}
        for run in runs
        for arm, figures in run.metrics["arms"][HELD_OUT].items()
        for row in figures
    ]
    return pl.DataFrame(rows, schema=CSV_SCHEMA)  # other columns are left out
