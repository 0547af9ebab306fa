"""A small release of PhysioNet 2012 made on the spot, and the real one where it is at hand."""

from __future__ import annotations

import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REAL = Path(__file__).parents[1].parent / "shared/data/physionet2012"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="PhysioNet 2012 set A is not at hand")
OUTCOMES_HEADER = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death"


def record(stay_id: int, rows: str = "", age: int = 60) -> str:
    """The text of one record: descriptors, then ``rows`` as ``HH:MM,Parameter,Value`` parted by blanks."""
    head = f"00:00,RecordID,{stay_id} 00:00,Age,{age} 00:00,Gender,1 00:00,Height,-1 00:00,ICUType,3 00:00,Weight,80"
    return "\n".join(["Time,Parameter,Value", *head.split(), *rows.split()]) + "\n"


def outcome(stay_id: int, days: int | str = 5, death: int | str = 0) -> str:
    return f"{stay_id},6,1,{days},-1,{death}"


def write_release(folder: Path, records: dict[int, str], outcomes: str | None = None, letter: str = "a") -> Path:
    """Folder ``set-<letter>`` and its outcomes file under ``folder``."""
    place = folder / f"set-{letter}"
    place.mkdir(parents=True, exist_ok=True)
    for stay_id, text in records.items():
        (place / f"{stay_id}.txt").write_bytes(text.encode())
    if outcomes is None:
        outcomes = "\n".join([OUTCOMES_HEADER, *(outcome(stay_id) for stay_id in records)]) + "\n"
    (folder / f"Outcomes-{letter}.txt").write_text(outcomes)
    return folder


def random_records(count: int, seed: int = 0) -> dict[int, str]:
    """Stays that differ in what they hold."""
    rng = random.Random(seed)
    records = {}
    for stay_id in range(1001, 1001 + count):
        minutes = sorted(rng.sample(range(1, 48 * 60), 12))
        groups = [
            ["HR", "Temp"],
            ["HR", "Urine"],
            *([["K", "Na"]] * (stay_id % 3 > 0)),
            *([["pH"]] * (stay_id % 4 > 0)),
        ]
        rows = []
        for minute in minutes:
            for name in rng.choice(groups):
                low, high = {"HR": (50, 150), "Temp": (35, 40), "Urine": (0, 500), "pH": (7, 7.6)}.get(name, (1, 9))
                value = rng.uniform(low, high) + (130 if name == "Na" else 0)
                rows.append(f"{minute // 60:02d}:{minute % 60:02d},{name},{value:.2f}")
        records[stay_id] = record(stay_id, " ".join(rows), age=rng.randint(20, 90))
    return records


def real_lines() -> Iterator[tuple[int, int, str, str, str]]:
    """(stay id, line, Time, Parameter, Value) of every row of the real set A, read member by member."""
    with tarfile.open(REAL / "set-a.tar.gz") as archive:
        for member in archive:
            stream = archive.extractfile(member)
            if stream is not None:
                stay_id = int(Path(member.name).stem)
                for line, text in enumerate(stream.read().decode().splitlines(), 1):
                    if line > 1:
                        time, name, value = text.split(",")
                        yield stay_id, line, sys.intern(time), sys.intern(name), sys.intern(value)
