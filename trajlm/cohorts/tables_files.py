"""Files of raw tables, part after part, as Arrow reads them: every row, or one error that names file and line."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq
from tqdm import tqdm

from trajlm.errors import UnexpectedInput

_BLOCK_BYTES = 1 << 25  # a row must fit in one block; a batch of a CSV table is one block
_BATCH_ROWS = 500_000  # of a parquet table
_BAR_FROM_BYTES = 50_000_000
_READ_BYTES = 1 << 20
_DAMAGED = (OSError, EOFError, zlib.error)


def _open(path: Path, errors: str = "strict") -> TextIO:
    binary = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 (closed by its wrapper)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors=errors, newline="")


def read_header(path: Path) -> list[str]:
    """The header of a CSV table, a column without a name called ``column 1`` by its place."""
    try:
        with _open(path, errors="replace") as lines:
            header = next(csv.reader(lines), [])
    except (*_DAMAGED, csv.Error) as error:
        raise UnexpectedInput(path, expected="a readable table", came=str(error)) from None
    if not header:
        raise UnexpectedInput(path, line=1, expected="a header", came="an empty file")
    header = [name or f"column {place}" for place, name in enumerate(header, 1)]
    for column in header:
        if header.count(column) > 1:
            raise UnexpectedInput(path, line=1, column=column, expected="each column once", came="it twice")
    return header


def parquet_header(path: Path) -> list[str]:
    """The names of a parquet table's columns."""
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise UnexpectedInput(path, expected="a parquet table", came=str(error)) from None


def parquet_parts(path: Path) -> Iterator[pa.Table]:
    """A parquet table batch after batch, after an empty one; NaN is null, and nested cells are text."""
    try:
        with pq.ParquetFile(path) as file:
            yield _plain(file.schema_arrow.empty_table())
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield _plain(pa.Table.from_batches([batch]))
    except (pa.ArrowInvalid, OSError) as error:
        raise UnexpectedInput(path, expected="a whole parquet table", came=str(error)) from None


def _plain(table: pa.Table) -> pa.Table:
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if pa.types.is_floating(field.type):
            column = pc.if_else(pc.is_nan(column), pa.scalar(None, field.type), column)
        elif pa.types.is_nested(field.type):
            column = pa.array([None if cell is None else str(cell) for cell in column.to_pylist()], pa.string())
        else:
            continue
        table = table.set_column(place, field.name, column)
    return table


def csv_parts(path: Path, header: list[str], lossy: Sequence[str]) -> Iterator[pa.Table]:
    """A CSV table block after block, after an empty one: all cells as strings, empty ones as ''.

    Arrow reads it rather than polars, which fills short lines silently.

    Args:
        header: of ``read_header``.
        lossy: columns in which bytes that are not UTF-8 are replaced.
    """
    types = [pa.binary() if column in lossy else pa.string() for column in header]
    yield pa.schema([(column, pa.string()) for column in header]).empty_table()
    try:
        if _holds_only_a_header(path):
            return
        with _watched(path) as bytes_read:
            reader = arrow_csv.open_csv(
                pa.PythonFile(io.BufferedReader(bytes_read, _READ_BYTES), mode="r"),
                read_options=arrow_csv.ReadOptions(
                    use_threads=False, block_size=_BLOCK_BYTES, autogenerate_column_names=True
                ),
                parse_options=arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
                convert_options=arrow_csv.ConvertOptions(
                    column_types={f"f{place}": kind for place, kind in enumerate(types)}, strings_can_be_null=False
                ),
            )
            first = True
            for batch in reader:
                table = pa.Table.from_batches([batch]).rename_columns(header)
                yield _decoded(table[1:] if first else table, lossy)
                first = False
        if bytes_read.quotes % 2:
            _refuse_open_quote(path)
    except (pa.ArrowInvalid, *_DAMAGED) as error:
        _explain(path, header, lossy)
        raise UnexpectedInput(path, expected="a CSV table in UTF-8", came=str(error)) from None


class _Watched(io.RawIOBase):
    """The bytes of a table, unpacked and counted.

    Attributes:
        quotes: how many quotation marks went by.
    """

    def __init__(self, source: Any) -> None:
        self._source, self.quotes = source, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as there are bytes."""
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        self.quotes += data.count(b'"')
        return len(data)


@dataclass
class _Told:
    """A file that tells a progress bar of every read."""

    file: Any
    bar: Any

    def read(self, size: int = -1) -> bytes:
        """Bytes of the file as it lies on disk."""
        data = self.file.read(size)
        self.bar.update(len(data))
        return data


@contextmanager
def _watched(path: Path) -> Iterator[_Watched]:
    """A table's bytes; a bar tells how far a large one has been read."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=path.name, unit="B", unit_scale=True, leave=False, disable=size < _BAR_FROM_BYTES) as bar,
    ):
        told: Any = _Told(file, bar)
        yield _Watched(gzip.GzipFile(fileobj=told, mode="rb") if path.suffix == ".gz" else told)


def _refuse_open_quote(path: Path) -> None:
    """Raise if a quotation mark is never closed: all that follows it has become one cell. Read slowly, to name it."""
    line = 1
    try:
        with _open(path, errors="replace") as lines:
            reader = csv.reader(lines, strict=True)
            for _ in reader:
                line = reader.line_num + 1
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            came = "one that is never closed"
            raise UnexpectedInput(path, line=line, expected="quotation marks in pairs", came=came) from None


def _holds_only_a_header(path: Path) -> bool:
    """Arrow cannot stream a table of no rows."""
    with _open(path, errors="replace") as lines:
        reader = csv.reader(lines)
        next(reader, None)
        try:
            return next(reader, None) is None
        except csv.Error:  # a huge cell is a row
            return False


def _decoded(table: pa.Table, lossy: Sequence[str]) -> pa.Table:
    for column in lossy:
        decoded = pa.array((cell.as_py().decode("utf-8", "replace") for cell in table[column]), pa.large_string())
        table = table.set_column(table.schema.get_field_index(column), column, decoded)
    return table


def _explain(path: Path, header: list[str], lossy: Sequence[str]) -> None:
    """Read again, slowly, to name the line that a fast reader could not take."""
    csv.field_size_limit(1 << 30)
    line = 1
    try:
        with _open(path, errors="surrogateescape") as lines:
            reader = csv.reader(lines)
            for cells in reader:
                if len(cells) != len(header):
                    raise UnexpectedInput(path, line=line, expected=f"{len(header)} cells", came=f"{len(cells)}")
                for column, cell in zip(header, cells, strict=True):
                    if column not in lossy and any("\udc80" <= letter <= "\udcff" for letter in cell):
                        raise UnexpectedInput(path, line=line, column=column, expected="UTF-8", came="other bytes")
                line = reader.line_num + 1
    except _DAMAGED as error:
        raise UnexpectedInput(path, line=line, expected="a whole file", came=str(error)) from None
