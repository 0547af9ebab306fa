"""Monitors, cuffs, laboratory and severity score of the synthetic eICU, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.random import Generator

from trajlm.cohorts import synthetic_eicu_measured as measures
from trajlm.cohorts.synthetic_course import stream
from trajlm.cohorts.synthetic_eicu_measured import Measured, long
from trajlm.cohorts.synthetic_eicu_rows import numbered, shuffled, twice


@dataclass(frozen=True)
class Assay:
    """One laboratory test; ``spellings`` are its unit as the hospitals' interfaces write it, "" for none."""

    name: str
    kind: int
    unit: str
    spellings: tuple[str, str, str]
    decimals: int


_MG, _MMOL, _MM = ("mg/dL", "MG/DL", "mg/dl"), ("mmol/L", "MEQ/L", "mEq/L"), ("mmHg", "mm Hg", "mmHg")
_GRAMS, _THOUSANDS, _PERCENT = ("g/dL", "gm/dL", "G/DL"), ("K/uL", "K/MM3", "K/CMM"), ("%", "%", "%")
ASSAYS = {
    50813: Assay("lactate", 1, "mmol/L", ("mmol/L", "mmol/L", "MMOL/L"), 1),
    measures.PH: Assay("pH", 7, "", ("", "", "units"), 2),
    50882: Assay("bicarbonate", 1, "mmol/L", _MMOL, 0),
    50885: Assay("total bilirubin", 1, "mg/dL", _MG, 1),
    50912: Assay("creatinine", 1, "mg/dL", _MG, 2),
    measures.GLUCOSE: Assay("glucose", 1, "mg/dL", _MG, 0),
    50971: Assay("potassium", 1, "mmol/L", _MMOL, 1),
    50983: Assay("sodium", 1, "mmol/L", _MMOL, 0),
    51006: Assay("BUN", 1, "mg/dL", _MG, 0),
    measures.HGB: Assay("Hgb", 3, "g/dL", _GRAMS, 1),
    51265: Assay("platelets x 1000", 3, "K/mcL", _THOUSANDS, 0),
    51301: Assay("WBC x 1000", 3, "K/mcL", _THOUSANDS, 1),
    measures.HCT: Assay("Hct", 3, "%", _PERCENT, 1),
    measures.PAO2: Assay("paO2", 7, "mm Hg", _MM, 0),
    measures.PACO2: Assay("paCO2", 7, "mm Hg", _MM, 1),
    measures.FIO2: Assay("FiO2", 7, "%", ("%", "", "%"), 2),
    measures.ALBUMIN: Assay("albumin", 1, "g/dL", _GRAMS, 1),
    measures.BEDSIDE_GLUCOSE: Assay("bedside glucose", 4, "mg/dL", _MG, 0),
    measures.CARBOXYHEMOGLOBIN: Assay("Carboxyhemoglobin", 7, "%", _PERCENT, 1),
    measures.SPECIFIC_GRAVITY: Assay("urinary specific gravity", 4, "", ("", "", ""), 3),
}
_FRACTION_SPELLING = 1  # interfaces that send the inspired oxygen as a fraction under the same name
# Columns of the score: the items behind each, the value from which the worst of the first day lies furthest, decimals.
_WORST = {
    "wbc": ((51301,), 11.5, 1), "temperature": ((measures.CELSIUS,), 37.5, 2), "respiratoryrate": ((220210,), 19.0, 0),
    "sodium": ((50983,), 145.0, 0), "heartrate": ((measures.HEART_RATE,), 75.0, 0),
    "meanbp": ((measures.ARTERIAL_MEAN, measures.CUFF_MEAN), 90.0, 0), "hematocrit": ((measures.HCT,), 45.5, 1),
    "creatinine": ((50912,), 1.0, 2), "albumin": ((measures.ALBUMIN,), 3.5, 1), "bun": ((51006,), 5.0, 0),
    "glucose": ((measures.GLUCOSE,), 130.0, 0), "bilirubin": ((50885,), 0.5, 1),
}  # fmt: skip
_GAS = {"ph": (measures.PH, 2), "pao2": (measures.PAO2, 0), "pco2": (measures.PACO2, 1), "fio2": (measures.FIO2, 0)}
_COMA_SCALE = {"eyes": 220739, "motor": 223901, "verbal": 223900}
_APS_COLUMNS = (
    "intubated", "vent", "dialysis", "eyes", "motor", "verbal", "meds", "urine", "wbc", "temperature",
    "respiratoryrate", "sodium", "heartrate", "meanbp", "ph", "hematocrit", "creatinine", "albumin", "pao2", "pco2",
    "bun", "glucose", "bilirubin", "fio2",
)  # fmt: skip


