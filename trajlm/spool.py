"""Between a raw release and its prepared folder: what a cohort's reader delivers, on disk, part after part.

A reader hands over measurements, notes and pictures as it meets them, so that memory stays flat however large the
release; preparing then takes them back by ranges of stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import polars as pl

from trajlm.schema import DOCUMENT_COLUMNS, IMAGE_COLUMNS, SPOOLED_COLUMNS, conform, empty, with_measured

Kind = Literal["measurements", "documents", "images"]
COLUMNS: dict[Kind, dict[str, pl.DataType]] = {
    "measurements": SPOOLED_COLUMNS,
    "documents": DOCUMENT_COLUMNS,
    "images": IMAGE_COLUMNS,
}
_BUFFERED_BYTES = 64_000_000  # of rows held in memory before they are written
_ROW_GROUP = 50_000


class Spool:
    """Rows of the three kinds under ``folder``, in files sorted by stay; of one stay in the order they were added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._buffer: dict[Kind, list[pl.DataFrame]] = {kind: [] for kind in COLUMNS}
        self._files: dict[Kind, list[Path]] = {kind: [] for kind in COLUMNS}
        self._buffered: dict[Kind, int] = dict.fromkeys(COLUMNS, 0)

    def add_measurements(self, frame: pl.DataFrame) -> None:
        """Take MEASUREMENT_COLUMNS, and ``measured`` if told, of any stays; of one stay and time, order counts."""
        self._add("measurements", with_measured(frame))

    def add_documents(self, frame: pl.DataFrame) -> None:
        """Take DOCUMENT_COLUMNS."""
        self._add("documents", frame)

    def add_images(self, frame: pl.DataFrame) -> None:
        """Take IMAGE_COLUMNS."""
        self._add("images", frame)

    def _add(self, kind: Kind, frame: pl.DataFrame) -> None:
        if frame.is_empty():
            return
        self._buffer[kind].append(conform(frame, COLUMNS[kind], kind))
        self._buffered[kind] += int(frame.estimated_size())
        if self._buffered[kind] >= _BUFFERED_BYTES:
            self._flush(kind)

    def _flush(self, kind: Kind) -> None:
        if not self._buffer[kind]:
            return
        rows = pl.concat(self._buffer[kind]).sort("stay_id", maintain_order=True)
        self._buffer[kind], self._buffered[kind] = [], 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{kind}-{len(self._files[kind]):05d}.parquet"
        rows.write_parquet(path, row_group_size=_ROW_GROUP, compression="lz4")
        self._files[kind].append(path)

    def files(self, kind: Kind) -> list[Path]:
        """Every file of a kind, in the order of writing, all rows included."""
        self._flush(kind)
        return list(self._files[kind])

    def collect(self, kind: Kind) -> pl.DataFrame:
        """All rows of a kind, for cohorts that fit in memory."""
        return read_spooled(self.files(kind), kind)

    def counts(self) -> pl.DataFrame:
        """``stay_id, modality, kind, rows``: how many rows each stay holds of each modality."""
        counted = [
            pl.scan_parquet(file)
            .group_by("stay_id", "modality")
            .agg(rows=pl.len().cast(pl.Int64))
            .with_columns(kind=pl.lit(kind))
            .collect()
            for kind in COLUMNS
            for file in self.files(kind)
        ]
        nothing = pl.DataFrame(schema={"stay_id": pl.Int64, "modality": pl.String, "rows": pl.Int64, "kind": pl.String})
        return pl.concat([nothing, *counted]).group_by("stay_id", "modality", "kind").agg(pl.col("rows").sum())


def read_spooled(files: list[Path], kind: Kind, stays: tuple[int, int] | None = None) -> pl.DataFrame:
    """Rows of a kind, in the order they were added, of all stays or of ``stays[0] <= stay_id <= stays[1]``."""
    if not files:
        return empty(COLUMNS[kind])
    parts = []
    for file in files:
        rows = pl.scan_parquet(file)
        if stays is not None:
            rows = rows.filter(pl.col("stay_id").is_between(*stays))
        parts.append(rows.collect())
    return pl.concat(parts)
