"""Raw MIMIC tables, read strictly: every row kept as text with its line, the columns in use parsed beside it."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import polars as pl
import pyarrow as pa
import pyarrow.csv as arrow_csv

from trajlm.cohorts.ledger import LINE, RowLedger
from trajlm.errors import TrajlmError, UnexpectedInput

Format = Literal["integer", "number", "time", "string", "text"]

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"
_EXPECTED = {"integer": "an integer or nothing", "number": "a number or nothing",
             "time": "a time as YYYY-MM-DD HH:MM:SS or nothing"}  # fmt: skip
_BLOCK_BYTES = 1 << 23  # a row must fit in one block: the longest notes are some 100 kB


def raw_text(column: str) -> str:
    """Name under which the raw text of ``column`` lies, out of the way of parsed and working columns."""
    return f"raw:{column}"


@dataclass(frozen=True)
class Table:
    """One raw table.

    Attributes:
        name: file name without ``.csv`` or ``.csv.gz``, which is also its name in the ledger.
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
        if column not in self.raw:
            came = ", ".join(self.raw)
            raise UnexpectedInput(self.path, line=1, column=column, expected="this column", came=came)

    def refuse(self, broken: pl.Expr, column: str, expected: str, came: str | None = None) -> None:
        """Raise UnexpectedInput for the first row for which ``broken`` holds."""
        bad = self.frame.filter(broken.fill_null(False)).head(1)
        if bad.height:
            came = came or repr(bad[raw_text(column)][0][:60])
            raise UnexpectedInput(self.path, line=bad[LINE][0], column=column, expected=expected, came=came)


class Release:
    """The folder of a release: finds its tables, reads them and notes what was read.

    Attributes:
        raw: the folder.
        ledger: accounts for every row.
        inputs: the files read so far.
        notes: what a user should know, in words.
    """

    def __init__(self, raw: Path, ledger: RowLedger) -> None:
        if not raw.is_dir():
            raise TrajlmError(f"{raw}: expected the folder of a MIMIC-IV release, came no folder")
        self.raw, self.ledger = raw, ledger
        self.inputs: list[str] = []
        self.notes: list[str] = []

    def find(self, *places: str) -> Path | None:
        """The first of ``places`` (without suffix) that exists as ``.csv`` or ``.csv.gz``."""
        for place in places:
            found = [path for path in (self.raw / f"{place}.csv", self.raw / f"{place}.csv.gz") if path.is_file()]
            if len(found) > 1:
                raise TrajlmError(f"{found[0]} and {found[1].name} both exist; keep the one that is to be read")
            if found:
                return found[0]
        return None

    def table(self, *places: str, columns: Mapping[str, Format]) -> Table | None:
        """Read the first of ``places`` that exists, all rows, and tell the ledger; None where none exists.

        Args:
            columns: the columns in use and their formats. ``text`` alone tolerates bytes that are not UTF-8.

        Raises:
            UnexpectedInput: a column in use is missing, a line is ragged or empty, or a cell is not of its format.
        """
        path = self.find(*places)
        if path is None:
            return None
        name = path.name.removesuffix(".gz").removesuffix(".csv")
        header = _read_header(path)
        for column in columns:
            Table(name, path, pl.DataFrame(), tuple(header)).require(column)
        lossy = [column for column, kind in columns.items() if kind == "text"]
        frame = _number_lines(_read_strings(path, header, lossy))
        table = Table(name, path, frame, tuple(header))
        hollow = pl.all_horizontal(pl.col(raw_text(column)) == "" for column in header)
        table.refuse(hollow, header[0], "a row", "an empty line")
        frame = frame.with_columns(_parse(column, kind) for column, kind in columns.items())
        table = Table(name, path, frame, tuple(header))
        for column, kind in columns.items():
            if kind in _EXPECTED:
                wrong = (pl.col(raw_text(column)) != "") & pl.col(column).is_null()
                table.refuse(wrong, column, _EXPECTED[kind])
        self.inputs.append(str(path))
        self.ledger.read(name, frame.height)
        return table

    def screen(self, table: Table, frame: pl.DataFrame, rules: Sequence[tuple[str, pl.Expr]]) -> pl.DataFrame:
        """Reject the rows of ``frame``, which belong to ``table``, that break a rule; return the others.

        As :meth:`RowLedger.screen`, with the raw columns brought back under their own names.
        """
        raw = [pl.col(raw_text(column)).alias(column) for column in table.raw]
        for reason, breaks in rules:
            broken = breaks.fill_null(False)
            self.ledger.reject(table.name, frame.filter(broken).select(LINE, *raw), reason)
            frame = frame.filter(~broken)
        return frame


def _parse(column: str, kind: Format) -> pl.Expr:
    cell = pl.col(raw_text(column)).alias(column)
    if kind == "time":
        return cell.str.to_datetime(TIME_FORMAT, time_unit="us", strict=False)
    if kind == "integer":
        return cell.cast(pl.Int64, strict=False)
    if kind == "number":
        number = cell.cast(pl.Float64, strict=False)
        return pl.when(number.is_finite()).then(number).alias(column)
    return pl.when(cell != "").then(cell).alias(column)


def _open(path: Path, errors: str = "strict") -> TextIO:
    binary = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 (closed by its wrapper)
    return io.TextIOWrapper(binary, encoding="utf-8-sig", errors=errors, newline="")


def _read_header(path: Path) -> list[str]:
    try:
        with _open(path, errors="replace") as lines:
            header = next(csv.reader(lines), [])
    except (OSError, EOFError) as error:
        raise UnexpectedInput(path, expected="a readable table", came=str(error)) from None
    if not header:
        raise UnexpectedInput(path, line=1, expected="a header", came="an empty file")
    for column in header:
        if header.count(column) > 1:
            raise UnexpectedInput(path, line=1, column=column, expected="each column once", came="it twice")
    return header


def _read_strings(path: Path, header: list[str], lossy: Sequence[str]) -> pl.DataFrame:
    """All cells as strings, empty ones as ''; arrow rather than polars, which fills short lines silently."""
    types = {column: pa.binary() if column in lossy else pa.string() for column in header}
    try:
        table = arrow_csv.read_csv(
            path,
            read_options=arrow_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            convert_options=arrow_csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, OSError) as error:
        _explain(path, header, lossy)
        raise UnexpectedInput(path, expected="a CSV table in UTF-8", came=str(error)) from None
    for column in lossy:
        decoded = pa.array((cell.as_py().decode("utf-8", "replace") for cell in table[column]), pa.large_string())
        table = table.set_column(table.schema.get_field_index(column), column, decoded)
    frame = pl.from_arrow(table.rename_columns([raw_text(column) for column in header]))
    assert isinstance(frame, pl.DataFrame)
    return frame


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
    except (OSError, EOFError) as error:
        raise UnexpectedInput(path, line=line, expected="a whole file", came=str(error)) from None


def _number_lines(frame: pl.DataFrame) -> pl.DataFrame:
    """Add ``line``, 1-based, the header being line 1; a cell with line breaks moves the rows after it down."""
    columns = frame.columns
    frame = frame.with_row_index(LINE, offset=2).with_columns(pl.col(LINE).cast(pl.Int64))
    broken = frame.select(pl.col(columns).str.contains("\n", literal=True).any()).row(0) if frame.height else ()
    wrapped = [column for column, found in zip(columns, broken, strict=False) if found]
    if not wrapped:
        return frame
    breaks = pl.sum_horizontal(pl.col(column).str.count_matches("\n", literal=True) for column in wrapped)
    return frame.with_columns(pl.col(LINE) + (breaks.cum_sum() - breaks).cast(pl.Int64))
