"""The patient table of eICU: which unit stays make the study cohort, what each rule costs, and the targets."""

from __future__ import annotations

import polars as pl

from trajlm.cohorts.eicu_rows import STAY
from trajlm.cohorts.tables import Format, Release
from trajlm.errors import TrajlmError
from trajlm.schema import (
    ADMISSION_RANK,
    LENGTH_OF_STAY,
    MORTALITY,
    STAY_COLUMNS,
    AttritionStep,
    conform,
)

YOUNGEST, OLDEST = 18, 89  # years
SHORTEST, LONGEST = 12, 720  # hours in hospital

PATIENT: dict[str, Format] = {
    STAY: "integer", "patienthealthsystemstayid": "integer", "uniquepid": "string", "unitvisitnumber": "integer",
    "hospitaldischargeyear": "integer", "hospitaladmitoffset": "number", "hospitaldischargeoffset": "number",
    "hospitaldischargestatus": "string", "unitdischargeoffset": "number", "unitdischargestatus": "string",
    "age": "string", "gender": "string", "ethnicity": "string", "admissionheight": "number",
    "admissionweight": "number", "unittype": "string", "unitstaytype": "string", "unitadmitsource": "string",
    "hospitaladmitsource": "string", "apacheadmissiondx": "string",
}  # fmt: skip

_OVER_89 = r"^>\s*89$"  # the release does not tell ages above 89
_ALIVE, _EXPIRED = "alive", "expired"

_YEARS, _IN_HOSPITAL = pl.col("years"), pl.col("hospital_hours")
_UNIT_END, _HOSPITAL_END = pl.col("unit_end"), pl.col("hospital_end")
# The reason for leaving a stay out, and the test of it, in order.
_RULES: tuple[tuple[str, pl.Expr], ...] = (
    ("age is unknown", _YEARS.is_null()),
    (f"younger than {YOUNGEST} years", _YEARS < YOUNGEST),
    (f"older than {OLDEST} years, recorded as > 89", _YEARS > OLDEST),
    ("length of the hospital stay is unknown", _IN_HOSPITAL.is_null()),
    ("discharged from the hospital before admission to it", _IN_HOSPITAL < 0),
    (f"less than {SHORTEST} hours in hospital", _IN_HOSPITAL < SHORTEST),
    (f"more than {LONGEST} hours in hospital", _IN_HOSPITAL > LONGEST),
    ("left the unit or the hospital before entering the unit", pl.min_horizontal(_UNIT_END, _HOSPITAL_END) < 0),
)


