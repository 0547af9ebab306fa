"""What clinicians of the synthetic eICU write down and order: diagnoses, treatments, drugs and infusions.

On every round a clinician lists what applies to the severity as this modality shows it. What a row says may be little;
when it was first written, and what was written after it, tells where the stay is going.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray

from trajlm.cohorts.synthetic_course import OUTCOME_WINDOW_HOURS, stream
from trajlm.cohorts.synthetic_eicu_catalogue import DIAGNOSES, DRUGS, TREATMENTS, Drug, Entry, applies
from trajlm.cohorts.synthetic_eicu_rows import numbered, shuffled, twice
from trajlm.cohorts.synthetic_eicu_stays import UnitStay
from trajlm.cohorts.synthetic_measurements import visits

Rows = list[tuple]
# Drug as `infusionDrug` calls it, unit of the rate, typical rate, its log slope in severity, above which severity it
# runs, mL per unit of the rate.
_INFUSIONS = (
    ("Norepinephrine", "mcg/min", 6.0, 0.5, 1.0, 3.75),
    ("Propofol", "mcg/kg/min", 25.0, 0.1, -0.6, 0.3),
    ("Fentanyl", "mcg/hr", 75.0, 0.2, 0.2, 0.1),
    ("Vasopressin", "units/min", 0.03, 0.0, 2.0, 150.0),
    ("Insulin", "units/hr", 3.0, 0.3, 0.8, 1.0),
    ("NS", "ml/hr", 75.0, 0.1, 0.3, 1.0),
)
_FOR_VENTILATED = {"Propofol", "Fentanyl"}


def diagnosis_table(stays: Sequence[UnitStay], seed: int) -> pl.DataFrame:
    """diagnosis: the problem list; shows severity through the error of reports."""
    rows: Rows = []
    for stay in _holding(stays, "diagnosis"):
        rng = stream(seed, 60, stay.course.index)
        for hour, entry, last, first in _listed(stay, rng, DIAGNOSES, "wording", 9.0, again=0.15):
            priority = "Primary" if first == 0 else str(rng.choice(["Major", "Other"], p=[0.55, 0.45]))
            at = _late(stay, rng, hour)
            rows.append((stay.stay_id, "True" if last else "False", at, entry.text, entry.code or None, priority))
    columns = "patientunitstayid,activeupondischarge,diagnosisoffset,diagnosisstring,icd9code,diagnosispriority"
    return _table(rows, "diagnosisid", 7_000_000, columns, 0.01, stream(seed, 70))


def treatment_table(stays: Sequence[UnitStay], seed: int) -> pl.DataFrame:
    """treatment: what is being done; shows severity through the error of pictures."""
    rows: Rows = []
    for stay in _holding(stays, "treatment"):
        rng = stream(seed, 61, stay.course.index)
        for hour, entry, last, _ in _listed(stay, rng, TREATMENTS, "image", 7.0, again=0.35):
            rows.append((stay.stay_id, _late(stay, rng, hour), entry.text, "True" if last else "False"))
    columns = "patientunitstayid,treatmentoffset,treatmentstring,activeupondischarge"
    return _table(rows, "treatmentid", 9_000_000, columns, 0.005, stream(seed, 71))


def medication_table(stays: Sequence[UnitStay], seed: int) -> pl.DataFrame:
    """medication: drug orders; some cancelled, some of home drugs begun long before, many without a name."""
    rows: Rows = []
    for stay in _holding(stays, "medication"):
        rng = stream(seed, 62, stay.course.index)
        hours = visits(stay.course, rng, 8.0, 3.0, 16.0)
        active = applies(stay.course, rng, [drug.entry for drug in DRUGS], _orders_shown(stay, rng, hours))
        for i, drug in enumerate(DRUGS):
            for begin, end in _spells(active[:, i]):
                stop = hours[end] if end < len(hours) else stay.course.hours_in_unit + rng.exponential(20)
                rows.append(_order(stay, rng, drug, float(hours[begin]), float(stop)))
    columns = (
        "patientunitstayid,drugorderoffset,drugstartoffset,drugivadmixture,drugordercancelled,drugname,drughiclseqno,"
        "dosage,routeadmin,frequency,loadingdose,prn,drugstopoffset,gtc"
    )
    return _table(rows, "medicationid", 20_000_000, columns, 0.004, stream(seed, 72))


def infusion_table(stays: Sequence[UnitStay], seed: int) -> pl.DataFrame:
    """infusionDrug: rates of what runs; units in the drug's name or nowhere, a rate now and then no number."""
    rows: Rows = []
    for stay in _holding(stays, "infusionDrug"):
        rng = stream(seed, 63, stay.course.index)
        hours = visits(stay.course, rng, 2.5, 1.0, 5.0)
        shown = _orders_shown(stay, rng, hours)
        weight = round(float(np.clip(rng.normal(80, 18), 38, 190)), 1)
        for drug, unit, typical, slope, above, volume in _INFUSIONS:
            if rng.random() < 0.35 or (drug in _FOR_VENTILATED and not stay.course.ventilated):
                continue
            running = shown + rng.normal(0, 0.15, len(hours)) > above + rng.normal(0, 0.3)
            rates = typical * np.exp(slope * (shown - above) + rng.normal(0, 0.1, len(hours)))
            for begin, end in _spells(running):
                # The row after the last says that the pump was stopped.
                for i in range(begin, min(end + 1, len(hours))):
                    rate = float(rates[i]) if i < end else 0.0
                    rows.append(_rate(stay, rng, float(hours[i]), drug, unit, rate, volume, weight))
    columns = "patientunitstayid,infusionoffset,drugname,drugrate,infusionrate,drugamount,volumeoffluid,patientweight"
    return _table(rows, "infusiondrugid", 40_000_000, columns, 0.003, stream(seed, 73))


