"""MIMIC-IV, with MIMIC-IV-Note and MIMIC-CXR-JPG beside it where they are: one timeline per ICU stay.

Layout of ``raw``: ``icu/`` and ``hosp/`` of MIMIC-IV (1.0: patients and admissions in ``core/``), ``note/`` of
MIMIC-IV-Note, ``cxr/`` of MIMIC-CXR-JPG (the metadata table and ``files/``), each there, nested below, or where the
settings say; tables as ``.csv``, ``.csv.gz`` or ``.parquet``. Series, notes, X-rays and diagnoses may each be absent.
Events run from ``intime`` to the earliest of the window's end, ``outtime``, ``dischtime`` and ``deathtime`` (paper
3.3.2: hourly bins of the series, X-rays at their study time, notes at their ``charttime``), dated by when they could be
known unless the settings say otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from trajlm.cohorts.leaks import length_leak
from trajlm.cohorts.ledger import RowLedger
from trajlm.cohorts.mimic_images import CHEST_XRAY, read_images
from trajlm.cohorts.mimic_items import SERIES, read_items
from trajlm.cohorts.mimic_links import STAY_WINDOW, Timing
from trajlm.cohorts.mimic_notes import DISCHARGE_NOTE, RADIOLOGY_NOTE, read_notes
from trajlm.cohorts.mimic_phenotypes import read_phenotypes
from trajlm.cohorts.mimic_places import find_images, find_notes, find_release
from trajlm.cohorts.mimic_series import read_series
from trajlm.cohorts.mimic_stays import DEMOGRAPHICS, demographics, read_stays, stay_rows
from trajlm.cohorts.tables import Release
from trajlm.config import PrepareConfig
from trajlm.schema import Modality, RawTimelines
from trajlm.spool import Spool

DEFAULT_BIN_HOURS = 1.0

MODALITIES = (
    Modality(DEMOGRAPHICS, "numeric", static=True),
    Modality(SERIES, "numeric", title="time series"),
    Modality(RADIOLOGY_NOTE, "text"),
    Modality(CHEST_XRAY, "image", title="chest X-ray"),
    Modality(DISCHARGE_NOTE, "text"),
)

_CHARTED_LEAK = (
    "charted values, laboratory results and radiology reports are dated by charttime, when the specimen was taken or "
    "the examination made, not by when the result was available"
)
_DEMOGRAPHICS_LEAK = (
    "demographics such as insurance and marital status stand at hour 0 but may have been edited later in the admission"
)
_IMAGE_LEAK = "chest X-rays are dated by when they were taken; MIMIC-CXR does not tell when they could be seen"
_DISCHARGE_LEAK = (
    "discharge summaries are written after the outcome is known and are dated by day; as only those dated within the "
    "stay in the unit are kept, mostly of patients who died there or went home from there, their very presence tells "
    "the outcome"
)


def read(raw: Path, settings: PrepareConfig, ledger: RowLedger, spool: Spool) -> RawTimelines:
    """Read a MIMIC-IV release, or one in its layout.

    Args:
        raw: folder of the release, or one above it.
        settings: ``window_hours``, ``before_admission_hours``, ``result_times``, ``items``, ``notes_folder``,
            ``images_folder``, ``discharge_notes`` and ``image_pixels`` are used here.
        ledger: accounts for every row of every table that is read.
        spool: gets every event.

    Returns:
        One stay per row of ``icustays`` of an adult. Mortality is death in hospital, length of stay that of the unit
        stay in hours, phenotypes those of the hospital admission. A modality without any event is noted.

    Raises:
        TrajlmError: ``raw`` is not such a folder.
        UnexpectedInput: a table is not what a release holds.
    """
    raw = Path(raw)
    root = find_release(raw)
    release = Release(root, ledger)
    if root != raw:
        release.notes.append(f"the release was found in {root.relative_to(raw)}")
    timing = Timing.of(settings)
    items = read_items(release, settings.items)
    stays, attrition = read_stays(release)
    kept = stays.filter("kept")
    static, features = demographics(kept)
    spool.add_measurements(static)
    targets = read_phenotypes(release, kept)

    windows = stays.select(STAY_WINDOW)
    counts = read_series(release, windows, timing, items, spool)
    counts |= _read_notes(raw, release, windows, settings, spool)
    _read_images(raw, release, windows, settings, spool)
    found = set(spool.counts()["modality"])
    absent = [modality.name for modality in MODALITIES if modality.name not in found]
    if absent:
        release.notes.append(f"without any event: {', '.join(absent)}")
    return RawTimelines(
        release=_release_name(root),
        modalities=MODALITIES,
        features=(*features, *items.features()),
        stays=stay_rows(kept).join(targets, on="stay_id", how="left", maintain_order="left"),
        inputs=tuple(dict.fromkeys(release.inputs)),
        open_leaks=(*_time_leaks(timing, counts), *_other_leaks(timing, found)),
        notes=tuple(release.notes),
        attrition=attrition,
    )


def _release_name(root: Path) -> str:
    """MIMIC tables carry no version; PhysioNet names the folder by it."""
    if (root / "SYNTHETIC.json").is_file():
        return "synthetic ICU in the layout of MIMIC-IV"
    name = "MIMIC-IV demo" if (root / "demo_subject_id.csv").is_file() else "MIMIC-IV"
    version = root.resolve().name
    if re.fullmatch(r"\d+(\.\d+)+", version):
        return f"{name} {version}"
    if name == "MIMIC-IV":
        return "MIMIC-IV (layout of 1.0)" if (root / "core").is_dir() else "MIMIC-IV (layout of 2.0 and later)"
    return name


def _read_notes(
    raw: Path, release: Release, windows: pl.DataFrame, settings: PrepareConfig, spool: Spool
) -> dict[str, tuple[int, int]]:
    folder = find_notes(raw, release.raw, settings)
    if folder is None:
        release.notes.append(f"MIMIC-IV-Note is absent: no {RADIOLOGY_NOTE}, no {DISCHARGE_NOTE}")
        return {}
    tables = Release(folder, release.ledger, "MIMIC-IV-Note")
    timing = Timing.of(settings)
    radiology = read_notes(tables, windows, timing, RADIOLOGY_NOTE, spool)
    discharge = read_notes(tables, windows, timing, DISCHARGE_NOTE, spool, wanted=settings.discharge_notes)
    release.inputs += tables.inputs
    release.notes += tables.notes
    return {"radiology": radiology, "discharge": discharge}


def _read_images(raw: Path, release: Release, windows: pl.DataFrame, settings: PrepareConfig, spool: Spool) -> None:
    place = find_images(raw, release.raw, settings)
    if place is None:
        release.notes.append(f"MIMIC-CXR-JPG is absent: no {CHEST_XRAY}")
        return
    folder, name = place
    tables = Release(folder, release.ledger, "MIMIC-CXR-JPG")
    read_images(tables, name, windows, Timing.of(settings), settings.image_pixels, spool)
    if not (folder / "files").is_dir():
        release.notes.append(f"{folder} holds no files/: no picture is there to be read")
    release.inputs += tables.inputs


def _time_leaks(timing: Timing, counts: Mapping[str, tuple[int, int]]) -> list[str]:
    if not timing.available:
        return [_CHARTED_LEAK]
    return [
        f"{unstored} of {kept} rows kept of {table} do not say when they were stored (storetime): they are dated by "
        "charttime, when the specimen was taken or the value or report is of, which may be before it was known"
        for table, (kept, unstored) in counts.items()
        if unstored
    ]


def _other_leaks(timing: Timing, found: set[str]) -> list[str]:
    return [
        *([_IMAGE_LEAK] if CHEST_XRAY in found else []),
        _DEMOGRAPHICS_LEAK,
        length_leak(timing.window_hours),
        *([_DISCHARGE_LEAK] if DISCHARGE_NOTE in found else []),
    ]
