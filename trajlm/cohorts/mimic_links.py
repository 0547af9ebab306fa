"""Which ICU stay of a MIMIC release a dated row belongs to, and why it may belong to none."""

from __future__ import annotations

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.mimic_tables import Release, Table

# What a row must know of its stay. ``left`` is when the patient left the unit; ``kept`` whether the stay is part of the
# cohort; ``window_end`` is null where the whole stay counts.
STAY_WINDOW = ["stay_id", "subject_id", "hadm_id", "intime", "left", "died", "window_end", "kept"]

HOURS = "hours"


def link_by_stay(frame: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """Give rows that name their stay its window; ``kept`` is null where the release has no such stay."""
    windows = stays.select(STAY_WINDOW).drop("subject_id", "hadm_id")
    return frame.join(windows, on="stay_id", how="left", maintain_order="left")


def link_by_time(frame: pl.DataFrame, stays: pl.DataFrame, time: str) -> pl.DataFrame:
    """Give rows that name an admission, or only a patient, the latest stay that began at or before their time.

    A row from before the first stay is given that first stay, so that it can be told from one without any stay, whose
    ``kept`` is null.

    Args:
        frame: with ``subject_id`` and, where the release has it, ``hadm_id``.
        stays: STAY_WINDOW.
        time: the column of the row's time, not null.
    """
    if "hadm_id" not in frame.columns:
        return _latest_stay(frame, stays, time, "subject_id").sort(LINE)
    named = _latest_stay(frame.filter(pl.col("hadm_id").is_not_null()), stays, time, "hadm_id")
    unnamed = _latest_stay(frame.filter(pl.col("hadm_id").is_null()), stays, time, "subject_id")
    return pl.concat([named, unnamed]).sort(LINE)


def _latest_stay(frame: pl.DataFrame, stays: pl.DataFrame, time: str, key: str) -> pl.DataFrame:
    windows = stays.select(key, *(column for column in STAY_WINDOW if column not in ("subject_id", "hadm_id")))
    windows = windows.sort("intime", "stay_id")
    first = windows.unique(key, keep="first", maintain_order=True)
    latest = frame.sort(time).join_asof(
        windows, left_on=time, right_on="intime", by=key, coalesce=False, check_sortedness=False
    )
    before = latest.filter(pl.col("stay_id").is_null()).select(frame.columns)
    before = before.join(first, on=key, how="left", maintain_order="left")
    return pl.concat([latest.filter(pl.col("stay_id").is_not_null()).select(before.columns), before])


def within_stay(release: Release, table: Table, frame: pl.DataFrame, time: str, no_stay: str) -> pl.DataFrame:
    """Reject linked rows outside their stay or the window; add ``hours`` since admission to the unit.

    Args:
        frame: linked rows.
        time: the column of the row's time.
        no_stay: the reason for rows that belong to no stay.
    """
    at = pl.col(time)
    rules = [
        (no_stay, pl.col("kept").is_null()),
        ("its ICU stay is rejected", ~pl.col("kept")),
        ("before admission to the unit", at < pl.col("intime")),
        ("after death", at > pl.col("died")),
        ("after the patient left the unit", at > pl.col("left")),
        ("after the window", at > pl.col("window_end")),
    ]
    frame = release.screen(table, frame, rules)
    elapsed = (at - pl.col("intime")).dt.total_microseconds()
    return frame.with_columns((elapsed / 3.6e9).alias(HOURS))
