"""Baselines without encoders: linear models and trees on summary features, refitted for each landmark (method 7).

They learn from exactly the stays that the sequence model of the same run learns from, are tuned on its tuning stays and
believe in the same stays; at a landmark, only stays still in the unit then count, in training as in the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from tqdm import tqdm

from trajlm.checkpoint import write_text
from trajlm.dataset import Prepared
from trajlm.metrics import LANDMARKS
from trajlm.schema import HELD_OUT, TRAIN, TUNING
from trajlm.summaries import Measurements, SummaryReader
from trajlm.tabular_models import Examples, Fitted, fit_tuned
from trajlm.tasks import Task


@dataclass(frozen=True)
class LandmarkStays:
    """The stays of one split that count at a landmark.

    Attributes:
        stays: int64[n], positions in the prepared folder.
        events: int64[n], how many of a stay's events are known by then, at least 1.
        features: float64[n, C].
    """

    stays: NDArray[np.int64]
    events: NDArray[np.int64]
    features: NDArray[np.float64]

    def same(self, other: LandmarkStays) -> bool:
        """Whether the same events of the same stays are known: a 48-hour window ends at the landmark of 48 hours."""
        return np.array_equal(self.stays, other.stays) and np.array_equal(self.events, other.events)


def known_events(prepared: Prepared, stays: NDArray[np.int64], landmark: float | None) -> NDArray[np.int64]:
    """int64[N]: events of each of these stays dated at or before the landmark (None: all of them)."""
    bounds = prepared.bounds
    if landmark is None:
        return bounds[stays + 1] - bounds[stays]
    upto = np.concatenate([[0], np.cumsum(prepared.hours <= landmark)])
    return upto[bounds[stays + 1]] - upto[bounds[stays]]


def still_there(prepared: Prepared, stays: NDArray[np.int64], landmark: float | None) -> NDArray[np.bool_]:
    """bool[N]: not known to have left the unit before the landmark, and with an event by then."""
    some = known_events(prepared, stays, landmark) > 0
    if landmark is None:
        return some
    hours = prepared.stays["hours_in_unit"].fill_null(float("inf")).to_numpy()[stays]
    return some & (hours >= landmark)


def tabular_beliefs(
    name: str,
    prepared: Prepared,
    splits: Mapping[str, NDArray[np.int64]],
    tasks: Sequence[Task],
    targets: NDArray[np.float64],
    folder: Path,
    trials: int,
    seed: int,
) -> pl.DataFrame:
    """Fit a model per landmark and target, and return its beliefs in the tuning and held-out stays.

    Args:
        name: logistic or lightgbm.
        prepared: the records.
        splits: positions of the stays of train, tuning and held_out.
        tasks: K tasks, in the order of ``targets``.
        targets: float[N, K] of every stay of the prepared folder, NaN where unknown.
        folder: ``tuning.json``, every setting tried and its loss, is written here.
        trials: settings tried for each landmark and target.
        seed: of the trees.

    Returns:
        the columns of ``beliefs.parquet`` and ``landmark`` (null: end of the window), one row per stay and landmark at
        which it counts; ``hours_since_admission`` is that of the last event the belief has seen, ``modality`` is all.
    """
    reader = SummaryReader(prepared)
    measured = {split: reader.measurements(stays) for split, stays in splits.items()}
    frames, told = [], []
    models: list[Fitted] = []
    before: dict[str, LandmarkStays] = {}
    for landmark in tqdm(LANDMARKS, desc=name, unit="landmark", mininterval=2.0):
        at = {split: _landmark_stays(reader, prepared, splits[split], measured[split], landmark) for split in splits}
        if not before or any(not at[split].same(before[split]) for split in at):
            models = [
                fit_tuned(name, t.kind, _examples(at[TRAIN], y), _examples(at[TUNING], y), trials, seed)
                for t, y in zip(tasks, targets.T, strict=True)
            ]
        before = at
        for task, model in zip(tasks, models, strict=True):
            told.append({"landmark": landmark, "target": task.target, "stays": len(at[TRAIN].stays)}
                        | {"trials": model.trials, "chosen": model.chosen})  # fmt: skip
        for split in (TUNING, HELD_OUT):
            beliefs = {t.target: _predict(m.predict, at[split].features) for t, m in zip(tasks, models, strict=True)}
            frames.append(_frame(prepared, split, at[split], landmark, beliefs, tasks, targets))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tuning.json", json.dumps(told, indent=1))
    return pl.concat(frames)


def _predict(predict: Any, features: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(predict(features), dtype=np.float64) if len(features) else np.empty(0)


def _landmark_stays(
    reader: SummaryReader,
    prepared: Prepared,
    stays: NDArray[np.int64],
    measured: Measurements,
    landmark: float | None,
) -> LandmarkStays:
    counts = still_there(prepared, stays, landmark)
    features = reader.summary(measured, landmark).values[counts]
    return LandmarkStays(stays[counts], known_events(prepared, stays[counts], landmark), features)


def _examples(at: LandmarkStays, targets: NDArray[np.float64]) -> Examples:
    known = np.isfinite(targets[at.stays])
    return Examples(at.features[known], targets[at.stays][known])


def _frame(
    prepared: Prepared,
    split: str,
    at: LandmarkStays,
    landmark: float | None,
    beliefs: Mapping[str, NDArray[np.float64]],
    tasks: Sequence[Task],
    targets: NDArray[np.float64],
) -> pl.DataFrame:
    columns: dict[str, Any] = {
        "stay_id": prepared.stays["stay_id"].to_numpy()[at.stays],
        "split": pl.Series([split] * len(at.stays), dtype=pl.String),
        "landmark": pl.Series([landmark] * len(at.stays), dtype=pl.Float64),
        "event_index": at.events - 1,
        "hours_since_admission": prepared.hours[prepared.bounds[at.stays] + at.events - 1],
        "modality": pl.Series(["all"] * len(at.stays), dtype=pl.String),
    }
    for k, task in enumerate(tasks):
        columns[f"belief_{task.target}"] = beliefs[task.target]
        columns[f"target_{task.target}"] = pl.Series(targets[at.stays, k].astype(np.float64)).fill_nan(None)
    return pl.DataFrame(columns)
