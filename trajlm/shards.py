"""The middle of preparing: spooled rows to events, one range of stays at a time, so that memory does not grow."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from trajlm.grouping import (
    Catalogue,
    LeftOut,
    build_events,
    check_rows,
    feature_statistics,
    group_measurements,
)
from trajlm.schema import FittedFeature
from trajlm.spool import COLUMNS, Kind, Spool, read_spooled

# A shard is a range of stays holding about so many measurements; a note or a picture weighs as much as several.
SHARD_WEIGHT = 3_000_000
_WEIGHTS: dict[Kind, int] = {"measurements": 1, "documents": 100, "images": 200}
ROW_GROUP_EVENTS = 50_000


@dataclass(frozen=True)
class Shard:
    """A range of stays and where their rows lie.

    Attributes:
        index: shards are in order of stay_id.
        stays: first and last stay_id.
        files: spooled files of each kind.
        cells: file for the grouped measurements, kept between the two passes.
    """

    index: int
    stays: tuple[int, int]
    files: dict[Kind, list[Path]]
    cells: Path

    def rows(self, kind: Kind) -> pl.DataFrame:
        """This shard's spooled rows of a kind."""
        return read_spooled(self.files[kind], kind, self.stays)


def plan_shards(spool: Spool, counts: pl.DataFrame, stay_ids: pl.Series, weight: int = SHARD_WEIGHT) -> list[Shard]:
    """Consecutive ranges of stays of about equal weight.

    Args:
        counts: of ``Spool.counts``.
        stay_ids: of the cohort, sorted.
    """
    weights = pl.DataFrame({"kind": list(_WEIGHTS), "weight": list(_WEIGHTS.values())})
    heavy = counts.join(weights, on="kind").group_by("stay_id").agg((pl.col("rows") * pl.col("weight")).sum())
    stays = stay_ids.to_frame().join(heavy, on="stay_id", how="left", maintain_order="left").fill_null(0)
    place = (pl.col("rows").cum_sum() - pl.col("rows")) // weight
    grouped = stays.with_columns(place.alias("place")).group_by("place", maintain_order=True)
    ranges = grouped.agg(pl.col("stay_id").first().alias("first"), pl.col("stay_id").last().alias("last"))
    files = {kind: spool.files(kind) for kind in COLUMNS}
    return [
        Shard(index, (first, last), files, spool.folder / f"cells-{index:05d}.parquet")
        for index, (_, first, last) in enumerate(ranges.iter_rows())
    ]


@dataclass(frozen=True)
class Grouping:
    """First pass over a shard: measurements to cells, and their statistics over the training split."""

    catalogue: Catalogue
    bin_hours: float
    stay_ids: pl.Series
    train_ids: pl.Series

    def __call__(self, shard: Shard) -> tuple[pl.DataFrame, int]:
        """Write the shard's cells; its statistics, and how many measurements a newer one superseded."""
        rows = shard.rows("measurements")
        check_rows("measurements", rows, self.stay_ids)
        cells, superseded = group_measurements(self.catalogue, rows, self.bin_hours)
        shard.cells.parent.mkdir(parents=True, exist_ok=True)
        cells.write_parquet(shard.cells, compression="lz4")
        return feature_statistics(cells, self.train_ids), superseded


@dataclass(frozen=True)
class Written:
    """What a shard's file of events holds.

    Attributes:
        held: ``stay_id, modality``, each pair once.
        events: by (stay's split, modality).
        left_out: what the vocabulary cost.
    """

    held: pl.DataFrame
    events: Counter[tuple[str, str]]
    left_out: LeftOut


@dataclass(frozen=True)
class Writing:
    """Second pass over a shard: cells, notes and pictures to one file of events."""

    catalogue: Catalogue
    fitted: Sequence[FittedFeature]
    splits: pl.DataFrame
    folder: Path

    def __call__(self, shard: Shard) -> Written:
        """Write the shard's events."""
        documents, images = shard.rows("documents"), shard.rows("images")
        for name, frame in (("documents", documents), ("images", images)):
            check_rows(name, frame, self.splits["stay_id"])
        events, left_out = build_events(self.catalogue, pl.read_parquet(shard.cells), documents, images, self.fitted)
        events.write_parquet(self.folder / f"part-{shard.index:05d}.parquet", row_group_size=ROW_GROUP_EVENTS)
        named = events.select("stay_id", "modality").join(self.splits, on="stay_id")
        counts = named.group_by("split", "modality").len().iter_rows()
        held = events.select("stay_id", "modality").unique()
        return Written(held, Counter({(split, modality): n for split, modality, n in counts}), left_out)


_Result = TypeVar("_Result")


@contextmanager
def over_shards(processes: int) -> Iterator[Callable[[Callable[[Shard], _Result], Sequence[Shard]], Iterator[_Result]]]:
    """A map over shards, results in order of the shards, on this process or on several."""
    if processes == 1:
        yield map
        return
    # polars' threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:

        def spread(work: Callable[[Shard], Any], shards: Sequence[Shard]) -> Iterator[Any]:
            return pool.map(work, shards)

        yield spread
