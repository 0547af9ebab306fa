"""Columns of numbers on disk: appended to part by part, memory-mapped afterwards, whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trajlm.checkpoint import write_text

NOTE = "about.json"


class ColumnWriter:
    """Appends to the columns of a folder; :func:`column_folder` makes one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._streams: dict[str, Any] = {}
        self.columns: dict[str, dict[str, Any]] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows to a column; the first call decides its type and the shape of a row."""
        if name not in self._streams:
            self._streams[name] = (self._folder / f"{name}.bin").open("wb")
            self.columns[name] = {"dtype": rows.dtype.str, "row": list(rows.shape[1:]), "rows": 0}
        column = self.columns[name]
        if (rows.dtype.str, list(rows.shape[1:])) != (column["dtype"], column["row"]):
            raise ValueError(f"column {name} holds {column}, came {rows.dtype}{rows.shape}")
        np.ascontiguousarray(rows).tofile(self._streams[name])
        column["rows"] += len(rows)

    def close(self) -> None:
        """Make sure that the columns lie on disk before anything says that they are whole."""
        for stream in self._streams.values():
            stream.flush()
            os.fsync(stream.fileno())
            stream.close()


@contextmanager
def column_folder(folder: Path, about: Mapping[str, Any]) -> Iterator[ColumnWriter]:
    """Write a folder of columns under another name; it takes its own, in one step, when the block has ended well."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = ColumnWriter(partial)
    yield writer
    writer.close()
    write_text(partial / NOTE, json.dumps(dict(about) | {"columns": writer.columns}, indent=1))
    if folder.exists():
        # A folder cannot be replaced by another in one step: without its note the old one no longer looks whole.
        (folder / NOTE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    partial.replace(folder)


def read_note(folder: Path) -> dict[str, Any] | None:
    """What a folder of columns says of itself; None where there is no whole one."""
    note = folder / NOTE
    if not note.is_file():
        return None
    about = json.loads(note.read_text())
    for name, column in about["columns"].items():
        path, expected = folder / f"{name}.bin", _size(column)
        if not path.is_file() or path.stat().st_size != expected:
            return None
    return about


def open_column(folder: Path, about: Mapping[str, Any], name: str) -> np.ndarray:
    """A column, memory-mapped and read-only."""
    column = about["columns"][name]
    shape = (column["rows"], *column["row"])
    if not _size(column):
        return np.zeros(shape, dtype=column["dtype"])  # nothing cannot be mapped
    return np.memmap(folder / f"{name}.bin", dtype=column["dtype"], mode="r", shape=shape)


def _size(column: Mapping[str, Any]) -> int:
    return int(np.dtype(column["dtype"]).itemsize * column["rows"] * np.prod(column["row"], dtype=np.int64))
