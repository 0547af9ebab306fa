"""What was measured of a synthetic eICU stay: item -> (hours, numbers), from the triplets of the common course."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray

from trajlm.cohorts.synthetic_course import stream
from trajlm.cohorts.synthetic_eicu_stays import UnitStay
from trajlm.cohorts.synthetic_measurements import Triplets, chart, labs, outputs

Numbers = NDArray[np.float64]
Series = tuple[Numbers, Numbers]  # hours since admission to the unit, numbers

# Items of the common course keep the number they have in MIMIC-IV; small numbers are measured in eICU only.
HCT, PAO2, PACO2, FIO2, ALBUMIN, BEDSIDE_GLUCOSE, CARBOXYHEMOGLOBIN, SPECIFIC_GRAVITY, URINE = range(1, 10)
PH, HGB, GLUCOSE, CELSIUS, FAHRENHEIT, HEART_RATE = 50820, 51222, 50931, 223762, 223761, 220045
ARTERIAL_MEAN, CUFF_MEAN = 220052, 220181
PERIODIC = {
    "temperature": CELSIUS, "sao2": 220277, "heartrate": HEART_RATE, "respiration": 220210, "cvp": 101, "etco2": 102,
    "systemicsystolic": 220050, "systemicdiastolic": 220051, "systemicmean": ARTERIAL_MEAN, "pasystolic": 103,
    "padiastolic": 104, "pamean": 105, "st1": 106, "st2": 107, "st3": 108, "icp": 109,
}  # fmt: skip
APERIODIC = {
    "noninvasivesystolic": 220179, "noninvasivediastolic": 220180, "noninvasivemean": CUFF_MEAN, "paop": 201,
    "cardiacoutput": 202, "cardiacinput": 203, "svr": 204, "svri": 205, "pvr": 206, "pvri": 207,
}  # fmt: skip
_NOTHING: Series = (np.empty(0), np.empty(0))


class Measured:
    """Everything that was measured of one stay, whether or not a table of the release holds it."""

    def __init__(self, stay: UnitStay) -> None:
        self.stay = stay
        self._series: dict[int, Series] = {}

    def __getitem__(self, item: int) -> Series:
        """The series of an item; empty where it was never measured."""
        return self._series.get(item, _NOTHING)

    def add(self, triplets: Triplets) -> None:
        """Take what the common course measured."""
        hours, items, numbers = triplets.columns()
        for item in np.unique(items):
            self._series[int(item)] = (hours[items == item], numbers[items == item])

    def put(self, item: int, series: Series) -> None:
        """Set the series of an item."""
        self._series[item] = series

    def first_day(self, *items: int) -> Numbers:
        """Numbers of these items in the first 24 hours."""
        return np.concatenate([n[(h >= 0) & (h <= 24)] for h, n in map(self.__getitem__, items)])


def measure(stay: UnitStay, seed: int) -> Measured:
    """The same numbers as the MIMIC-IV layout charts of this course, and what eICU records beside them."""
    course, rng, own = stay.course, stream(seed, 64, stay.course.index), Measured(stay)
    own.add(chart(course, stream(seed, 20, course.index)))
    own.add(labs(course, stream(seed, 22, course.index)))
    hours, fahrenheit = own[FAHRENHEIT]
    if len(hours):
        own.put(CELSIUS, (hours, (fahrenheit - 32) / 1.8))
    hours, _, volumes = outputs(course, stream(seed, 21, course.index)).columns()
    own.put(URINE, (hours, volumes))
    hours, haemoglobin = own[HGB]
    own.put(HCT, (hours, 3 * haemoglobin + rng.normal(0, 0.6, len(hours))))
    follow = _Followers(own, rng)
    follow("labs", PAO2, PH, 105, -8, 14)
    follow("labs", PACO2, PH, 40, 1.5, 5)
    follow("labs", FIO2, PH, 48, 9, 6, 0.8)
    follow("labs", ALBUMIN, HGB, 3.1, -0.2, 0.3, 0.3)
    follow("labs", SPECIFIC_GRAVITY, HGB, 1.016, 0.0, 0.004, 0.4)
    if rng.random() < 0.6:
        follow("labs", BEDSIDE_GLUCOSE, GLUCOSE, 140, 8, 22, 0.7)
    if rng.random() < 0.06:
        follow("labs", CARBOXYHEMOGLOBIN, PH, 1.0, 0.0, 0.2)
    _devices(own, rng, follow)
    return own


class _Followers:
    """Measures an item whenever another one was, showing the same severity."""

    def __init__(self, measured: Measured, rng: Generator) -> None:
        self._measured, self._rng = measured, rng

    def __call__(
        self, modality: str, item: int, like: int, base: float, slope: float, noise: float, share: float = 1.0
    ) -> None:
        rng, (hours, _) = self._rng, self._measured[like]
        hours = hours[rng.random(len(hours)) < share]
        shown = self._measured.stay.course.shown(hours, modality)
        numbers = base + rng.normal(0, noise) + slope * shown + rng.normal(0, noise, len(hours))
        self._measured.put(item, (hours, np.clip(numbers, 0.1 * base, 4 * base)))


def _devices(measured: Measured, rng: Generator, follow: _Followers) -> None:
    """Catheters and probes that few stays have."""
    course = measured.stay.course
    if rng.random() < 0.3:
        follow("vitals", PERIODIC["cvp"], ARTERIAL_MEAN, 9, 1.2, 1.5)
    if course.ventilated and rng.random() < 0.3:
        follow("vitals", PERIODIC["etco2"], HEART_RATE, 35, -1.0, 2.5)
    if course.illness in ("stroke", "trauma") and rng.random() < 0.2:
        follow("vitals", PERIODIC["icp"], HEART_RATE, 11, 2.5, 1.5)
    if course.illness == "heart failure" and rng.random() < 0.3:
        for column, base in (("pasystolic", 42.0), ("padiastolic", 20.0), ("pamean", 28.0)):
            follow("vitals", PERIODIC[column], ARTERIAL_MEAN, base, 2, 2)
        for column, base in (
            ("cardiacoutput", 5.2),
            ("cardiacinput", 2.7),
            ("paop", 16.0),
            ("svr", 1100.0),
            ("pvr", 190.0),
        ):
            follow("vitals", APERIODIC[column], CUFF_MEAN, base, -0.05 * base, 0.06 * base, 0.5)
    if course.illness == "heart failure" and rng.random() < 0.4:
        for column in ("st1", "st2", "st3"):
            follow("vitals", PERIODIC[column], HEART_RATE, 0.4, 0.2, 0.3)


def long(measured: Sequence[Measured], items: Sequence[int]) -> pl.DataFrame:
    """One row per number of these items, by stay: patientunitstayid, spelling (of its hospital), end (minutes in the
    unit), item, offset (minutes), number.
    """  # fmt: skip
    of_stay: dict[str, list] = {name: [np.empty(0, np.int64)] for name in ("patientunitstayid", "spelling", "end")}
    columns: dict[str, list] = {"item": [np.empty(0, np.int64)], "offset": [np.empty(0, np.int64)], "number": []}
    for one in measured:
        identity = (one.stay.stay_id, one.stay.hospital.spelling, one.stay.unit_discharge_offset)
        for item in items:
            hours, numbers = one[item]
            columns["item"].append(np.full(len(hours), item))
            columns["offset"].append(np.minimum(one.stay.minutes(hours), one.stay.unit_discharge_offset))
            columns["number"].append(numbers)
            for name, value in zip(of_stay, identity, strict=True):
                of_stay[name].append(np.full(len(hours), value))
    columns["number"].append(np.empty(0))
    return pl.DataFrame({name: np.concatenate(parts) for name, parts in (of_stay | columns).items()})
