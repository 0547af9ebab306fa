"""Chest X-rays of MIMIC-CXR-JPG: antero-posterior views taken during a stay, as small greyscale pictures."""

from __future__ import annotations

import io
import re
from pathlib import Path

import polars as pl
from PIL import Image

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.mimic_links import HOURS, link_by_time, within_stay
from trajlm.cohorts.mimic_tables import Format, Release, Table, raw_text
from trajlm.schema import IMAGE_COLUMNS, conform, empty

CHEST_XRAY = "chest_xray"

_PLACE = "cxr/mimic-cxr-2.0.0-metadata"
_COLUMNS: dict[str, Format] = {"dicom_id": "string", "subject_id": "integer", "study_id": "integer",
                               "ViewPosition": "string", "StudyDate": "string", "StudyTime": "string"}  # fmt: skip
_DICOM_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_TAKEN = "taken"


def read_images(release: Release, stays: pl.DataFrame, pixels: int) -> pl.DataFrame:
    """IMAGE_COLUMNS of the X-rays of all kept stays; absent metadata is noted in the release.

    Args:
        stays: STAY_WINDOW of :mod:`trajlm.cohorts.mimic_links`.
        pixels: side of the stored square.

    Raises:
        UnexpectedInput: the metadata table is not what a release holds.
    """
    table = release.table(_PLACE, columns=_COLUMNS)
    if table is None:
        release.notes.append(f"{_PLACE} is absent: no {CHEST_XRAY}")
        return empty(IMAGE_COLUMNS)
    frame = release.screen(
        table,
        _dated(table),
        [
            ("not an antero-posterior (AP) view", ~pl.col("ViewPosition").eq_missing(pl.lit("AP"))),
            ("no time", pl.col(_TAKEN).is_null()),
            ("names no patient", pl.col("subject_id").is_null()),
        ],
    )
    frame = link_by_time(frame, stays, _TAKEN)
    frame = within_stay(release, table, frame, _TAKEN, "no ICU stay of this patient")
    frame = _with_pictures(release, table, frame, pixels)
    release.ledger.keep(table.name, frame.height)
    frame = frame.sort("stay_id", HOURS, LINE).select(
        stay_id="stay_id", hours_since_admission=HOURS, modality=pl.lit(CHEST_XRAY), image="image"
    )
    return conform(frame, IMAGE_COLUMNS, CHEST_XRAY)


def _dated(table: Table) -> pl.DataFrame:
    """Add when the study was taken: a date as 21800506 and a time as 213014.531, leading zeros lost."""
    date, clock = pl.col(raw_text("StudyDate")), pl.col(raw_text("StudyTime"))
    whole = clock.str.extract(r"^(\d{1,6})(?:\.\d*)?$").str.zfill(6)
    day = date.str.to_datetime("%Y%m%d", time_unit="us", strict=False)
    hour, minute, second = (whole.str.slice(start, 2).cast(pl.Int64, strict=False) for start in (0, 2, 4))
    sound = (hour < 24) & (minute < 60) & (second < 60)
    taken = pl.when(sound).then(day + pl.duration(hours=hour, minutes=minute, seconds=second))
    table.refuse((date != "") & day.is_null(), "StudyDate", "a date as YYYYMMDD or nothing")
    table.refuse((clock != "") & ~sound.fill_null(False), "StudyTime", "a time as HHMMSS or nothing")
    odd = ~pl.col(raw_text("dicom_id")).str.contains(f"^(?:{_DICOM_ID.pattern})$")
    table.refuse(odd, "dicom_id", "an identifier of letters, digits, '.', '_' and '-'")
    return table.frame.with_columns(taken.alias(_TAKEN))


def _with_pictures(release: Release, table: Table, frame: pl.DataFrame, pixels: int) -> pl.DataFrame:
    """Add ``image``; reject rows whose file is missing or cannot be read."""
    pictures: list[bytes | None] = []
    missing: list[bool] = []
    names = frame.select("subject_id", "study_id", "dicom_id")
    for subject, study, dicom in names.iter_rows():
        path = table.path.parent / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg"
        missing.append(not path.is_file())
        pictures.append(None if missing[-1] else small_picture(path, pixels))
        if not missing[-1]:
            release.inputs.append(str(path))
    frame = frame.with_columns(pl.Series("image", pictures, pl.Binary), pl.Series("missing", missing, pl.Boolean))
    return release.screen(
        table,
        frame,
        [("image file is missing", pl.col("missing")), ("image cannot be read", pl.col("image").is_null())],
    )


def small_picture(path: Path, pixels: int) -> bytes | None:
    """The picture at ``path`` as a greyscale PNG of ``pixels`` a side; None if it cannot be read.

    The short side is brought to ``pixels`` and the middle of the long side is kept.
    """
    try:
        with Image.open(path) as picture:
            picture.draft("L", (pixels, pixels))  # lets a JPEG of 3000 pixels a side decode at a fraction of its size
            grey = picture.convert("L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    scale = pixels / min(grey.size)
    width, height = (max(pixels, round(side * scale)) for side in grey.size)
    grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - pixels) // 2, (height - pixels) // 2
    stored = io.BytesIO()
    grey.crop((left, top, left + pixels, top + pixels)).save(stored, format="PNG")
    return stored.getvalue()
