"""Raw tables as they come: any sound file reads as a plain CSV reader reads it, any broken one is one clear error."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trajlm.cohorts import tables_files
from trajlm.cohorts.ledger import RowLedger
from trajlm.cohorts.tables import Release, Select, raw_text
from trajlm.errors import TrajlmError, UnexpectedInput

COLUMNS = {"id": "integer", "taken": "time", "amount": "number", "what": "string", "said": "text"}
HEADER = [*COLUMNS, "unused"]


def release(folder: Path) -> Release:
    return Release(folder, RowLedger(folder / "rejected"))


def written(folder: Path, rows: list[list[str]], *, header=HEADER, suffix=".csv", newline="\n", bom=False) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=newline).writerows([header, *rows])
    data = (b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode()
    path = folder / f"table{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    return path


def plain(rows: list[list[str]], newline: str = "\n") -> list[tuple]:
    """Line, values: by the csv module's own count of lines and Python's own parsers."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([HEADER, *rows])
    reader = csv.reader(io.StringIO(text.getvalue(), newline=""))
    next(reader)
    found, line = [], reader.line_num + 1
    for number, taken, amount, what, said, _ in reader:
        found.append(
            (
                line,
                int(number) if number else None,
                datetime.strptime(taken, "%Y-%m-%d %H:%M:%S") if taken else None,
                float(amount) if amount else None,
                what or None,
                said or None,
            )
        )
        line = reader.line_num + 1
    return found


WORDS = st.text(st.sampled_from("ab ,\"'\nü;|\t"), max_size=8)
TIMES = st.datetimes(datetime(2100, 1, 1), datetime(2210, 1, 1)).map(lambda t: t.strftime("%Y-%m-%d %H:%M:%S"))
ROWS = st.lists(
    st.tuples(
        st.integers(-5, 10**12).map(str),  # an id in every row: a row of empty cells alone is an empty line
        st.one_of(st.just(""), TIMES),
        st.one_of(st.just(""), st.floats(-1e6, 1e6).map(repr)),
        WORDS,
        WORDS,
        st.just("x"),
    ).map(list),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([".csv", ".csv.gz"]), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_sound_file_reads_as_a_plain_reader_reads_it(rows, suffix, newline, bom):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, rows, suffix=suffix, newline=newline, bom=bom)
        source = release(folder)
        table = source.table("table", columns=COLUMNS)
        assert table is not None
        assert table.frame.select("line", *COLUMNS).rows() == plain(rows)
        assert table.frame.select(raw_text(c) for c in HEADER).rows() == [tuple(row) for row in rows]
        source.ledger.keep("table", len(rows))
        assert source.ledger.close()["table"]["read"] == len(rows)


@settings(max_examples=25, deadline=None)
@given(ROWS)
def test_small_batches_and_a_parquet_file_read_as_the_whole(rows):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, rows)
        whole = release(folder).table("table", columns=COLUMNS)
        assert whole is not None
        typed = whole.frame.select(*COLUMNS, unused=raw_text("unused"))
        (folder / "other").mkdir()
        typed.write_parquet(folder / "other" / "table.parquet")
        as_parquet = release(folder / "other").table("table", columns=COLUMNS)
        assert as_parquet is not None
        assert as_parquet.frame.select(*COLUMNS).equals(typed.select(*COLUMNS))
        assert as_parquet.frame["line"].to_list() == list(range(2, 2 + len(rows)))
        longest = max((sum(map(len, row)) for row in rows), default=0)
        old, tables_files._BLOCK_BYTES = tables_files._BLOCK_BYTES, 2 * longest + 200
        try:
            batches = release(folder).batches("table", columns=COLUMNS)
            assert batches is not None
            assert pl.concat(batch.frame for batch in batches).equals(whole.frame)
        finally:
            tables_files._BLOCK_BYTES = old


