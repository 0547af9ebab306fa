"""A grid's held-out figures over its splits and seeds: means, and intervals from resampling patients (method 8).

A patient who is held out in several splits is drawn in all of them alike, and the models stand as they were trained:
an interval says how sure the mean is for these models, the spread between splits what other training stays would give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from trajlm.arms import MACRO, beliefs_path, landmarks_of
from trajlm.calibration import fit_temperature, scaled
from trajlm.compared import load_runs
from trajlm.ensemble import mean_beliefs
from trajlm.errors import TrajlmError
from trajlm.evidence import CHOSEN_BY
from trajlm.gaps import drawn_gaps, gaps_difference_interval, gaps_interval
from trajlm.metrics import (
    METRICS,
    RAISED_BY_CHANCE,
    Kind,
    Metric,
    adaptive_calibration_error,
    beliefs_at_landmark,
    interval_of,
    resample_weights,
)
from trajlm.pooled_arms import KINDS, RIVALS, GridRun, Holder, held_arms, is_sequence_title, kind_of
from trajlm.schema import HELD_OUT, TUNING
from trajlm.subgroups import STAYS

FloatArray = NDArray[np.float64]
POOLED = {
    "probability": ("auroc", "auprc"),
    "hours": ("mae", "spearman"),
    "group": ("macro_auroc", "macro_auprc"),
}
CALIBRATION = ("adaptive_calibration_error", "brier_skill_score")
SCALED = "_scaled"  # ends the name of a calibration metric after temperature scaling
POOLED_COLUMNS: dict[str, pl.DataType] = {
    "arm": pl.String(), "target": pl.String(), "landmark": pl.Float64(), "metric": pl.String(), "value": pl.Float64(),
    "low": pl.Float64(), "high": pl.Float64(), "deviation": pl.Float64(), "splits": pl.Int64(), "runs": pl.Int64(),
}  # fmt: skip

Key = tuple[str, str, float | None, str]  # arm, target, landmark, metric
Draws = dict[Key, dict[str, dict[int | None, FloatArray]]]  # by split and seed: the figure, then its resamples


class Pool:
    """Held-out figures of every arm of a grid, each with its resamples.

    Args:
        runs: finished runs; within a split their held-out stays and outcomes must be the same.
        resamples, seed: of the bootstrap over the patients of all splits together.

    Raises:
        TrajlmError: a run is not finished, or two of a split differ in their held-out stays.
    """

    def __init__(self, runs: Sequence[GridRun], resamples: int, seed: int = 0) -> None:
        self.runs, self.resamples, self.seed = list(runs), resamples, seed
        self.splits = list(dict.fromkeys(run.split for run in runs))
        for split in self.splits:
            load_runs([run.path for run in runs if run.split == split])
        metrics = {run.path: json.loads((run.path / "metrics.json").read_text()) for run in runs}
        first = metrics[runs[0].path]
        self.targets = [t | {"members": [t["name"]]} for t in first["targets"] if t["group"] is None]
        self.targets += [{"name": g["name"], "kind": "group", "title": g["title"], "members": g["targets"]}
                         for g in first["groups"]]  # fmt: skip
        self._kinds: dict[str, Kind] = {t["name"]: t["kind"] for t in first["targets"]}
        self._holders = held_arms(runs, {path: list(told["arms"][HELD_OUT]) for path, told in metrics.items()})
        self._tuning = {key: self._told(holder, metrics) for key, holder in self._holders.items()}
        self.arms = sorted({arm for arm, _, _ in self._holders}, key=lambda arm: (is_sequence_title(arm), arm))
        self._counted: dict[tuple[str, float | None], frozenset[int]] = {}

    def _told(self, holder: Holder, metrics: dict[Path, Any]) -> list[dict[str, Any]]:
        """What ``metrics.json`` tells of tuning stays; of several models together, what arms are chosen by alone."""
        if len(holder.models) == 1:
            run, name = holder.models[0]
            return metrics[run.path]["arms"][TUNING][name]
        stays, beliefs = self._read(holder)
        own, rows = beliefs.filter(pl.col("split") == TUNING), []
        for landmark in landmarks_of(own):
            at = _of_patients(own, stays, landmark)
            for target in self.targets:
                metric, _ = _chosen_by(target)
                y, b, _ = _known(at, target)
                value = float(_metric(metric)(y, b)) if len(y) else float("nan")
                rows.append({"target": target["name"], "metric": metric, "landmark": landmark, "value": value})
        return rows

    def _read(self, holder: Holder) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Stays, and the beliefs in them: the mean where there are several models."""
        sides = [
            mean_beliefs([pl.read_parquet(beliefs_path(run.path, name)) for run, name in side], self._kinds)
            for side in holder.sides
        ]
        return pl.read_parquet(holder.models[0][0].path / STAYS), mean_beliefs(sides, self._kinds)

    @property
    def static_arms(self) -> list[str]:
        """What sequence models are compared with."""
        return [arm for arm in self.arms if not is_sequence_title(arm)]

    @cached_property
    def _patients(self) -> tuple[NDArray[np.object_], FloatArray]:
        """Every patient held out in some split, and how often each is drawn: float[resamples, patients]."""
        frames = [pl.read_parquet(run.path / STAYS).filter(pl.col("split") == HELD_OUT) for run in self.runs]
        people = np.unique(pl.concat([f.select("subject_id") for f in frames])["subject_id"].to_numpy())
        return people, np.concatenate(list(resample_weights(people, self.resamples, self.seed)))

    @cached_property
    def draws(self) -> Draws:
        """Every pooled figure with its resamples, float[1 + resamples]; NaN where undefined."""
        return {
            key: {split: {seed: _figure(v) for seed, v in seeds.items()} for split, seeds in of.items()}
            for key, of in self._drawn.items()
        }

    @cached_property
    def _drawn(self) -> Draws:
        """:attr:`draws`, but of a calibration error its gaps, float[1 + resamples, bins]."""
        found: Draws = {}
        for (arm, split, seed), holder in self._holders.items():
            for target, landmark, metric, values in self._figures(holder):
                found.setdefault((arm, target, landmark, metric), {}).setdefault(split, {})[seed] = values
        return found

    def _figures(self, holder: Holder) -> Iterator[tuple[str, float | None, str, FloatArray]]:
        stays, beliefs = self._read(holder)
        held_out, tuning = (beliefs.filter(pl.col("split") == split) for split in (HELD_OUT, TUNING))
        for landmark in landmarks_of(held_out):
            at = _of_patients(held_out, stays, landmark)
            self._require_same_stays(*holder.models[0], landmark, at)
            for target in self.targets:
                y, b, people = _known(at, target)
                for metric in POOLED[target["kind"]]:
                    yield target["name"], landmark, metric, self._resampled(_metric(metric), y, b, people)
        last, earlier = (_of_patients(own, stays, None) for own in (held_out, tuning))
        for target in (t for t in self.targets if t["kind"] == "probability" and len(last)):
            (y, b, people), (before, told, _) = _known(last, target), _known(earlier, target)
            after = scaled(b, fit_temperature(before, told))
            for metric in CALIBRATION:
                yield target["name"], None, metric, self._resampled(METRICS[metric][0], y, b, people)
                yield target["name"], None, metric + SCALED, self._resampled(METRICS[metric][0], y, after, people)

    def _require_same_stays(self, run: GridRun, name: str, landmark: float | None, at: pl.DataFrame) -> None:
        """Figures on other stays are no comparison of arms."""
        own = frozenset(at["stay_id"])
        odd = own ^ self._counted.setdefault((run.split, landmark), own)
        if odd:
            when = "the end of the window" if landmark is None else f"{landmark:g} hours"
            raise TrajlmError(
                f"{run.path}: at {when} {name} has beliefs in other stays than the arms before it ({len(odd)} such "
                f"stays, the first being {min(odd)}); such figures cannot be compared"
            )

    def _resampled(self, metric: Metric, y: FloatArray, b: FloatArray, people: NDArray[np.object_]) -> FloatArray:
        names, weights = self._patients
        drawn = weights[:, np.searchsorted(names, people)]
        gaps = metric is adaptive_calibration_error
        if not len(y):
            return np.full((1 + self.resamples, 1) if gaps else 1 + self.resamples, np.nan)
        if gaps:
            return drawn_gaps(y, b, [drawn], self.resamples)
        return np.concatenate([[metric(y, b)], metric(y, b, drawn)])

    def by_split(self, key: Key) -> dict[str, FloatArray]:
        """Mean over the seeds of each split, float[1 + resamples]; empty where the arm has no such figure."""
        return {split: _mean(list(of.values())) for split, of in self.draws.get(key, {}).items()}

    def best_static(self, target: dict[str, Any], landmark: float | None, kind: str = "whole") -> str | None:
        """The static arm that was best on the tuning stays of all splits at a landmark; None without any.

        One for all splits, as the sequence arm is: few tuning stays of one split die, and what is best among them by
        chance is a weak rival.

        Args:
            target: one of ``targets``.
            landmark: hours since admission, or None.
            kind: of the sequence arm that it is to be the rival of (RIVALS).
        """
        return self._best([arm for arm in self.static_arms if kind_of(arm) in RIVALS[kind]], target, landmark)

    def best_sequence(self, target: dict[str, Any], kind: str) -> str | None:
        """The sequence arm of a kind that was best on the tuning stays of all splits at the window's end."""
        return self._best([a for a in self.arms if is_sequence_title(a) and kind_of(a) == kind], target, None)

    def chosen(self, target: dict[str, Any]) -> list[str]:
        """:meth:`best_sequence` of every kind that there is."""
        found = [self.best_sequence(target, kind) for kind in KINDS]
        return [arm for arm in found if arm is not None]

    def _best(self, arms: Sequence[str], target: dict[str, Any], landmark: float | None) -> str | None:
        found = {arm: self._tuned(arm, target, landmark) for arm in arms}
        known = {arm: value for arm, value in found.items() if np.isfinite(value)}
        return max(known, key=lambda arm: known[arm]) if known else None

    def _tuned(self, arm: str, target: dict[str, Any], landmark: float | None) -> float:
        """Mean over runs of the metric that arms are chosen by, on tuning stays; greater is better.

        NaN for an arm that some split lacks.
        """
        metric, sign = _chosen_by(target)
        wanted = (target["name"], metric, landmark)
        values = [
            (split, sign * row["value"])
            for (name, split, _), rows in self._tuning.items()
            if name == arm
            for row in rows
            if (row["target"], row["metric"], row["landmark"]) == wanted and row["value"] is not None
        ]
        everywhere = {split for split, _ in values} == set(self.splits)
        return float(np.mean([value for _, value in values])) if everywhere else float("nan")

    def figures(self) -> pl.DataFrame:
        """POOLED_COLUMNS of every arm."""
        rows = []
        for key, of in self.draws.items():
            value, low, high, *rest = self.spread(self.by_split(key), _metric(key[3]) in RAISED_BY_CHANCE)
            if _is_calibration_error(key):
                low, high = gaps_interval(_side_by_side(list(self._drawn[key].values())), len(self._patients[0]))
            rows.append((*key, value, low, high, *rest, self._runs(key[0], of)))
        return _frame(rows)

    def _runs(self, arm: str, of: dict[str, dict[int | None, FloatArray]]) -> int:
        """How many runs figures of an arm come of."""
        return sum(len(self._holders[arm, split, seed].runs) for split, seeds in of.items() for seed in seeds)

    def differences(self) -> pl.DataFrame:
        """POOLED_COLUMNS of every sequence arm minus the best static arm, on the same stays."""
        rows = []
        for key, of in self.draws.items():
            moved = self.difference(key)
            if is_sequence_title(key[0]) and moved:
                value, low, high, *rest = self.spread(moved)
                if _is_calibration_error(key):
                    own, theirs = (
                        _side_by_side([self._drawn[side][split] for split in moved]) for side in (key, self._rival(key))
                    )
                    low, high = gaps_difference_interval(own, theirs, len(self._patients[0]))
                rows.append((*key, value, low, high, *rest, self._runs(key[0], of)))
        return _frame(rows)

    def difference(self, key: Key, rival: str | None = None) -> dict[str, FloatArray]:
        """By split, an arm minus a rival, float[1 + resamples]; without one named the best static arm at the landmark.

        Empty where there is no rival; of the splits, those that have both.
        """
        theirs = self.by_split(self._rival(key) if rival is None else (rival, *key[1:]))
        return {split: own - theirs[split] for split, own in self.by_split(key).items() if split in theirs}

    def _rival(self, key: Key) -> Key:
        """The figure that an arm's is compared with; of no arm where there is none to compare with."""
        target = next(t for t in self.targets if t["name"] == key[1])
        return (self.best_static(target, key[2], kind_of(key[0])) or "", *key[1:])

    def spread(self, of: dict[str, FloatArray], raised: bool = False) -> tuple[float, float, float, float, int]:
        """Mean over splits, its interval, deviation between splits (NaN for one), number of splits.

        ``raised``: of a metric that chance raises (:func:`trajlm.metrics.interval_of`).
        """
        together = _mean(list(of.values()))
        low, high = interval_of(together[1:], len(self._patients[0]), about=float(together[0]) if raised else None)
        values = np.array([own[0] for own in of.values()])
        deviation = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
        return float(together[0]), low, high, deviation, len(values)


