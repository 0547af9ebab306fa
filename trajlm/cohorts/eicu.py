"""eICU Collaborative Research Database: one timeline per unit stay.

``raw`` holds the tables of release 2.0 or 2.0.1 under their official names (``apacheApsVar.csv.gz``) or the same in
lower case, as ``.csv``, ``.csv.gz`` or ``.parquet``; ``patient`` must be there, any other may be absent. Times are
offsets in minutes from admission to the unit, and events run from there to the earliest of the window's end and of
leaving the unit or the hospital. Six modalities are the paper's (3.3.2 and App. A); ``settings.further_modalities``
adds vital signs and infusions.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

import polars as pl

from trajlm.cohorts.eicu_codes import DIAGNOSIS, TREATMENT, read_codes
from trajlm.cohorts.eicu_demographics import DEMOGRAPHICS, demographics
from trajlm.cohorts.eicu_infusion import INFUSION, read_infusions
from trajlm.cohorts.eicu_lab import LAB, read_labs
from trajlm.cohorts.eicu_medication import MEDICATION, read_medication
from trajlm.cohorts.eicu_readings import APS, VITAL_APERIODIC, VITAL_PERIODIC, read_readings
from trajlm.cohorts.eicu_rows import STAY, STAY_ENDS, EventTables
from trajlm.cohorts.eicu_scores import with_scores
from trajlm.cohorts.eicu_stays import StudyCohort
from trajlm.cohorts.leaks import length_leak
from trajlm.cohorts.ledger import RowLedger
from trajlm.cohorts.tables import Release
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError
from trajlm.schema import Feature, Modality, RawTimelines
from trajlm.spool import Spool

DEFAULT_BIN_HOURS = 0.0

MODALITIES = (
    Modality(DEMOGRAPHICS, "numeric", static=True),
    Modality(DIAGNOSIS, "numeric"),
    Modality(TREATMENT, "numeric"),
    Modality(MEDICATION, "numeric"),
    Modality(LAB, "numeric", title="laboratory"),
    Modality(APS, "numeric", title="acute physiology score"),
)
FURTHER_MODALITIES = (
    Modality(VITAL_PERIODIC, "numeric", title="vital signs, monitor"),
    Modality(VITAL_APERIODIC, "numeric", title="vital signs, at intervals"),
    Modality(INFUSION, "numeric"),
)
_READERS: dict[str, Callable[[EventTables], list[Feature]]] = {
    DIAGNOSIS: lambda tables: read_codes(tables, DIAGNOSIS),
    TREATMENT: lambda tables: read_codes(tables, TREATMENT),
    MEDICATION: read_medication,
    APS: lambda tables: read_readings(tables, APS),
    VITAL_PERIODIC: lambda tables: read_readings(tables, VITAL_PERIODIC),
    VITAL_APERIODIC: lambda tables: read_readings(tables, VITAL_APERIODIC),
    INFUSION: read_infusions,
}

_LEAKS = (
    "the cohort is chosen by length of stay, which is not known before discharge",
    "cancelled drug orders are left out whenever they were cancelled: that an order stands is known only later",
    "diagnoses and treatments are dated by their offset; whether an entry was edited later is not told",
)
_ADMISSION_LEAK = (
    "admission height, weight and diagnosis stand at hour 0 but may have been entered later in the first day"
)
_LAB_LEAK = "stays without any laboratory result are left out, whenever the result of others came"
_CHARTED_LEAK = "laboratory results are dated by when the specimen was drawn, not by when the result was known"
_START_LEAK = "drug orders are dated by their start even where they were entered later"
_APS_LEAK = "variables of the severity score stand at hour 0 though they summarise the first 24 hours"


def read(raw: Path, settings: PrepareConfig, ledger: RowLedger, spool: Spool) -> RawTimelines:
    """Read an eICU release.

    Args:
        raw: folder of the release.
        settings: ``window_hours``, ``before_admission_hours``, ``result_times``, ``aps_at_admission``,
            ``further_modalities``, ``least_code_share`` and ``paper_faithful`` are used here.
        ledger: accounts for every row of every table that is read.
        spool: gets the measurements.

    Returns:
        One stay per unit stay of the study cohort: 18 to 89 years, 12 to 720 hours in hospital. Mortality is death in
        hospital, length of stay that in hospital, in hours.

    Raises:
        TrajlmError: ``raw`` is not such a folder, or a further modality is not known.
        UnexpectedInput: a table is not what a release holds.
    """
    modalities = (*MODALITIES, *_further(settings.further_modalities))
    release = Release(raw, ledger, "an eICU release")
    cohort = StudyCohort(release)
    released = cohort.attrition[0].stays
    tables = EventTables(release, settings, spool, cohort.stays.select(STAY_ENDS))
    features = {}
    features[LAB], with_result = read_labs(tables)
    if settings.paper_faithful:
        without = ~pl.col(STAY).is_in(pl.Series(sorted(with_result), dtype=pl.Int64).implode())
        cohort.leave_out("no laboratory result, as in the paper", without)
        tables = EventTables(release, settings, spool, cohort.stays.select(STAY_ENDS))
    static, features[DEMOGRAPHICS], notes = demographics(cohort.stays, settings.paper_faithful)
    spool.add_measurements(static)
    release.notes.extend(notes)
    for modality in modalities:
        if modality.name in _READERS:
            features[modality.name] = _READERS[modality.name](tables)
    stays = with_scores(tables, cohort.close())
    return RawTimelines(
        release=_release_name(raw, released),
        modalities=modalities,
        features=tuple(feature for modality in modalities for feature in features[modality.name]),
        stays=stays,
        inputs=tuple(release.inputs),
        open_leaks=_open_leaks(settings),
        notes=tuple(release.notes),
        attrition=tuple(cohort.attrition),
    )


def _further(names: list[str]) -> list[Modality]:
    known = {modality.name: modality for modality in FURTHER_MODALITIES}
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TrajlmError(
                f"prepare.further_modalities: {name!r} is not one of eICU's; the nearest is {nearest!r}, all are "
                f"{', '.join(known)}"
            )
    return [modality for name, modality in known.items() if name in names]


def _release_name(raw: Path, stays: int) -> str:
    """No table carries a version, so the size is what tells releases apart."""
    if (raw / "SYNTHETIC.json").is_file():
        return "synthetic ICU in the layout of eICU"
    return f"eICU Collaborative Research Database, {stays:,} unit stays"


def _open_leaks(settings: PrepareConfig) -> tuple[str, ...]:
    return (
        *_LEAKS,
        *((_CHARTED_LEAK,) if settings.result_times == "charted" else ()),
        *((_START_LEAK, _LAB_LEAK) if settings.paper_faithful else (_ADMISSION_LEAK,)),
        *((_APS_LEAK,) if settings.aps_at_admission else ()),
        length_leak(settings.window_hours),
    )
