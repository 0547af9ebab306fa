"""The files of a MEDS dataset: found, checked against the standard's schema, and read in batches of bounded size."""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds

from trajlm.cohorts.ledger import LINE, RowLedger
from trajlm.errors import TrajlmError, UnexpectedInput

SHARD = "shard"  # path of a row's file relative to the dataset, kept with every rejected row
FIRST_LINE = 2  # the header counts as line 1, as in a CSV file
_BATCH_ROWS, _BATCH_BYTES = 500_000, 1 << 27


def _is_text(kind: pa.DataType) -> bool:
    if kinds.is_dictionary(kind):
        return _is_text(kind.value_type)
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _is_number(kind: pa.DataType) -> bool:
    return kinds.is_floating(kind) or kinds.is_integer(kind) or kinds.is_null(kind)


def _is_time(kind: pa.DataType) -> bool:
    return kinds.is_timestamp(kind) and kind.tz is None


@dataclass(frozen=True)
class Column:
    """What a column of a MEDS table must be: arrow types that are taken, how an error names them, what it becomes."""

    fits: Callable[[pa.DataType], bool]
    expected: str
    dtype: pl.DataType
    optional: bool = False


_ID = Column(lambda kind: kinds.is_integer(kind) and kind != pa.uint64(), "int64", pl.Int64())
_TIME = Column(_is_time, "timestamp[us] without a time zone", pl.Datetime("us"))
_TEXT = Column(_is_text, "string", pl.String())
DATA: dict[str, Column] = {
    "subject_id": _ID,
    "time": _TIME,
    # Few codes, many rows: numbered by a dictionary they are read, joined and counted several times as fast.
    "code": Column(_is_text, "string", pl.Categorical()),
    "numeric_value": Column(_is_number, "float32", pl.Float64(), optional=True),
    "text_value": Column(lambda kind: _is_text(kind) or kinds.is_null(kind), "string", pl.String(), optional=True),
}
SPLITS: dict[str, Column] = {"subject_id": _ID, "split": _TEXT}
LABELS: dict[str, Column] = {
    "subject_id": _ID,
    "prediction_time": _TIME,
    "boolean_value": Column(kinds.is_boolean, "bool", pl.Boolean(), optional=True),
    "integer_value": Column(kinds.is_integer, "int64", pl.Int64(), optional=True),
    "float_value": Column(_is_number, "float32", pl.Float64(), optional=True),
    "categorical_value": Column(_is_text, "string", pl.String(), optional=True),
}
CODES: dict[str, Column] = {
    "code": _TEXT,
    "unit": Column(_is_text, "string", pl.String(), optional=True),
    "aggregate": Column(_is_text, "string", pl.String(), optional=True),
}


@dataclass(frozen=True)
class Part:
    """One parquet file.

    Attributes:
        name: path relative to the dataset, with ``/``.
        table: name of its rows in the ledger; files of one folder are one table.
    """

    path: Path
    name: str
    table: str


