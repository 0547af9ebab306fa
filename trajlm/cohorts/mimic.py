"""MIMIC-IV, with MIMIC-IV-Note and MIMIC-CXR-JPG beside it where they are: one timeline per ICU stay.

Layout of ``raw``: ``icu/`` and ``hosp/`` of MIMIC-IV (1.0: patients and admissions in ``core/``), ``note/`` of
MIMIC-IV-Note, ``cxr/`` of MIMIC-CXR-JPG (the metadata table and ``files/``); tables as ``.csv`` or ``.csv.gz``. Series,
notes and X-rays may each be absent. Events run from ``intime`` to the earliest of the window's end, ``outtime`` and
``deathtime`` (paper 3.3.2: hourly bins of the series, X-rays at their study time, notes at their ``charttime``).
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from trajlm.cohorts.ledger import RowLedger
from trajlm.cohorts.mimic_images import CHEST_XRAY, read_images
from trajlm.cohorts.mimic_links import STAY_WINDOW
from trajlm.cohorts.mimic_notes import DISCHARGE_NOTE, RADIOLOGY_NOTE, read_notes
from trajlm.cohorts.mimic_series import SERIES, read_series, series_features
from trajlm.cohorts.mimic_tables import Format, Release, Table, raw_text
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError
from trajlm.schema import (
    ADMISSION_RANK,
    LENGTH_OF_STAY,
    MEASUREMENT_COLUMNS,
    MORTALITY,
    STAY_COLUMNS,
    Feature,
    Modality,
    RawTimelines,
    conform,
)

DEFAULT_BIN_HOURS = 1.0
ADULT_YEARS = 18

DEMOGRAPHICS = "demographics"
MODALITIES = (
    Modality(DEMOGRAPHICS, "numeric", static=True),
    Modality(SERIES, "numeric", title="time series"),
    Modality(RADIOLOGY_NOTE, "text"),
    Modality(CHEST_XRAY, "image", title="chest X-ray"),
    Modality(DISCHARGE_NOTE, "text"),
)

_PATIENTS: dict[str, Format] = {"subject_id": "integer", "gender": "string", "anchor_age": "integer",
                                "anchor_year": "integer"}  # fmt: skip
_CATEGORIES = ["admission_type", "admission_location", "insurance", "language", "marital_status"]
_ADMISSIONS: dict[str, Format] = {"subject_id": "integer", "hadm_id": "integer", "admittime": "time",
                                  "dischtime": "time", "deathtime": "time", "hospital_expire_flag": "integer",
                                  **dict.fromkeys(_CATEGORIES, "string")}  # fmt: skip
_ICUSTAYS: dict[str, Format] = {"subject_id": "integer", "hadm_id": "integer", "stay_id": "integer", "intime": "time",
                                "outtime": "time"}  # fmt: skip

_LEAKS = (
    "charted values, laboratory results and radiology reports are dated by charttime, when the specimen was taken or "
    "the examination made, not by when the result was available",
    "demographics such as insurance and marital status stand at hour 0 but may have been edited later in the admission",
)
_END_LEAK = (
    "a stay that ends within the window has no events after its end: how long its timeline runs tells when the patient "
    "died or left; landmarks compare only stays still in the unit then"
)
_WHOLE_STAY_LEAK = (
    "whole stays are read, without a window: late beliefs know nearly everything up to death or discharge, and how "
    "long a timeline runs is the length of stay"
)
_DISCHARGE_LEAK = (
    "discharge summaries are written after the outcome is known and are dated by day; as only those dated within the "
    "stay in the unit are kept, mostly of patients who died there or went home from there, their very presence tells "
    "the outcome"
)


def read(raw: Path, settings: PrepareConfig, ledger: RowLedger) -> RawTimelines:
    """Read a MIMIC-IV release, or one in its layout.

    Args:
        raw: folder of the release.
        settings: ``window_hours``, ``discharge_notes`` and ``image_pixels`` are used here.
        ledger: accounts for every row of every table that is read.

    Returns:
        One stay per row of ``icustays`` of an adult. Mortality is death in hospital, length of stay that of the unit
        stay in hours. A modality without any event is noted.

    Raises:
        TrajlmError: ``raw`` is not such a folder.
        UnexpectedInput: a table is not what a release holds.
    """
    release = Release(raw, ledger)
    stays = _read_stays(release, settings.window_hours)
    kept = stays.filter(pl.col("kept"))
    if kept.is_empty():
        raise TrajlmError(f"{raw}: no ICU stay of an adult; the table icu/icustays holds {stays.height} stays")
    windows = stays.select(STAY_WINDOW)
    demographics, features = _demographics(kept)
    measurements = pl.concat([demographics, read_series(release, windows)])
    radiology = read_notes(release, windows, RADIOLOGY_NOTE)
    images = read_images(release, windows, settings.image_pixels)
    discharge = read_notes(release, windows, DISCHARGE_NOTE, wanted=settings.discharge_notes)
    documents = pl.concat([radiology, discharge])

    found = pl.concat([frame["modality"] for frame in (measurements, documents, images)]).unique().to_list()
    absent = [modality.name for modality in MODALITIES if modality.name not in found]
    if absent:
        release.notes.append(f"without any event: {', '.join(absent)}")
    return RawTimelines(
        release=_release_name(release),
        modalities=MODALITIES,
        features=(*features, *series_features()),
        stays=_stay_rows(kept),
        measurements=measurements,
        documents=documents,
        images=images,
        inputs=tuple(release.inputs),
        open_leaks=(
            *_LEAKS,
            _WHOLE_STAY_LEAK if settings.window_hours is None else _END_LEAK,
            *((_DISCHARGE_LEAK,) if DISCHARGE_NOTE in found else ()),
        ),
        notes=tuple(release.notes),
    )


def _release_name(release: Release) -> str:
    """MIMIC tables carry no version; a synthetic release, the demo and the layout of 1.0 can be told."""
    if (release.raw / "SYNTHETIC.json").is_file():
        return "synthetic ICU in the layout of MIMIC-IV"
    if (release.raw / "demo_subject_id.csv").is_file():
        return "MIMIC-IV demo"
    return "MIMIC-IV (layout of 1.0)" if (release.raw / "core").is_dir() else "MIMIC-IV (layout of 2.0 and later)"


def _required(release: Release, *places: str, columns: dict[str, Format]) -> Table:
    table = release.table(*places, columns=columns)
    if table is None:
        wanted = " or ".join(f"{place}.csv[.gz]" for place in places)
        raise TrajlmError(f"{release.raw}: expected {wanted}, came no such file; is this the folder of MIMIC-IV?")
    return table


def _read_stays(release: Release, window_hours: float | None) -> pl.DataFrame:
    """Every identified row of icustays with its patient and admission: STAY_WINDOW, ``age``, and what the stay is."""
    patients = _required(release, "hosp/patients", "core/patients", columns=_PATIENTS)
    admissions = _required(release, "hosp/admissions", "core/admissions", columns=_ADMISSIONS)
    flag = pl.col("hospital_expire_flag")
    admissions.refuse(~flag.is_in([0, 1]), "hospital_expire_flag", "0, 1 or nothing")
    # 1.0 and before call it ethnicity; one name for both lets a model be used on either.
    race = next((column for column in ("race", "ethnicity") if column in admissions.raw), "race")
    admissions.require(race)
    icustays = _required(release, "icu/icustays", columns=_ICUSTAYS)

    people = _first_of(release, patients, "subject_id")
    hospital = _first_of(release, admissions, "hadm_id")
    units = _first_of(release, icustays, "stay_id")
    units = release.screen(icustays, units, [("no intime", pl.col("intime").is_null())])
    person = people.select("subject_id", "gender", "anchor_age", "anchor_year", person=True)
    episode = hospital.select(
        *_ADMISSIONS,
        race=pl.when(pl.col(raw_text(race)) != "").then(pl.col(raw_text(race))),
        episode=True,
    )
    joined = units.join(person, on="subject_id", how="left", maintain_order="left")
    joined = joined.join(episode, on=["subject_id", "hadm_id"], how="left", maintain_order="left")
    joined = _with_window(joined, window_hours)
    kept = release.screen(
        icustays,
        joined,
        [
            ("patient is not in patients", pl.col("person").is_null()),
            ("admission is not in admissions", pl.col("episode").is_null()),
            ("age is unknown", pl.col("age").is_null()),
            (f"younger than {ADULT_YEARS} years", pl.col("age") < ADULT_YEARS),
            ("left the unit before entering it", pl.col("left") <= pl.col("intime")),
            ("died before entering the unit", pl.col("died") < pl.col("intime")),
        ],
    )
    release.ledger.keep(icustays.name, kept.height)
    joined = joined.with_columns(kept=pl.col("stay_id").is_in(kept["stay_id"].implode()))
    _account(release, patients, people, "subject_id", joined, "patient")
    _account(release, admissions, hospital, "hadm_id", joined, "admission")
    open_ended = kept["outtime"].null_count()
    if open_ended:
        release.notes.append(f"{open_ended} stays have no outtime: their length is unknown, events run to discharge")
    return joined


def _first_of(release: Release, table: Table, key: str) -> pl.DataFrame:
    """The rows that name their key, each key once."""
    named = ("names no " + key, pl.col(key).is_null())
    return release.screen(table, table.frame, [named, (f"repeats an earlier {key}", ~pl.col(key).is_first_distinct())])


def _with_window(joined: pl.DataFrame, window_hours: float | None) -> pl.DataFrame:
    years = pl.col("admittime").dt.year() - pl.col("anchor_year")
    window = (
        pl.lit(None, pl.Duration("us"))
        if window_hours is None
        else pl.duration(microseconds=round(window_hours * 3.6e9))
    )
    return joined.with_columns(
        left=pl.coalesce("outtime", "dischtime"),
        died=pl.col("deathtime"),
        window_end=pl.col("intime") + window,
        age=pl.col("anchor_age") + years,
    )


def _account(release: Release, table: Table, frame: pl.DataFrame, key: str, stays: pl.DataFrame, what: str) -> None:
    """Keep the rows of patients or admissions that lead to a kept stay."""
    known, kept = stays[key], stays.filter(pl.col("kept"))[key]
    rules = [
        (f"no ICU stay of this {what}", ~pl.col(key).is_in(known.drop_nulls().implode())),
        (f"every ICU stay of this {what} is rejected", ~pl.col(key).is_in(kept.implode())),
    ]
    release.ledger.keep(table.name, release.screen(table, frame, rules).height)


def _stay_rows(kept: pl.DataFrame) -> pl.DataFrame:
    hours = (pl.col("outtime") - pl.col("intime")).dt.total_microseconds() / 3.6e9
    rank = pl.struct("intime", "stay_id").rank("ordinal").over("subject_id")
    frame = kept.select(
        "stay_id",
        pl.col("subject_id").cast(pl.String),
        hours_in_unit=hours,
        **{MORTALITY: pl.col("hospital_expire_flag"), LENGTH_OF_STAY: hours, ADMISSION_RANK: rank},
    )
    return conform(frame, {**STAY_COLUMNS, ADMISSION_RANK: pl.Int64()}, "stays").sort("stay_id")


def _demographics(kept: pl.DataFrame) -> tuple[pl.DataFrame, list[Feature]]:
    """Age and one-hot categories at hour 0, and the features they may take; an empty cell gives nothing."""
    features = [Feature(DEMOGRAPHICS, "age", "years")]
    parts = [kept.select("stay_id", feature=pl.lit("age"), value=pl.col("age").cast(pl.Float64))]
    for column in ("gender", *_CATEGORIES, "race"):
        shown = kept.filter(pl.col(column).is_not_null())
        parts.append(shown.select("stay_id", feature=pl.format("{}={}", pl.lit(column), column), value=pl.lit(1.0)))
        values = shown[column].unique().sort()
        features += [Feature(DEMOGRAPHICS, f"{column}={value}", kind="category") for value in values]
    rows = pl.concat(parts).sort("stay_id", maintain_order=True)
    rows = rows.with_columns(hours_since_admission=pl.lit(0.0), modality=pl.lit(DEMOGRAPHICS))
    return conform(rows, MEASUREMENT_COLUMNS, DEMOGRAPHICS), features
