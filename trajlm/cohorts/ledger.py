"""Accounts for every row read: kept + rejected = read, and rejected rows are stored with their reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

LINE = "line"  # 1-based line of the row in its raw file, the header being line 1

_BUFFERED_BYTES = 32_000_000


class RowLedger:
    """Counts the rows of raw tables and stores the rejected ones under ``folder`` as ``<table>.parquet``.

    A reader calls ``read`` with the rows of a table, ``screen`` or ``reject`` with rows it leaves out, and ``keep``
    with the number that made it into stays or events; batch after batch where a table is large. ``close`` fails if the
    three do not add up. Memory stays flat: rejected rows are written as they come.

    Args:
        folder: made when the first row is rejected.
        stored_rows: most rows to store per table and reason; all are counted. None stores all.
    """

    def __init__(self, folder: Path, stored_rows: int | None = None) -> None:
        self._folder, self._stored_rows = folder, stored_rows
        self._read: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._reasons: dict[str, Counter[str]] = {}
        self._stores: dict[str, _Store] = {}

    def read(self, table: str, rows: int) -> None:
        """Note that ``rows`` rows of a raw table were read."""
        self._read[table] += rows

    def keep(self, table: str, rows: int) -> None:
        """Note that ``rows`` rows of a raw table ended in the cohort."""
        self._kept[table] += rows

    def room(self, table: str, reason: str, rows: int) -> int:
        """How many of ``rows`` further rows rejected for this reason would be stored."""
        if self._stored_rows is None:
            return rows
        return min(rows, max(0, self._stored_rows - self._reasons.get(table, Counter())[reason]))

    def reject(self, table: str, frame: pl.DataFrame, reason: str, count: int | None = None) -> None:
        """Store raw rows that are left out.

        Args:
            frame: ``line`` and the raw columns, and nothing else.
            count: how many rows are rejected, where ``frame`` holds only those that there is room for.
        """
        count = frame.height if count is None else count
        if not count:
            return
        room = self.room(table, reason, frame.height)
        self._reasons.setdefault(table, Counter())[reason] += count
        if room:
            store = self._stores.setdefault(table, _Store(self._folder / f"{table.replace('/', '-')}.parquet"))
            store.add(_stored(table, frame.head(room), reason))

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
        """Finish the files; per table ``read``, ``kept``, ``rejected``, ``stored`` (of those, on disk), ``reasons``."""
        unread = (set(self._kept) | set(self._reasons)) - set(self._read)
        if unread:
            raise AssertionError(f"rows kept or rejected of tables never read: {sorted(unread)}")
        account: dict[str, dict] = {}
        for table, read in sorted(self._read.items()):
            reasons = dict(sorted(self._reasons.get(table, {}).items()))
            kept, rejected = self._kept[table], sum(reasons.values())
            if kept + rejected != read:
                raise AssertionError(f"{table}: read {read} rows, kept {kept}, rejected {rejected}")
            stored = self._stores[table].close() if table in self._stores else 0
            account[table] = {"read": read, "kept": kept, "rejected": rejected, "stored": stored, "reasons": reasons}
        return account


def _stored(table: str, frame: pl.DataFrame, reason: str) -> pl.DataFrame:
    raw = frame.select(pl.exclude(LINE).cast(pl.String))
    named = frame.select(pl.lit(table).alias("table"), pl.col(LINE).cast(pl.Int64), pl.lit(reason).alias("reason"))
    return pl.concat([named, raw], how="horizontal")


class _Store:
    """One parquet file of rejected rows, written as they come; each write is in order of line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None
        self._buffer: list[pl.DataFrame] = []
        self._buffered = 0
        self._rows = 0

    def add(self, frame: pl.DataFrame) -> None:
        """Take rows; the first ones fix the columns."""
        self._buffer.append(frame)
        self._buffered += int(frame.estimated_size())
        if self._buffered >= _BUFFERED_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        rows = pl.concat(self._buffer, how="diagonal").sort(LINE, maintain_order=True)
        self._buffer, self._buffered = [], 0
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            schema = pa.schema([(name, pa.int64() if name == LINE else pa.large_string()) for name in rows.columns])
            self._writer = pq.ParquetWriter(self._path, schema, compression="zstd")
        self._writer.write_table(rows.to_arrow().cast(self._writer.schema))
        self._rows += rows.height

    def close(self) -> int:
        """Write what is left; the number of rows stored."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
        return self._rows
