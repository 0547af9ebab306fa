"""Small MEDS datasets made on the spot, and what a reader must make of them, told by a plain loop."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
from cohort_example import Read, read_cohort

from trajlm.cohorts import meds
from trajlm.config import PrepareConfig

DAY = datetime(2020, 2, 1)
DATA = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32,
        "text_value": pl.String}  # fmt: skip
MAPPING = """
starts: [ICU_ADMISSION]
ends: [ICU_DISCHARGE]
left_out: [LAB//SPECIMEN]
modalities:
  person: {codes: [GENDER, RACE], static: true}
  lab: {codes: ["LAB//"]}
  drug: {codes: [DRUG]}
  note: {codes: [NOTE], kind: text}
"""

Row = tuple[int, float | None, str, float | None, str | None]  # subject, hours after DAY, code, value, text


def at(hours: float | None) -> datetime | None:
    return None if hours is None else DAY + timedelta(hours=hours)


def frame(rows: Sequence[Sequence]) -> pl.DataFrame:
    """MEDS rows of (subject, hours, code, value, text), the last two as far as given."""
    full = [(*row, *(None,) * (5 - len(row))) for row in rows]
    return pl.DataFrame([(s, at(h), *rest) for s, h, *rest in full], schema=DATA, orient="row")


def write(root: Path, shards: dict[str, Sequence[Sequence] | pl.DataFrame], **options) -> Path:
    """Shards by name under ``data``; ``options`` go to the parquet writer."""
    for name, rows in shards.items():
        path = root / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        (rows if isinstance(rows, pl.DataFrame) else frame(rows)).write_parquet(path, **options)
    return root


def labels(root: Path, name: str, rows: Sequence[tuple[int, float | None, object]], column: str) -> None:
    """``labels/<name>.parquet`` of (subject, hours of the prediction time, value)."""
    dtype = {"boolean_value": pl.Boolean, "integer_value": pl.Int64, "float_value": pl.Float32,
             "categorical_value": pl.String}[column]  # fmt: skip
    path = root / "labels" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = {"subject_id": pl.Int64, "prediction_time": pl.Datetime("us"), column: dtype}
    pl.DataFrame([(s, at(h), v) for s, h, v in rows], schema=schema, orient="row").write_parquet(path)


def splits(root: Path, of: dict[int, str]) -> None:
    (root / "metadata").mkdir(exist_ok=True)
    schema = {"subject_id": pl.Int64, "split": pl.String}
    pl.DataFrame(list(of.items()), schema=schema, orient="row").write_parquet(root / "metadata/subject_splits.parquet")


def read(root: Path, mapping: str = MAPPING, **options) -> Read:
    """Read the dataset; what it spools and rejects goes beside it."""
    file = root.parent / f"{root.name}.yaml"
    file.write_text(mapping)
    work = root.parent / f"{root.name}-read-{len(list(root.parent.iterdir()))}"
    return read_cohort(meds, root, PrepareConfig(cohort="meds", mapping=str(file), **options), work)


def random_rows(seed: int, subjects: Sequence[int] = (1, 2, 3)) -> list[Row]:
    """Subjects with none to three stays, on a grid of half hours so that times coincide often."""
    rng = random.Random(seed)
    codes = [
        "LAB//1",
        "LAB//1",
        "LAB//2",
        "LAB//SPECIMEN//1",
        "LABOR",
        "DRUG//a",
        "NOTE//x",
        "RACE//a",
        "RACE//b",
        "XX",
    ]
    rows: list[Row] = []
    for subject in subjects:
        mine: list[Row] = []
        for _ in range(rng.randint(0, 3)):
            mine.append((subject, None, rng.choice(["GENDER//f", "GENDER//m", "LAB//2"]), None, None))
        marks = [("ICU_ADMISSION//x", 4), ("ICU_DISCHARGE//x", 3), ("MEDS_DEATH", 1)]
        for code, most in marks:
            mine += [(subject, rng.randint(0, 60) / 2, code, None, None) for _ in range(rng.randint(0, most))]
        for _ in range(rng.randint(0, 25)):
            code = rng.choice(codes)
            value = rng.choice([1.5, 2.5, None, float("inf")]) if code == "LAB//1" else None
            text = rng.choice(["hello", " ", None]) if code.startswith("NOTE") else None
            mine.append((subject, rng.randint(0, 60) / 2, code, value, text))
        rng.shuffle(mine)
        rows += sorted(mine, key=lambda row: -1.0 if row[1] is None else row[1])
    return rows


@dataclass
class Expected:
    """``stays``: by id, subject, hours, mortality. ``items``: (stay, hours, modality, what, value), counted."""

    stays: dict[int, tuple[int, float | None, int | None]] = field(default_factory=dict)
    items: Counter = field(default_factory=Counter)
    kept: int = 0


def expected(rows: Sequence[Row], window: float | None, before: float) -> Expected:
    """What MAPPING makes of the rows, one row after another, without any table."""
    told = Expected()
    counts = {code: [row[3] is not None for row in rows if row[2] == code] for code in {row[2] for row in rows}}
    valued = {code for code, has in counts.items() if any(has) and sum(has) >= 0.1 * len(has)}
    for subject in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == subject]
        times = {name: sorted({h for _, h, code, *_ in mine if code.startswith(name)})
                 for name in ("ICU_ADMISSION", "ICU_DISCHARGE", "MEDS_DEATH")}  # fmt: skip
        starts, death = times["ICU_ADMISSION"], min(times["MEDS_DEATH"], default=None)
        stays = []
        for i, start in enumerate(starts):
            following = starts[i + 1] if i + 1 < len(starts) else None
            end = next((h for h in times["ICU_DISCHARGE"] if h > start), None)
            if end is not None and following is not None and end > following:
                end = None
            stays.append((subject * 1000 + i + 1, start, end, following))
        kept = [stay for stay in stays if death is None or death >= stay[1]]
        told.kept += len(kept) + (death is not None and bool(kept)) + len({s[2] for s in kept if s[2] is not None})
        for stay_id, start, end, following in kept:
            limit = end if end is not None else following
            died = death is not None and (limit is None or death <= limit)
            ended = death if died else end
            mortality = 1 if died else 0 if end is not None else None
            told.stays[stay_id] = (subject, None if ended is None else ended - start, mortality)
        for row in mine:
            told.kept += _place(row, mine, stays, kept, death, valued, window, before, told)
    return told


def _place(row, mine, stays, kept, death, valued, window, before, told) -> bool:
    _, hour, code, value, text = row
    if code.startswith(("ICU_", "MEDS_", "LAB//SPECIMEN")) or code in ("LABOR", "XX"):
        return False
    modality = {"LAB": "lab", "DRU": "drug", "NOT": "note", "GEN": "person", "RAC": "person"}[code[:3]]
    what = text if modality == "note" else code
    if modality == "note" and not (text or "").strip():
        return False
    if modality != "note" and code in valued and (value is None or value == float("inf")):
        return False
    number = None if modality == "note" else value if code in valued else 1.0
    if hour is None:
        found = [(stay_id, 0.0) for stay_id, *_ in kept]
    elif modality == "person":
        found = []
        for stay_id, start, *_ in kept:
            known = [h for _, h, c, *_ in mine if h is not None and h <= start and c[:4] == code[:4]]
            found += [(stay_id, 0.0)] if known and hour == max(known) else []
    else:
        found = _dated(hour, stays, kept, death, window, before)
    told.items.update((stay_id, hours, modality, what, number) for stay_id, hours in found)
    return bool(found)


def _dated(hour, stays, kept, death, window, before) -> list[tuple[int, float]]:
    begun = [stay for stay in stays if stay[1] <= hour]
    if begun:
        stay_id, start, end, _ = begun[-1]
        inside = (end is None or hour <= end) and (death is None or hour <= death)
        if inside:
            fits = begun[-1] in kept and (window is None or hour - start <= window)
            return [(stay_id, hour - start)] if fits else []
    later = [stay for stay in kept if stay[1] >= hour]
    if later and before and later[0][1] - hour <= before:
        return [(later[0][0], 0.0)]
    return []


def items(read: Read) -> Counter:
    """What was spooled, as ``Expected.items``."""
    found = Counter(read.measurements.select("stay_id", "hours_since_admission", "modality", "feature", "value").rows())
    notes = read.documents.select("stay_id", "hours_since_admission", "modality", "text").rows()
    found.update((*row, None) for row in notes)
    return found
