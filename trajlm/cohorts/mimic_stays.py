"""ICU stays of MIMIC-IV with their patients and admissions: who is in the cohort, and which rule left others out."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from trajlm.cohorts.tables import Format, Release, Table, raw_text
from trajlm.errors import TrajlmError
from trajlm.schema import (
    ADMISSION_RANK,
    LENGTH_OF_STAY,
    MEASUREMENT_COLUMNS,
    MORTALITY,
    STAY_COLUMNS,
    AttritionStep,
    Feature,
    conform,
)

ADULT_YEARS = 18
OLDEST_YEARS = 120  # the release gives 91 to all above 89; more is no age
DEMOGRAPHICS = "demographics"

_PATIENTS: dict[str, Format] = {"subject_id": "integer", "gender": "string", "anchor_age": "integer",
                                "anchor_year": "integer"}  # fmt: skip
_CATEGORIES = ["admission_type", "admission_location", "insurance", "language", "marital_status"]
_ADMISSIONS: dict[str, Format] = {"subject_id": "integer", "hadm_id": "integer", "admittime": "time",
                                  "dischtime": "time", "deathtime": "time", "hospital_expire_flag": "integer",
                                  **dict.fromkeys(_CATEGORIES, "string")}  # fmt: skip
_ICUSTAYS: dict[str, Format] = {"subject_id": "integer", "hadm_id": "integer", "stay_id": "integer", "intime": "time",
                                "outtime": "time"}  # fmt: skip


def read_stays(release: Release) -> tuple[pl.DataFrame, tuple[AttritionStep, ...]]:
    """Every identified row of icustays with its patient and admission, and what each rule left of them.

    Returns:
        STAY_WINDOW of :mod:`trajlm.cohorts.mimic_links`, ``age`` in years, and what else the admission says; and the
        attrition, from all rows of icustays to the cohort.

    Raises:
        TrajlmError: no stay is left.
        UnexpectedInput: a table is not what a release holds.
    """
    patients = _required(release, "hosp/patients", "core/patients", columns=_PATIENTS)
    admissions = _required(release, "hosp/admissions", "core/admissions", columns=_ADMISSIONS)
    flag = pl.col("hospital_expire_flag")
    admissions.refuse(~flag.is_in([0, 1]), "hospital_expire_flag", "0, 1 or nothing")
    icustays = _required(release, "icu/icustays", columns=_ICUSTAYS)

    people = _first_of(release, patients, "subject_id")
    hospital = _first_of(release, admissions, "hadm_id")
    rules = [*_identity_rules("stay_id"), ("no intime", pl.col("intime").is_null())]
    steps, units = _screened(release, icustays, icustays.frame, rules)
    joined = _joined(units, people, hospital.with_columns(race=_race(admissions)))
    further, kept = _screened(release, icustays, joined, _cohort_rules())
    if kept.is_empty():
        raise TrajlmError(
            f"{release.raw}: no ICU stay of an adult; the table icu/icustays holds {icustays.frame.height} rows, of "
            f"which {units.height} are stays"
        )
    release.ledger.keep(icustays.name, kept.height)
    joined = joined.with_columns(kept=pl.col("stay_id").is_in(kept["stay_id"].implode()))
    _account(release, patients, people, "subject_id", joined, "patient")
    _account(release, admissions, hospital, "hadm_id", joined, "admission")
    _note_oddities(release, kept)
    return joined, (_step("rows of icustays", icustays.frame), *steps, *further)


def _required(release: Release, *places: str, columns: dict[str, Format]) -> Table:
    table = release.table(*places, columns=columns)
    if table is None:
        wanted = " or ".join(f"{place}.csv[.gz]" for place in places)
        raise TrajlmError(f"{release.raw}: expected {wanted}, came no such file; is the download complete?")
    return table


def _race(admissions: Table) -> pl.Expr:
    """1.0 and before call it ethnicity; one name for both lets a model be used on either."""
    plain = {column.strip().lower(): column for column in admissions.raw}
    column = plain.get("race", plain.get("ethnicity", "race"))
    admissions.require(column)
    return pl.when(pl.col(raw_text(column)) != "").then(pl.col(raw_text(column)))


def _identity_rules(key: str) -> list[tuple[str, pl.Expr]]:
    return [
        (f"names no {key}", pl.col(key).is_null()),
        (f"repeats an earlier {key}", ~pl.col(key).is_first_distinct()),
    ]


def _first_of(release: Release, table: Table, key: str) -> pl.DataFrame:
    """The rows that name their key, each key once."""
    return _screened(release, table, table.frame, _identity_rules(key))[1]


def _cohort_rules() -> list[tuple[str, pl.Expr]]:
    return [
        ("patient is not in patients", pl.col("person").is_null()),
        ("admission is not in admissions", pl.col("episode").is_null()),
        ("age is unknown", pl.col("age").is_null()),
        (f"younger than {ADULT_YEARS} years", pl.col("age") < ADULT_YEARS),
        (f"older than {OLDEST_YEARS} years", pl.col("age") > OLDEST_YEARS),
        ("discharged from hospital before admission to it", pl.col("dischtime") < pl.col("admittime")),
        ("left the unit before entering it", pl.col("outtime") <= pl.col("intime")),
        ("entered the unit after discharge from hospital", pl.col("dischtime") <= pl.col("intime")),
        ("died before entering the unit", pl.col("died") < pl.col("intime")),
    ]


def _screened(
    release: Release, table: Table, frame: pl.DataFrame, rules: Sequence[tuple[str, pl.Expr]]
) -> tuple[list[AttritionStep], pl.DataFrame]:
    """Apply the rules in order; the rows that pass them all, and how many stays and patients each one left."""
    steps = []
    for rule in rules:
        frame = release.screen(table, frame, [rule])
        steps.append(_step(rule[0], frame))
    return steps, frame


def _step(rule: str, frame: pl.DataFrame) -> AttritionStep:
    return AttritionStep(rule, frame.height, frame["subject_id"].drop_nulls().n_unique())


def _joined(units: pl.DataFrame, people: pl.DataFrame, hospital: pl.DataFrame) -> pl.DataFrame:
    person = people.select("subject_id", "gender", "anchor_age", "anchor_year", person=True)
    episode = hospital.select(*_ADMISSIONS, "race", episode=True)
    joined = units.join(person, on="subject_id", how="left", maintain_order="left")
    joined = joined.join(episode, on=["subject_id", "hadm_id"], how="left", maintain_order="left")
    return joined.with_columns(
        left=pl.min_horizontal("outtime", "dischtime"),
        died=pl.col("deathtime"),
        age=pl.col("anchor_age") + (pl.col("admittime").dt.year() - pl.col("anchor_year")),
    )


def _account(release: Release, table: Table, frame: pl.DataFrame, key: str, stays: pl.DataFrame, what: str) -> None:
    """Keep the rows of patients or admissions that lead to a kept stay."""
    known, kept = stays[key], stays.filter(pl.col("kept"))[key]
    rules = [
        (f"no ICU stay of this {what}", ~pl.col(key).is_in(known.drop_nulls().implode())),
        (f"every ICU stay of this {what} is rejected", ~pl.col(key).is_in(kept.implode())),
    ]
    release.ledger.keep(table.name, release.screen(table, frame, rules).height)


def _note_oddities(release: Release, kept: pl.DataFrame) -> None:
    outtime, discharged, died = pl.col("outtime"), pl.col("dischtime"), pl.col("deathtime")
    flagged = pl.col("hospital_expire_flag")
    told = {
        "have no outtime: their length is unknown, events run to discharge": outtime.is_null(),
        "leave the unit after discharge from hospital: events run to discharge": outtime > discharged,
        "leave the unit after death: events run to death": outtime > died,
        "are flagged as survivors of the admission and have a time of death": (flagged == 0) & died.is_not_null(),
        "are flagged as deaths and have no time of death: events run to leaving": (flagged == 1) & died.is_null(),
        "do not say whether the patient died": flagged.is_null(),
    }
    for what, holds in told.items():
        count = kept.filter(holds).height
        if count:
            release.notes.append(f"{count} of {kept.height} stays {what}")


def stay_rows(kept: pl.DataFrame) -> pl.DataFrame:
    """STAY_COLUMNS and the rank of each stay among its patient's.

    Mortality is death in hospital. The length of stay runs from ``intime`` to ``outtime``; ``hours_in_unit`` ends at
    death or discharge from hospital where these come first, so that nobody counts as still in the unit after them.
    """
    end = pl.when(pl.col("outtime").is_not_null()).then(pl.min_horizontal("left", "died"))
    rank = pl.struct("intime", "stay_id").rank("ordinal").over("subject_id")
    frame = kept.select(
        "stay_id",
        pl.col("subject_id").cast(pl.String),
        hours_in_unit=_hours(end),
        **{MORTALITY: pl.col("hospital_expire_flag"), LENGTH_OF_STAY: _hours(pl.col("outtime")), ADMISSION_RANK: rank},
    )
    return conform(frame, {**STAY_COLUMNS, ADMISSION_RANK: pl.Int64()}, "stays").sort("stay_id")


def _hours(time: pl.Expr) -> pl.Expr:
    return (time - pl.col("intime")).dt.total_microseconds() / 3.6e9


def demographics(kept: pl.DataFrame) -> tuple[pl.DataFrame, tuple[Feature, ...]]:
    """Eight static features at hour 0, age and seven one-hot categories; an empty cell gives nothing.

    Returns:
        MEASUREMENT_COLUMNS, and the features that they may take.
    """
    features = [Feature(DEMOGRAPHICS, "age", "years")]
    parts = [kept.select("stay_id", feature=pl.lit("age"), value=pl.col("age").cast(pl.Float64))]
    for column in ("gender", *_CATEGORIES, "race"):
        shown = kept.filter(pl.col(column).is_not_null())
        parts.append(shown.select("stay_id", feature=pl.format("{}={}", pl.lit(column), column), value=pl.lit(1.0)))
        values = shown[column].unique().sort()
        features += [Feature(DEMOGRAPHICS, f"{column}={value}", kind="category") for value in values]
    rows = pl.concat(parts).sort("stay_id", maintain_order=True)
    rows = rows.with_columns(hours_since_admission=pl.lit(0.0), modality=pl.lit(DEMOGRAPHICS))
    return conform(rows, MEASUREMENT_COLUMNS, DEMOGRAPHICS), tuple(features)
