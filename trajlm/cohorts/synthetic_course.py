"""The hidden truth of the synthetic ICU: who comes, how ill they are hour by hour, and who dies.

A stay's severity is a level plus a trend over its first 48 hours plus an Ornstein-Uhlenbeck process. Death depends on
the severity late in that window and on how far it rose, so that the same values in reverse order foretell the opposite.
Every modality later shows the severity through an error of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

OUTCOME_WINDOW_HOURS = 48.0

MICU, SICU = "Medical Intensive Care Unit (MICU)", "Surgical Intensive Care Unit (SICU)"
MICU_SICU, CCU = "Medical/Surgical Intensive Care Unit (MICU/SICU)", "Coronary Care Unit (CCU)"
CVICU, TSICU = "Cardiac Vascular Intensive Care Unit (CVICU)", "Trauma SICU (TSICU)"
NEURO_SICU, NEURO_STEPDOWN = "Neuro Surgical Intensive Care Unit (Neuro SICU)", "Neuro Stepdown"


@dataclass(frozen=True)
class Illness:
    """Why a stay happens; shifts severity, units and what each modality shows."""

    name: str
    share: float
    severity: float  # added to the level of a stay
    units: dict[str, float]  # unit: weight


ILLNESSES = (
    Illness("pneumonia", 0.20, 0.10, {MICU: 6, MICU_SICU: 3, CCU: 1}),
    Illness("heart failure", 0.18, 0.00, {CCU: 5, CVICU: 4, MICU: 2}),
    Illness("sepsis", 0.20, 0.30, {MICU: 6, MICU_SICU: 3, SICU: 2}),
    Illness("haemorrhage", 0.16, -0.05, {MICU: 3, SICU: 3, MICU_SICU: 3}),
    Illness("stroke", 0.13, 0.00, {NEURO_SICU: 6, NEURO_STEPDOWN: 3}),
    Illness("trauma", 0.13, -0.35, {TSICU: 6, SICU: 3}),
)

# Log odds of having any imaging, and how far apart charting lies: habits of the unit, whatever the illness.
UNIT_IMAGING = {MICU: 1.2, SICU: 0.2, MICU_SICU: 0.6, CCU: 0.5, CVICU: 1.0, TSICU: 0.3, NEURO_SICU: -1.3,
                NEURO_STEPDOWN: -2.0}  # fmt: skip
UNIT_INTERVAL = {MICU: 1.0, SICU: 1.0, MICU_SICU: 1.1, CCU: 1.0, CVICU: 0.8, TSICU: 1.0, NEURO_SICU: 1.0,
                 NEURO_STEPDOWN: 1.7}  # fmt: skip

# Admission type: share and the log odds of death it adds.
ADMISSION_TYPES = {
    "EW EMER.": (0.44, 0.25),
    "URGENT": (0.18, 0.35),
    "OBSERVATION ADMIT": (0.14, 0.0),
    "SURGICAL SAME DAY ADMISSION": (0.12, -0.9),
    "DIRECT EMER.": (0.06, 0.25),
    "ELECTIVE": (0.06, -0.9),
}
# What each modality adds to the severity it shows: standard deviation of a constant over the stay, and of a drift that
# turns sign after 24 hours. So no modality knows level or trend for sure, and two know more than one.
ERRORS = {"vitals": (0.6, 0.3), "labs": (0.6, 0.3), "image": (0.3, 0.2), "wording": (0.2, 0.15)}


@dataclass(frozen=True)
class Patient:
    """One person of the synthetic hospital; ``age`` is that of the anchor year, in years."""

    subject_id: int
    gender: str
    age: int
    anchor_year: int
    first_admission: np.datetime64
    stays_wanted: int


@dataclass(frozen=True)
class Course:
    """One stay as it truly went.

    Attributes:
        index: 0-based number of the stay; with the seed it names the stay's random streams.
        edregtime: None unless the stay came through the emergency room.
        dischtime: when the hospital stay ended, a whole minute as ``deathtime`` is; never before ``outtime``.
        deathtime: None for those who leave the hospital alive.
        severity: float[ceil(hours in unit) + 1], at every whole hour since admission to the unit.
        p_death: probability of in-hospital death that the outcome was drawn from; ``demographic_logit`` is the part of
            its log odds owed to age and admission type.
        errors: (constant, drift) of each modality of ``ERRORS``, in units of severity.
        side: of the chest that is worse off, "left" or "right".
        demographics_only: nothing but administrative rows was ever recorded.
    """

    index: int
    patient: Patient
    hadm_id: int
    stay_id: int
    age: int
    admission_type: str
    unit: str
    illness: str
    side: str
    edregtime: np.datetime64 | None
    admittime: np.datetime64
    intime: np.datetime64
    outtime: np.datetime64
    dischtime: np.datetime64
    deathtime: np.datetime64 | None
    severity: NDArray[np.float64]
    p_death: float
    demographic_logit: float
    errors: dict[str, tuple[float, float]]
    ventilated: bool
    demographics_only: bool

    @property
    def hours_in_unit(self) -> float:
        """Hours from admission to the unit to leaving it."""
        return float((self.outtime - self.intime) / np.timedelta64(1, "h"))

    def severity_at(self, hours: NDArray[np.float64]) -> NDArray[np.float64]:
        """Severity at hours since admission to the unit; the ends hold beyond the stay."""
        return np.interp(hours, np.arange(len(self.severity)), self.severity)

    def shown(self, hours: NDArray[np.float64], modality: str) -> NDArray[np.float64]:
        """Severity as one modality of ``ERRORS`` shows it, before noise of the single measurement."""
        constant, drift = self.errors[modality]
        return self.severity_at(hours) + constant + drift * (np.clip(hours, 0, OUTCOME_WINDOW_HOURS) / 24 - 1)


def stream(seed: int, purpose: int, index: int = 0) -> Generator:
    """The random stream of one purpose for one stay or patient: no draw of another can shift it."""
    return np.random.default_rng([seed, purpose, index])


def logistic(log_odds: float) -> float:
    """Probability of these log odds."""
    return float(1 / (1 + np.exp(-log_odds)))


def draw_severity(rng: Generator, hours_in_unit: float, level: float, trend: float) -> NDArray[np.float64]:
    """Severity float[H + 1] of a stay's first hours: level, trend through the outcome window, wandering."""
    hours = np.arange(int(np.ceil(hours_in_unit)) + 1)
    window = min(OUTCOME_WINDOW_HOURS, hours_in_unit)
    persistence = float(np.exp(-1 / 8))
    wander = rng.normal(0, 0.35, len(hours))
    for hour in range(1, len(hours)):
        wander[hour] = persistence * wander[hour - 1] + np.sqrt(1 - persistence**2) * wander[hour]
    # The trend is odd about the middle of the window: rising and falling stays share their mean.
    return level + trend * (2 * np.minimum(hours / window, 1) - 1) + wander