def _figure(values: FloatArray) -> FloatArray:
    """float[1 + R] of what :attr:`Pool._drawn` holds."""
    return np.abs(values).sum(axis=1) if values.ndim == 2 else values


def _is_calibration_error(key: Key) -> bool:
    return _metric(key[3]) is adaptive_calibration_error


def _side_by_side(splits: Sequence[dict[int | None, FloatArray]]) -> FloatArray:
    """float[1 + R, m]: the gaps of all runs of an arm, scaled so that their absolute sum is the mean over splits.

    Runs whose figure is undefined are left out, as of that mean.

    Args:
        splits: of each split its seeds' gaps float[1 + R, bins].
    """
    known = [[gaps for gaps in seeds.values() if np.isfinite(gaps[0]).all()] for seeds in splits]
    known = [own for own in known if own]
    shares = [gaps / (len(known) * len(own)) for own in known for gaps in own]
    return np.concatenate(shares, axis=1) if shares else np.full((1, 1), np.nan)


def _metric(name: str) -> Metric:
    name = name.removesuffix(SCALED)
    return METRICS[name][0] if name in METRICS else MACRO[name]


def _chosen_by(target: dict[str, Any]) -> tuple[str, float]:
    """Metric that arms are chosen by, and 1.0 where more is better, else -1.0."""
    return CHOSEN_BY.get(target["kind"], ("macro_auroc", 1.0))


