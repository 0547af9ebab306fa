"""Chest X-rays of MIMIC-CXR-JPG: antero-posterior views taken during a stay, as small greyscale pictures."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from trajlm.cohorts.mimic_links import HOURS, KNOWN, Timing, link_by_time, within_stay
from trajlm.cohorts.tables import Format, Release, Table, raw_text
from trajlm.spool import Spool

CHEST_XRAY = "chest_xray"
LEAST_PIXELS = 16  # a side; a smaller picture shows no chest
MISSING, UNREADABLE = "image file is missing", "image cannot be read"
TOO_SMALL = f"image is smaller than {LEAST_PIXELS} pixels a side"

_COLUMNS: dict[str, Format] = {"dicom_id": "string", "subject_id": "integer", "study_id": "integer",
                               "ViewPosition": "string", "StudyDate": "string", "StudyTime": "string"}  # fmt: skip
_DICOM_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]*")
_TAKEN = "taken"
_AT_ONCE = 500  # pictures in memory


def read_images(
    release: Release, table_name: str, stays: pl.DataFrame, timing: Timing, pixels: int, spool: Spool
) -> int:
    """Spool the X-rays of all kept stays.

    Args:
        release: the folder of MIMIC-CXR-JPG, in which the metadata table and ``files/`` lie.
        table_name: the metadata table's, without suffix.
        stays: STAY_WINDOW of :mod:`trajlm.cohorts.mimic_links`.
        timing: which pictures count, and when.
        pixels: side of the stored square.
        spool: gets the images.

    Returns:
        How many pictures were kept.

    Raises:
        UnexpectedInput: the metadata table is not what a release holds.
    """
    kept = 0
    for table in release.batches(table_name, columns=_COLUMNS) or ():
        if table.frame.is_empty():
            continue
        rules = [
            ("not an antero-posterior (AP) view", ~pl.col("ViewPosition").eq_missing(pl.lit("AP"))),
            ("no time", pl.col(_TAKEN).is_null()),
            ("names no patient", pl.col("subject_id").is_null()),
        ]
        frame = timing.known(release.screen(table, _dated(table), rules), _TAKEN)
        frame = link_by_time(frame, stays, KNOWN, timing.before_hours)
        frame = within_stay(release, table, frame, timing, _TAKEN, "no ICU stay of this patient")
        for some in frame.iter_slices(_AT_ONCE):
            pictured = _with_pictures(release, table, some, pixels)
            release.ledger.keep(table.name, pictured.height)
            kept += pictured.height
            spool.add_images(
                pictured.select("stay_id", hours_since_admission=HOURS, modality=pl.lit(CHEST_XRAY), image="image")
            )
    return kept


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
    """Add ``image``; reject rows whose file is missing, cannot be read or shows nothing."""
    pictures: list[bytes | None] = []
    faults: list[str | None] = []
    for subject, study, dicom in frame.select("subject_id", "study_id", "dicom_id").iter_rows():
        path = table.path.parent / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg"
        read = path.is_file()
        picture = small_picture(path, pixels) if read else MISSING
        if read:
            release.inputs.append(str(path))
        pictures.append(picture if isinstance(picture, bytes) else None)
        faults.append(picture if isinstance(picture, str) else None)
    frame = frame.with_columns(pl.Series("image", pictures, pl.Binary), pl.Series("fault", faults, pl.String))
    return release.screen(table, frame, [(why, pl.col("fault") == why) for why in (MISSING, UNREADABLE, TOO_SMALL)])


def small_picture(path: Path, pixels: int) -> bytes | str:
    """The picture at ``path`` as a greyscale PNG of ``pixels`` a side, or why there is none.

    The short side is brought to ``pixels`` and the middle of the long side is kept. Grey levels of more than 8 bits are
    spread over black to white from the darkest to the brightest that the picture holds, as scanners use a part of them
    only; what is transparent is black, as around an X-ray.
    """
    try:
        with Image.open(path) as picture:
            if min(picture.size) < LEAST_PIXELS:
                return TOO_SMALL
            picture.draft("L", (pixels, pixels))  # lets a JPEG of 3000 pixels a side decode at a fraction of its size
            grey = _grey(picture)
    except Exception:  # a damaged file may be any format, and each decoder fails in a way of its own
        return UNREADABLE
    scale = pixels / min(grey.size)
    width, height = (max(pixels, round(side * scale)) for side in grey.size)
    grey = grey.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - pixels) // 2, (height - pixels) // 2
    stored = io.BytesIO()
    grey.crop((left, top, left + pixels, top + pixels)).save(stored, format="PNG")
    return stored.getvalue()


def _grey(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):
        levels = np.asarray(picture, np.float64)
        low, high = levels.min(), levels.max()
        if not np.isfinite([low, high]).all():
            raise ValueError("levels that are not finite")
        spread = (levels - low) * (255 / (high - low)) if high > low else np.zeros_like(levels)
        return Image.fromarray(np.round(spread).astype(np.uint8))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, picture.convert("RGBA")).convert("L")
    return picture.convert("L")
