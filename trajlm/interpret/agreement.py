"""Where attention and intervention disagree: per stay, event by event. Read from tables, with no model at hand."""

from __future__ import annotations

from typing import Any

import polars as pl
from scipy.stats import spearmanr

INTERVENTIONS = ("knock_out", "removal", "attribution")
LEAST = 0.3  # rank correlation with the removals under which attention is said to disagree


def agreement(importance: pl.DataFrame) -> dict[str, float | None]:
    """Spearman's rank correlation over events of attention with the size of each intervention's effect.

    Returns:
        ``knock_out``, ``removal``, ``attribution``: in [-1, 1]; None where undefined (fewer than three events, a
        constant, or unknown).
    """
    found: dict[str, float | None] = {}
    for name in INTERVENTIONS:
        known = importance.drop_nulls(["attention", name])
        x, y = known["attention"].to_numpy(), known[name].abs().to_numpy()
        usable = known.height >= 3 and len(set(x)) > 1 and len(set(y)) > 1
        found[name] = float(spearmanr(x, y).statistic) if usable else None
    return found


def disagreement(importance: pl.DataFrame, least: float = LEAST) -> dict[str, Any]:
    """Whether attention and interventions disagree about the events of a stay.

    Args:
        importance: of :func:`trajlm.interpret.importance.event_importance`.
        least: rank correlation below which they are said to disagree.

    Returns:
        events, the three correlations of :func:`agreement`, ``most_attended`` and ``most_moving`` (event_index of the
        event that the last read-out attends to most, and of the one whose removal moves the belief most),
        ``same_event``, and ``disagree``: attention's ranking correlates less than ``least`` with the removals'. None
        where there is no attention to show.
    """
    ranks = agreement(importance)
    seen = importance["attention"].null_count() == 0
    attended = importance.sort("attention", descending=True, nulls_last=True)["event_index"][0]
    moving = importance.sort(pl.col("removal").abs(), descending=True)["event_index"][0]
    return {
        "events": importance.height,
        **ranks,
        "most_attended": attended if seen else None,
        "most_moving": moving,
        "same_event": attended == moving if seen else None,
        "disagree": None if ranks["removal"] is None else ranks["removal"] < least,
    }
