"""Diagnoses and treatments of eICU: paths such as ``renal|disorder of kidney|acute renal failure``."""

from __future__ import annotations

import polars as pl

from trajlm.cohorts.eicu_rows import HOURS, STAY, EventTables
from trajlm.schema import Feature

DIAGNOSIS = "diagnosis"
TREATMENT = "treatment"

_LEVELS = "levels"


def read_codes(tables: EventTables, modality: str) -> list[Feature]:
    """Spool one of the two tables: a row gives a category for its path and for every path above it.

    So a rare leaf still counts towards what it is a case of. ``activeupondischarge`` is not read: it is of the future.

    Args:
        modality: ``diagnosis`` or ``treatment``, which is also the table's name and that of its columns.

    Returns:
        A feature for every path met.
    """
    path, offset = f"{modality}string", f"{modality}offset"
    found: set[str] = set()
    for table in tables.batches(modality, {offset: "number", path: "string"}):
        levels = pl.col(path).str.split("|").list.eval(pl.element().str.strip_chars())
        levels = levels.list.eval(pl.element().filter(pl.element() != ""))
        frame = table.frame.with_columns(levels.alias(_LEVELS))
        empty = (f"names no {modality}", pl.col(_LEVELS).is_null() | (pl.col(_LEVELS).list.len() == 0))
        frame = tables.dated(table, frame, pl.col(offset), rules=[empty])
        rows = path_rows(frame)
        found.update(rows["feature"].unique().to_list())
        tables.deliver(table, frame, rows, modality)
    share = tables.settings.least_code_share
    return [Feature(modality, name, kind="category", least_share=share) for name in sorted(found)]


def path_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """A row of value 1 for every prefix of ``levels``, each once per stay and time.

    Args:
        frame: STAY, HOURS and ``levels``, a list of at least one name.
    """
    deepest = frame[_LEVELS].list.len().max() or 0
    parts = [
        frame.filter(pl.col(_LEVELS).list.len() >= depth).select(
            STAY, HOURS, pl.col(_LEVELS).list.head(depth).list.join("|").alias("feature")
        )
        for depth in range(1, int(str(deepest)) + 1)
    ]
    if not parts:
        return frame.select(STAY, HOURS, pl.lit("").alias("feature"), pl.lit(1.0).alias("value"))
    return pl.concat(parts).unique(maintain_order=True).with_columns(pl.lit(1.0).alias("value"))
