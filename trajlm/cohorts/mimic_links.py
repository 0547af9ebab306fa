"""Which ICU stay of a MIMIC release a dated row belongs to, when it was known, and why it may belong to none."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.tables import Release, Table
from trajlm.config import PrepareConfig
from trajlm.schema import MEASURED

# What a row must know of its stay. ``left`` is when the patient left the unit or the hospital, whichever came first;
# ``kept`` whether the stay is part of the cohort.
STAY_WINDOW = ["stay_id", "subject_id", "hadm_id", "intime", "left", "died", "kept"]

HOURS = "hours"
KNOWN = "known"  # when a row could be known


@dataclass(frozen=True)
class Timing:
    """Which rows of a stay count, and by which of their times.

    Attributes:
        available: rows are dated by when they could be known, the later of their own time and ``storetime``.
        window_hours: later rows are left out; None keeps the whole stay.
        before_hours: rows up to this long before admission to the unit count, at hour 0.
    """

    available: bool = True
    window_hours: float | None = None
    before_hours: float = 0.0

    @classmethod
    def of(cls, settings: PrepareConfig) -> Timing:
        """The timing that the settings ask for."""
        return cls(settings.result_times == "available", settings.window_hours, settings.before_admission_hours)

    def known(self, frame: pl.DataFrame, time: str) -> pl.DataFrame:
        """Add ``known``. A bedside value may be stored ahead of its own time, a result hours after it."""
        stored = self.available and "storetime" in frame.columns
        return frame.with_columns((pl.max_horizontal(time, "storetime") if stored else pl.col(time)).alias(KNOWN))


def link_by_stay(frame: pl.DataFrame, stays: pl.DataFrame) -> pl.DataFrame:
    """Give rows that name their stay its window; ``kept`` is null where the release has no such stay."""
    windows = stays.select(STAY_WINDOW).drop("subject_id", "hadm_id")
    return frame.join(windows, on="stay_id", how="left", maintain_order="left")


def link_by_time(frame: pl.DataFrame, stays: pl.DataFrame, time: str, before_hours: float = 0.0) -> pl.DataFrame:
    """Give rows that name an admission, or only a patient, the latest stay that began at or before their time.

    A row from before the first stay is given that first stay, so that it can be told from one without any stay, whose
    ``kept`` is null. A row of the last ``before_hours`` before a stay that lies in no earlier stay is given that one.

    Args:
        frame: with ``subject_id`` and, where the release has it, ``hadm_id``.
        stays: STAY_WINDOW.
        time: the column of the row's time, not null.
        before_hours: not negative.
    """
    if "hadm_id" not in frame.columns:
        return _nearest_stay(frame, stays, time, "subject_id", before_hours).sort(LINE)
    named = _nearest_stay(frame.filter(pl.col("hadm_id").is_not_null()), stays, time, "hadm_id", before_hours)
    unnamed = _nearest_stay(frame.filter(pl.col("hadm_id").is_null()), stays, time, "subject_id", before_hours)
    return pl.concat([named, unnamed]).sort(LINE)


def _nearest_stay(frame: pl.DataFrame, stays: pl.DataFrame, time: str, key: str, before_hours: float) -> pl.DataFrame:
    windows = stays.select(key, *(column for column in STAY_WINDOW if column not in ("subject_id", "hadm_id")))
    windows = windows.sort("intime", "stay_id")
    latest = _joined(frame, windows, time, key, "backward")
    if not before_hours:
        return _or_first(latest, frame.columns, windows, key)
    inside = pl.col("stay_id").is_not_null() & (pl.col(time) <= pl.col("left")).fill_null(True)
    ahead = _joined(latest.filter(~inside).select(frame.columns), windows, time, key, "forward")
    soon = (pl.col("intime") - pl.col(time) <= pl.duration(microseconds=round(before_hours * 3.6e9))).fill_null(False)
    others = latest.join(ahead.filter(soon).select(LINE), on=LINE, how="anti")
    return pl.concat([ahead.filter(soon), _or_first(others, frame.columns, windows, key)])


def _joined(frame: pl.DataFrame, windows: pl.DataFrame, time: str, key: str, strategy: str) -> pl.DataFrame:
    return frame.sort(time).join_asof(
        windows, left_on=time, right_on="intime", by=key, coalesce=False, check_sortedness=False,
        strategy="forward" if strategy == "forward" else "backward",
    )  # fmt: skip


def _or_first(latest: pl.DataFrame, columns: list[str], windows: pl.DataFrame, key: str) -> pl.DataFrame:
    first = windows.unique(key, keep="first", maintain_order=True)
    before = latest.filter(pl.col("stay_id").is_null()).select(columns)
    before = before.join(first, on=key, how="left", maintain_order="left")
    return pl.concat([latest.filter(pl.col("stay_id").is_not_null()).select(before.columns), before])


def within_stay(
    release: Release, table: Table, frame: pl.DataFrame, timing: Timing, time: str, no_stay: str
) -> pl.DataFrame:
    """Reject linked rows outside their stay or the window; add hours since admission to the unit.

    These are ``hours`` at which a row was known, at least 0, and ``measured``, of its own time.

    A row counts from when it could be known; one whose own time lies after death or leaving is told apart from one that
    was only stored by then.

    Args:
        frame: linked rows with ``known``.
        timing: decides which rows count.
        time: the column of the row's own time.
        no_stay: the reason for rows that belong to no stay.
    """
    own, known = pl.col(time), pl.col(KNOWN)
    begin = pl.col("intime") - pl.duration(microseconds=round(timing.before_hours * 3.6e9))
    rules = [
        (no_stay, pl.col("kept").is_null()),
        ("its ICU stay is rejected", ~pl.col("kept")),
        ("before admission to the unit", known < begin),
        ("after death", own > pl.col("died")),
        ("after the patient left the unit", own > pl.col("left")),
        ("stored after death", known > pl.col("died")),
        ("stored after the patient left the unit", known > pl.col("left")),
    ]
    if timing.window_hours is not None:
        window = pl.duration(microseconds=round(timing.window_hours * 3.6e9))
        rules.append(("after the window", known > pl.col("intime") + window))
    frame = release.screen(table, frame, rules)
    since = {of: (time - pl.col("intime")).dt.total_microseconds() / 3.6e9 for of, time in (("k", known), ("o", own))}
    return frame.with_columns(since["k"].clip(lower_bound=0.0).alias(HOURS), since["o"].alias(MEASURED))
