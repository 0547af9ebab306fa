"""The raw values behind every event of a stay, with their units: what a reader sees on pointing at one."""

from __future__ import annotations

from typing import Any

import polars as pl

from trajlm.interpret.beliefs import raw_values
from trajlm.report.contents import VALUE_COLUMNS
from trajlm.schema import Timeline
from trajlm.trajectory import TrajectoryModel


def event_values(model: TrajectoryModel, timeline: Timeline) -> pl.DataFrame:
    """Every measurement of every event, none left out; notes and pictures have no row.

    Returns:
        event_index, feature, value (in ``unit``; null for a category, which is there or not), unit ("" for none).
    """
    categories = [feature.name for feature in model.features if feature.kind == "category"]
    value = pl.when(pl.col("feature").is_in(categories)).then(None).otherwise(pl.col("value"))
    return raw_values(model, timeline).with_columns(value.alias("value")).select(VALUE_COLUMNS)


def packed_values(values: pl.DataFrame) -> dict[str, Any]:
    """The same for a page: ``features``, pairs of name and unit, and ``at``, by event: [[place in features, value]]."""
    pairs = list(dict.fromkeys(zip(values["feature"], values["unit"], strict=True)))
    place = {pair: i for i, pair in enumerate(pairs)}
    at: dict[int, list[list[float | None]]] = {}
    for index, feature, value, unit in values.select(VALUE_COLUMNS).iter_rows():
        # Seven digits are what float32 holds.
        at.setdefault(index, []).append([place[feature, unit], None if value is None else float(f"{value:.7g}")])
    return {"features": [list(pair) for pair in pairs], "at": at}