class StudyCohort:
    """The unit stays of the patient table that meet the rules.

    Attributes:
        table: the patient table.
        stays: its rows that are left, with every column of ``PATIENT``, ``years``, ``hospital_hours`` and the minutes
            ``unit_end`` and ``hospital_end`` from admission to the unit.
        attrition: the release, then what was left after each reason to leave stays out.

    Raises:
        TrajlmError: there is no patient table, or no stay of it meets the rules.
        UnexpectedInput: the table is not what a release holds.
    """

    def __init__(self, release: Release) -> None:
        table = release.table("patient", columns=PATIENT)
        if table is None:
            raise TrajlmError(
                f"{release.raw}: expected patient.csv, .csv.gz or .parquet, came no such file; is this the folder of "
                "eICU?"
            )
        self.table, self._release = table, release
        self.attrition: list[AttritionStep] = []
        whole = r"^\s*-?\d+(\.0+)?\s*$"
        strange = ~(pl.col("age").str.contains(whole) | pl.col("age").str.strip_chars().str.contains(_OVER_89))
        table.refuse(strange, "age", "whole years, '> 89' or nothing")
        unnamed, again = f"names no {STAY}", f"repeats an earlier {STAY}"
        rules = [(unnamed, pl.col(STAY).is_null()), (again, ~pl.col(STAY).is_first_distinct())]
        self.stays = release.screen(table, table.frame, rules).with_columns(_subject(), *_measures())
        self._note("unit stays in the release")
        for reason, broken in _RULES:
            self.leave_out(reason, broken)

    def _note(self, rule: str) -> None:
        self.attrition.append(AttritionStep(rule, self.stays.height, self.stays["subject_id"].n_unique()))

    def leave_out(self, reason: str, broken: pl.Expr) -> None:
        """Reject the stays for which ``broken`` holds and note how many are left."""
        self.stays = self._release.screen(self.table, self.stays, [(reason, broken)])
        self._note(reason)
        if self.stays.is_empty():
            raise TrajlmError(
                f"{self._release.raw}: none of its {self.attrition[0].stays} unit stays is one of the study cohort; "
                f"the last were left out as: {reason}"
            )

    def close(self) -> pl.DataFrame:
        """Keep what is left, note what is odd about it, and return it as the rows of stays of the contract."""
        self._release.ledger.keep(self.table.name, self.stays.height)
        self._release.notes.extend(_oddities(self.stays))
        # Two hospital stays of one year are in no known order; their ids at least give every run the same one.
        order = pl.struct("hospitaldischargeyear", "patienthealthsystemstayid", "unitvisitnumber", STAY)
        frame = self.stays.select(
            pl.col(STAY).alias("stay_id"),
            "subject_id",
            (pl.min_horizontal(_UNIT_END, _HOSPITAL_END) / 60).alias("hours_in_unit"),
            _mortality().alias(MORTALITY),
            pl.col("hospital_hours").alias(LENGTH_OF_STAY),
            order.rank("ordinal").over("subject_id").alias(ADMISSION_RANK),
        )
        return conform(frame, {**STAY_COLUMNS, ADMISSION_RANK: pl.Int64()}, "stays").sort("stay_id")


def _subject() -> pl.Expr:
    return pl.coalesce("uniquepid", pl.format("stay-{}", STAY)).alias("subject_id")


def _measures() -> list[pl.Expr]:
    age = pl.col("age").str.strip_chars()
    years = pl.when(age.str.contains(_OVER_89)).then(pl.lit(OLDEST + 1.0)).otherwise(age.cast(pl.Float64, strict=False))
    hours = (pl.col("hospitaldischargeoffset") - pl.col("hospitaladmitoffset")) / 60
    return [
        years.alias("years"),
        hours.alias("hospital_hours"),
        pl.col("unitdischargeoffset").alias("unit_end"),
        pl.col("hospitaldischargeoffset").alias("hospital_end"),
    ]


def _status(column: str) -> pl.Expr:
    return pl.col(column).str.strip_chars().str.to_lowercase()


def _mortality() -> pl.Expr:
    """1 if the patient died in hospital, 0 if not, null for any status but the two."""
    return _status("hospitaldischargestatus").replace_strict(
        {_ALIVE: 0, _EXPIRED: 1}, default=None, return_dtype=pl.Int8
    )


def _oddities(stays: pl.DataFrame) -> list[str]:
    """What a user should know of the stays kept, counted."""
    contrary = (_status("unitdischargestatus") == _EXPIRED) & (_mortality() == 0)
    counted = {
        "stays have a hospital status other than Alive and Expired: mortality is unknown": _mortality().is_null(),
        "stays are Expired in the unit but Alive on leaving the hospital: the hospital's status stands": contrary,
        "stays name no patient: each counts as a patient": pl.col("uniquepid").is_null(),
        "stays end in the hospital before the unit: events run to the earlier": _HOSPITAL_END < _UNIT_END,
        "stays have no time of leaving the unit: events run to discharge from the hospital": _UNIT_END.is_null(),
        "stays lasted no minute in the unit": _UNIT_END == 0,
    }
    found = ((what, stays.select(test.fill_null(False).sum()).item()) for what, test in counted.items())
    return [f"{count} {what}" for what, count in found if count]
