"""What eICU knows of a patient on admission to the unit: one static event at hour 0."""

from __future__ import annotations

import polars as pl

from trajlm.cohorts.eicu_rows import STAY
from trajlm.schema import MEASUREMENT_COLUMNS, Feature, conform

DEMOGRAPHICS = "demographics"

# Name, unit, and the bounds (inclusive) of the possible: a height of 66 is in inches, one of 0.3 in nothing.
_NUMBERS: dict[str, tuple[str, float, float]] = {
    "age": ("years", 0, 120),
    "admissionheight": ("cm", 100, 250),
    "admissionweight": ("kg", 20, 400),
    "hours_in_hospital_before": ("hours", 0, 24 * 365),
    "unitvisitnumber": ("", 1, 100),
}
_CATEGORIES = ["gender", "ethnicity", "unittype", "unitstaytype", "unitadmitsource", "hospitaladmitsource",
               "apacheadmissiondx"]  # fmt: skip
_OF_THE_PAPER = ["age", "gender", "ethnicity"]


def demographics(stays: pl.DataFrame, paper_faithful: bool) -> tuple[pl.DataFrame, list[Feature], list[str]]:
    """Numbers and one-hot categories of every stay; an empty cell gives nothing.

    Args:
        stays: of ``StudyCohort``.
        paper_faithful: age, gender and ethnicity only.

    Returns:
        MEASUREMENT_COLUMNS; every feature in them; notes on values outside the possible range, which are left out.
    """
    hours = -pl.col("hospitaladmitoffset") / 60
    known = stays.with_columns(
        pl.col("years").alias("age"),
        # A few stays enter the hospital after the unit, as recorded: no such number of hours.
        pl.when(hours >= 0).then(hours).alias("hours_in_hospital_before"),
        *(pl.col(column).str.strip_chars() for column in _CATEGORIES),
    )
    parts, features, notes = [], [], []
    for column, (unit, low, high) in _NUMBERS.items():
        if paper_faithful and column not in _OF_THE_PAPER:
            continue
        given = known.filter(pl.col(column).is_not_null())
        possible = given.filter(pl.col(column).is_between(low, high))
        if given.height > possible.height:
            notes.append(
                f"{given.height - possible.height} values of {column} outside {low:g} to {high:g} {unit} are left out; "
                "their stays are kept"
            )
        parts.append(_rows(possible, pl.lit(column), pl.col(column)))
        features.append(Feature(DEMOGRAPHICS, column, unit))
    for column in _CATEGORIES:
        if paper_faithful and column not in _OF_THE_PAPER:
            continue
        given = known.filter(pl.col(column).is_not_null() & (pl.col(column) != ""))
        parts.append(_rows(given, pl.format("{}={}", pl.lit(column), column), pl.lit(1.0)))
        values = given[column].unique().sort()
        features += [Feature(DEMOGRAPHICS, f"{column}={value}", kind="category") for value in values]
    return conform(pl.concat(parts), MEASUREMENT_COLUMNS, DEMOGRAPHICS), features, notes


def _rows(stays: pl.DataFrame, feature: pl.Expr, value: pl.Expr) -> pl.DataFrame:
    return stays.select(
        pl.col(STAY).alias("stay_id"),
        pl.lit(0.0).alias("hours_since_admission"),
        pl.lit(DEMOGRAPHICS).alias("modality"),
        feature.alias("feature"),
        value.cast(pl.Float64).alias("value"),
    )