def outcome_log_odds(severity: NDArray[np.float64], hours_in_unit: float, demographic_logit: float) -> float:
    """Log odds of in-hospital death, from the last and the first quarter of the outcome window."""
    hours, window = np.arange(len(severity)), min(OUTCOME_WINDOW_HOURS, hours_in_unit)
    early = float(severity[hours <= window / 4].mean())
    late = float(severity[(hours >= window * 3 / 4) & (hours <= window)].mean())
    return -2.55 + 1.25 * late + 0.6 * (late - early) + demographic_logit


def patients(stays: int, seed: int) -> list[Patient]:
    """Enough people for ``stays`` stays even if everyone stays once; about one in ten would come again."""
    rng = stream(seed, 0)
    identifiers = 10_000_000 + rng.choice(9_900_000, size=stays, replace=False)
    people = []
    for identifier in identifiers:
        year = int(rng.integers(2110, 2201))
        first = np.datetime64(f"{year}-01-01T00:00:00") + np.timedelta64(int(rng.integers(0, 364 * 86_400)), "s")
        people.append(
            Patient(
                subject_id=int(identifier),
                gender=str(rng.choice(["F", "M"], p=[0.44, 0.56])),
                age=int(np.clip(rng.normal(64, 16), 18, 97)),
                anchor_year=year,
                first_admission=first,
                stays_wanted=int(rng.choice([1, 2, 3], p=[0.87, 0.10, 0.03])),
            )
        )
    return people


