"""Synthetic courses as the unit stays of an eICU release: hospitals with habits, offsets in minutes, table `patient`.

In eICU a stay is one visit to one unit, and a hospital stay may hold several. So some returns of a patient are told
here as further visits of the hospital stay before, and all visits of a hospital stay share how it ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray

from trajlm.cohorts.synthetic_course import (
    CCU,
    CVICU,
    MICU,
    MICU_SICU,
    NEURO_SICU,
    NEURO_STEPDOWN,
    SICU,
    TSICU,
    UNIT_IMAGING,
    Course,
    logistic,
    stream,
)

_STAYS_PER_HOSPITAL = 40
_GENERAL_UNIT = "Med-Surg ICU"
_UNIT_TYPES = {
    MICU: "MICU", SICU: "SICU", MICU_SICU: _GENERAL_UNIT, CCU: "Cardiac ICU", CVICU: "CTICU", TSICU: "SICU",
    NEURO_SICU: "Neuro ICU", NEURO_STEPDOWN: "Neuro ICU",
}  # fmt: skip
_ADMISSION_DIAGNOSES = {
    "pneumonia": ("Pneumonia, bacterial", "Pneumonia, aspiration", "Sepsis, pulmonary"),
    "heart failure": ("CHF, congestive heart failure", "Rhythm disturbance (atrial, supraventricular)"),
    "sepsis": ("Sepsis, pulmonary", "Sepsis, renal/UTI (including bladder)", "Sepsis, GI", "Sepsis, unknown"),
    "haemorrhage": ("Bleeding, upper GI", "Bleeding, lower GI", "Bleeding, GI-location unknown"),
    "stroke": ("CVA, cerebrovascular accident/stroke", "Hemorrhage/hematoma, intracranial"),
    "trauma": ("Head only trauma", "Chest thorax only trauma", "Head/multiple trauma"),
}
_SOURCES = {
    "EW EMER.": ("Emergency Department",),
    "DIRECT EMER.": ("Emergency Department",),
    "OBSERVATION ADMIT": ("Emergency Department", "Floor"),
    "URGENT": ("Floor", "Direct Admit", "Other Hospital", "Acute Care/Floor"),
    "SURGICAL SAME DAY ADMISSION": ("Operating Room", "Recovery Room"),
    "ELECTIVE": ("Operating Room", "Direct Admit"),
}
_ETHNICITIES = ("Caucasian", "African American", "Hispanic", "Other/Unknown", "Asian", "Native American", None)
_WARDS = ("Floor", "Step-Down Unit (SDU)", "Acute Care/Floor", "Telemetry")
_HOMES = ("Home", "Skilled Nursing Facility", "Other Hospital", "Other External", "Rehabilitation", "Nursing Home")
# Log odds that a stay with records has any in a table: typical, per unit of severity, per unit of the unit's habit.
_PRESENCE = {
    "diagnosis": (1.9, 0.5, 0.3),
    "treatment": (1.2, 0.5, 0.4),
    "medication": (1.9, 0.2, 0.1),
    "infusionDrug": (0.4, 0.9, 0.2),
    "lab": (2.6, 0.4, 0.3),
    "apacheApsVar": (2.3, 0.4, 0.2),
    "vitalPeriodic": (2.4, 0.3, 0.3),
    "vitalAperiodic": (2.8, 0.0, 0.3),
}
PATIENT_COLUMNS = (
    "patientunitstayid", "patienthealthsystemstayid", "gender", "age", "ethnicity", "hospitalid", "wardid",
    "apacheadmissiondx", "admissionheight", "hospitaladmittime24", "hospitaladmitoffset", "hospitaladmitsource",
    "hospitaldischargeyear", "hospitaldischargetime24", "hospitaldischargeoffset", "hospitaldischargelocation",
    "hospitaldischargestatus", "unittype", "unitadmittime24", "unitadmitsource", "unitvisitnumber", "unitstaytype",
    "admissionweight", "dischargeweight", "unitdischargetime24", "unitdischargeoffset", "unitdischargelocation",
    "unitdischargestatus", "uniquepid",
)  # fmt: skip


@dataclass(frozen=True)
class Hospital:
    """One hospital of the release.

    Attributes:
        general: its one unit takes everybody.
        spelling: 0 to 2, how its interfaces write units and drugs.
        drugs_named: it fills ``drugname``; the others deliver code numbers only.
        delivers: tables that its interfaces deliver at all.
        habit: log odds of charting diagnoses and treatments, against the average hospital.
    """

    hospital_id: int
    system: int
    general: bool
    spelling: int
    drugs_named: bool
    delivers: frozenset[str]
    habit: float


@dataclass(frozen=True)
class UnitStay:
    """One row of `patient`; all offsets are whole minutes since admission to the unit.

    Attributes:
        visit: 1-based number of the visit within its hospital stay.
        ends: the course that ends the hospital stay; its outcome is that of every visit.
        admitted: when the patient came to the unit, on the calendar.
        status_known: whether anyone wrote down how the hospital stay ended.
        tables: those that hold rows of this stay.
    """

    course: Course
    ends: Course
    hospital: Hospital
    system_stay_id: int
    visit: int
    admitted: np.datetime64
    hospital_admit_offset: int
    hospital_discharge_offset: int
    status_known: bool
    tables: frozenset[str]

    @property
    def stay_id(self) -> int:
        """The patientunitstayid."""
        return self.course.stay_id

    @property
    def unit_discharge_offset(self) -> int:
        """Minutes in the unit."""
        return int(self.minutes(np.array([self.course.hours_in_unit]))[0])

    @property
    def dies_in_unit(self) -> bool:
        """Whether the hospital stay ended with death in this very unit."""
        died = self.ends is self.course and self.course.deathtime is not None
        return died and bool(self.course.dischtime - self.course.outtime <= np.timedelta64(60, "s"))

    def minutes(self, hours: NDArray[np.float64]) -> NDArray[np.int64]:
        """Offsets of hours since admission to the unit, cut to whole minutes."""
        return np.floor(hours * 60 + 1e-9).astype(np.int64)


def unit_stays(cohort: Sequence[Course], seed: int) -> list[UnitStay]:
    """Every course as a unit stay, in the order of the cohort."""
    hospitals = _hospitals(max(3, round(len(cohort) / _STAYS_PER_HOSPITAL)), seed)
    shares = 1 / np.sqrt(np.arange(1, len(hospitals) + 1))
    stays: list[UnitStay] = []
    for subject_id, own in groupby(cohort, key=lambda course: course.patient.subject_id):
        chosen = stream(seed, 52, subject_id).choice(len(hospitals), p=shares / shares.sum())
        for visits in _hospital_stays(list(own), seed):
            stays += _visits(visits, hospitals[chosen], seed)
    return stays


def _hospitals(count: int, seed: int) -> list[Hospital]:
    found = []
    for index in range(count):
        rng = stream(seed, 51, index)
        # The first hospital delivers everything, so that the smallest release holds every table.
        refuses = {"medication": 0.12, "infusionDrug": 0.2, "treatment": 0.06, "vitalPeriodic": 0.05}
        lacking = {table for table, chance in refuses.items() if rng.random() < chance and index > 0}
        found.append(
            Hospital(
                hospital_id=56 + 3 * index,
                system=int(rng.integers(2, 36)),
                general=bool(rng.random() < 0.5),
                spelling=int(rng.integers(3)),
                drugs_named=bool(rng.random() < 0.65) or index == 0,
                delivers=frozenset(set(_PRESENCE) - lacking),
                habit=float(rng.normal(0, 0.6)),
            )
        )
    return found


def _hospital_stays(courses: Sequence[Course], seed: int) -> Iterator[list[Course]]:
    """The courses of one patient, those of one hospital stay together."""
    together = [courses[0]]
    for course in courses[1:]:
        if stream(seed, 53, course.index).random() < 0.45:
            together.append(course)
        else:
            yield together
            together = [course]
    yield together


def _visits(courses: Sequence[Course], hospital: Hospital, seed: int) -> list[UnitStay]:
    first, last = courses[0], courses[-1]
    rng = stream(seed, 54, first.index)
    starts = [0.0]  # hours since the first admission to a unit
    for course in courses[:-1]:
        starts.append(starts[-1] + course.hours_in_unit + 0.5 + float(rng.exponential(30)))
    admit = -_hours(first.intime - first.admittime)
    discharge = starts[-1] + _hours(last.dischtime - last.intime)
    died_in_unit = last.deathtime is not None and bool(last.dischtime - last.outtime <= np.timedelta64(60, "s"))
    if died_in_unit and rng.random() < 0.1:
        # The death is timed before the bed is given up.
        discharge = starts[-1] + max(last.hours_in_unit - float(rng.exponential(0.6)), 0.5)
    elif rng.random() < 0.006:
        admit = float(rng.exponential(8))  # the hospital admits after the unit did
    known = died_in_unit or bool(rng.random() >= 0.02)
    return [
        UnitStay(
            course=course,
            ends=last,
            hospital=hospital,
            system_stay_id=first.hadm_id,
            visit=visit,
            admitted=first.intime + np.timedelta64(round(start * 3600), "s"),
            hospital_admit_offset=int(np.floor((admit - start) * 60)),
            hospital_discharge_offset=int(np.floor((discharge - start) * 60)),
            status_known=known,
            tables=_tables(course, hospital, visit, stream(seed, 55, course.index)),
        )
        for visit, (course, start) in enumerate(zip(courses, starts, strict=True), 1)
    ]


def _tables(course: Course, hospital: Hospital, visit: int, rng: Generator) -> frozenset[str]:
    """What is recorded at all: the sicker, the more; by the habits of unit and hospital."""
    severity, unit = float(course.severity[:25].mean()), UNIT_IMAGING[course.unit]
    held = set()
    for table, (typical, by_severity, by_unit) in _PRESENCE.items():
        habit = hospital.habit if table in ("diagnosis", "treatment") else 0.0
        again = -2.5 if table == "apacheApsVar" and visit > 1 else 0.0  # scored on the first visit
        if rng.random() < logistic(typical + by_severity * severity + by_unit * unit + habit + again):
            held.add(table)
    return frozenset() if course.demographics_only else frozenset(held & hospital.delivers)


def patient_table(stays: Sequence[UnitStay], seed: int) -> pl.DataFrame:
    """patient: one row per unit stay."""
    rows = [_patient_row(stay, seed) for stay in stays]
    numbers = dict.fromkeys(("admissionheight", "admissionweight", "dischargeweight"), pl.Float64)
    return pl.DataFrame(
        rows, schema=list(PATIENT_COLUMNS), orient="row", schema_overrides=numbers, infer_schema_length=None
    )


def _patient_row(stay: UnitStay, seed: int) -> tuple:
    course, hospital = stay.course, stay.hospital
    own, whole, rng = (
        stream(seed, 56, course.patient.subject_id),
        stream(seed, 57, stay.ends.index),
        stream(seed, 58, course.index),
    )
    ethnicity = own.choice(np.array(_ETHNICITIES, object), p=[0.78, 0.09, 0.05, 0.035, 0.015, 0.01, 0.02])
    gender = None if own.random() < 0.002 else {"F": "Female", "M": "Male"}[course.patient.gender]
    height = float(np.clip(own.normal(175 if course.patient.gender == "M" else 162, 8), 140, 205).round(1))
    weight = float(np.clip(height - 95 + own.normal(0, 16), 38, 190).round(1))
    died = stay.ends.deathtime is not None
    home = "Death" if died else str(whole.choice(_HOMES, p=[0.6, 0.14, 0.08, 0.08, 0.06, 0.04]))
    year, came_late = 2014 + int(whole.integers(2)), bool(rng.random() < 0.24)
    source = str(rng.choice(_SOURCES[course.admission_type])) if stay.visit == 1 else "Floor"
    ward = "Death" if stay.dies_in_unit else str(rng.choice(_WARDS, p=[0.6, 0.15, 0.15, 0.1]))
    diagnosis = str(rng.choice(_ADMISSION_DIAGNOSES[course.illness]))
    kind = ("admit" if rng.random() < 0.97 else "stepdown/other") if stay.visit == 1 else "readmit"
    unit = _GENERAL_UNIT if hospital.general else _UNIT_TYPES[course.unit]
    ward_id = 10 * hospital.hospital_id + sorted({*_UNIT_TYPES.values()}).index(unit)
    return (
        course.stay_id, stay.system_stay_id, gender, _age(course.age, rng), ethnicity, hospital.hospital_id, ward_id,
        None if rng.random() < (0.08 if stay.visit == 1 else 0.5) else diagnosis,
        None if own.random() < 0.03 else height,
        _clock(stay, stay.hospital_admit_offset), stay.hospital_admit_offset,
        None if came_late else source,
        year, _clock(stay, stay.hospital_discharge_offset), stay.hospital_discharge_offset,
        home if stay.status_known else None,
        ("Expired" if died else "Alive") if stay.status_known else None,
        unit, _clock(stay, 0), source, stay.visit, kind,
        None if rng.random() < 0.08 else weight,
        None if rng.random() < 0.5 else round(weight + float(rng.normal(0, 2)), 1),
        _clock(stay, stay.unit_discharge_offset), stay.unit_discharge_offset, ward,
        "Expired" if stay.dies_in_unit else "Alive",
        f"{hospital.system:03d}-{course.patient.subject_id - 10_000_000}",
    )  # fmt: skip


def _age(age: int, rng: Generator) -> str | None:
    if rng.random() < 0.002:
        return None
    return "> 89" if age > 89 else str(age)


def _clock(stay: UnitStay, offset: int) -> str:
    return str((stay.admitted + np.timedelta64(offset, "m")).astype("datetime64[m]"))[11:] + ":00"


def _hours(span: np.timedelta64) -> float:
    return float(span / np.timedelta64(1, "h"))
