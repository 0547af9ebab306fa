"""What nurses, laboratories and drains write down of a synthetic stay: (hours, item, number) triplets.

Sicker stays are charted and sampled more often and get arterial lines and blood gases that others never have, so that
absence itself says something, as in a real unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from trajlm.cohorts.synthetic_course import UNIT_INTERVAL, Course

Hours = NDArray[np.float64]


@dataclass(frozen=True)
class Item:
    """One row of d_items or d_labitems; ``decimals`` is how the number is written."""

    itemid: int
    label: str
    short: str
    category: str
    unit: str = ""
    decimals: int = 0
    low: float | None = None
    high: float | None = None


_VITAL, _NEURO = "Routine Vital Signs", "Neurological"
CHART_ITEMS = (
    Item(220045, "Heart Rate", "HR", _VITAL, "bpm"),
    Item(220050, "Arterial Blood Pressure systolic", "ABPs", _VITAL, "mmHg", 0, 90, 140),
    Item(220051, "Arterial Blood Pressure diastolic", "ABPd", _VITAL, "mmHg", 0, 60, 90),
    Item(220052, "Arterial Blood Pressure mean", "ABPm", _VITAL, "mmHg"),
    Item(220179, "Non Invasive Blood Pressure systolic", "NBPs", _VITAL, "mmHg"),
    Item(220180, "Non Invasive Blood Pressure diastolic", "NBPd", _VITAL, "mmHg"),
    Item(220181, "Non Invasive Blood Pressure mean", "NBPm", _VITAL, "mmHg"),
    Item(220210, "Respiratory Rate", "RR", "Respiratory", "insp/min"),
    Item(220277, "O2 saturation pulseoxymetry", "SpO2", "Respiratory", "%"),
    Item(220739, "GCS - Eye Opening", "Eye Opening", _NEURO),
    Item(223761, "Temperature Fahrenheit", "Temperature F", _VITAL, "°F", 1),
    Item(223762, "Temperature Celsius", "Temperature C", _VITAL, "°C", 1),
    Item(223835, "Inspired O2 Fraction", "FiO2", "Respiratory"),
    Item(223900, "GCS - Verbal Response", "Verbal Response", _NEURO),
    Item(223901, "GCS - Motor Response", "Motor Response", _NEURO),
    Item(223951, "Capillary Refill R", "Capillary Refill R", "Cardiovascular (Pulses)"),
    Item(224308, "Capillary Refill L", "Capillary Refill L", "Cardiovascular (Pulses)"),
    Item(226512, "Admission Weight (Kg)", "Admission Weight (Kg)", "General", "kg", 1),
    Item(226730, "Height (cm)", "Height (cm)", "General", "cm"),
)
OUTPUT_ITEMS = (Item(226559, "Foley", "Foley", "Output", "mL"), Item(226560, "Void", "Void", "Output", "mL"))
LAB_ITEMS = (
    Item(50813, "Lactate", "", "Blood Gas", "mmol/L", 1, 0.5, 2.0),
    Item(50820, "pH", "", "Blood Gas", "units", 2, 7.35, 7.45),
    Item(50882, "Bicarbonate", "", "Chemistry", "mEq/L", 0, 22, 32),
    Item(50885, "Bilirubin, Total", "", "Chemistry", "mg/dL", 1, 0, 1.5),
    Item(50912, "Creatinine", "", "Chemistry", "mg/dL", 1, 0.5, 1.2),
    Item(50931, "Glucose", "", "Chemistry", "mg/dL", 0, 70, 100),
    Item(50971, "Potassium", "", "Chemistry", "mEq/L", 1, 3.3, 5.1),
    Item(50983, "Sodium", "", "Chemistry", "mEq/L", 0, 133, 145),
    Item(51006, "Urea Nitrogen", "", "Chemistry", "mg/dL", 0, 6, 20),
    Item(51222, "Hemoglobin", "", "Hematology", "g/dL", 1, 13.7, 17.5),
    Item(51265, "Platelet Count", "", "Hematology", "K/uL", 0, 150, 400),
    Item(51301, "White Blood Cells", "", "Hematology", "K/uL", 1, 4.0, 10.0),
)

# Charted in words: item -> code -> (text, number). The tube leaves a verbal score of 1 under words of its own.
WORDS: dict[int, dict[int, tuple[str, float | None]]] = {
    220739: {4: ("Spontaneously", 4), 3: ("To Speech", 3), 2: ("To Pain", 2), 1: ("None", 1)},
    223900: {
        5: ("Oriented", 5), 4: ("Confused", 4), 3: ("Inappropriate Words", 3),
        2: ("Incomprehensible sounds", 2), 1: ("No Response", 1), 0: ("No Response-ETT", 1),
    },
    223901: {
        6: ("Obeys Commands", 6), 5: ("Localizes Pain", 5), 4: ("Flex-withdraws", 4),
        3: ("Abnormal Flexion", 3), 2: ("Abnormal extension", 2), 1: ("No response", 1),
    },
    223951: {0: ("Normal <3 Seconds", None), 1: ("Abnormal >3 Seconds", None)},
    224308: {0: ("Normal <3 Seconds", None), 1: ("Abnormal >3 Seconds", None)},
}  # fmt: skip


class Triplets:
    """Collects (hours since admission, item, number) of one stay."""

    def __init__(self) -> None:
        self._hours: list[Hours] = []
        self._items: list[NDArray[np.int64]] = []
        self._numbers: list[Hours] = []

    def add(self, itemid: int, hours: Hours, numbers: Hours) -> None:
        """Add one item at ``hours``, both float[N]."""
        self._hours.append(hours)
        self._items.append(np.full(len(hours), itemid))
        self._numbers.append(numbers)

    def columns(self) -> tuple[Hours, NDArray[np.int64], Hours]:
        """float[N] hours, int[N] items, float[N] numbers, in order of time."""
        if not self._hours:
            return np.empty(0), np.empty(0, np.int64), np.empty(0)
        hours = np.concatenate(self._hours)
        order = np.argsort(hours, kind="stable")
        return hours[order], np.concatenate(self._items)[order], np.concatenate(self._numbers)[order]


def visits(course: Course, rng: Generator, interval_hours: float, low: float, high: float) -> Hours:
    """When someone comes: every ``low`` to ``high`` hours, sooner for the sicker, thinning out after 48 hours."""
    times, now = [], float(rng.uniform(0.05, 0.5) * low)
    habit = interval_hours * UNIT_INTERVAL[course.unit]
    while now < course.hours_in_unit:
        times.append(now)
        severity = float(course.severity_at(np.array([now]))[0])
        step = np.clip(habit * np.exp(-0.45 * severity), low, high) * rng.uniform(0.85, 1.15)
        now += float(step) * (1 + max(now - 48, 0) / 24)
    return np.array(times)


def chart(course: Course, rng: Generator) -> Triplets:
    """Bedside charting of one stay."""
    rows = Triplets()
    hours = visits(course, rng, 2.2, 1.0, 4.0)
    shown = course.shown(hours, "vitals")
    feverish = 0.5 if course.illness in ("pneumonia", "sepsis") else 0.0

    def show(base: float, slope: float, between: float, within: float) -> Hours:
        return base + rng.normal(0, between) + slope * shown + rng.normal(0, within, len(hours))

    rows.add(220045, hours, np.clip(show(84, 9, 11, 6), 30, 190))
    rows.add(220210, hours, np.clip(show(19, 2.8, 2.5, 2.5), 6, 50))
    rows.add(220277, hours, np.clip(show(96.6, -1.0, 1.0, 1.2), 70, 100))
    _pressures(course, rng, rows, hours, show(122, -8, 12, 8))
    celsius = np.clip(show(36.9 + feverish, 0.15, 0.3, 0.3), 33, 41.5)
    every_fourth = np.arange(len(hours)) % 2 == 0
    if rng.random() < 0.15:
        rows.add(223762, hours[every_fourth], celsius[every_fourth])
    else:
        rows.add(223761, hours[every_fourth], celsius[every_fourth] * 1.8 + 32)
    _coma_scale(course, rng, rows, hours[every_fourth], shown[every_fourth])
    slow = np.arange(len(hours)) % 4 == 1
    refill = rng.random(slow.sum()) < 1 / (1 + np.exp(2.2 - 1.2 * shown[slow]))
    rows.add(224308 if rng.random() < 0.5 else 223951, hours[slow], refill.astype(float))
    if course.ventilated:
        oxygen = np.round(np.clip(show(44, 12, 6, 5)[every_fourth], 21, 100) / 5) * 5
        rows.add(223835, hours[every_fourth], oxygen)
    _size(course, rng, rows)
    return rows


def _pressures(course: Course, rng: Generator, rows: Triplets, hours: Hours, systolic: Hours) -> None:
    systolic = np.clip(systolic, 45, 230)
    diastolic = np.clip(0.52 * systolic + rng.normal(0, 4, len(hours)), 25, 130)
    mean = diastolic + (systolic - diastolic) / 3 + rng.normal(0, 1.5, len(hours))
    arterial_line = rng.random() < 1 / (1 + np.exp(0.8 - 1.1 * course.severity[:25].mean()))
    cuff = np.arange(len(hours)) % 3 == 0 if arterial_line else np.ones(len(hours), bool)
    for itemid, values in ((220179, systolic), (220180, diastolic), (220181, mean)):
        rows.add(itemid, hours[cuff], values[cuff] + rng.normal(0, 2, cuff.sum()))
    if arterial_line:
        for itemid, values in ((220050, systolic), (220051, diastolic), (220052, mean)):
            rows.add(itemid, hours, values)


def _coma_scale(course: Course, rng: Generator, rows: Triplets, hours: Hours, shown: Hours) -> None:
    depth = np.maximum(0.75 * shown + (0.9 if course.illness == "stroke" else 0) + rng.normal(0, 0.4), 0)
    depth = np.maximum(depth + rng.normal(0, 0.25, len(hours)), 0)
    rows.add(220739, hours, np.clip(np.round(4 - depth), 1, 4))
    rows.add(223901, hours, np.clip(np.round(6 - 1.2 * depth), 1, 6))
    verbal = np.zeros(len(hours)) if course.ventilated else np.clip(np.round(5 - 1.2 * depth), 1, 5)
    rows.add(223900, hours, verbal)


def _size(course: Course, rng: Generator, rows: Triplets) -> None:
    tall = 175 if course.patient.gender == "M" else 162
    height = float(np.clip(rng.normal(tall, 8), 140, 205))
    at = np.array([min(0.4, course.hours_in_unit)])
    rows.add(226512, at, np.array([np.clip(height - 95 + rng.normal(0, 16), 38, 190)]))
    if rng.random() < 0.6:
        rows.add(226730, at, np.array([height]))


def outputs(course: Course, rng: Generator) -> Triplets:
    """Urine, in mL since the last emptying; failing kidneys give less."""
    rows = Triplets()
    hours = visits(course, rng, 3.5, 2.0, 6.0)
    since = np.minimum(np.diff(hours, prepend=0.0), 6)
    rate = np.exp(4.25 - 0.38 * course.shown(hours, "labs") + rng.normal(0, 0.3) + rng.normal(0, 0.4, len(hours)))
    volume = np.round(np.clip(rate * since, 0, 1200) / 5) * 5
    foley = rng.random() < 0.8 or course.ventilated
    rows.add(226559 if foley else 226560, hours, volume)
    return rows


def labs(course: Course, rng: Generator) -> Triplets:
    """Chemistry, blood counts and blood gases; an emergency panel precedes admission where there was an emergency."""
    rows = Triplets()
    panel = visits(course, rng, 11, 5.0, 24.0)
    if course.edregtime is not None:
        before = float((course.edregtime - course.intime) / np.timedelta64(1, "h")) + 0.6
        panel = np.concatenate([[before], panel])
    baseline = {item.itemid: rng.normal() for item in LAB_ITEMS}

    def show(itemid: int, hours: Hours, base: float, slope: float, between: float, within: float) -> None:
        noise = between * baseline[itemid] + rng.normal(0, within, len(hours))
        numbers = base + slope * course.shown(hours, "labs") + noise
        logarithmic = itemid in (50813, 50885, 50912, 50931, 51006, 51265, 51301)
        rows.add(itemid, hours, np.exp(numbers) if logarithmic else numbers)

    infected, bleeding = course.illness in ("pneumonia", "sepsis"), course.illness in ("haemorrhage", "trauma")
    show(50882, panel, 24.5, -1.7, 2.0, 1.3)
    show(50912, panel, 0.08, 0.24, 0.45, 0.08)
    show(50931, panel, 4.85, 0.10, 0.18, 0.15)
    show(50971, panel, 4.1, 0.12, 0.3, 0.25)
    show(50983, panel, 138.5, 0.0, 3.0, 1.2)
    show(51006, panel, 3.05, 0.24, 0.45, 0.08)
    counts = panel[rng.random(len(panel)) < 0.85]
    show(51222, counts, 9.2 if bleeding else 10.8, -0.25, 1.3, 0.4)
    show(51265, counts, 5.25, -0.14, 0.35, 0.07)
    show(51301, counts, 2.6 if infected else 2.25, 0.14, 0.28, 0.10)
    show(50885, panel[rng.random(len(panel)) < 0.25], -0.35, 0.28, 0.6, 0.12)
    chance = 1 / (1 + np.exp(1.2 - 1.1 * course.severity_at(panel) - 0.8 * course.ventilated))
    gases = panel[rng.random(len(panel)) < chance]
    gases = gases + rng.uniform(0.01, 0.02) * (gases < course.hours_in_unit - 0.1)
    show(50813, gases, 0.50, 0.30, 0.22, 0.15)
    show(50820, gases, 7.385, -0.032, 0.025, 0.02)
    return rows
