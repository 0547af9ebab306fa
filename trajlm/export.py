"""A prepared folder as a MEDS dataset, with the mapping that reads it back.

A prepared folder knows hours since admission and no calendar: every stay begins at ``ANCHOR``. The stays of one patient
would overlap there, so each is a MEDS subject of its own, whose ``subject_id`` is the ``stay_id``; the column
``patient_id`` keeps the patient, whose stays share a split as they did before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from trajlm.errors import TrajlmError
from trajlm.export_tables import (
    DATA,
    MAPPING,
    Source,
    Tally,
    mapping_yaml,
    notes_on,
    readme,
    rows_of,
    write_labels,
    write_metadata,
)
from trajlm.schema import EVENT_COLUMNS, SPLITS

_BATCH_EVENTS = 20_000
_EVENTS = {name: dtype for name, dtype in EVENT_COLUMNS.items() if name != "image"}


def export_meds(prepared: Path, out: Path) -> None:
    """Write a prepared folder as a MEDS dataset: data, metadata, labels, ``mapping.yaml`` and a README.

    Features become codes ``<modality>//<feature>``, categories without a value; notes become ``<modality>//text``.
    Events of static modalities at hour 0 have no time. Labels stand at the end of the window or, if that is earlier, of
    the stay. Pictures are left out, as MEDS has no place for them, and counted. Everything is written to a hidden
    folder beside ``out`` that takes its name in the end.

    Raises:
        TrajlmError: ``prepared`` is not a prepared folder, or ``out`` holds anything.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrajlmError(f"{out} exists and is not empty; name another --out or remove it")
    source = Source.open(Path(prepared))
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tally = _write_data(source, partial)
        write_metadata(source, partial)
        write_labels(source, tally, partial)
        notes = notes_on(source, tally)
        (partial / MAPPING).write_text(mapping_yaml(source))
        (partial / "README.md").write_text(readme(source, notes))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for note in notes:
        tqdm.write(note)
    tqdm.write(f"{out}: {sum(tally.rows.values()):,} rows of {source.stays.height:,} stays exported")


def _write_data(source: Source, folder: Path) -> Tally:
    """``data/<split>/<number>.parquet``, one shard per split and file of events; stays without events go along."""
    tally = Tally()
    parts: list[Path | None] = [*source.events] or [None]
    left = source.stays
    for number, part in enumerate(tqdm(parts, desc="exporting events", unit="file")):
        with _Shards(folder / "data", number) as shards:
            for events, last in _whole_stays(part):
                whole = last and number == len(parts) - 1
                here = pl.lit(True) if whole else pl.col("stay_id") <= events["stay_id"].max()
                stays, left = left.filter(here), left.filter(~here)
                strange = events.filter(~pl.col("stay_id").is_in(stays["stay_id"].implode())).head(1)
                if strange.height:
                    raise TrajlmError(
                        f"{part}: stay {strange['stay_id'][0]} is in no row of stays.parquet, or in two files; prepare "
                        "the folder again"
                    )
                rows = rows_of(source, stays, events, tally)
                for split in SPLITS:
                    mine = rows.filter(pl.col("split") == split)
                    tally.rows[split] += mine.height
                    shards.write(split, mine)
    return tally


def _whole_stays(part: Path | None) -> Iterator[tuple[pl.DataFrame, bool]]:
    """Events of a file, some whole stays at a time, and whether these are the last ones."""
    held = pl.DataFrame(schema=_EVENTS)
    if part is not None:
        with pq.ParquetFile(part, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=_BATCH_EVENTS, columns=list(_EVENTS), use_threads=False):
                frame = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(frame, pl.DataFrame)
                held = pl.concat([held, frame.select(list(_EVENTS)).cast(held.schema)])
                open_stay = held["stay_id"][-1]
                whole = held.filter(pl.col("stay_id") != open_stay)
                if whole.height:
                    yield whole, False
                    held = held.filter(pl.col("stay_id") == open_stay)
    yield held, True


class _Shards:
    """One file per split, opened when the first row comes."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number
        self._writers: dict[str, pq.ParquetWriter] = {}

    def write(self, split: str, rows: pl.DataFrame) -> None:
        """Append rows, in order of subject and time."""
        if rows.is_empty():
            return
        if split not in self._writers:
            path = self._folder / split / f"{self._number}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writers[split] = pq.ParquetWriter(path, DATA, compression="zstd")
        self._writers[split].write_table(rows.select(DATA.names).to_arrow().cast(DATA))

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
