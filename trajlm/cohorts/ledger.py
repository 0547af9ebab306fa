"""Accounts for every row read: kept + rejected = read, and each rejected row is stored with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

LINE = "line"  # 1-based line of the row in its raw file, the header being line 1


class RowLedger:
    """Counts the rows of raw tables and stores the rejected ones under ``folder`` as ``<table>.parquet``.

    A reader calls ``read`` once per table, ``screen`` or ``reject`` for rows it leaves out, and ``keep`` with the rows
    that made it into stays or events. ``close`` fails if the three do not add up.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, int] = {}
        self._kept: dict[str, int] = {}
        self._rejected: dict[str, list[pl.DataFrame]] = {}

    def read(self, table: str, rows: int) -> None:
        """Note that ``rows`` rows of a raw table were read."""
        self._read[table] = self._read.get(table, 0) + rows

    def keep(self, table: str, rows: int) -> None:
        """Note that ``rows`` rows of a raw table ended in the cohort."""
        self._kept[table] = self._kept.get(table, 0) + rows

    def reject(self, table: str, frame: pl.DataFrame, reason: str) -> None:
        """Store raw rows that are left out. ``frame`` holds ``line`` and the raw columns (and nothing else)."""
        if frame.is_empty():
            return
        raw = frame.select(pl.exclude(LINE).cast(pl.String))
        stored = frame.select(pl.lit(table).alias("table"), pl.col(LINE).cast(pl.Int64), pl.lit(reason).alias("reason"))
        self._rejected.setdefault(table, []).append(pl.concat([stored, raw], how="horizontal"))

    def screen(
        self, table: str, frame: pl.DataFrame, rules: Sequence[tuple[str, pl.Expr]], raw: Sequence[str]
    ) -> pl.DataFrame:
        """Reject the rows that break a rule and return the others.

        Args:
            rules: (reason, expression that is true for rows to reject); the first rule a row breaks names its reason;
                null counts as false.
            raw: the raw columns to store; ``line`` is stored in any case. Other columns of ``frame`` are working ones.
        """
        for reason, breaks in rules:
            broken = breaks.fill_null(False)
            self.reject(table, frame.filter(broken).select([LINE, *raw]), reason)
            frame = frame.filter(~broken)
        return frame

    def close(self) -> dict[str, dict]:
        """Write the rejected rows and return, per table, ``read``, ``kept``, ``rejected`` and ``reasons``."""
        account: dict[str, dict] = {}
        for table in sorted(self._read):
            rejected = pl.concat(self._rejected[table], how="diagonal") if table in self._rejected else None
            count = 0 if rejected is None else rejected.height
            kept = self._kept.get(table, 0)
            if kept + count != self._read[table]:
                raise AssertionError(f"{table}: read {self._read[table]} rows, kept {kept}, rejected {count}")
            reasons = {} if rejected is None else dict(sorted(rejected["reason"].value_counts().iter_rows()))
            account[table] = {"read": self._read[table], "kept": kept, "rejected": count, "reasons": reasons}
            if rejected is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                rejected.sort("line", maintain_order=True).write_parquet(self._folder / f"{table}.parquet")
        unread = set(self._kept) | set(self._rejected)
        if not unread <= set(self._read):
            raise AssertionError(f"rows kept or rejected of tables never read: {sorted(unread - set(self._read))}")
        return account
