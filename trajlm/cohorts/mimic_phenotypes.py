"""The 25 phenotypes of the public MIMIC benchmarks, from the diagnoses of a stay's hospital admission.

Codes match exactly and within their ICD version, as the benchmarks match them; blanks and dots around and in a code do
not count, as releases differ in them. Diagnoses are coded at discharge for the whole admission: they are targets, and
never an input. ``mimic_phenotypes.csv`` holds the codes and names their source and licence.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from trajlm.cohorts.tables import Format, Release, Select
from trajlm.errors import UnexpectedInput
from trajlm.schema import PHENOTYPE_PREFIX

DEFINITIONS = Path(__file__).with_name("mimic_phenotypes.csv")

_PLACE = "hosp/diagnoses_icd"
_COLUMNS: dict[str, Format] = {"hadm_id": "integer", "icd_code": "string", "icd_version": "integer"}
_VERSIONS = (9, 10)
_CODE = ["icd_version", "code"]
_UNNAMED = (
    "; codes that the public definitions do not name count for nothing, J9601 (acute respiratory failure) and I480 "
    "(atrial fibrillation) among them"
)


def load_definitions(path: Path = DEFINITIONS) -> pl.DataFrame:
    """``phenotype, title, icd_version, code``, codes in capitals without dots, in the order of the file.

    Raises:
        UnexpectedInput: a code stands twice, be it in two groups or in one; or its version is neither 9 nor 10.
    """
    rows = pl.read_csv(path, comment_prefix="#", infer_schema=False).with_columns(
        pl.col("icd_version").cast(pl.Int64, strict=False), _plain(pl.col("code"))
    )
    odd = rows.filter(~pl.col("icd_version").is_in(_VERSIONS).fill_null(False) | (pl.col("code") == ""))
    if odd.height:
        raise UnexpectedInput(path, column="icd_version", expected="codes of ICD 9 or 10", came=str(odd.row(0)))
    twice = rows.filter(~pl.struct(_CODE).is_first_distinct())
    if twice.height:
        version, code = twice.select("icd_version", "code").row(0)
        owners = rows.filter(pl.col("icd_version") == version, pl.col("code") == code)["title"].to_list()
        raise UnexpectedInput(
            path, column="code", expected="every code once", came=f"ICD-{version} {code} in {' and in '.join(owners)}"
        )
    return rows


def read_phenotypes(release: Release, stays: pl.DataFrame) -> pl.DataFrame:
    """``stay_id`` and one ``target_phenotype_<name>`` each, 0 or 1; null where the admission has no coded diagnosis.

    The columns are absent where the table is; notes tell how much the definitions say of the release's codes.

    Args:
        stays: ``stay_id`` and ``hadm_id`` of the stays of the cohort.

    Raises:
        UnexpectedInput: the table is not what a release holds.
    """
    admissions = stays["hadm_id"].unique()
    batches = release.batches(
        _PLACE,
        columns=_COLUMNS,
        select=Select("hadm_id", frozenset(admissions.to_list()), "no stay of the cohort in this admission"),
    )
    if batches is None:
        release.notes.append(f"{_PLACE} is absent: no phenotypes")
        return stays.select("stay_id")
    definitions = load_definitions()
    coded = [pl.DataFrame(schema={"hadm_id": pl.Int64, "icd_version": pl.Int64, "phenotype": pl.String})]
    for table in batches:
        if table.frame.is_empty():
            continue
        frame = table.frame.with_columns(code=_plain(pl.col("icd_code"))).join(
            definitions, on=_CODE, how="left", maintain_order="left"
        )
        rules = [
            ("names no code", pl.col("code").is_null() | (pl.col("code") == "")),
            ("neither ICD-9 nor ICD-10", ~pl.col("icd_version").is_in(_VERSIONS).fill_null(False)),
        ]
        frame = release.screen(table, frame, rules)
        coded.append(frame.select(coded[0].columns))
        frame = release.screen(table, frame, [("code is in no phenotype", pl.col("phenotype").is_null())])
        release.ledger.keep(table.name, frame.height)
    every = pl.concat(coded)
    _note(release, stays, every)
    return _targets(stays, every, definitions)


def _plain(code: pl.Expr) -> pl.Expr:
    """MIMIC-IV 1.0 pads codes with blanks; other sources write the dot."""
    return code.str.strip_chars().str.to_uppercase().str.replace(".", "", literal=True)


def _targets(stays: pl.DataFrame, coded: pl.DataFrame, definitions: pl.DataFrame) -> pl.DataFrame:
    found = coded.filter(pl.col("phenotype").is_not_null()).unique(["hadm_id", "phenotype"])
    known = pl.col("hadm_id").is_in(coded["hadm_id"].unique().implode())
    columns = []
    for name in definitions["phenotype"].unique(maintain_order=True):
        mine = found.filter(pl.col("phenotype") == name)["hadm_id"]
        has = pl.col("hadm_id").is_in(mine.implode()).cast(pl.Int8)
        columns.append(pl.when(known).then(has).alias(PHENOTYPE_PREFIX + name))
    return stays.select("stay_id", *columns)


def _note(release: Release, stays: pl.DataFrame, coded: pl.DataFrame) -> None:
    release.notes.append(
        "phenotypes are coded at discharge for the whole hospital admission: targets only, never inputs; they say "
        "nothing of when in the admission a condition began"
    )
    uncoded = stays.filter(~pl.col("hadm_id").is_in(coded["hadm_id"].unique().implode())).height
    if uncoded:
        release.notes.append(f"{uncoded} stays have no coded diagnosis: their phenotypes are unknown")
    for version in _VERSIONS:
        mine = coded.filter(pl.col("icd_version") == version)
        if mine.is_empty():
            continue
        grouped = mine.filter(pl.col("phenotype").is_not_null())
        held = grouped.select("hadm_id", "phenotype").n_unique() / mine["hadm_id"].n_unique()
        release.notes.append(
            f"ICD-{version}: {grouped.height} of {mine.height} diagnoses of the cohort are in a phenotype, {held:.1f} "
            f"phenotypes per admission{_UNNAMED if version == 10 else ''}"
        )
