"""Series of MIMIC-IV: charted values, laboratory results and urine output, in one unit per variable.

The tables are read batch after batch: rows of other items go first, and what is kept goes to the spool at once.
"""

from __future__ import annotations

from collections.abc import Callable

import polars as pl

from trajlm.cohorts.mimic_items import SERIES, Items
from trajlm.cohorts.mimic_links import HOURS, Timing, link_by_stay, link_by_time, within_stay
from trajlm.cohorts.mimic_places import has_column
from trajlm.cohorts.tables import Format, Release, Select, Table
from trajlm.schema import MEASURED
from trajlm.spool import Spool

_GLASGOW = "glasgow_coma_scale_"
_COMPONENTS = [f"{_GLASGOW}{part}" for part in ("eye_opening", "verbal_response", "motor_response")]
_TOTAL = f"{_GLASGOW}total"

# What a chart says in words, lower case, where it gives no number; MIMIC-IV's own and those of older charts.
WORDS: dict[str, dict[str, float]] = {
    f"{_GLASGOW}eye_opening": {
        "none": 1, "no response": 1, "1 no response": 1, "to pain": 2, "2 to pain": 2, "to speech": 3,
        "3 to speech": 3, "spontaneously": 4, "4 spontaneously": 4},
    f"{_GLASGOW}verbal_response": {
        "no response": 1, "no response-ett": 1, "1 no response": 1, "1.0 et/trach": 1, "incomprehensible sounds": 2,
        "2 incomp sounds": 2, "inappropriate words": 3, "3 inapprop words": 3, "confused": 4, "4 confused": 4,
        "oriented": 5, "5 oriented": 5},
    f"{_GLASGOW}motor_response": {
        "no response": 1, "1 no response": 1, "abnormal extension": 2, "2 abnorm extensn": 2, "abnormal flexion": 3,
        "3 abnorm flexion": 3, "flex-withdraws": 4, "4 flex-withdraws": 4, "localizes pain": 5, "5 localizes pain": 5,
        "obeys commands": 6, "6 obeys commands": 6},
    "capillary_refill_rate": {"normal <3 seconds": 0, "abnormal >3 seconds": 1},
}  # fmt: skip
_MEANT = {f"{variable}|{said}": number for variable, words in WORDS.items() for said, number in words.items()}

_DATED: dict[str, Format] = {"charttime": "time", "itemid": "integer", "valueuom": "string"}
_CHART: dict[str, Format] = {**_DATED, "stay_id": "integer", "value": "string", "valuenum": "number"}
_LAB: dict[str, Format] = {**_DATED, "subject_id": "integer", "hadm_id": "integer", "valuenum": "number"}
_OUTPUT: dict[str, Format] = {**_DATED, "stay_id": "integer", "value": "number"}

# Rows of a stay's Glasgow components are held back in this form until all batches are read: a few bytes each.
_HELD = {"stay_id": pl.Int64(), "charttime": pl.Datetime("us"), HOURS: pl.Float64(), MEASURED: pl.Float64(),
         "part": pl.UInt8(), "value": pl.Float32()}  # fmt: skip
_STAYS_AT_ONCE = 10_000


def read_series(
    release: Release, stays: pl.DataFrame, timing: Timing, items: Items, spool: Spool
) -> dict[str, tuple[int, int]]:
    """Spool the series of all kept stays; a table that is absent is noted in the release.

    Args:
        stays: STAY_WINDOW of :mod:`trajlm.cohorts.mimic_links`.
        timing: which rows count, and when.
        items: what is read.
        spool: gets the measurements.

    Returns:
        Per table: rows kept, and how many of them do not say when they were stored.

    Raises:
        UnexpectedInput: a table is not what a release holds.
    """
    glasgow = _Glasgow()
    counts = {}
    for place, columns in (("icu/chartevents", _CHART), ("hosp/labevents", _LAB), ("icu/outputevents", _OUTPUT)):
        name = place.split("/")[1]
        stored = timing.available and has_column(release, place, "storetime")
        select = Select("itemid", items.ids(name), "not an item of the series")
        batches = release.batches(place, columns={**columns, "storetime": "time"} if stored else columns, select=select)
        if batches is None:
            release.notes.append(f"{place} is absent: its series are missing")
            continue
        kept = unstored = 0
        for table in batches:
            if table.frame.is_empty():
                continue
            frame = _screened(release, table, stays, timing, items)
            release.ledger.keep(table.name, frame.height)
            spool.add_measurements(_measurements(frame))
            glasgow.hold(frame)
            kept += frame.height
            unstored += frame["storetime"].null_count() if stored else frame.height
        counts[name] = (kept, unstored)
    glasgow.add_totals(spool.add_measurements)
    return counts


