"""Tables of eICU with one column per quantity: the severity score's variables and the vital signs."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trajlm.cohorts.eicu_rows import HOURS, STAY, EventTables, fahrenheit_to_celsius
from trajlm.cohorts.tables import Format
from trajlm.schema import MEASURED, Feature

APS = "aps"
VITAL_PERIODIC = "vital_periodic"
VITAL_APERIODIC = "vital_aperiodic"

APS_HOURS = 24  # the score takes the worst of the first day in the unit
NOT_RECORDED = -1.0  # in apacheApsVar

# Unit, and the bounds (inclusive) of the possible, wide on purpose.
Quantities = dict[str, tuple[str, float, float]]

APS_VARIABLES: Quantities = {
    "intubated": ("", 0, 1), "vent": ("", 0, 1), "dialysis": ("", 0, 1), "eyes": ("", 1, 4), "motor": ("", 1, 6),
    "verbal": ("", 1, 5), "meds": ("", 0, 1), "urine": ("mL", 0, 100_000), "wbc": ("K/mcL", 0, 1000),
    "temperature": ("°C", 15, 45), "respiratoryrate": ("/min", 0, 150), "sodium": ("mmol/L", 50, 250),
    "heartrate": ("/min", 0, 350), "meanbp": ("mm Hg", 0, 375), "ph": ("", 6, 8.5), "hematocrit": ("%", 0, 100),
    "creatinine": ("mg/dL", 0, 100), "albumin": ("g/dL", 0, 10), "pao2": ("mm Hg", 0, 800),
    "pco2": ("mm Hg", 0, 300), "bun": ("mg/dL", 0, 400), "glucose": ("mg/dL", 0, 5000),
    "bilirubin": ("mg/dL", 0, 100), "fio2": ("%", 20, 100),
}  # fmt: skip
PERIODIC: Quantities = {
    "temperature": ("°C", 15, 45), "sao2": ("%", 0, 100), "heartrate": ("/min", 0, 350),
    "respiration": ("/min", 0, 150), "cvp": ("mm Hg", -50, 150), "etco2": ("mm Hg", 0, 200),
    "systemicsystolic": ("mm Hg", 0, 375), "systemicdiastolic": ("mm Hg", 0, 375), "systemicmean": ("mm Hg", 0, 375),
    "pasystolic": ("mm Hg", -50, 250), "padiastolic": ("mm Hg", -50, 250), "pamean": ("mm Hg", -50, 250),
    "st1": ("mm", -30, 30), "st2": ("mm", -30, 30), "st3": ("mm", -30, 30), "icp": ("mm Hg", -50, 200),
}  # fmt: skip
APERIODIC: Quantities = {
    "noninvasivesystolic": ("mm Hg", 0, 375), "noninvasivediastolic": ("mm Hg", 0, 375),
    "noninvasivemean": ("mm Hg", 0, 375), "paop": ("mm Hg", -50, 150), "cardiacoutput": ("L/min", 0, 50),
    "cardiacinput": ("L/min/m2", 0, 30), "svr": ("dyn s/cm5", 0, 20_000), "svri": ("dyn s m2/cm5", 0, 40_000),
    "pvr": ("dyn s/cm5", 0, 10_000), "pvri": ("dyn s m2/cm5", 0, 20_000),
}  # fmt: skip


@dataclass(frozen=True)
class _Kind:
    """A wide table: its official name, the column of its time (None: ``APS_HOURS``) and what it measures."""

    table: str
    offset: str | None
    quantities: Quantities


_KINDS = {
    APS: _Kind("apacheApsVar", None, APS_VARIABLES),
    VITAL_PERIODIC: _Kind("vitalPeriodic", "observationoffset", PERIODIC),
    VITAL_APERIODIC: _Kind("vitalAperiodic", "observationoffset", APERIODIC),
}


def read_readings(tables: EventTables, modality: str) -> list[Feature]:
    """Spool one of the wide tables; a row is kept if any of its values is recorded and possible.

    The severity score's variables summarise the first 24 hours, so they are dated by their end, and a stay or a window
    that ends earlier has none; with ``aps_at_admission`` they are dated at hour 0, as in the paper.

    Args:
        modality: ``aps``, ``vital_periodic`` or ``vital_aperiodic``.

    Returns:
        A feature for every column.
    """
    kind = _KINDS[modality]
    names = list(kind.quantities)
    columns: dict[str, Format] = dict.fromkeys(names, "number")
    if kind.offset is not None:
        columns[kind.offset] = "number"
    absent = impossible = 0
    for table in tables.batches(kind.table, columns):
        frame = table.frame
        if modality == APS:
            absent += frame.select(pl.sum_horizontal(pl.col(name) == NOT_RECORDED for name in names).sum()).item()
            frame = frame.with_columns(pl.when(pl.col(name) != NOT_RECORDED).then(name) for name in names)
        hollow = pl.all_horizontal(pl.col(names).is_null())
        hours = 0 if tables.settings.aps_at_admission else APS_HOURS
        known = pl.lit(60.0 * hours) if kind.offset is None else pl.col(kind.offset)
        frame = tables.dated(table, frame, known, rules=[("no value is recorded", hollow)])
        possible = frame.with_columns(_possible(name, kind) for name in names)
        lost = frame.select(names).null_count().sum_horizontal().item()
        impossible += possible.select(names).null_count().sum_horizontal().item() - lost
        kept = tables.release.screen(table, possible, [("no value within the possible range", hollow)])
        rows = kept.unpivot(names, index=[STAY, HOURS, MEASURED], variable_name="feature").drop_nulls("value")
        tables.deliver(table, kept, rows, modality)
    if absent:
        tables.release.notes.append(f"{absent} values of {kind.table} are -1, not recorded: they are absent")
    if impossible:
        tables.release.notes.append(f"{impossible} values of {kind.table} outside the possible range are left out")
    return [Feature(modality, name, kind.quantities[name][0]) for name in names]


def _possible(name: str, kind: _Kind) -> pl.Expr:
    unit, low, high = kind.quantities[name]
    value = fahrenheit_to_celsius(pl.col(name)) if unit == "°C" else pl.col(name)
    return pl.when(value.is_between(low, high)).then(value).alias(name)
