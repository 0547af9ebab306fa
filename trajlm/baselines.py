"""Baselines without encoders: linear models and trees on summary features, refitted for each landmark (method 7).

They learn from exactly the stays that the sequence model of the same run learns from, are tuned on its tuning stays and
believe in the same stays; at a landmark, only stays still in the unit then count, in training as in the report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from trajlm.belief_tables import at_landmark, belief_table
from trajlm.checkpoint import write_text
from trajlm.dataset import Prepared
from trajlm.errors import TrajlmError
from trajlm.metrics import LANDMARKS
from trajlm.schema import HELD_OUT, SCORE_HOURS, SCORE_PREFIX, TRAIN, TUNING
from trajlm.summaries import SummaryReader
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
    score: str | None = None,
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
        score: a severity score of the stays (``score_<name>``) to read instead of summary features, at the landmarks
            from SCORE_HOURS on.

    Returns:
        the columns of ``beliefs.parquet`` and ``landmark`` (null: end of the window), one row per stay and landmark at
        which it counts; ``hours_since_admission`` is that of the last event the belief has seen, ``modality`` is all.
    """
    features = _summaries(prepared, splits) if score is None else _score(prepared, splits, score)
    landmarks = [at for at in LANDMARKS if score is None or at is None or at >= SCORE_HOURS]
    frames, told = [], []
    models: list[Fitted] = []
    before: dict[str, LandmarkStays] = {}
    for landmark in tqdm(landmarks, desc=score or name, unit="landmark", mininterval=2.0):
        at = {split: _landmark_stays(prepared, splits[split], features(split, landmark), landmark) for split in splits}
        if not before or any(not at[split].same(before[split]) for split in at):
            models = [
                fit_tuned(
                    name,
                    t.kind,
                    _examples(prepared, at[TRAIN], t, y),
                    _examples(prepared, at[TUNING], t, y),
                    trials,
                    seed,
                )
                for t, y in zip(tasks, targets.T, strict=True)
            ]
        before = at
        for task, model in zip(tasks, models, strict=True):
            told.append({"landmark": landmark, "target": task.target, "stays": len(at[TRAIN].stays)}
                        | {"trials": model.trials, "chosen": model.chosen})  # fmt: skip
        for split in (TUNING, HELD_OUT):
            beliefs = np.stack([_predict(m.predict, at[split].features) for m in models], axis=-1)
            frames.append(_frame(prepared, split, at[split], landmark, beliefs, tasks, targets))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tuning.json", json.dumps(told, indent=1))
    return pl.concat(frames)


def _predict(predict: Any, features: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(predict(features), dtype=np.float64) if len(features) else np.empty(0)


# Features float64[n, C] of all stays of a split, as of a landmark.
Features = Callable[[str, float | None], NDArray[np.float64]]


def _summaries(prepared: Prepared, splits: Mapping[str, NDArray[np.int64]]) -> Features:
    reader = SummaryReader(prepared)
    measured = {split: reader.measurements(stays) for split, stays in splits.items()}
    return lambda split, landmark: reader.summary(measured[split], landmark).values


def _score(prepared: Prepared, splits: Mapping[str, NDArray[np.int64]], score: str) -> Features:
    """The score alone; not known of a stay that had left the unit before the score's day was over."""
    points = prepared.stays[score].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    hours = prepared.stays["hours_in_unit"].fill_null(float("inf")).to_numpy()
    known = np.where(hours >= SCORE_HOURS, points, np.nan)
    return lambda split, _: known[splits[split], None]


def scores_of(prepared: Prepared) -> list[str]:
    """The severity scores of a prepared folder that some stay has; an error where there is none."""
    found = [c for c in prepared.stays.columns if c.startswith(SCORE_PREFIX) and prepared.stays[c].is_not_null().any()]
    if not found:
        raise TrajlmError(
            f"{prepared.folder}: no severity score is known there; leave severity out of finetuning.baselines"
        )
    return found


def _landmark_stays(
    prepared: Prepared, stays: NDArray[np.int64], features: NDArray[np.float64], landmark: float | None
) -> LandmarkStays:
    counts = still_there(prepared, stays, landmark)
    return LandmarkStays(stays[counts], known_events(prepared, stays[counts], landmark), features[counts])


def _last_hours(prepared: Prepared, at: LandmarkStays) -> NDArray[np.float64]:
    """Of the last event that is known of each stay."""
    return prepared.hours[prepared.bounds[at.stays] + at.events - 1]


def _targets(prepared: Prepared, at: LandmarkStays, task: Task, targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """float64[n] of the stays that count, from those of every stay; NaN where unknown."""
    return task.at(torch.from_numpy(targets[at.stays]), torch.from_numpy(_last_hours(prepared, at))).numpy()


def _examples(prepared: Prepared, at: LandmarkStays, task: Task, targets: NDArray[np.float64]) -> Examples:
    own = _targets(prepared, at, task, targets)
    known = np.isfinite(own)
    return Examples(at.features[known], own[known])


def _frame(
    prepared: Prepared,
    split: str,
    at: LandmarkStays,
    landmark: float | None,
    beliefs: NDArray[np.float64],
    tasks: Sequence[Task],
    targets: NDArray[np.float64],
) -> pl.DataFrame:
    own = [_targets(prepared, at, task, targets[:, k]) for k, task in enumerate(tasks)]
    table = belief_table(
        prepared.stays["stay_id"].to_numpy()[at.stays],
        split,
        at.events - 1,
        _last_hours(prepared, at),
        "all",
        tasks,
        beliefs,
        np.stack(own, axis=-1),
    )
    return at_landmark(table, landmark)
