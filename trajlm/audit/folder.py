"""A prepared folder, opened for an audit: who holds how many events of what, and since when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.errors import TrajlmError
from trajlm.schema import SPLITS

ALL = "all"  # the name, in column `split`, of the splits together


@dataclass(frozen=True)
class Folder:
    """A prepared folder, opened.

    Attributes:
        path: where it lies.
        manifest: as written by `trajlm prepare`.
        stays: ``stays.parquet``.
        held: one row per stay and modality with events: stay_id, modality, events, first_hour, last_hour (hours since
            admission to the unit), sorted.
    """

    path: Path
    manifest: dict[str, Any]
    stays: pl.DataFrame
    held: pl.DataFrame

    @property
    def modalities(self) -> list[str]:
        """Every modality, in the order that breaks ties between events."""
        return [m["name"] for m in self.manifest["modalities"]]


def read_folder(prepared: Path) -> Folder:
    """Open a prepared folder; of its events only who has how many and when is kept.

    Raises:
        TrajlmError: as :func:`audit_folder`.
    """
    manifest_file, stays_file = prepared / "manifest.json", prepared / "stays.parquet"
    events = sorted((prepared / "events").glob("*.parquet"))
    if not (manifest_file.is_file() and stays_file.is_file() and events):
        raise TrajlmError(
            f"{prepared} is not a prepared folder: expected manifest.json, stays.parquet and events/*.parquet"
        )
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        present = {f"present_{m['name']}" for m in manifest["modalities"]}
        manifest["tables"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrajlmError(f"{manifest_file}: expected the manifest of a prepared folder, came {error!r}") from error
    try:
        stays = pl.read_parquet(stays_file)
        held = _held(pl.scan_parquet(events))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise TrajlmError(f"{prepared} cannot be read: {' '.join(str(error).split())[:200]}") from error
    missing = {"stay_id", "subject_id", "split", "hours_in_unit", *present} - set(stays.columns)
    if missing:
        raise TrajlmError(f"{stays_file}: expected the columns {', '.join(sorted(missing))}, came a table without them")
    return Folder(prepared, manifest, stays, held)


def _held(events: pl.LazyFrame) -> pl.DataFrame:
    hour = pl.col("hours_since_admission")
    counts = [pl.len().cast(pl.Int64).alias("events"), hour.min().alias("first_hour"), hour.max().alias("last_hour")]
    return events.group_by("stay_id", "modality").agg(counts).collect(engine="streaming").sort("stay_id", "modality")


def by_split(frame: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    """The rows of each split, then all."""
    yield from ((split, frame.filter(pl.col("split") == split)) for split in SPLITS)
    yield ALL, frame
