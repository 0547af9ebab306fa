"""The tables of an audit.

What the files can tell is counted from them; the manifest is asked only for what is nowhere else: how many rows were
read, and what each rule cost.
"""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from trajlm.audit.folder import ALL, Folder, by_split
from trajlm.schema import SPLITS
from trajlm.splits import combination

QUANTILES = {"q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}
_Z = 1.959963984540054  # of a two-sided 95 % interval


def splits_table(folder: Folder) -> pl.DataFrame:
    """split, stays, patients, events."""
    events = folder.held.group_by("stay_id").agg(pl.col("events").sum())
    stays = folder.stays.join(events, on="stay_id", how="left")
    rows = [
        (split, mine.height, mine["subject_id"].n_unique(), int(mine["events"].sum()))
        for split, mine in by_split(stays)
    ]
    return pl.DataFrame(
        rows, schema={"split": pl.String} | dict.fromkeys(("stays", "patients", "events"), pl.Int64), orient="row"
    )


def attrition_table(manifest: dict[str, Any]) -> pl.DataFrame | None:
    """rule, stays and patients left after it, stays_lost and patients_lost to it; first the release as it is."""
    steps = manifest.get("attrition")
    if not steps:
        return None
    schema = {"rule": pl.String, "stays": pl.Int64, "patients": pl.Int64}
    table = pl.DataFrame([{name: step[name] for name in schema} for step in steps], schema=schema)
    return table.with_columns(
        (-pl.col(name).diff()).fill_null(0).alias(f"{name}_lost") for name in ("stays", "patients")
    )


def tables_table(manifest: dict[str, Any]) -> pl.DataFrame:
    """table, rows read, kept and rejected of each raw table."""
    schema = {"table": pl.String} | dict.fromkeys(("read", "kept", "rejected"), pl.Int64)
    rows = [(name, rows["read"], rows["kept"], rows["rejected"]) for name, rows in manifest["tables"].items()]
    return pl.DataFrame(rows, schema=schema, orient="row")


def rejected_table(folder: Folder) -> pl.DataFrame:
    """table, reason, rows rejected for it, share of the rows read, stored (rows that lie under ``rejected/``)."""
    files = sorted((folder.path / "rejected").glob("*.parquet"))
    counted = [
        pl.scan_parquet(file).group_by("table", "reason").agg(pl.len().cast(pl.Int64).alias("stored")) for file in files
    ]
    schema = {"table": pl.String, "reason": pl.String, "rows": pl.Int64, "share": pl.Float64}
    rows = [
        (name, reason, count, count / rows["read"] if rows["read"] else None)
        for name, rows in folder.manifest["tables"].items()
        for reason, count in sorted(rows["reasons"].items(), key=lambda item: -item[1])
    ]
    told = pl.DataFrame(rows, schema=schema, orient="row")
    empty = pl.LazyFrame(schema={"table": pl.String, "reason": pl.String, "stored": pl.Int64})
    stored = pl.concat([empty, *counted]).collect(engine="streaming")
    # Reasons that only the files know come last: the manifest is not believed over them.
    return told.join(
        stored, on=["table", "reason"], how="full", coalesce=True, maintain_order="left_right"
    ).with_columns(pl.col("rows", "stored").fill_null(0))


def combinations_table(folder: Folder) -> pl.DataFrame:
    """combination, modalities (how many), stays in train, tuning, held_out and all, share of all; most stays first."""
    held = combination([f"present_{name}" for name in folder.modalities]).alias("combination")
    stays = folder.stays.select(held, "split")
    counts = [(pl.col("split") == split).sum().cast(pl.Int64).alias(split) for split in SPLITS]
    table = stays.group_by("combination").agg(*counts, pl.len().cast(pl.Int64).alias(ALL))
    size = (
        pl.when(pl.col("combination") == "nothing")
        .then(0)
        .otherwise(pl.col("combination").str.count_matches(r"\+") + 1)
    )
    return (
        table.with_columns(modalities=size.cast(pl.Int64), share=pl.col(ALL) / stays.height)
        .select("combination", "modalities", *SPLITS, ALL, "share")
        .sort(ALL, "combination", descending=[True, False])
    )


def modalities_table(folder: Folder) -> pl.DataFrame:
    """Per modality and split: stays, present (stays that hold it), share, events; of those that hold it, quantiles of
    events per stay (events_q05 ...) and of the hour of the first event (first_hour_q05 ...).
    """  # fmt: skip
    rows = []
    for name in folder.modalities:
        own = folder.held.filter(pl.col("modality") == name).drop("modality")
        stays = folder.stays.select("stay_id", "split").join(own, on="stay_id", how="left")
        for split, mine in by_split(stays):
            present = mine.height - mine["events"].null_count()
            rows.append(
                {"modality": name, "split": split, "stays": mine.height, "present": present}
                | {"share": present / mine.height if mine.height else None, "events": int(mine["events"].sum())}
                | _quantiles(mine["events"], "events_")
                | _quantiles(mine["first_hour"], "first_hour_")
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def _quantiles(values: pl.Series, prefix: str = "") -> dict[str, float | None]:
    """Linear between ranks, nulls left out; None where nothing is known."""
    return {prefix + name: values.quantile(q, "linear") for name, q in QUANTILES.items()}


def wilson(positive: int, known: int) -> tuple[float, float] | None:
    """95 % interval of a share by Wilson's score; None where nothing is known.

    Unlike the textbook one it stays within [0, 1] and is honest for rare outcomes. It takes stays as independent.
    """
    if known == 0:
        return None
    share, spread = positive / known, _Z**2 / known
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def prevalence_table(stays: pl.DataFrame) -> pl.DataFrame:
    """target, split, known, unknown, positive, prevalence among the known, low and high (95 %, Wilson)."""
    rows = []
    for target in (c for c in stays.columns if c.startswith("target_") and not stays.schema[c].is_float()):
        for split, mine in by_split(stays):
            values = mine[target].drop_nulls()
            known, positive = len(values), int((values == 1).sum())
            low, high = wilson(positive, known) or (None, None)
            share = positive / known if known else None
            rows.append((target, split, known, mine.height - known, positive, share, low, high))
    schema: dict[str, type[pl.DataType]] = {"target": pl.String, "split": pl.String}
    schema |= dict.fromkeys(("known", "unknown", "positive"), pl.Int64)
    schema |= dict.fromkeys(("prevalence", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, schema=schema, orient="row")


def hours_table(stays: pl.DataFrame) -> pl.DataFrame:
    """quantity (a target in hours, or hours_in_unit), split, known, unknown, mean and quantiles."""
    rows = []
    wanted = [
        c for c in stays.columns if c == "hours_in_unit" or (c.startswith("target_") and stays.schema[c].is_float())
    ]
    for quantity in sorted(wanted, reverse=True):
        for split, mine in by_split(stays):
            values = mine[quantity].drop_nulls()
            row = {"quantity": quantity, "split": split, "known": len(values), "unknown": mine.height - len(values)}
            rows.append(row | {"mean": values.mean()} | _quantiles(values))
    return pl.DataFrame(rows, infer_schema_length=None)
