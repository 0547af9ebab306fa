"""Synthetic stays as the tables of a MIMIC-IV release: official columns in order, with some of its blemishes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.random import Generator
from numpy.typing import NDArray

from trajlm.cohorts.synthetic_course import Course, Patient, stream
from trajlm.cohorts.synthetic_measurements import CHART_ITEMS, LAB_ITEMS, OUTPUT_ITEMS, WORDS, Item, Triplets

Times = NDArray[np.datetime64]

_YEAR_GROUPS = ("2008 - 2010", "2011 - 2013", "2014 - 2016", "2017 - 2019")
_HOMES = ("HOME", "HOME HEALTH CARE", "SKILLED NURSING FACILITY", "REHAB", "")  # "": not recorded
_RACES = ("WHITE", "BLACK/AFRICAN AMERICAN", "HISPANIC/LATINO - PUERTO RICAN", "ASIAN", "OTHER", "UNKNOWN")

# (ICD-9, ICD-10): the illness itself, then what comes with age, then what comes with severity.
_ILLNESS_CODES = {
    "pneumonia": (("486", "J189"), ("51881", "J9601")),
    "heart failure": (("4280", "I509"), ("5119", "J90")),
    "sepsis": (("0389", "A419"), ("99591", "A4189")),
    "haemorrhage": (("5789", "K922"), ("2851", "D62")),
    "stroke": (("43491", "I639"), ("34290", "G8190")),
    "trauma": (("80704", "S2241XA"), ("8605", "S271XXA")),
}
_CHRONIC_CODES = (("4019", "I10"), ("2724", "E785"), ("25000", "E119"), ("41401", "I2510"), ("42731", "I4891"),
                  ("496", "J449"), ("5859", "N189"), ("2449", "E039"))  # fmt: skip
_GRAVE_CODES = (("5849", "N179"), ("2762", "E872"), ("78552", "R6521"), ("51881", "J9600"), ("2761", "E871"))


def minutes_of(course: Course, hours: NDArray[np.float64]) -> Times:
    """Whole minutes of hours since admission to the unit, as charting writes them; never past leaving the unit."""
    start = course.intime.astype("datetime64[s]").astype(np.int64)
    end = course.outtime.astype("datetime64[s]").astype(np.int64)
    minutes = np.ceil((start + hours * 3600) / 60)
    minutes = np.where((minutes * 60 > end) & (hours <= course.hours_in_unit), np.floor(end / 60), minutes)
    return (minutes.astype(np.int64) * 60).astype("datetime64[s]")


def _year_group(seed: int, patient: Patient) -> int:
    return int(stream(seed, 5, patient.subject_id).integers(len(_YEAR_GROUPS)))


def patients_table(cohort: Sequence[Course], seed: int) -> pl.DataFrame:
    """hosp/patients: one row per person; some die after their last discharge."""
    last = {course.patient.subject_id: course for course in cohort}
    rows = []
    for course in last.values():
        rng = stream(seed, 6, course.index)
        death = course.deathtime
        if death is None and rng.random() < 0.15:
            death = course.dischtime + np.timedelta64(int(rng.exponential(120) + 2), "D")
        dod = None if death is None else str(death.astype("datetime64[D]"))
        person = course.patient
        group = _YEAR_GROUPS[_year_group(seed, person)]
        rows.append((person.subject_id, person.gender, person.age, person.anchor_year, group, dod))
    return _frame(rows, "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod")


def admissions_table(cohort: Sequence[Course], seed: int) -> pl.DataFrame:
    """hosp/admissions: one row per stay, as each stay has an admission of its own."""
    rows = []
    for course in cohort:
        person = stream(seed, 7, course.patient.subject_id)
        language = str(person.choice(["ENGLISH", "?"], p=[0.92, 0.08]))
        married = person.choice(["SINGLE", "MARRIED", "WIDOWED", "DIVORCED", ""], p=[0.35, 0.38, 0.14, 0.08, 0.05])
        race = str(person.choice(_RACES, p=[0.66, 0.12, 0.05, 0.04, 0.06, 0.07]))
        rng = stream(seed, 8, course.index)
        elsewhere = rng.choice(["PHYSICIAN REFERRAL", "TRANSFER FROM HOSPITAL", "CLINIC REFERRAL"])
        came_from = str(elsewhere) if course.edregtime is None else "EMERGENCY ROOM"
        went_to = "DIED" if course.deathtime is not None else str(rng.choice(_HOMES, p=[0.3, 0.3, 0.22, 0.1, 0.08]))
        insurance = "Medicare" if course.age >= 65 else str(rng.choice(["Other", "Medicaid"], p=[0.75, 0.25]))
        left_emergency = None if course.edregtime is None else course.admittime + np.timedelta64(25, "m")
        provider = f"P{rng.integers(36**5):05X}"[:6]
        rows.append((
            course.patient.subject_id, course.hadm_id, _minute(course.admittime), _minute(course.dischtime),
            _minute(course.deathtime), course.admission_type, provider, came_from, went_to or None, insurance,
            language, str(married) or None, race, _minute(course.edregtime), _minute(left_emergency),
            int(course.deathtime is not None),
        ))  # fmt: skip
    return _frame(
        rows,
        "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,admission_location,"
        "discharge_location,insurance,language,marital_status,race,edregtime,edouttime,hospital_expire_flag",
    )


def icustays_table(cohort: Sequence[Course]) -> pl.DataFrame:
    """icu/icustays; ``los`` in days."""
    rows = [
        (c.patient.subject_id, c.hadm_id, c.stay_id, c.unit, c.unit, _second(c.intime), _second(c.outtime),
         c.hours_in_unit / 24)
        for c in cohort
    ]  # fmt: skip
    return _frame(rows, "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los")


def diagnoses_table(cohort: Sequence[Course], seed: int) -> pl.DataFrame:
    """hosp/diagnoses_icd: the illness first, then chronic and grave companions; the version follows the year group."""
    rows = []
    for course in cohort:
        rng = stream(seed, 9, course.index)
        edition = 0 if _year_group(seed, course.patient) < 2 else 1
        first, second = _ILLNESS_CODES[course.illness]
        codes = [first] + [second] * int(rng.random() < 0.5)
        codes += [code for code in _CHRONIC_CODES if rng.random() < 0.08 + 0.004 * max(course.age - 30, 0)]
        grave = 1 / (1 + np.exp(1.6 - 1.1 * course.severity.max()))
        codes += [code for code in _GRAVE_CODES if rng.random() < grave]
        unique = list(dict.fromkeys(code[edition] for code in codes))
        rows += [(course.patient.subject_id, course.hadm_id, n, code, 9 + edition) for n, code in enumerate(unique, 1)]
    return _frame(rows, "subject_id,hadm_id,seq_num,icd_code,icd_version")


def items_table() -> pl.DataFrame:
    """icu/d_items."""
    rows = []
    for linked, items in (("chartevents", CHART_ITEMS), ("outputevents", OUTPUT_ITEMS)):
        for i in items:
            kind = "Text" if i.itemid in WORDS else "Numeric"
            rows.append((i.itemid, i.label, i.short, linked, i.category, i.unit or None, kind, i.low, i.high))
    return _frame(rows, "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,highnormalvalue")


def lab_items_table() -> pl.DataFrame:
    """hosp/d_labitems."""
    return _frame([(i.itemid, i.label, "Blood", i.category) for i in LAB_ITEMS], "itemid,label,fluid,category")


def chart_table(cohort: Sequence[Course], charted: Sequence[Triplets], rng: Generator) -> pl.DataFrame:
    """icu/chartevents; with impossible and missing numbers, doubled rows, and charting after the stay was over."""
    frame = _measured(cohort, charted, CHART_ITEMS)
    rows = frame.height
    impossible = pl.Series(rng.random(rows) < 0.0006) & (frame["itemid"] == 220045)
    heard = pl.Series(rng.random(rows) < 0.0005)
    late = pl.Series(rng.random(rows) < 0.001)
    delay = pl.Series(rng.integers(60, 18_000, rows) // 60 * 60)
    frame = frame.with_columns(
        value=pl.when(impossible).then(pl.lit("9999")).when(heard).then(pl.lit("ERROR")).otherwise(pl.col("value")),
        valuenum=pl.when(impossible).then(pl.lit("9999")).when(heard).then(None).otherwise(pl.col("valuenum")),
        charttime=pl.when(late)
        .then(pl.col("outtime").dt.truncate("1m") + pl.duration(seconds=pl.lit(60 + delay)))
        .otherwise(pl.col("charttime")),
        warning=impossible.cast(pl.Int8),
    )
    frame = _stored(frame, rng, 60, 3600)
    frame = frame[np.sort(np.concatenate([np.arange(rows), np.flatnonzero(rng.random(rows) < 0.001)]))]
    columns = "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,valueuom,warning"
    return frame.select(columns.split(","))


def outputs_table(cohort: Sequence[Course], drained: Sequence[Triplets], rng: Generator) -> pl.DataFrame:
    """icu/outputevents."""
    frame = _stored(_measured(cohort, drained, OUTPUT_ITEMS), rng, 60, 3600)
    columns = "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valueuom"
    return frame.with_columns(valueuom=pl.lit("ml")).select(columns.split(","))


def labs_table(cohort: Sequence[Course], sampled: Sequence[Triplets], rng: Generator) -> pl.DataFrame:
    """hosp/labevents; without admission id before admission and now and then after, with results that are no number."""
    frame = _measured(cohort, sampled, LAB_ITEMS)
    rows = frame.height
    lost = pl.Series(rng.random(rows) < 0.02)
    hidden = pl.Series(rng.random(rows) < 0.003)
    limits = pl.DataFrame(
        [(i.itemid, i.low, i.high) for i in LAB_ITEMS],
        schema={"itemid": pl.Int64, "ref_range_lower": pl.Float64, "ref_range_upper": pl.Float64},
        orient="row",
    )
    frame = frame.join(limits, on="itemid", how="left", maintain_order="left")
    number = pl.col("valuenum").cast(pl.Float64)
    beyond = (number < pl.col("ref_range_lower")) | (number > pl.col("ref_range_upper"))
    frame = frame.with_columns(
        labevent_id=pl.int_range(1, rows + 1, dtype=pl.Int64),
        specimen_id=pl.struct("stay_id", "charttime").rank("dense").cast(pl.Int64) + 10_000_000,
        order_provider_id=pl.lit(None, pl.String),
        hadm_id=pl.when(lost | (pl.col("charttime") < pl.col("admittime"))).then(None).otherwise(pl.col("hadm_id")),
        flag=pl.when(~hidden & beyond).then(pl.lit("abnormal")).otherwise(None),
        priority=pl.when(pl.Series(rng.random(rows) < 0.6)).then(pl.lit("STAT")).otherwise(pl.lit("ROUTINE")),
        comments=pl.when(hidden).then(pl.lit("HEMOLYZED, RESULT NOT RELIABLE.")).otherwise(None),
        value=pl.when(hidden).then(pl.lit("___")).otherwise(pl.col("value")),
        valuenum=pl.when(hidden).then(None).otherwise(pl.col("valuenum")),
    )
    columns = (
        "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,storetime,value,valuenum,"
        "valueuom,ref_range_lower,ref_range_upper,flag,priority,comments"
    )
    return _stored(frame, rng, 1200, 7200).select(columns.split(","))


def _measured(cohort: Sequence[Course], collected: Sequence[Triplets], items: Sequence[Item]) -> pl.DataFrame:
    """One row per triplet with the ids of its stay; ``value`` and ``valuenum`` as the release writes them."""
    stays = {"subject_id": [], "hadm_id": [], "stay_id": [], "outtime": [], "admittime": []}  # type: dict[str, list]
    columns: dict[str, list] = {"charttime": [], "itemid": [], "number": []}
    for course, triplets in zip(cohort, collected, strict=True):
        hours, itemids, numbers = triplets.columns()
        columns["charttime"].append(minutes_of(course, hours))
        columns["itemid"].append(itemids)
        columns["number"].append(numbers)
        for name, identifier in zip(stays, (course.patient.subject_id, course.hadm_id, course.stay_id,
                                            course.outtime, course.admittime), strict=True):  # fmt: skip
            stays[name].append(np.full(len(hours), identifier))
    joined = {name: np.concatenate(parts) for name, parts in (stays | columns).items()}
    for name in ("charttime", "outtime", "admittime"):
        joined[name] = joined[name].astype("datetime64[ms]")  # polars takes no seconds
    frame = pl.DataFrame(joined)
    decimals = pl.DataFrame(
        [(i.itemid, i.decimals, i.unit or None) for i in items],
        schema={"itemid": pl.Int64, "decimals": pl.Int64, "valueuom": pl.String},
        orient="row",
    )
    words = pl.DataFrame(
        [(item, float(code), text, None if n is None else str(int(n)))
         for item, codes in WORDS.items() for code, (text, n) in codes.items()],
        schema={"itemid": pl.Int64, "number": pl.Float64, "text": pl.String, "score": pl.String},
        orient="row",
    )  # fmt: skip
    frame = frame.join(decimals, on="itemid", how="left", maintain_order="left")
    frame = frame.join(words, on=["itemid", "number"], how="left", maintain_order="left")
    whole = pl.col("number").round(0).cast(pl.Int64).cast(pl.String)
    tenths, hundredths = (pl.col("number").round(digits).cast(pl.String) for digits in (1, 2))
    written = (
        pl.when(pl.col("decimals") == 0).then(whole).when(pl.col("decimals") == 1).then(tenths).otherwise(hundredths)
    )
    return frame.with_columns(
        value=pl.coalesce("text", written),
        valuenum=pl.when(pl.col("text").is_not_null()).then(pl.col("score")).otherwise(written),
    )


def _stored(frame: pl.DataFrame, rng: Generator, soonest: int, latest: int) -> pl.DataFrame:
    """Add who charted and when it was stored, ``soonest`` to ``latest`` seconds after."""
    delay = pl.Series(rng.integers(soonest // 60, latest // 60 + 1, frame.height) * 60)
    return frame.with_columns(
        caregiver_id=pl.Series(rng.integers(10_000, 10_400, frame.height)),
        storetime=pl.col("charttime") + pl.duration(seconds=pl.lit(delay)),
    )


def _frame(rows: Sequence[tuple], columns: str) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=columns.split(","), orient="row", infer_schema_length=None)


def _second(time: np.datetime64) -> str:
    return str(time.astype("datetime64[s]")).replace("T", " ")


def _minute(time: np.datetime64 | None) -> str | None:
    return None if time is None else _second(time.astype("datetime64[m]"))
