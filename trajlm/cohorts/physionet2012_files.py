"""PhysioNet 2012 on disk: sets of record files, in an archive or a folder, read whole and cut into lines."""

from __future__ import annotations

import difflib
import gzip
import io
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import polars as pl
import pyarrow as pa

from trajlm.cohorts.ledger import LINE
from trajlm.errors import TrajlmError, UnexpectedInput

SETS = ("a", "b", "c")
ENDINGS = (".tar.gz", ".tgz", ".zip", "")  # "" is a folder; of two forms of one set the first is read
_RECORD = re.compile(r"(\d+)\.txt")


@dataclass(frozen=True)
class RecordSet:
    """Where one set lies.

    Attributes:
        letter: a, b or c.
        source: its archive or folder.
        outcomes: its outcomes file, ``None`` if the release has none.
        ignored: other forms of the same set that lie beside it.
    """

    letter: str
    source: Path
    outcomes: Path | None
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the release calls it."""
        return f"set-{self.letter}"

    @property
    def outcomes_name(self) -> str:
        """What the release calls its outcomes file."""
        return f"Outcomes-{self.letter}.txt"

    @property
    def place(self) -> Path:
        """The folder from which ``Records.files`` are named."""
        return self.source.parent


@dataclass(frozen=True)
class Records:
    """The bytes of a set.

    Attributes:
        files: name below ``RecordSet.place`` to (stay id, content), in order of stay id.
        inputs: files on disk that were read.
        notes: counted, what was left unread.
    """

    files: dict[str, tuple[int, bytes]]
    inputs: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def stay_ids(self) -> list[int]:
        """The stay of each file."""
        return [stay_id for stay_id, _ in self.files.values()]


def find_sets(raw: Path, wanted: list[str]) -> list[RecordSet]:
    """The sets under ``raw`` that are wanted (none named: all), in the order a, b, c.

    Args:
        raw: a folder that holds sets, or one set's folder or archive, outcomes beside it.

    Raises:
        TrajlmError: for a set that no release has.
        UnexpectedInput: for a set that is not there.
    """
    for letter in wanted:
        if letter not in SETS:
            nearest = difflib.get_close_matches(str(letter), SETS, n=1, cutoff=0.0)[0]
            raise TrajlmError(f"prepare.sets: {letter!r} is not a set; the nearest is {nearest!r}, all are a, b, c")
    if not raw.exists():
        raise UnexpectedInput(raw, expected="a folder or an archive", came="nothing of this name")
    names = {f"set-{letter}{ending}": letter for letter in SETS for ending in ENDINGS}
    place = raw.parent if raw.name in names else raw
    if not place.is_dir():
        raise UnexpectedInput(raw, expected=f"a file named {_either(names)}", came=raw.name)
    offered = [raw.name] if raw.name in names else [n for n in names if (place / n).exists()]
    found: dict[str, RecordSet] = {}
    for letter in SETS:
        forms = [name for name in offered if names[name] == letter]
        if forms and (not wanted or letter in wanted):
            outcomes = place / f"Outcomes-{letter}.txt"
            found[letter] = RecordSet(
                letter, place / forms[0], outcomes if outcomes.is_file() else None, tuple(forms[1:])
            )
    for letter in wanted or (SETS if not found else ()):
        if letter not in found:
            looked_for = _either([n for n in names if not wanted or names[n] == letter])
            here = sorted(path.name for path in place.iterdir())[:5] if raw == place else [raw.name]
            came = ", ".join(here) or "an empty folder"
            raise UnexpectedInput(raw, expected=looked_for, came=came, hint="give the folder that holds the sets")
    return list(found.values())


def _either(names: list[str] | dict[str, str]) -> str:
    return " or ".join(names)


def read_records(source: RecordSet) -> Records:
    """Read every ``NNNNNN.txt`` of a set.

    Raises:
        UnexpectedInput: for an archive that is cut off or damaged, a set without records, or two records of one name.
    """
    folder = source.source.is_dir()
    files: dict[str, tuple[int, bytes]] = {}
    seen: dict[int, str] = {}
    inputs: list[str] = []
    others = 0
    for name, content in _members(source.source):
        record = _RECORD.fullmatch(PurePosixPath(name).name)
        if record is None:
            others += 1
            continue
        stay_id, label = int(record[1]), f"{source.source.name}/{name}"
        if stay_id in seen:
            expected = f"one file for record {stay_id}"
            raise UnexpectedInput(source.place / label, expected=expected, came=f"a second one after {seen[stay_id]}")
        seen[stay_id] = label
        files[label] = (stay_id, content)
        if folder:
            inputs.append(str(source.source / name))
    if not files:
        raise UnexpectedInput(source.source, expected="records named NNNNNN.txt", came="none")
    notes = [f"{others} files are not named NNNNNN.txt and were not read"] if others else []
    if source.ignored:
        notes.append(f"read from {source.source.name}, not from {', '.join(source.ignored)} beside it")
    ordered = dict(sorted(files.items(), key=lambda item: item[1][0]))
    return Records(ordered, tuple(inputs) if folder else (str(source.source),), tuple(notes))


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file in a folder or archive; nothing is unpacked to disk."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    try:
        if source.suffix == ".zip":
            with zipfile.ZipFile(source) as archive:
                for name in archive.namelist():
                    if not name.endswith("/"):
                        yield name, archive.read(name)
            return
        # The whole stream first: gzip checks its sum, whereas tarfile ends quietly at a damaged header.
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(source.read_bytes())), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, RuntimeError) as problem:
        reason = f"{type(problem).__name__}: {problem}"
        raise UnexpectedInput(source, expected="a whole archive", came=reason, hint="download it again") from problem


def split_lines(where: Path, files: dict[str, tuple[int, bytes]]) -> pl.DataFrame:
    """Cut files into lines without a Python loop over them.

    Args:
        where: folder that errors name the files from.
        files: name to (stay id, content).

    Returns:
        ``file`` str, ``stay_id`` int64, ``line`` int64 (1-based within the file), ``text`` str without its end of line.

    Raises:
        UnexpectedInput: for a file that is empty or not UTF-8.
    """
    pieces = []
    for name, (_, content) in files.items():
        if not content:
            raise UnexpectedInput(where / name, line=1, expected="a header", came="an empty file")
        try:
            content.decode()
        except UnicodeDecodeError as problem:
            line = content[: problem.start].count(b"\n") + 1
            came = f"byte 0x{content[problem.start]:02x}"
            raise UnexpectedInput(where / name, line=line, expected="UTF-8 text", came=came) from None
        text = content.replace(b"\r\n", b"\n") if b"\r" in content else content
        pieces.append(text if text.endswith(b"\n") else text + b"\n")
    counts = np.array([piece.count(b"\n") for piece in pieces])
    data = b"".join(pieces)
    ends = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n")) + 1
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    strings = pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(data))
    which = np.repeat(np.arange(len(pieces)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    stay_ids = np.array([stay_id for stay_id, _ in files.values()], dtype=np.int64)
    return pl.DataFrame(
        {
            "file": pl.Series(list(files)).gather(which),
            "stay_id": stay_ids[which],
            LINE: np.arange(len(ends)) - first + 1,
            "text": pl.Series(strings).str.strip_suffix("\n"),
        }
    )
