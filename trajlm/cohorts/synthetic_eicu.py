"""The synthetic ICU as the raw tables of an eICU release: official columns in order, with the release's traps.

The course of every stay is the one that the MIMIC-IV layout tells of the same seed; only hospitals, tables and habits
of charting differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
from tqdm import tqdm

from trajlm.cohorts.synthetic_course import Course, stream
from trajlm.cohorts.synthetic_eicu_bedside import aperiodic_table, aps_table, lab_table, periodic_table
from trajlm.cohorts.synthetic_eicu_measured import measure
from trajlm.cohorts.synthetic_eicu_orders import diagnosis_table, infusion_table, medication_table, treatment_table
from trajlm.cohorts.synthetic_eicu_stays import patient_table, unit_stays

GENERATOR_VERSION = 1  # raise whenever the same stays and seed would give other files


def release(cohort: Sequence[Course], seed: int) -> tuple[dict[str, pl.DataFrame], list[float]]:
    """The tables by name, and of each stay the probability of death from which its hospital outcome was drawn."""
    stays = unit_stays(cohort, seed)
    # Nothing is measured of a stay without tables, so that its silence costs nothing either.
    measured = [measure(s, seed) for s in tqdm(stays, desc="synthesize", unit="stay") if s.tables]
    tables = {
        "patient": patient_table(stays, seed),
        "apacheApsVar": aps_table(measured, seed),
        "diagnosis": diagnosis_table(stays, seed),
        "treatment": treatment_table(stays, seed),
        "medication": medication_table(stays, seed),
        "infusionDrug": infusion_table(stays, seed),
        "lab": lab_table(measured, stream(seed, 75)),
        "vitalPeriodic": periodic_table(measured, stream(seed, 76)),
        "vitalAperiodic": aperiodic_table(measured, stream(seed, 77)),
    }
    return tables, [stay.ends.p_death for stay in stays]
