"""Infusions of eICU: rates as charted, one continuous feature per drug and unit."""

from __future__ import annotations

import polars as pl

from trajlm.cohorts.eicu_rows import HOURS, STAY, EventTables
from trajlm.cohorts.tables import Format, storable
from trajlm.schema import MEASURED, Feature

INFUSION = "infusion"

LEAST_SHARE = 0.01  # by the share that codes must have not even norepinephrine would be a feature
_NAME = r"^(.*?)\s*(?:\(([^()]*)\))?\s*$"  # "Norepinephrine (mcg/min)"; without unit "()", "(Unknown)" or nothing


def read_infusions(tables: EventTables) -> list[Feature]:
    """Spool the infusion rates; a rate of 0 is one, as it says that the infusion stopped.

    Returns:
        A feature for every drug in every unit it is charted in; the unit is "" where none is.
    """
    found: dict[str, str] = {}
    columns: dict[str, Format] = {"infusionoffset": "number", "drugname": "string", "drugrate": "string"}
    for table in tables.batches("infusionDrug", columns):
        said = pl.col("drugname").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
        drug, unit = said.str.extract(_NAME, 1), said.str.extract(_NAME, 2).fill_null("").str.strip_chars()
        frame = table.frame.with_columns(
            drug.alias("drug"),
            pl.when(unit != "unknown").then(unit).otherwise(pl.lit("")).alias("unit"),
            pl.col("drugrate").str.strip_chars().cast(pl.Float64, strict=False).alias("value"),
        )
        rules = [
            ("names no drug", pl.col("drug").is_null() | (pl.col("drug") == "")),
            ("no numeric rate", ~storable(pl.col("value")).fill_null(False)),
            ("value outside the possible range", pl.col("value") < 0),
        ]
        frame = tables.dated(table, frame, pl.col("infusionoffset"), rules=rules)
        named = pl.when(pl.col("unit") == "").then("drug").otherwise(pl.format("{} ({})", "drug", "unit"))
        frame = frame.with_columns(named.alias("feature"))
        found.update(frame.select("feature", "unit").unique().iter_rows())
        tables.deliver(table, frame, frame.select(STAY, HOURS, MEASURED, "feature", "value"), INFUSION)
    share = min(tables.settings.least_code_share, LEAST_SHARE)
    return [Feature(INFUSION, name, found[name], least_share=share) for name in sorted(found)]
