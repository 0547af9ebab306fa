"""Raw tables, read strictly and in batches: every row as text with its line, the columns in use parsed beside it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from trajlm.cohorts.ledger import LINE, RowLedger
from trajlm.cohorts.tables_files import csv_parts, parquet_header, parquet_parts, read_header
from trajlm.errors import TrajlmError, UnexpectedInput

Format = Literal["integer", "number", "time", "string", "text"]

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
SUFFIXES = (".csv", ".csv.gz", ".parquet")
_EXPECTED = {"integer": "an integer or nothing", "number": "a number or nothing",
             "time": "a time as YYYY-MM-DD HH:MM:SS or nothing"}  # fmt: skip
_LARGEST = 3.4e38  # what float32, in which values are stored, can hold
_PLACE = "place in the batch"
_MARKS = (";", "\t", "|")


def raw_text(column: str) -> str:
    """Name under which the raw text of ``column`` lies, out of the way of parsed and working columns."""
    return f"raw:{column}"


@dataclass(frozen=True)
class Table:
    """One raw table, or a batch of its rows.

    Attributes:
        name: file name without suffix, which is also its name in the ledger.
        path: where it lies.
        frame: ``line``, ``raw_text(column)`` of every raw column as strings, and each column in use, parsed, under its
            own name; null where the cell is empty.
        raw: names of the raw columns, all of them, in the order of the file.
    """

    name: str
    path: Path
    frame: pl.DataFrame
    raw: tuple[str, ...]

    def require(self, column: str) -> None:
        """Raise UnexpectedInput if the table lacks a column."""
        if column in self.raw:
            return
        came, hint = ", ".join(self.raw), None
        mark = next((mark for mark in _MARKS if len(self.raw) == 1 and mark in self.raw[0]), None)
        if mark is not None:
            hint = f"the cells seem to be separated by {mark!r}, not by commas"
        elif near := difflib.get_close_matches(column, self.raw, n=1):
            hint = f"the nearest is {near[0]}"
        raise UnexpectedInput(self.path, line=1, column=column, expected="this column", came=came, hint=hint)

    def refuse(self, broken: pl.Expr, column: str, expected: str, came: str | None = None) -> None:
        """Raise UnexpectedInput for the first row for which ``broken`` holds."""
        bad = self.frame.filter(broken.fill_null(False)).head(1)
        if bad.height:
            came = came or repr(bad[raw_text(column)][0][:60])
            raise UnexpectedInput(self.path, line=bad[LINE][0], column=column, expected=expected, came=came)


@dataclass(frozen=True)
class Select:
    """Keep the rows whose ``column``, one of the columns in use, is among ``values``; reject the others unparsed."""

    column: str
    values: Collection[int] | Collection[str]
    reason: str


class Release:
    """The folder of a release: finds its tables, reads them and notes what was read.

    Attributes:
        raw: the folder.
        ledger: accounts for every row.
        inputs: the files read so far.
        notes: what a user should know, in words.
    """

    def __init__(self, raw: Path, ledger: RowLedger, what: str = "a MIMIC-IV release") -> None:
        if not raw.is_dir():
            raise TrajlmError(f"{raw}: expected the folder of {what}, came {'a file' if raw.exists() else 'no folder'}")
        self.raw, self.ledger = raw, ledger
        self.inputs: list[str] = []
        self.notes: list[str] = []

    def find(self, *places: str) -> Path | None:
        """The first of ``places`` (without suffix) that exists as ``.csv``, ``.csv.gz`` or ``.parquet``."""
        for place in places:
            named = [self.raw / f"{place}{suffix}" for suffix in SUFFIXES]
            found = [path for path in named if path.exists() or path.is_symlink()]
            for path in found:
                if not path.is_file():
                    came = "a folder" if path.is_dir() else "a link to nothing"
                    raise TrajlmError(f"{path}: expected a table in one file, came {came}")
            if len(found) > 1:
                raise TrajlmError(f"{found[0]} and {found[1].name} both exist; keep the one that is to be read")
            if found:
                return found[0]
        return None

    def table(self, *places: str, columns: Mapping[str, Format]) -> Table | None:
        """All rows of a table of moderate size; as :meth:`batches`, in one piece."""
        batches = self.batches(*places, columns=columns)
        if batches is None:
            return None
        parts = list(batches)
        return Table(parts[0].name, parts[0].path, pl.concat(part.frame for part in parts), parts[0].raw)

    def batches(
        self, *places: str, columns: Mapping[str, Format], select: Select | None = None
    ) -> Iterator[Table] | None:
        """Read the first of ``places`` that exists, batch after batch, and tell the ledger; None where none exists.

        There is at least one batch, which may hold no rows. Memory does not grow with the table.

        Args:
            columns: the columns in use and their formats. ``text`` alone tolerates bytes that are not UTF-8.
            select: rejects rows before anything else of them is looked at.

        Raises:
            UnexpectedInput: a column in use is missing, a line is ragged or empty, or a cell is not of its format.
        """
        path = self.find(*places)
        if path is None:
            return None
        name = path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".parquet")
        self.inputs.append(str(path))
        return self._batches(name, path, columns, select)

    def _batches(self, name: str, path: Path, columns: Mapping[str, Format], select: Select | None) -> Iterator[Table]:
        header = parquet_header(path) if path.suffix == ".parquet" else read_header(path)
        names = _canonical(path, header, columns)
        for column in columns:
            Table(name, path, pl.DataFrame(), names).require(column)
        lossy = [column for column, kind in zip(header, names, strict=True) if columns.get(kind) == "text"]
        is_csv = path.suffix != ".parquet"
        parts = csv_parts(path, header, lossy) if is_csv else parquet_parts(path)
        line = 2
        for part in parts:
            lines, line = _line_numbers(part, line, wraps=is_csv)
            part = part.rename_columns(list(names)).append_column(LINE, lines)
            self.ledger.read(name, part.num_rows)
            if select is not None:
                part = self._selected(name, path, part, columns[select.column], select)
            yield _parsed(Table(name, path, _frame(part), names), columns)

    def _selected(self, name: str, path: Path, part: pa.Table, kind: Format, select: Select) -> pa.Table:
        """The rows that are wanted; each different cell is parsed once, and of the others few become a frame."""
        cells = part[select.column].combine_chunks().dictionary_encode()
        different = pl.Series(select.column, cells.dictionary)
        value = _parse_as(different, kind, different.cast(pl.String))
        for odd in different.filter(value.is_null()):
            rows = _frame(part.filter(pc.equal(part[select.column], odd)))
            _refuse_empty_lines(path, rows)
            if kind in _EXPECTED and odd != "":
                came = repr(str(odd)[:60])
                raise UnexpectedInput(
                    path, line=rows[LINE][0], column=select.column, expected=_EXPECTED[kind], came=came
                )
        wanted = value.is_in(list(select.values)).fill_null(False)
        chosen = pc.fill_null(pc.take(wanted.to_arrow(), cells.indices), False)
        left_out = pc.indices_nonzero(pc.invert(chosen))
        stored = left_out[: self.ledger.room(name, select.reason, len(left_out))]
        self.ledger.reject(name, _frame(part.take(stored)), select.reason, count=len(left_out))
        return part.filter(chosen)

    def screen(self, table: Table, frame: pl.DataFrame, rules: Sequence[tuple[str, pl.Expr]]) -> pl.DataFrame:
        """Reject the rows of ``frame``, which belong to ``table``, that break a rule; return the others.

        As :meth:`RowLedger.screen`, with the raw columns brought back under their own names.
        """
        raw = [pl.col(raw_text(column)).alias(column) for column in table.raw]
        # Each rule sees the rows that the earlier ones left, but raw cells, most of a row's weight, are moved once.
        named = {name for _, breaks in rules for name in breaks.meta.root_names()}
        heavy = {raw_text(column) for column in table.raw} - named
        looked_at = [column for column in frame.columns if column not in heavy]
        left = frame.select(pl.int_range(frame.height, dtype=pl.UInt32).alias(_PLACE), *looked_at)
        for reason, breaks in rules:
            broken = left.select(breaks.fill_null(False)).to_series()
            if len(broken) != left.height:  # a rule of no column, pl.lit(...)
                broken = pl.repeat(broken[0], left.height, dtype=pl.Boolean, eager=True)
            if broken.any():
                places = left.filter(broken)[_PLACE]
                stored = places.head(self.ledger.room(table.name, reason, len(places)))
                self.ledger.reject(table.name, frame[stored].select(LINE, *raw), reason, count=len(places))
                left = left.filter(~broken)
        return frame if left.height == frame.height else frame[left[_PLACE]]


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _canonical(path: Path, header: Sequence[str], wanted: Mapping[str, Format]) -> tuple[str, ...]:
    """The header with the names of the columns in use as we write them: case and surrounding blanks do not count."""
    plain = {column.lower(): column for column in wanted}
    names = tuple(column if column in wanted else plain.get(column.strip().lower(), column) for column in header)
    for column in names:
        if names.count(column) > 1:
            raise UnexpectedInput(path, line=1, column=column, expected="each column once", came="it twice")
    return names


def _parsed(table: Table, columns: Mapping[str, Format]) -> Table:
    """Raw columns as text under their raw names, columns in use parsed; checked."""
    typed = table.frame
    text = typed.select(LINE, *(_text(column, typed.schema[column]).alias(raw_text(column)) for column in table.raw))
    _refuse_empty_lines(table.path, typed)
    parsed = [_parse_as(typed[column], kind, text[raw_text(column)]) for column, kind in columns.items()]
    ready = Table(table.name, table.path, text.with_columns(parsed), table.raw)
    for column, kind in columns.items():
        if kind in _EXPECTED:
            ready.refuse((pl.col(raw_text(column)) != "") & pl.col(column).is_null(), column, _EXPECTED[kind])
    return ready


def _refuse_empty_lines(path: Path, frame: pl.DataFrame) -> None:
    strings = [column for column in frame.columns if frame.schema[column] == pl.String]
    if len(strings) < frame.width - 1:  # a parquet table has no lines
        return
    hollow = frame.filter(pl.col(strings[0]) == "")
    hollow = hollow.filter(pl.all_horizontal(pl.col(column) == "" for column in strings)).head(1)
    if hollow.height:
        raise UnexpectedInput(path, line=hollow[LINE][0], column=strings[0], expected="a row", came="an empty line")


def _text(column: str, dtype: pl.DataType) -> pl.Expr:
    if dtype == pl.String:
        return pl.col(column).fill_null("")
    whole_time = isinstance(dtype, pl.Datetime)
    cell = pl.col(column).dt.strftime(TIME_FORMAT) if whole_time else pl.col(column).cast(pl.String)
    return cell.fill_null("")


def _parse_as(typed: pl.Series, kind: Format, text: pl.Series) -> pl.Series:
    """A column in use: as a parquet file types it where that fits, else from its text."""
    fits = (
        (kind == "integer" and typed.dtype.is_integer())
        or (kind == "number" and typed.dtype.is_numeric())
        or (kind == "integer" and typed.dtype.is_float())  # an integer column with gaps, as pandas writes it
        or (kind == "time" and (isinstance(typed.dtype, pl.Datetime) or typed.dtype == pl.Date))
    )
    if not fits:
        return pl.select(_parse(pl.lit(text), kind).alias(typed.name)).to_series()
    if kind == "time":
        return typed.cast(pl.Datetime("us")) if typed.dtype == pl.Date else _without_zone(typed)
    if kind == "integer" and typed.dtype.is_float():
        cell = pl.col(typed.name)
        whole = pl.when(cell.is_finite() & (cell == cell.floor())).then(cell).cast(pl.Int64)
        return typed.to_frame().select(whole.alias(typed.name)).to_series()
    number = typed.cast(pl.Int64 if kind == "integer" else pl.Float64, strict=False)
    return number if kind == "integer" else number.to_frame().select(_finite(pl.col(typed.name))).to_series()


def _without_zone(time: pl.Series) -> pl.Series:
    return time.dt.replace_time_zone(None).cast(pl.Datetime("us"))


def _finite(number: pl.Expr) -> pl.Expr:
    return pl.when(storable(number)).then(number)


def storable(number: pl.Expr) -> pl.Expr:
    """Whether a number is finite and stays so as float32."""
    return number.is_finite() & (number.abs() <= _LARGEST)


def _parse(cell: pl.Expr, kind: Format) -> pl.Expr:
    if kind == "time":
        return cell.str.to_datetime(TIME_FORMAT, time_unit="us", strict=False)
    if kind == "integer":
        return cell.cast(pl.Int64, strict=False)
    if kind == "number":
        return _finite(cell.cast(pl.Float64, strict=False))
    return pl.when(cell != "").then(cell)


def _line_numbers(part: pa.Table, first: int, *, wraps: bool) -> tuple[pa.Array, int]:
    """The line of each row, counted from ``first``, and the next one; where it wraps, line breaks in cells count."""
    lines = np.arange(first, first + part.num_rows, dtype=np.int64)
    breaks = np.zeros(part.num_rows, np.int64)
    for column in part.columns if wraps else ():
        if _holds_a_break(column):
            breaks += pc.count_substring(column, "\n").combine_chunks().to_numpy(zero_copy_only=False)
    before = np.cumsum(breaks) - breaks
    return pa.array(lines + before), first + part.num_rows + int(breaks.sum())


def _holds_a_break(column: pa.ChunkedArray) -> bool:
    """Looks at the bytes of a whole column at once; a hit may lie beside the rows it shows."""
    buffers = (chunk.buffers()[2] for chunk in column.chunks)
    return any(buffer is not None and re.search(b"\n", buffer) is not None for buffer in buffers)
