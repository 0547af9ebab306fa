"""Laboratory results of eICU: one continuous feature per test, in one unit.

``eicu_labs.csv`` holds the unit that the release gives a test, the bounds of the possible, which are wide on purpose,
and how to tell values that stand in another unit under that name. A test that is not listed takes the unit that it is
first met with and must not be negative.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from trajlm.cohorts.eicu_rows import HOURS, STAY, EventTables, fahrenheit_to_celsius
from trajlm.cohorts.eicu_units import conversion_factor
from trajlm.cohorts.tables import Format
from trajlm.schema import MEASURED, Feature

LAB = "lab"
TESTS = pl.read_csv(Path(__file__).with_name("eicu_labs.csv"), schema_overrides={"unit": pl.String, "low": pl.Float64,
                    "high": pl.Float64, "conversion": pl.String}).with_columns(
                        pl.col("unit", "conversion").fill_null(""))  # fmt: skip

_COLUMNS: dict[str, Format] = {
    "labresultoffset": "number", "labresultrevisedoffset": "number", "labname": "string", "labresult": "string",
    "labmeasurenamesystem": "string",
}  # fmt: skip
_IONISED_CALCIUM_MG_DL = 4.008  # 1 mmol/L; nobody lives with 2 mg/dL, nobody with 2 mmol/L


class _Units:
    """The unit of every test, the listed ones from the start."""

    def __init__(self) -> None:
        self.of: dict[str, str] = dict(TESTS.select("labname", "unit").iter_rows())

    def plan(self, frame: pl.DataFrame) -> pl.DataFrame:
        """For every (labname, labmeasurenamesystem) of a batch the ``factor`` to the test's unit, null if unknown."""
        pairs = frame.group_by("labname", "labmeasurenamesystem").len().drop_nulls("labname")
        met = pairs.drop_nulls().sort("len", "labmeasurenamesystem", descending=[True, False])
        for name, unit in met.select("labname", "labmeasurenamesystem").iter_rows():
            if not self.of.get(name):
                self.of[name] = unit
        factors = [
            1.0 if unit is None else conversion_factor(unit, self.of[name])
            for name, unit in pairs.select("labname", "labmeasurenamesystem").iter_rows()
        ]
        return pairs.drop("len").with_columns(pl.Series("factor", factors, dtype=pl.Float64))


def read_labs(tables: EventTables) -> tuple[list[Feature], set[int]]:
    """Spool the laboratory results.

    A result is dated by when it was last revised: before that it may have said something else. With ``result_times``
    charted it is dated by when the specimen was drawn.

    Returns:
        A feature for every test met, and the stays that have a numeric result, whenever it was.
    """
    drawn, revised = pl.col("labresultoffset"), pl.col("labresultrevisedoffset")
    known = drawn if tables.settings.result_times == "charted" else pl.max_horizontal(drawn, revised)
    units, found, with_result = _Units(), set[str](), set[int]()
    for table in tables.batches(LAB, _COLUMNS):
        frame = table.frame.with_columns(
            pl.col("labname").str.strip_chars(),
            pl.col("labresult").str.strip_chars().cast(pl.Float64, strict=False).alias("value"),
        )
        frame = tables.release.screen(
            table, frame, [("names no test", pl.col("labname").is_null()), ("no numeric result", ~_is_number("value"))]
        )
        with_result.update(frame[STAY].unique().to_list())
        frame = tables.dated(table, frame, known, measured=drawn)
        frame = frame.join(
            units.plan(frame),
            on=["labname", "labmeasurenamesystem"],
            how="left",
            nulls_equal=True,
            maintain_order="left",
        )
        frame = frame.join(TESTS.drop("unit"), on="labname", how="left", maintain_order="left")
        frame = frame.with_columns(_in_one_unit(pl.col("value") * pl.col("factor")).alias("value"))
        outside = ~pl.col("value").is_between(pl.col("low").fill_null(0), pl.col("high").fill_null(float("inf")))
        frame = tables.release.screen(
            table,
            frame,
            [
                ("its unit is not that of the test, conversion unknown", pl.col("factor").is_null()),
                # A bound that is given stands; a test without any must not be negative.
                ("value outside the possible range", outside),
            ],
        )
        rows = frame.select(STAY, HOURS, MEASURED, pl.col("labname").alias("feature"), "value")
        found.update(rows["feature"].unique().to_list())
        tables.deliver(table, frame, rows, LAB)
    share = tables.settings.least_code_share
    return [Feature(LAB, name, units.of.get(name, ""), least_share=share) for name in sorted(found)], with_result


def _is_number(column: str) -> pl.Expr:
    return pl.col(column).is_finite().fill_null(False)


def _in_one_unit(value: pl.Expr) -> pl.Expr:
    """Undo another unit under the name of the usual one, where the size of the value tells it."""
    how = pl.col("conversion")
    return (
        pl.when((how == "fraction_to_percent") & (value <= 1))
        .then(value * 100)
        .when((how == "mmol/L_to_mg/dL") & (value < 2))
        .then(value * _IONISED_CALCIUM_MG_DL)
        .when(how == "fahrenheit_to_celsius")
        .then(fahrenheit_to_celsius(value))
        .otherwise(value)
    )