def _holding(stays: Sequence[UnitStay], table: str) -> list[UnitStay]:
    return [stay for stay in stays if table in stay.tables]


def _listed(
    stay: UnitStay, rng: Generator, entries: Sequence[Entry], modality: str, interval: float, again: float
) -> list[tuple[float, Entry, bool, int]]:
    """(hour, entry, still listed when the stay ends, rank of the entry) for every row a clinician writes on rounds.

    What still applies is written ``again`` on that share of the rounds.
    """
    hours = visits(stay.course, rng, interval, interval / 3, 3 * interval)
    active = applies(stay.course, rng, entries, stay.course.shown(hours, modality))
    fresh = active & ~np.vstack([np.zeros((1, len(entries)), bool), active[:-1]])
    written = fresh | (active & (rng.random(active.shape) < again))
    first = int(np.argmax(written.any(0))) if written.any() else 0
    rows = []
    for i in map(int, np.flatnonzero(written.any(0))):
        moments = np.flatnonzero(written[:, i])
        for moment in moments:
            last = bool(active[-1, i]) and moment == moments[-1]
            rows.append((float(hours[moment]) + rng.uniform(0, 0.05), entries[i], last, i - first))
    return rows


def _spells(active: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs of what is active, as (first index, index after the last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _orders_shown(stay: UnitStay, rng: Generator, hours: NDArray[np.float64]) -> NDArray[np.float64]:
    """Severity as orders show it: with an error of their own, made like those of the other modalities."""
    constant, drift = rng.normal(0, 0.35), rng.normal(0, 0.2)
    return stay.course.severity_at(hours) + constant + drift * (np.clip(hours, 0, OUTCOME_WINDOW_HOURS) / 24 - 1)


def _late(stay: UnitStay, rng: Generator, hour: float) -> int:
    """The offset of a row; a few are charted only after the stay."""
    if rng.random() < 0.004:
        return stay.unit_discharge_offset + int(rng.integers(1, 400))
    return min(int(hour * 60), stay.unit_discharge_offset)


def _order(stay: UnitStay, rng: Generator, drug: Drug, hour: float, stop: float) -> tuple:
    hospital, entry = stay.hospital, drug.entry
    ordered = int(hour * 60) + int(rng.integers(-3, 4))
    start = ordered + round(float(rng.normal(20, 25)))
    if entry.chronic and rng.random() < 0.4:
        start = -int(rng.exponential(6000)) - 60  # taken at home
    elif rng.random() < 0.03:
        start = ordered + int(rng.exponential(700))
    name = (entry.text, drug.brand, drug.label)[hospital.spelling]
    name = name.upper() if hospital.spelling == 0 and rng.random() < 0.4 else name
    named, coded = hospital.drugs_named and rng.random() < 0.9, rng.random() < 0.88
    dispensed = rng.random() < 0.04  # from a cabinet, which knows no dose
    return (
        stay.stay_id, ordered, start, "Yes" if drug.admixture else "No", "Yes" if rng.random() < 0.04 else "No",
        name if named else None, drug.hicl if coded else None,
        "PYXIS" if dispensed else None if rng.random() < 0.1 else drug.dosage,
        "MISC" if dispensed else drug.route, "Pyxis" if dispensed else None if rng.random() < 0.15 else drug.frequency,
        "0 mg" if rng.random() < 0.0005 else None, "Yes" if drug.as_needed else "No",
        0 if rng.random() < 0.04 else max(start, int(stop * 60)), drug.gtc if coded else 0,
    )  # fmt: skip


def _rate(
    stay: UnitStay, rng: Generator, hour: float, drug: str, unit: str, rate: float, volume: float, weight: float
) -> tuple:
    spelling = stay.hospital.spelling
    if spelling == 1:  # the pump's own unit
        rate, unit = rate * volume, "ml/hr"
    name = f"{drug} ({unit if spelling < 2 or rng.random() < 0.5 else ''})"
    text: str | None = f"{rate:.3g}" if rate < 10 else f"{rate:.1f}".removesuffix(".0")
    luck = rng.random()
    text = None if luck < 0.003 else "ERROR" if luck < 0.0045 else "OFF" if rate == 0 and luck < 0.1 else text
    filled = spelling == 0
    return (
        stay.stay_id, _late(stay, rng, hour), name, text, f"{rate * volume:.1f}" if filled else None,
        "4" if filled else None, "250" if filled else None, weight if filled and unit.startswith("mcg/kg") else None,
    )  # fmt: skip


def _table(rows: Rows, key: str, first: int, columns: str, doubled: float, rng: Generator) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema=columns.split(","), orient="row", infer_schema_length=None)
    return numbered(shuffled(twice(frame, doubled, rng), "patientunitstayid", rng), key, first, rng)