def periodic_table(measured: Sequence[Measured], rng: Generator) -> pl.DataFrame:
    """vitalPeriodic; a lead that came off now and then leaves a heart rate of 0."""
    held = [m for m in measured if "vitalPeriodic" in m.stay.tables]
    frame = _wide(held, measures.PERIODIC, {"temperature": 2, "st1": 2, "st2": 2, "st3": 2})
    off = pl.Series(rng.random(frame.height) < 0.0008, dtype=pl.Boolean) & pl.col("heartrate").is_not_null()
    frame = frame.with_columns(heartrate=pl.when(off).then(0.0).otherwise(pl.col("heartrate")))
    return numbered(shuffled(frame, "patientunitstayid", rng), "vitalperiodicid", 5_000_000, rng)


def aperiodic_table(measured: Sequence[Measured], rng: Generator) -> pl.DataFrame:
    """vitalAperiodic; monitors send some readings twice."""
    held = [m for m in measured if "vitalAperiodic" in m.stay.tables]
    frame = twice(_wide(held, measures.APERIODIC, {"cardiacoutput": 1, "cardiacinput": 1}), 0.01, rng)
    return numbered(shuffled(frame, "patientunitstayid", rng), "vitalaperiodicid", 3_000_000, rng)


def _wide(measured: Sequence[Measured], columns: Mapping[str, int], decimals: Mapping[str, int]) -> pl.DataFrame:
    """One row per stay and minute, the items as columns; the later number where one minute holds two."""
    frame = long(measured, list(columns.values()))
    numbers = [
        pl.col("number").filter(pl.col("item") == item).last().round(decimals.get(name, 0)).alias(name)
        for name, item in columns.items()
    ]
    key = ["patientunitstayid", pl.col("offset").alias("observationoffset")]
    return frame.group_by(key, maintain_order=True).agg(numbers)


def lab_table(measured: Sequence[Measured], rng: Generator) -> pl.DataFrame:
    """lab: with results that are no number, sent twice, revised later under the same draw, or dated after the stay."""
    frame = long([m for m in measured if "lab" in m.stay.tables], list(ASSAYS))
    frame = frame.join(_assays(), on=["item", "spelling"], how="left", maintain_order="left")
    rows = frame.height
    fraction = (pl.col("item") == measures.FIO2) & (pl.col("spelling") == _FRACTION_SPELLING)
    after, wait = (pl.Series(v) for v in (rng.random(rows) < 0.002, rng.integers(1, 400, rows)))
    frame = frame.with_columns(
        number=_rounded(pl.when(fraction).then(pl.col("number") / 100).otherwise(pl.col("number"))),
        offset=pl.when(after).then(pl.col("end") + wait).otherwise(pl.col("offset")),
    )
    panel = ["patientunitstayid", "offset", "labtypeid"]
    frame = frame.join(_delays(frame.select(panel), rng), on=panel, how="left", maintain_order="left").with_columns(
        revised=pl.col("offset") + pl.col("delay")
    )
    frame = pl.concat([twice(frame, 0.002, rng), _corrected(frame, rng)])
    frame = numbered(shuffled(frame, "patientunitstayid", rng), "labid", 100_000_000, rng)
    hidden = pl.Series(rng.random(frame.height) < 0.004, dtype=pl.Boolean)
    text = pl.col("number").cast(pl.String).str.replace(r"\.0$", "")
    return frame.select(
        "labid",
        "patientunitstayid",
        pl.col("offset").alias("labresultoffset"),
        "labtypeid",
        "labname",
        pl.when(hidden).then(None).otherwise(pl.col("number")).alias("labresult"),
        pl.when(hidden).then(pl.lit(">") + text).otherwise(text).alias("labresulttext"),
        "labmeasurenamesystem",
        "labmeasurenameinterface",
        pl.col("revised").alias("labresultrevisedoffset"),
    )