def _of_patients(beliefs: pl.DataFrame, stays: pl.DataFrame, landmark: float | None) -> pl.DataFrame:
    """Beliefs at a landmark, with whose they are."""
    return beliefs_at_landmark(beliefs, stays, landmark).join(stays.select("stay_id", "subject_id"), on="stay_id")


def _known(at: pl.DataFrame, target: dict[str, Any]) -> tuple[FloatArray, FloatArray, NDArray[np.object_]]:
    """Target and belief, float[n] (float[n, C] of a group), of the stays with a known target, and their patients."""
    members = target["members"]
    known = at.filter(pl.any_horizontal(pl.col(f"target_{name}").is_not_null() for name in members)).sort("stay_id")
    y, b = (
        known.select(pl.col(f"{what}_{name}").cast(pl.Float64).fill_null(float("nan")) for name in members).to_numpy()
        for what in ("target", "belief")
    )
    people = known["subject_id"].to_numpy()
    return (y, b, people) if target["kind"] == "group" else (y[:, 0], b[:, 0], people)


def _mean(values: Sequence[FloatArray]) -> FloatArray:
    """Mean over a list of float[R], leaving out what is undefined; NaN where nothing is defined."""
    stack = np.stack(values)
    defined = np.isfinite(stack)
    with np.errstate(invalid="ignore"):
        return np.where(defined, stack, 0.0).sum(axis=0) / defined.sum(axis=0)


def _frame(rows: Sequence[tuple[Any, ...]]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=POOLED_COLUMNS, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))
