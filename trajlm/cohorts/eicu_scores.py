"""Severity scores of eICU's apachePatientResult: what one would use otherwise, never an input."""

from __future__ import annotations

import polars as pl

from trajlm.cohorts.eicu_rows import STAY, EventTables
from trajlm.cohorts.tables import Format

TABLE = "apachePatientResult"
VERSION = "IVa"  # the newer of the two that the release computes for the same stays
SCORES = {
    "acutephysiologyscore": "score_aps",
    "apachescore": "score_apache_iva",
    "predictedhospitalmortality": "score_apache_iva_mortality",
}


def with_scores(tables: EventTables, stays: pl.DataFrame) -> pl.DataFrame:
    """``stays`` with SCORES' columns, float64, null where the release has no such score (-1) of the stay."""
    columns: dict[str, Format] = {"apacheversion": "string", **dict.fromkeys(SCORES, "number")}
    unknown = pl.all_horizontal(pl.col(name).is_null() | (pl.col(name) < 0) for name in SCORES)
    again = "repeats an earlier row of the stay"
    rules = [
        (f"a version other than {VERSION}", ~pl.col("apacheversion").eq_missing(VERSION)),
        ("no score is known (-1)", unknown),
        (again, ~pl.col(STAY).is_first_distinct()),
    ]
    found = [pl.DataFrame(schema={STAY: pl.Int64(), **dict.fromkeys(SCORES.values(), pl.Float64())})]
    seen: set[int] = set()
    for table in tables.batches(TABLE, columns):
        before = pl.col(STAY).is_in(pl.Series(sorted(seen), dtype=pl.Int64).implode())
        kept = tables.release.screen(table, table.frame, [*rules, (again, before)])
        tables.release.ledger.keep(table.name, kept.height)
        seen |= set(kept[STAY])
        values = [pl.when(pl.col(raw) >= 0).then(raw).cast(pl.Float64).alias(name) for raw, name in SCORES.items()]
        found.append(kept.select(STAY, *values))
    return stays.join(pl.concat(found), left_on="stay_id", right_on=STAY, how="left", maintain_order="left")