class Dataset:
    """A MEDS dataset: its shards, and what was read of it.

    Attributes:
        root: the folder that holds ``data`` and ``metadata``.
        shards: the parquet files under ``data``, in order of name.
        inputs: files read so far.
        notes: what a user should know, in words.
        release: name and version as ``metadata/dataset.json`` tells them.
    """

    def __init__(self, root: Path, ledger: RowLedger, stored_rows: int | None = None) -> None:
        if not root.is_dir():
            came = "a file" if root.exists() else "no folder"
            raise TrajlmError(f"{root}: expected the folder of a MEDS dataset, came {came}")
        self.root, self.ledger, self._stored_rows = root, ledger, stored_rows
        self._rejected: Counter[tuple[str, str]] = Counter()
        self.inputs: list[str] = []
        self.notes: list[str] = []
        found = sorted(path for path in (root / "data").rglob("*.parquet") if not _hidden(path, root))
        if not found:
            raise TrajlmError(f"{root}: expected data/**/*.parquet, came no such file; is this a MEDS dataset?")
        self.shards = [self._part(path) for path in found]
        self.inputs += [str(path) for path in found]
        self.release = self._release()

    def _part(self, path: Path) -> Part:
        name = Path(os.path.relpath(path, self.root)).as_posix()
        return Part(path, name, name.rpartition("/")[0] or name.removesuffix(".parquet"))

    def _release(self) -> str:
        about = self.root / "metadata" / "dataset.json"
        if not about.is_file():
            self.notes.append("metadata/dataset.json is absent: the dataset names neither itself nor its version")
            return "MEDS dataset"
        try:
            told = json.loads(about.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UnexpectedInput(about, expected="JSON", came=str(error)) from None
        if not isinstance(told, dict):
            raise UnexpectedInput(about, expected="an object of keys and values", came=type(told).__name__)
        self.inputs.append(str(about))
        name, version = told.get("dataset_name") or "dataset", told.get("dataset_version")
        words = [name, version, "in MEDS", told.get("meds_version")]
        return " ".join(str(word) for word in words if word)

    def labels(self, pattern: str) -> list[Part]:
        """The files that a label pattern of the mapping names.

        Raises:
            TrajlmError: it names none.
        """
        found = sorted(glob.glob(str(self.root / pattern), recursive=True))
        if not found:
            raise TrajlmError(f"{self.root / pattern}: expected parquet files of labels, came none")
        self.inputs += [path for path in found if path not in self.inputs]
        parts = [self._part(Path(path)) for path in found]
        if glob.has_magic(pattern):
            return parts
        return [replace(part, table=part.name.removesuffix(".parquet")) for part in parts]

    def metadata(self, name: str, columns: Mapping[str, Column]) -> tuple[Part, pl.DataFrame] | None:
        """All rows of ``metadata/<name>.parquet``, told to the ledger; None where it is absent."""
        path = self.root / "metadata" / f"{name}.parquet"
        if not path.is_file():
            return None
        self.inputs.append(str(path))
        part = Part(path, f"metadata/{name}.parquet", f"metadata/{name}")
        return part, self.read(part, columns)

    def read(self, part: Part, columns: Mapping[str, Column]) -> pl.DataFrame:
        """``line`` and ``columns`` of every row of a small file, told to the ledger."""
        frame = pl.concat(list(batches(part, columns)))
        self.ledger.read(part.table, frame.height)
        return frame

    def reject(self, part: Part, frame: pl.DataFrame, columns: Sequence[str], reason: str) -> None:
        """Store rows of a file that are left out, with the file's name; those that only count go without content."""
        if self._stored_rows is None or self._rejected[part.table, reason] < self._stored_rows:
            frame = frame.select(LINE, pl.lit(part.name).alias(SHARD), *columns)
        else:
            frame = frame.select(LINE)
        self.ledger.reject(part.table, frame, reason)
        self._rejected[part.table, reason] += frame.height

    def screen(
        self, part: Part, frame: pl.DataFrame, columns: Sequence[str], rules: Sequence[tuple[str, pl.Expr]]
    ) -> pl.DataFrame:
        """Reject the rows that break a rule, the first broken one naming the reason, and return the others."""
        number = pl.coalesce(pl.when(breaks).then(pl.lit(i, pl.Int8)) for i, (_, breaks) in enumerate(rules))
        broken = frame.select(number.alias("broken"))["broken"]
        if broken.null_count() == frame.height:
            return frame
        for i in broken.unique().drop_nulls().sort():
            self.reject(part, frame.filter(broken == i), columns, rules[i][0])
        return frame.filter(broken.is_null())


def _hidden(path: Path, root: Path) -> bool:
    return any(name.startswith((".", "_")) for name in path.relative_to(root).parts)


def check_columns(part: Part, columns: Mapping[str, Column], further: Sequence[str] = ()) -> list[str]:
    """The names of ``columns`` that a file has, and ``further`` ones it must have.

    Raises:
        UnexpectedInput: not a parquet file, a column that must be there is not, or one is of another type.
    """
    try:
        schema = pq.read_schema(part.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UnexpectedInput(part.path, expected="a whole parquet file", came=_said(error)) from None
    for name in [*(name for name, column in columns.items() if not column.optional), *further]:
        if name not in schema.names:
            hint = "patient_id is of MEDS before 0.3; write the dataset anew" if "patient_id" in schema.names else None
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = hint or (f"the nearest is {near[0]}" if near else None)
            raise UnexpectedInput(
                part.path, column=name, expected="this column", came=", ".join(schema.names), hint=hint
            )
    held = [name for name in columns if name in schema.names]
    for name in held:
        kind = schema.field(name).type
        if not columns[name].fits(kind):
            raise UnexpectedInput(part.path, column=name, expected=columns[name].expected, came=str(kind))
    return held


def batches(part: Part, columns: Mapping[str, Column], further: Sequence[str] = ()) -> Iterator[pl.DataFrame]:
    """Rows of a file, a batch at a time: ``line`` and ``columns`` (null where the file has none), ``further`` as text.

    Memory follows the batch, not the file or its row groups: batches of long texts hold fewer rows.
    """
    held = check_columns(part, columns, further)
    line = FIRST_LINE
    yield _typed(pl.DataFrame(), columns, further, line)
    try:
        coded = [name for name in held if columns[name].dtype == pl.Categorical]
        with pq.ParquetFile(part.path, pre_buffer=False, buffer_size=1 << 20, read_dictionary=coded) as file:
            size = _batch_rows(file.metadata, [*held, *further])
            for batch in file.iter_batches(batch_size=size, columns=[*held, *further], use_threads=False):
                frame = pl.from_arrow(pa.Table.from_batches([batch]))
                assert isinstance(frame, pl.DataFrame)
                yield _typed(frame, columns, further, line)
                line += frame.height
    except (pa.ArrowInvalid, OSError) as error:
        raise UnexpectedInput(part.path, expected="a whole parquet file", came=_said(error)) from None


def _batch_rows(metadata: pq.FileMetaData, columns: Sequence[str]) -> int:
    """Rows whose columns take about ``_BATCH_BYTES``, judged by the row group of the heaviest rows."""
    heaviest = 1.0
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        chunks = (group.column(i) for i in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
        heaviest = max(heaviest, size / max(group.num_rows, 1))
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / heaviest)))


