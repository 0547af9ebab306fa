"""The tables of a results page, from the pooled figures of a grid (:mod:`trajlm.pooling`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import polars as pl

from trajlm.calibration import CALIBRATION_NOTE
from trajlm.metrics import LANDMARKS
from trajlm.pooled_arms import is_sequence_title, kind_of
from trajlm.pooling import CALIBRATION, SCALED, Pool
from trajlm.report.tables import NOT_DEFINED, count, interval, metric_title, signed
from trajlm.typeset import Table

END = "end of window"
MAIN = {"probability": "auroc", "hours": "mae", "group": "macro_auroc"}
UNITS = {"mae": " (hours)"}
LOWER_IS_BETTER = {"mae"}
KIND_TITLES = {"whole": "the sequence model", "network": "its network alone", "averaged": "it and a baseline averaged",
               "seeds": "seeds averaged"}  # fmt: skip
LABELS = ["Model", "Arm", "Runs"]

Row = dict[str, Any]


def measure(target: dict[str, Any], metric: str) -> str:
    """A target and a metric as a heading says them."""
    title = str(target["title"])
    return f"{title[0].upper()}{title[1:]}, {metric_title(metric)}{UNITS.get(metric, '')}"


def at_landmark(landmark: float | None) -> str:
    """A landmark as the head of a column."""
    return END if landmark is None else f"{landmark:g} h"


def difference(row: Row) -> str:
    """``+value [+low, +high]``."""
    if row["value"] is None:
        return NOT_DEFINED
    return signed(row["value"]) + ("" if row["low"] is None else f" [{signed(row['low'])}, {signed(row['high'])}]")


def _labels(arm: str, runs: int) -> list[str]:
    model, _, rest = arm.partition(", ")
    return [model[0].upper() + model[1:], rest or "–", str(runs)]


def figures_table(values: pl.DataFrame, target: dict[str, Any], metric: str) -> Table:
    """Every arm at every landmark, POOLED_COLUMNS to one metric of one target."""
    own = values.filter((pl.col("target") == target["name"]) & (pl.col("metric") == metric))

    def cell(row: Row) -> str:
        return interval(row["value"], row["low"], row["high"])

    return _by_landmark(measure(target, metric), own, cell, _best(own, metric), "")


def difference_table(pool: Pool, moved: pl.DataFrame, target: dict[str, Any]) -> Table:
    """Every sequence arm minus the best static arm, by landmark."""
    metric = MAIN[target["kind"]]
    own = moved.filter((pl.col("target") == target["name"]) & (pl.col("metric") == metric))
    title = f"{measure(target, metric)}: sequence model minus the best static arm"
    return _by_landmark(title, own, difference, set(), f"{_rivals(pool, target)} {_sign(metric)}".strip())


def _sign(metric: str) -> str:
    return "Of an error, below zero is better." if metric in LOWER_IS_BETTER else ""


def _rivals(pool: Pool, target: dict[str, Any]) -> str:
    """Which static arms the sequence arms of each kind are measured against."""
    kinds: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kind_of(arm) for arm in pool.chosen(target)):
        kinds.setdefault(_best_at(pool, target, kind), []).append(KIND_TITLES[kind])
    return " ".join(f"The best on the tuning stays, for {', '.join(own)}: {at}." for at, own in kinds.items())


def _best_at(pool: Pool, target: dict[str, Any], kind: str) -> str:
    at: dict[str, list[str]] = {}
    for landmark in LANDMARKS:
        rival = pool.best_static(target, landmark, kind)
        if rival is not None:
            at.setdefault(rival, []).append(at_landmark(landmark))
    return "; ".join(f"{rival} at {', '.join(when)}" for rival, when in at.items())


def each_table(pool: Pool, target: dict[str, Any]) -> Table:
    """The chosen sequence arms minus every static arm, by landmark."""
    metric = MAIN[target["kind"]]
    pairs = [(arm, rival) for arm in pool.chosen(target) for rival in pool.static_arms]
    moved = {(*pair, at): pool.difference((pair[0], target["name"], at, metric), pair[1])
             for pair in pairs for at in LANDMARKS}  # fmt: skip
    landmarks = [at for at in LANDMARKS if any(moved[(*pair, at)] for pair in pairs)]
    rows = [[*pair, *(_spread(pool, moved[(*pair, at)]) for at in landmarks)] for pair in pairs]
    title = f"{measure(target, metric)}: the chosen sequence models minus each static arm"
    columns = ["Sequence model", "Static arm", *map(at_landmark, landmarks)]
    return Table(title, columns, rows, set(), _sign(metric), labels=2)


def _by_landmark(
    title: str, own: pl.DataFrame, cell: Callable[[Row], str], best: set[tuple[str, float | None]], note: str
) -> Table:
    by_key = {(row["arm"], row["landmark"]): row for row in own.iter_rows(named=True)}
    landmarks = [at for at in LANDMARKS if any(at == of for _, of in by_key)]
    arms = own.group_by("arm").agg(pl.col("runs").max()).sort("arm").rows()
    arms.sort(key=lambda pair: is_sequence_title(pair[0]))
    rows = []
    for arm, runs in arms:
        cells = [cell(by_key[arm, at]) if (arm, at) in by_key else NOT_DEFINED for at in landmarks]
        rows.append([*_labels(arm, runs), *cells])
    bold = {
        (i, len(LABELS) + j) for i, (arm, _) in enumerate(arms) for j, at in enumerate(landmarks) if (arm, at) in best
    }
    return Table(title, [*LABELS, *map(at_landmark, landmarks)], rows, bold, note)


def _best(own: pl.DataFrame, metric: str) -> set[tuple[str, float | None]]:
    """(arm, landmark) of the best value of each landmark."""
    best = set()
    for at in LANDMARKS:
        known = own.filter(pl.col("landmark").eq_missing(pl.lit(at, pl.Float64)) & pl.col("value").is_not_null())
        if known.height > 1:
            best.add((known.sort("value", descending=metric not in LOWER_IS_BETTER)["arm"][0], at))
    return best


def split_table(pool: Pool, target: dict[str, Any]) -> Table:
    """The chosen sequence arms minus the best static arm, split by split."""
    metric = MAIN[target["kind"]]
    arms = pool.chosen(target)
    moved = {(arm, at): pool.difference((arm, target["name"], at, metric)) for arm in arms for at in LANDMARKS}
    landmarks = [at for at in LANDMARKS if any(moved[arm, at] for arm in arms)]
    rows = []
    for arm in arms:
        for split in pool.splits if landmarks else ():
            own = [{split: values[split]} if split in (values := moved[arm, at]) else {} for at in landmarks]
            rows.append([split, arm, *(_spread(pool, of) for of in own)])
    title = f"{measure(target, metric)}: the chosen sequence models minus the best static arm, by split"
    columns = ["Split", "Sequence model", *map(at_landmark, landmarks)]
    return Table(title, columns, rows, set(), "Means over seeds.", labels=2)


def _spread(pool: Pool, moved: dict[str, Any]) -> str:
    """A difference by split as a cell."""
    if not moved:
        return NOT_DEFINED
    value, low, high, *_ = (None if math.isnan(v) else v for v in pool.spread(moved))
    return difference({"value": value, "low": low, "high": high})


def calibration_table(values: pl.DataFrame, pool: Pool) -> Table:
    """Adaptive calibration error and Brier skill at the end of the window, as believed and after scaling."""
    columns = [
        (target, name + end)
        for target in pool.targets
        if target["kind"] == "probability"
        for name in CALIBRATION
        for end in ("", SCALED)
    ]
    last = values.filter(pl.col("landmark").is_null())
    by_key = {(row["arm"], row["target"], row["metric"]): row for row in last.iter_rows(named=True)}
    rows = []
    for arm in pool.arms if columns else ():
        found = [by_key.get((arm, target["name"], metric)) for target, metric in columns]
        runs = max((row["runs"] for row in found if row), default=0)
        cells = [NOT_DEFINED if row is None else interval(row["value"], row["low"], row["high"]) for row in found]
        rows.append([*_labels(arm, runs), *cells])
    titles = [measure(t, m.removesuffix(SCALED)) + (", scaled" if m.endswith(SCALED) else "") for t, m in columns]
    return Table(f"Calibration at the {END}", [*LABELS, *titles], rows, set(), CALIBRATION_NOTE)


def sizes_table(pool: Pool, metrics: dict[str, dict[str, Any]]) -> Table:
    """Stays of every split, and how many of the held-out ones have a known outcome; ``metrics`` of one run of each."""
    rows = []
    for split in pool.splits:
        told = metrics[split]
        sizes = [count(told["stays"][name]) for name in ("train", "tuning", "held_out")]
        figures = [row for rows_ in told["arms"]["held_out"].values() for row in rows_ if row["landmark"] is None]
        known = {row["target"]: row for row in figures}
        cells = [_known(known.get(target["name"])) for target in pool.targets]
        seeds = len({run.seed for run in pool.runs if run.split == split})
        rows.append([split, str(seeds), *sizes, *cells])
    titles = [f"Held out, {target['title']} known" for target in pool.targets]
    return Table("Splits", ["Split", "Seeds", "Learned from", "Tuned on", "Held out", *titles], rows)


def _known(row: Row | None) -> str:
    if row is None:
        return NOT_DEFINED
    return count(row["stays"]) + (f" ({count(row['positives'])} positive)" if row["positives"] is not None else "")
