"""Series of MIMIC-IV: charted values, laboratory results and urine output, in one unit per variable.

The 17 variables, their items and possible ranges are those of the public MIMIC benchmarks, taken over for the items
that MIMIC-IV uses; ``mimic_items.csv`` holds them, with common laboratory tests and urine output beside. Items of other
body fluids (urine glucose, urine pH) are left out, and so is a height or weight of zero.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.mimic_links import HOURS, link_by_stay, link_by_time, within_stay
from trajlm.cohorts.mimic_tables import Format, Release, Table
from trajlm.schema import MEASUREMENT_COLUMNS, Feature, conform, empty

SERIES = "series"
ITEMS = pl.read_csv(Path(__file__).with_name("mimic_items.csv"), schema_overrides={"unit": pl.String, "low": pl.Float64,
                    "high": pl.Float64}).with_columns(pl.col("unit", "conversion").fill_null(""))  # fmt: skip

_GLASGOW = "glasgow_coma_scale_"
_COMPONENTS = [f"{_GLASGOW}{part}" for part in ("eye_opening", "verbal_response", "motor_response")]
_TOTAL = f"{_GLASGOW}total"

# What a chart says in words, lower case, where it gives no number.
_WORDS: dict[str, dict[str, float]] = {
    f"{_GLASGOW}eye_opening": {"none": 1, "no response": 1, "to pain": 2, "to speech": 3, "spontaneously": 4},
    f"{_GLASGOW}verbal_response": {"no response": 1, "no response-ett": 1, "incomprehensible sounds": 2,
                                   "inappropriate words": 3, "confused": 4, "oriented": 5},
    f"{_GLASGOW}motor_response": {"no response": 1, "abnormal extension": 2, "abnormal flexion": 3,
                                  "flex-withdraws": 4, "localizes pain": 5, "obeys commands": 6},
    "capillary_refill_rate": {"normal <3 seconds": 0, "abnormal >3 seconds": 1},
}  # fmt: skip

_CHART: dict[str, Format] = {"stay_id": "integer", "charttime": "time", "itemid": "integer", "value": "string",
                             "valuenum": "number"}  # fmt: skip
_LAB: dict[str, Format] = {"subject_id": "integer", "hadm_id": "integer", "charttime": "time", "itemid": "integer",
                           "valuenum": "number"}  # fmt: skip
_OUTPUT: dict[str, Format] = {"stay_id": "integer", "charttime": "time", "itemid": "integer", "value": "number"}


def series_features() -> tuple[Feature, ...]:
    """Every variable of the series, in the order of the item table."""
    variables = ITEMS.unique("variable", keep="first", maintain_order=True)
    return tuple(
        Feature(SERIES, name, unit, aggregate="sum" if table == "outputevents" else "last")
        for name, unit, table in variables.select("variable", "unit", "table").iter_rows()
    )


def read_series(release: Release, stays: pl.DataFrame) -> pl.DataFrame:
    """MEASUREMENT_COLUMNS of the series of all kept stays; a table that is absent is noted in the release.

    Args:
        stays: STAY_WINDOW of :mod:`trajlm.cohorts.mimic_links`.

    Raises:
        UnexpectedInput: a table is not what a release holds.
    """
    parts = [
        _read_table(release, stays, "icu/chartevents", _CHART),
        _read_table(release, stays, "hosp/labevents", _LAB),
        _read_table(release, stays, "icu/outputevents", _OUTPUT),
    ]
    rows = pl.concat(parts)
    rows = pl.concat([rows, _glasgow_total(rows)]).sort(
        "stay_id", "hours_since_admission", "feature", maintain_order=True
    )
    return conform(rows, MEASUREMENT_COLUMNS, SERIES)


def _read_table(release: Release, stays: pl.DataFrame, place: str, columns: dict[str, Format]) -> pl.DataFrame:
    table = release.table(place, columns=columns)
    if table is None:
        release.notes.append(f"{place} is absent: its series are missing")
        return empty(MEASUREMENT_COLUMNS)
    items = ITEMS.filter(pl.col("table") == table.name).drop("table", "label", "unit")
    frame = table.frame.join(items, left_on="itemid", right_on="itemid", how="left", maintain_order="left")
    frame = release.screen(
        table,
        frame,
        [
            ("not an item of the series", pl.col("variable").is_null()),
            ("no time", pl.col("charttime").is_null()),
        ],
    )
    if "stay_id" in frame.columns:
        frame, no_stay = link_by_stay(frame, stays), "names no known ICU stay"
    else:
        frame, no_stay = link_by_time(frame, stays, "charttime"), "no ICU stay of this admission"
    frame = within_stay(release, table, frame, "charttime", no_stay)
    frame = frame.with_columns(number=_number(columns))
    rules = [("no numeric value", pl.col("number").is_null())]
    if table.name != "outputevents":  # two equal amounts of one minute may be two vessels; two equal readings are one
        key = pl.struct("stay_id", "itemid", "charttime", "number")
        rules.append(("repeats an earlier row", ~key.is_first_distinct()))
    frame = release.screen(table, frame, rules).with_columns(number=_convert(pl.col("number"), pl.col("conversion")))
    outside = ~pl.col("number").is_between(pl.col("low"), pl.col("high"))
    frame = release.screen(table, frame, [("value outside the possible range", outside)])
    return _keep(release, table, frame)


def _keep(release: Release, table: Table, frame: pl.DataFrame) -> pl.DataFrame:
    release.ledger.keep(table.name, frame.height)
    return frame.sort(LINE).select(
        stay_id="stay_id",
        hours_since_admission=HOURS,
        modality=pl.lit(SERIES),
        feature="variable",
        value="number",
    )


def _number(columns: dict[str, Format]) -> pl.Expr:
    """The number of a row, before any conversion; a chart may give it in words only."""
    if columns.get("valuenum") is None:
        return pl.col("value")
    number = pl.col("valuenum")
    if "value" not in columns:
        return number
    said = pl.col("value").str.to_lowercase().str.strip_chars()
    for variable, words in _WORDS.items():
        meant = said.replace_strict(words, default=None, return_dtype=pl.Float64)
        number = pl.when(number.is_null() & (pl.col("variable") == variable)).then(meant).otherwise(number)
    return number


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


def _glasgow_total(rows: pl.DataFrame) -> pl.DataFrame:
    """The sum where all three components were charted at one time and the total was not."""
    at = ["stay_id", "hours_since_admission"]
    charted = rows.filter(pl.col("feature") == _TOTAL).select(at)
    components = (
        rows.filter(pl.col("feature").is_in(_COMPONENTS)).group_by([*at, "feature"]).agg(pl.col("value").last())
    )
    whole = (
        components.group_by(at).agg(pl.col("value").sum(), parts=pl.len()).filter(pl.col("parts") == len(_COMPONENTS))
    )
    whole = whole.join(charted, on=at, how="anti")
    return whole.select(*at, modality=pl.lit(SERIES), feature=pl.lit(_TOTAL), value="value")