@settings(max_examples=40, deadline=None)
@given(ROWS, st.sets(st.integers(-5, 10**12), max_size=4), st.sampled_from(["csv", "parquet"]))
def test_a_selection_keeps_what_a_plain_loop_keeps_and_rejects_the_rest_as_it_was(rows, others, form):
    wanted = others | {int(row[0]) for row in rows[::2]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written(folder, rows)
        if form == "parquet":
            whole = release(folder).table("table", columns=COLUMNS)
            assert whole is not None
            whole.frame.select(*COLUMNS, unused=raw_text("unused")).write_parquet(folder / "table.parquet")
            (folder / "table.csv").unlink()
        source = release(folder)
        batches = source.batches("table", columns=COLUMNS, select=Select("id", wanted, "not wanted"))
        assert batches is not None
        kept = pl.concat(batch.frame for batch in batches)
        source.ledger.keep("table", kept.height)
        account = source.ledger.close()["table"]
        mine = [row for row in rows if int(row[0]) in wanted]
        assert kept["id"].to_list() == [int(row[0]) for row in mine]
        assert account["read"] == len(rows)
        assert account["reasons"] == ({"not wanted": len(rows) - len(mine)} if len(mine) < len(rows) else {})
        if form == "csv" and len(mine) < len(rows):
            stored = pl.read_parquet(folder / "rejected" / "table.parquet")
            assert stored.select(HEADER).rows() == [tuple(row) for row in rows if int(row[0]) not in wanted]
            lines = [row[0] for row in plain(rows)]
            assert stored["line"].to_list() == [
                n for n, row in zip(lines, rows, strict=True) if int(row[0]) not in wanted
            ]


GOOD = [["1", "2180-01-01 00:00:00", "1.5", "a", "b", "x"], ["2", "", "", "", "", "y"]]


def broken(folder: Path, fault: str) -> str:
    """Write a table with a fault; the error it must give."""
    path = written(folder, GOOD)
    whole = path.read_bytes()
    if fault == "empty file":
        path.write_bytes(b"")
        return r"line 1: expected a header, came an empty file"
    if fault == "other separator":
        path.write_bytes(whole.replace(b",", b";"))
        return r"line 1, column id: .* separated by ';', not by commas"
    if fault == "renamed column":
        path.write_bytes(whole.replace(b"amount", b"amounts"))
        return r"line 1, column amount: expected this column.*the nearest is amounts"
    if fault == "column twice":
        path.write_bytes(whole.replace(b"unused", b"amount"))
        return r"line 1, column amount: expected each column once"
    if fault == "ragged line":
        path.write_bytes(whole + b"3,,\n")
        return r"line 4: expected 6 cells, came 3"
    if fault == "empty line":
        path.write_bytes(whole + b",,,,,\n")
        return r"line 4, column id: expected a row, came an empty line"
    if fault == "text in a number":
        path.write_bytes(whole.replace(b"1.5", b"much"))
        return r"line 2, column amount: expected a number or nothing, came 'much'"
    if fault == "no such date":
        path.write_bytes(whole.replace(b"2180-01-01", b"2180-02-30"))
        return r"line 2, column taken: expected a time as YYYY-MM-DD HH:MM:SS or nothing, came '2180-02-30"
    if fault == "infinite":
        path.write_bytes(whole.replace(b"1.5", b"inf"))
        return r"line 2, column amount: expected a number or nothing, came 'inf'"
    if fault == "other bytes":
        path.write_bytes(whole.replace(b"a,b", b"\xff,b"))
        return r"line 2, column what: expected UTF-8, came other bytes"
    if fault == "truncated gzip":
        path.unlink()
        (folder / "table.csv.gz").write_bytes(gzip.compress(whole * 200)[:-30])
        return r"table\.csv\.gz.*expected a (whole file|readable table)"
    if fault == "damaged gzip":
        path.unlink()
        packed = bytearray(gzip.compress(bytes(range(32, 127)) + whole * 50))
        packed[len(packed) // 2] ^= 0xFF
        (folder / "table.csv.gz").write_bytes(packed)
        return r"table\.csv\.gz"
    if fault == "quotation mark never closed":
        path.write_bytes(whole + b'3,,,,,"x\n4,,,,,y\n5,,,,,z\n')
        return r"line 4: expected quotation marks in pairs, came one that is never closed"
    if fault == "cut within a quoted cell":
        path.write_bytes(whole + b'3,,,,,"x\nmore of the no')
        return r"line 4: expected quotation marks in pairs"
    if fault == "number too large to store":
        path.write_bytes(whole.replace(b"1.5", b"1e39"))
        return r"line 2, column amount: expected a number or nothing, came '1e39'"
    if fault == "a folder":
        path.unlink()
        path.mkdir()
        return r"table\.csv: expected a table in one file, came a folder"
    if fault == "a link to nothing":
        path.unlink()
        path.symlink_to(folder / "gone")
        return r"table\.csv: expected a table in one file, came a link to nothing"
    if fault == "not gzip":
        path.rename(folder / "table.csv.gz")
        return r"table\.csv\.gz: expected a readable table, came .*[Gg]zip"
    if fault == "not parquet":
        path.rename(folder / "table.parquet")
        return r"table\.parquet: expected a parquet table"
    assert fault == "twice"
    (folder / "table.csv.gz").write_bytes(gzip.compress(whole))
    return r"table\.csv and table\.csv\.gz both exist"


FAULTS = [
    "empty file", "other separator", "renamed column", "column twice", "ragged line", "empty line", "text in a number",
    "no such date", "infinite", "other bytes", "truncated gzip", "not gzip", "not parquet", "twice", "damaged gzip",
    "quotation mark never closed", "cut within a quoted cell", "number too large to store", "a folder",
    "a link to nothing",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("selecting", [False, True])
def test_a_fault_is_one_line_that_names_file_line_and_column(tmp_path, fault, selecting):
    expected = broken(tmp_path, fault)
    select = Select("id", {1}, "not wanted") if selecting else None
    with pytest.raises(TrajlmError, match=expected) as caught:
        list(release(tmp_path).batches("table", columns=COLUMNS, select=select) or [])
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_pass_in_free_text_alone(tmp_path):
    path = written(tmp_path, GOOD)
    path.write_bytes(path.read_bytes().replace(b",b,", b",b\xff,"))
    table = release(tmp_path).table("table", columns=COLUMNS)
    assert table is not None
    assert table.frame["said"].to_list() == ["b\ufffd", None]


def test_a_note_of_two_megabytes_is_a_cell_like_any_other(tmp_path):
    note = "line one\nline two, with a comma\n" * 70_000
    written(tmp_path, [["1", "", "", "", note, "x"], ["2", "", "", "", "short", "x"]])
    table = release(tmp_path).table("table", columns=COLUMNS)
    assert table is not None
    assert table.frame["said"].to_list() == [note, "short"]
    assert table.frame["line"].to_list() == [2, 3 + note.count("\n")]


def test_a_header_may_differ_in_case_and_blanks(tmp_path):
    written(tmp_path, GOOD, header=["ID", " Taken", "AMOUNT ", "what", "said", "Unused"])
    table = release(tmp_path).table("table", columns=COLUMNS)
    assert table is not None
    assert table.raw == (*COLUMNS, "Unused")
    assert table.frame["id"].to_list() == [1, 2]


def test_a_quotation_mark_within_a_cell_is_a_character(tmp_path):
    path = written(tmp_path, GOOD)
    path.write_bytes(path.read_bytes() + b'3,,,5" tube,,x\n')
    table = release(tmp_path).table("table", columns=COLUMNS)
    assert table is not None
    assert table.frame["what"].to_list() == ["a", None, '5" tube']


def test_a_column_without_a_name_is_called_by_its_place(tmp_path):
    written(tmp_path, [["0", *row] for row in GOOD], header=["", *HEADER])
    table = release(tmp_path).table("table", columns=COLUMNS)
    assert table is not None
    assert table.raw == ("column 1", *HEADER)
    assert table.frame["id"].to_list() == [1, 2]


def test_what_other_programs_write_into_parquet_is_read_or_refused(tmp_path):
    frame = pl.DataFrame(
        {
            "id": [1.0, float("nan"), 3.0],
            "taken": [None, None, None],
            "amount": [0.5, float("nan"), None],
            "what": ["a", None, "c"],
            "said": [None, "b", None],
            "unused": [[1, 2], [], None],
        },
        schema_overrides={"taken": pl.Datetime("ns")},
    )
    frame.write_parquet(tmp_path / "table.parquet")
    table = release(tmp_path).table("table", columns=COLUMNS)
    assert table is not None
    assert table.frame["id"].to_list() == [1, None, 3]
    assert table.frame["amount"].to_list() == [0.5, None, None]
    assert table.frame[raw_text("unused")].to_list() == ["[1, 2]", "[]", ""]
    source = release(tmp_path)
    selected = pl.concat(b.frame for b in source.batches("table", columns=COLUMNS, select=Select("id", {3}, "other")))
    assert selected["id"].to_list() == [3]
    pl.DataFrame({**{c: ["1"] for c in HEADER}, "id": [2**63 + 1]}).write_parquet(tmp_path / "table.parquet")
    with pytest.raises(
        UnexpectedInput, match="line 2, column id: expected an integer or nothing, came '9223372036854775809'"
    ):
        release(tmp_path).table("table", columns={"id": "integer"})


def test_a_table_of_a_header_alone_has_no_rows(tmp_path):
    written(tmp_path, [])
    table = release(tmp_path).table("table", columns=COLUMNS)
    assert table is not None
    assert table.frame.height == 0


def test_what_is_absent_is_none_and_a_file_is_no_folder(tmp_path):
    assert release(tmp_path).table("table", columns=COLUMNS) is None
    assert release(tmp_path).batches("table", columns=COLUMNS) is None
    with pytest.raises(TrajlmError, match="expected the folder of"):
        release(written(tmp_path, GOOD))


def test_a_fault_deep_in_a_large_table_is_still_named(tmp_path):
    rows = [[str(i), "", str(i / 2), "some words", "", "x"] for i in range(300_000)]
    rows[250_000][2] = "n/a"
    written(tmp_path, rows)
    with pytest.raises(UnexpectedInput, match="line 250002, column amount: expected a number or nothing, came 'n/a'"):
        list(release(tmp_path).batches("table", columns=COLUMNS) or [])