def courses(stays: int, seed: int) -> Iterator[Course]:
    """Exactly ``stays`` stays, those of one patient in order of time; nobody returns after death."""
    rng = stream(seed, 1)
    hadm_ids = 20_000_000 + rng.choice(9_900_000, size=stays, replace=False)
    stay_ids = 30_000_000 + rng.choice(9_900_000, size=stays, replace=False)
    index = 0
    for patient in patients(stays, seed):
        admittime = patient.first_admission
        for _ in range(patient.stays_wanted):
            if index == stays:
                return
            course = _course(seed, index, patient, int(hadm_ids[index]), int(stay_ids[index]), admittime)
            yield course
            index += 1
            if course.deathtime is not None:
                break
            admittime = course.dischtime + _hours(24 * (3 + stream(seed, 2, index).exponential(150)))


def _course(seed: int, index: int, patient: Patient, hadm_id: int, stay_id: int, admittime: np.datetime64) -> Course:
    rng = stream(seed, 3, index)
    kinds = list(ADMISSION_TYPES)
    admission_type = str(rng.choice(kinds, p=[ADMISSION_TYPES[kind][0] for kind in kinds]))
    illness = ILLNESSES[rng.choice(len(ILLNESSES), p=[illness.share for illness in ILLNESSES])]
    weights = np.array(list(illness.units.values()))
    unit = str(rng.choice(list(illness.units), p=weights / weights.sum()))
    age = patient.age + int(str(admittime)[:4]) - patient.anchor_year

    level = illness.severity + rng.normal(0, 1.3)
    trend = float(rng.choice([-1.0, 0.0, 1.0], p=[0.38, 0.34, 0.28]) * rng.uniform(0.5, 1.0))
    hours_in_unit = float(np.clip(np.exp(rng.normal(np.log(66) + 0.12 * level, 0.75)), 12.2, 478))
    severity = draw_severity(rng, hours_in_unit, level, trend)
    demographic_logit = 0.55 * (age - 64) / 16 + ADMISSION_TYPES[admission_type][1]
    p_death = logistic(outcome_log_odds(severity, hours_in_unit, demographic_logit))
    dies, dies_in_unit = bool(rng.random() < p_death), bool(rng.random() < 0.75)
    severity = _after_window(severity, 2.2 if dies else -0.9)

    intime = admittime + _hours(rng.exponential(5) + 0.2)
    outtime = intime + _hours(hours_in_unit)
    on_ward = rng.exponential(60) + 2
    leaves = outtime if dies and dies_in_unit else outtime + _hours(on_ward)
    dischtime = leaves.astype("datetime64[m]").astype("datetime64[s]") + np.timedelta64(60, "s")
    emergency = admission_type in ("EW EMER.", "OBSERVATION ADMIT", "DIRECT EMER.")
    return Course(
        index=index,
        patient=patient,
        hadm_id=hadm_id,
        stay_id=stay_id,
        age=age,
        admission_type=admission_type,
        unit=unit,
        illness=illness.name,
        side=str(rng.choice(["left", "right"])),
        edregtime=admittime - _hours(rng.uniform(1, 9)) if emergency else None,
        admittime=admittime,
        intime=intime,
        outtime=outtime,
        dischtime=dischtime,
        deathtime=dischtime if dies else None,
        severity=severity,
        p_death=p_death,
        demographic_logit=demographic_logit,
        errors=_errors(rng),
        ventilated=bool(rng.random() < logistic(-1.2 + 1.3 * level)),
        demographics_only=bool(rng.random() < 0.03),
    )


def _after_window(severity: NDArray[np.float64], destination: float) -> NDArray[np.float64]:
    """Beyond the outcome window a stay drifts towards its end; nothing earlier may depend on the outcome."""
    beyond = np.maximum(np.arange(len(severity)) - OUTCOME_WINDOW_HOURS, 0)
    return severity + (destination - severity) * (1 - np.exp(-beyond / 48))


def _errors(rng: Generator) -> dict[str, tuple[float, float]]:
    drawn = {name: (rng.normal(0, constant), rng.normal(0, drift)) for name, (constant, drift) in ERRORS.items()}
    # A report describes the same picture, so it inherits part of the picture's error.
    (picture, picture_drift), (own, own_drift) = drawn["image"], drawn["wording"]
    return drawn | {"wording": (own + 0.6 * picture, own_drift + 0.6 * picture_drift)}


def _hours(hours: float) -> np.timedelta64:
    return np.timedelta64(round(hours * 3600), "s")