def _typed(frame: pl.DataFrame, columns: Mapping[str, Column], further: Sequence[str], line: int) -> pl.DataFrame:
    typed = [
        pl.col(name).cast(column.dtype) if name in frame.columns else pl.lit(None, column.dtype).alias(name)
        for name, column in columns.items()
    ]
    typed = [
        # Some writers put NaN where there is no value; of a label it is an error.
        column.fill_nan(None) if name == "numeric_value" else column
        for name, column in zip(columns, typed, strict=True)
    ]
    text = [pl.col(name).cast(pl.String) for name in further if name in frame.columns]
    if frame.width == 0:
        dtypes = {name: column.dtype for name, column in columns.items()}
        return pl.DataFrame(schema={LINE: pl.Int64, **dtypes, **dict.fromkeys(further, pl.String)})
    return frame.with_columns(typed).select(
        pl.int_range(line, line + pl.len(), dtype=pl.Int64).alias(LINE), *columns, *text
    )


def refuse(part: Part, frame: pl.DataFrame, broken: pl.Expr, column: str, expected: str, came: Any = None) -> None:
    """Raise UnexpectedInput for the first row of ``frame`` for which ``broken`` holds."""
    bad = frame.filter(broken.fill_null(False)).head(1)
    if bad.height:
        shown = str(came if came is not None else bad[column][0])
        raise UnexpectedInput(part.path, line=bad[LINE][0], column=column, expected=expected, came=shown)


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