def _assays() -> pl.DataFrame:
    schema = {
        "item": pl.Int64, "labname": pl.String, "labtypeid": pl.Int64, "labmeasurenamesystem": pl.String,
        "decimals": pl.Int64, "spelling": pl.Int64, "labmeasurenameinterface": pl.String,
    }  # fmt: skip
    rows = [
        (item, a.name, a.kind, a.unit or None, a.decimals, spelling, written or None)
        for item, a in ASSAYS.items()
        for spelling, written in enumerate(a.spellings)
    ]
    return pl.DataFrame(rows, schema=schema, orient="row")


def _delays(panels: pl.DataFrame, rng: Generator) -> pl.DataFrame:
    """Minutes from the draw of each panel to its results; now and then the clocks disagree and they come before it."""
    panels = panels.unique(maintain_order=True)
    early, slow = rng.random(panels.height) < 0.015, rng.gamma(1.6, 28, panels.height).astype(np.int64)
    return panels.with_columns(delay=pl.Series(np.where(early, rng.integers(-15, 0, panels.height), slow)))


def _rounded(number: pl.Expr) -> pl.Expr:
    digits = pl.col("decimals")
    return (
        pl.when(digits == 0).then(number.round(0)).when(digits == 1).then(number.round(1))
        .when(digits == 2).then(number.round(2)).otherwise(number.round(3))
    )  # fmt: skip


def _corrected(frame: pl.DataFrame, rng: Generator) -> pl.DataFrame:
    """Some rows once more: the same draw, with another number that was known later."""
    chosen = frame.filter(pl.Series(rng.random(frame.height) < 0.003, dtype=pl.Boolean))
    factor = pl.Series(1 + rng.normal(0, 0.08, chosen.height))
    wait = pl.Series(rng.integers(4, 150, chosen.height))
    return chosen.with_columns(number=_rounded(pl.col("number") * factor), revised=pl.col("revised") + wait)


def aps_table(measured: Sequence[Measured], seed: int) -> pl.DataFrame:
    """apacheApsVar: the worst of the first day; -1 where nothing was measured or nobody looked."""
    rows = []
    for one in measured:
        if "apacheApsVar" in one.stay.tables:
            score = _score(one, stream(seed, 65, one.stay.course.index))
            rows.append((one.stay.stay_id, *(f"{score[name]:.10g}" for name in _APS_COLUMNS)))
    columns = ["patientunitstayid", *_APS_COLUMNS]
    frame = pl.DataFrame(rows, schema=columns, orient="row", infer_schema_length=None)
    return numbered(frame, "apacheapsvarid", 10_000, stream(seed, 74))


def _score(one: Measured, rng: Generator) -> dict[str, float]:
    score: dict[str, float] = dict.fromkeys(_APS_COLUMNS, -1)
    for name, (items, middle, digits) in _WORST.items():
        found = one.first_day(*items)
        if len(found) and rng.random() < 0.92:
            score[name] = round(float(found[np.argmax(np.abs(found - middle))]), digits)
    course = one.stay.course
    gases = [one.first_day(item) for item, _ in _GAS.values()]
    if course.ventilated and all(len(found) for found in gases):
        score |= {name: round(float(f[0]), digits) for (name, (_, digits)), f in zip(_GAS.items(), gases, strict=True)}
    if rng.random() < 0.5:
        score["urine"] = round(float(one.first_day(measures.URINE).sum()) * 1.0008, 4)
    severity = float(course.severity[:25].mean())
    score["intubated"], score["vent"] = int(course.ventilated and rng.random() < 0.6), int(course.ventilated)
    score["dialysis"] = int(rng.random() < 0.03 * np.exp(0.5 * severity))
    if rng.random() < 0.045:
        score["meds"] = 1 if rng.random() < 0.3 else -1  # sedated, or unknown whether: no coma scale
    else:
        score["meds"] = 0
        for name, item in _COMA_SCALE.items():
            found = one.first_day(item)
            score[name] = int(max(found.min(), 1)) if len(found) else -1
    return score