def _screened(release: Release, table: Table, stays: pl.DataFrame, timing: Timing, items: Items) -> pl.DataFrame:
    """Rows of one batch that are values of the cohort: dated, in range, in the unit of their variable."""
    frame = release.screen(table, table.frame, [("no time", pl.col("charttime").is_null())])
    frame = timing.known(frame, "charttime")
    if "stay_id" in frame.columns:
        frame, no_stay = link_by_stay(frame, stays), "names no known ICU stay"
    else:
        frame = link_by_time(frame, stays, "known", timing.before_hours)
        no_stay = "no ICU stay of this admission"
    frame = within_stay(release, table, frame, timing, "charttime", no_stay)
    frame = _with_number(items.describe(table.name, frame))
    rules = [("no numeric value", pl.col("number").is_null()), ("unknown unit", pl.col("unknown_unit"))]
    frame = frame.with_columns(number=_convert(pl.col("number"), pl.col("conversion")))
    outside = (pl.col("number") < pl.col("low")) | (pl.col("number") > pl.col("high"))
    return release.screen(table, frame, [*rules, ("value outside the possible range", outside)])


def _measurements(frame: pl.DataFrame) -> pl.DataFrame:
    """With the time of charting, as a nurse may store several hours at once."""
    return frame.select(
        "stay_id", MEASURED, hours_since_admission=HOURS, modality=pl.lit(SERIES), feature="variable", value="number"
    )


def _with_number(frame: pl.DataFrame) -> pl.DataFrame:
    """Add ``number``, before any conversion; a chart may give it in words only."""
    if "valuenum" not in frame.columns:
        return frame.with_columns(number=pl.col("value"))
    number = frame["valuenum"].alias("number")
    if "value" in frame.columns:
        silent = (number.is_null() & frame["variable"].is_in(list(WORDS))).arg_true()
        said = frame[silent].select(
            pl.concat_str("variable", pl.lit("|"), pl.col("value").str.to_lowercase().str.strip_chars())
        )
        meant = said.to_series().replace_strict(_MEANT, default=None, return_dtype=pl.Float64)
        number = number.scatter(silent, meant)
    return frame.with_columns(number)


def _convert(number: pl.Expr, conversion: pl.Expr) -> pl.Expr:
    return (
        pl.when(conversion == "fahrenheit_to_celsius")
        .then((number - 32) / 1.8)
        .when(conversion == "inch_to_cm")
        .then(number * 2.54)
        .when(conversion == "pound_to_kg")
        .then(number * 0.45359237)
        .when((conversion == "percent_to_fraction") & (number > 1))  # some charts give the fraction itself
        .then(number / 100)
        .otherwise(number)
    )


class _Glasgow:
    """The sum where all three components were charted at one time and the total was not; known with the last of them.

    The rows of one time may lie in different batches, so they are held until all are read.
    """

    def __init__(self) -> None:
        self._held = [pl.DataFrame(schema=_HELD)]

    def hold(self, frame: pl.DataFrame) -> None:
        """Take the kept rows of a batch; charted totals and components are remembered."""
        parts = {name: number for number, name in enumerate([*_COMPONENTS, _TOTAL])}
        mine = frame.filter(pl.col("variable").is_in(list(parts)))
        if mine.height:
            part = pl.col("variable").replace_strict(parts, return_dtype=pl.UInt8)
            held = mine.select("stay_id", "charttime", HOURS, MEASURED, part=part, value="number")
            self._held.append(held.cast(_HELD))  # type: ignore[arg-type]

    def add_totals(self, add: Callable[[pl.DataFrame], None]) -> None:
        """Hand over the totals as SPOOLED_COLUMNS, some stays at a time."""
        held = pl.concat(self._held)
        self._held = []
        stays = held["stay_id"].unique().sort()
        for start in range(0, len(stays), _STAYS_AT_ONCE):
            some = stays[start : start + _STAYS_AT_ONCE]
            add(_totals(held.filter(pl.col("stay_id").is_between(some[0], some[-1]))))


def _totals(held: pl.DataFrame) -> pl.DataFrame:
    at = ["stay_id", "charttime"]
    charted = held.filter(pl.col("part") == len(_COMPONENTS)).select(at)
    last = held.join(charted, on=at, how="anti", maintain_order="left").group_by([*at, "part"]).last()
    told = pl.col(HOURS).max(), pl.col(MEASURED).first(), pl.col("value").cast(pl.Float64).sum()
    whole = last.group_by(at).agg(*told, parts=pl.len())
    whole = whole.filter(pl.col("parts") == len(_COMPONENTS)).sort(at)
    return whole.select(
        "stay_id", MEASURED, hours_since_admission=HOURS, modality=pl.lit(SERIES), feature=pl.lit(_TOTAL), value="value"
    )
