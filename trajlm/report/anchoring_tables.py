"""The anchoring audit as tables a reader sees: of one run, and of two runs' difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from trajlm.report.contents import TargetInfo
from trajlm.report.tables import NOT_DEFINED, Block, Table, count, name_label

SHOWN = 2  # targets whose rows are not folded
SHARES = {
    "share_before": "attention on demographics (%)",
    "share_after": "without it (%)",
    "share_change": "change (points)",
}
BELIEFS = {"drift": "drift of the belief", "absolute_drift": "size of the drift", "flips": "decisions flipped (%)"}
MEASURE_TITLES = SHARES | BELIEFS
IN_PERCENT = {*SHARES, "flips"}
SIGNED = {"share_change", "drift"}


def unit_of(measure: str, target: TargetInfo) -> str:
    """The unit in which the measure is shown."""
    if measure in ("share_before", "share_after", "flips"):
        return "%"
    return "points" if measure in IN_PERCENT or target.kind == "probability" else target.unit


def shown(measure: str, target: TargetInfo, value: float) -> float:
    """A value of the audit in that unit."""
    return 100 * value if measure in IN_PERCENT or target.kind == "probability" else value


def summary_table(summary: pl.DataFrame, targets: Sequence[TargetInfo]) -> Table:
    """Means of one run with their 95 % intervals: a block per target, a row per ablation.

    Args:
        summary: SUMMARY_COLUMNS of :mod:`trajlm.interpret.audit`.
    """
    return _table(summary, targets, "Before and after an ablation: mean [95% interval]", SIGNED)


def difference_table(difference: pl.DataFrame, targets: Sequence[TargetInfo], against: str) -> Table:
    """The same of the difference between two runs, paired by stay."""
    caption = f"This run minus {against}, paired by stay: mean [95% interval]"
    return _table(difference, targets, caption, set(MEASURE_TITLES))


def _table(summary: pl.DataFrame, targets: Sequence[TargetInfo], caption: str, signed: set[str]) -> Table:
    held = set(summary["measure"])
    measures = [name for name in MEASURE_TITLES if name in held]
    blocks = []
    for target in targets:
        own = summary.filter(pl.col("target") == target.name)
        rows = [
            _row(own.filter(pl.col("ablated") == ablated), ablated, measures, target, signed)
            for ablated in own["ablated"].unique(maintain_order=True)
        ]
        unit = "points" if target.kind == "probability" else target.unit
        blocks.append(Block(target.title, f"beliefs in {unit}", rows))
    titles = [MEASURE_TITLES[name] for name in measures]
    return Table(caption, ["Ablated", "stays", *titles], blocks[:SHOWN], folded=blocks[SHOWN:])


def _row(own: pl.DataFrame, ablated: str, measures: Sequence[str], target: TargetInfo, signed: set[str]) -> list[str]:
    found = {row["measure"]: row for row in own.iter_rows(named=True)}
    stays = max(row["stays"] for row in found.values())
    cells = [_cell(found.get(name), name, target, name in signed) for name in measures]
    return [name_label(ablated), count(stays), *cells]


def _cell(row: dict[str, Any] | None, measure: str, target: TargetInfo, signed: bool) -> str:
    if row is None:
        return NOT_DEFINED

    def told(value: float) -> str:
        text = f"{shown(measure, target, value):{'+' if signed else ''}.1f}"
        return text.replace("-", "−") if text not in ("-0.0", "+0.0") else "0.0"

    if row["low"] is None or row["high"] is None:
        return told(row["value"])
    return f"{told(row['value'])} [{told(row['low'])}, {told(row['high'])}]"
