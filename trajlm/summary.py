"""A grid's figures over its splits and seeds: means, deviations, and how often a difference was told from chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.checkpoint import write_text
from trajlm.pooled_arms import GridRun, pooled_title
from trajlm.report.tables import NOT_DEFINED, metric_title, number, signed
from trajlm.schema import HELD_OUT
from trajlm.typeset import Table, latex, markdown

SHOWN = ("auroc", "auprc", "mae", "spearman", "macro_auroc", "macro_auprc")
COMPARED = ("auroc", "auprc", "mae")
KEYS = ["arm", "target", "landmark", "metric"]


def figures(runs: Sequence[GridRun]) -> pl.DataFrame:
    """Held-out figures of every arm of every run: split, seed, KEYS, value.

    A baseline stands once per split and seed and initialisation of its encoders, not once per backbone beside it.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in runs:
        metrics = json.loads((run.path / "metrics.json").read_text())
        for name, found in metrics["arms"][HELD_OUT].items():
            arm = pooled_title(run, name)
            for row in found:
                key = (run.split, run.seed, arm, row["target"], row["landmark"], row["metric"])
                rows[key] = dict(zip(["split", "seed", *KEYS], key, strict=True)) | {"value": row["value"]}
    schema = {"split": pl.String, "seed": pl.Int64, "arm": pl.String, "target": pl.String, "landmark": pl.Float64,
              "metric": pl.String, "value": pl.Float64}  # fmt: skip
    return pl.DataFrame(list(rows.values()), schema=schema)


def differences(runs: Sequence[GridRun], out: Path) -> pl.DataFrame:
    """Sequence models minus the best static arm, of each split's tables: split, seed, KEYS, value, low and high."""
    of = {(run.split, name): run for run in runs for name in (run.path.name, str(run.path))}
    frames = []
    for split in dict.fromkeys(run.split for run in runs):
        paired = pl.read_csv(out / split / "tables" / "paired.csv", schema_overrides={"landmark": pl.Float64})
        names = paired["run"].to_list()
        frames.append(
            paired.select(
                pl.lit(split).alias("split"),
                pl.Series("seed", [of[split, name].seed for name in names], dtype=pl.Int64),
                pl.Series(
                    "arm",
                    [pooled_title(of[split, name], arm) for name, arm in zip(names, paired["arm"], strict=True)],
                    dtype=pl.String,
                ),
                "target",
                "landmark",
                "metric",
                *(pl.col(name).cast(pl.Float64) for name in ("value", "low", "high")),
            )
        )
    return pl.concat(frames)


def spread(frame: pl.DataFrame) -> pl.DataFrame:
    """KEYS, mean, deviation (null for one run), least, greatest and number of the defined values of each."""
    defined = frame.filter(pl.col("value").is_not_null())
    return defined.group_by(KEYS, maintain_order=True).agg(
        pl.col("value").mean().alias("mean"),
        pl.col("value").std().alias("deviation"),
        pl.col("value").min().alias("least"),
        pl.col("value").max().alias("greatest"),
        pl.len().alias("runs"),
    )


def summarise(runs: Sequence[GridRun], out: Path) -> None:
    """Write ``summary.md``, ``.tex`` and ``.csv`` into ``out`` and print the first."""
    every, paired = spread(figures(runs)), differences(runs, out)
    moved = spread(paired)
    told = paired.filter(pl.col("low").is_not_null()).group_by(KEYS, maintain_order=True).agg(
        (pl.col("low") > 0).sum().alias("above"), (pl.col("high") < 0).sum().alias("below")
    )  # fmt: skip
    moved = moved.join(told, on=KEYS, how="left", nulls_equal=True, maintain_order="left")
    tables = [*_figure_tables(every), *_difference_tables(moved)]
    text = "\n".join(markdown(table) for table in tables)
    both = pl.concat([every.with_columns(what=pl.lit("value")), moved.with_columns(what=pl.lit("difference"))],
                     how="diagonal")  # fmt: skip
    write_text(out / "summary.csv", both.write_csv())
    write_text(out / "summary.tex", "\n".join(latex(table) for table in tables))
    write_text(out / "summary.md", text)
    print(text)


def _landmark(hours: float | None) -> str:
    return "end of window" if hours is None else f"{hours:g} h"


def _figure_tables(every: pl.DataFrame) -> list[Table]:
    """A table per target and metric: mean and deviation over splits and seeds, by landmark."""
    return _tables(every, SHOWN, "", "Mean ± deviation over splits and seeds.", _cell)


def _difference_tables(moved: pl.DataFrame) -> list[Table]:
    note = (
        "Mean ± deviation over splits and seeds; in brackets the runs whose 95 % interval lies above and below 0. "
        "Which arm is best on few tuning stays is a matter of chance: `trajlm results` takes one for all splits."
    )
    return _tables(moved, COMPARED, ": sequence model minus the best static arm of its split", note, _difference)


def _tables(frame: pl.DataFrame, metrics: Sequence[str], words: str, note: str, cell: Any) -> list[Table]:
    tables = []
    shown = frame.filter(pl.col("metric").is_in(metrics) & ~pl.col("target").str.starts_with("phenotype_"))
    for (target, metric), own in shown.group_by(["target", "metric"], maintain_order=True):
        landmarks = sorted(set(own["landmark"]), key=lambda at: float("inf") if at is None else at)
        by_key = {(row["arm"], row["landmark"]): row for row in own.iter_rows(named=True)}
        arms = own.group_by("arm", maintain_order=True).agg(pl.col("runs").max())
        title = f"{str(target).replace('_', ' ').capitalize()}, {metric_title(str(metric))}{words}"
        rows = [[*_labels(arm), str(runs), *(cell(by_key.get((arm, at))) for at in landmarks)]
                for arm, runs in arms.rows()]  # fmt: skip
        tables.append(Table(title, ["Model", "Arm", "Runs", *map(_landmark, landmarks)], rows, set(), note))
    return tables


def _labels(arm: str) -> list[str]:
    model, _, rest = arm.partition(", ")
    return [model, rest or "–"]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return NOT_DEFINED
    return number(row["mean"]) + ("" if row["deviation"] is None else f" ± {number(row['deviation'])}")


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return NOT_DEFINED
    spread_ = "" if row["deviation"] is None else f" ± {number(row['deviation'])}"
    return f"{signed(row['mean'])}{spread_} ({row['above'] or 0} above, {row['below'] or 0} below)"
