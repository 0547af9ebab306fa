"""Beliefs as rows of ``beliefs.parquet``, in the columns that every arm shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch import Tensor

from trajlm.latents import TrajectoryBatch
from trajlm.tasks import Task, beliefs_at, targets_at


def belief_columns(
    tasks: Sequence[Task], beliefs: NDArray[np.floating[Any]], targets: NDArray[np.floating[Any]]
) -> dict[str, pl.Series]:
    """``belief_<target>`` and ``target_<target>`` (null where unknown) of each task, float64.

    Args:
        tasks: K of them.
        beliefs: float[R, K], probabilities or hours.
        targets: float[R, K], NaN where unknown.
    """
    columns = {}
    for k, task in enumerate(tasks):
        columns[f"belief_{task.target}"] = pl.Series(beliefs[:, k].astype(np.float64))
        columns[f"target_{task.target}"] = pl.Series(targets[:, k].astype(np.float64)).fill_nan(None)
    return columns


def belief_table(
    stay_ids: NDArray[np.int64],
    split: str | None,
    event_index: NDArray[np.int64],
    hours: NDArray[np.float64],
    modality: str | NDArray[np.str_],
    tasks: Sequence[Task],
    beliefs: NDArray[np.floating[Any]],
    targets: NDArray[np.floating[Any]],
) -> pl.DataFrame:
    """One row per belief: stay_id, split, event_index, hours_since_admission, modality, and two columns per target.

    Args:
        stay_ids: int64[R].
        split: of all these stays; None leaves the column empty.
        event_index: int64[R], place in the timeline of the last event that a belief has seen.
        hours: float64[R], since admission, of that event.
        modality: of that event, one for all or str[R].
        tasks, beliefs, targets: of :func:`belief_columns`.
    """
    rows = len(stay_ids)
    columns: dict[str, Any] = {
        "stay_id": stay_ids,
        "split": pl.Series([split] * rows, dtype=pl.String),
        "event_index": event_index,
        "hours_since_admission": hours,
        "modality": pl.Series([modality] * rows if isinstance(modality, str) else modality, dtype=pl.String),
    }
    return pl.DataFrame(columns | belief_columns(tasks, beliefs, targets))


def at_landmark(beliefs: pl.DataFrame, landmark: float | None) -> pl.DataFrame:
    """A :func:`belief_table` of a model refitted for a landmark (None: the end of the window), which a column tells."""
    return beliefs.clone().insert_column(2, pl.Series("landmark", [landmark] * len(beliefs), dtype=pl.Float64))


def batch_beliefs(
    batch: TrajectoryBatch,
    chosen: Tensor,
    modalities: Sequence[str],
    tasks: Sequence[Task],
    readouts: Tensor,
) -> pl.DataFrame:
    """The :func:`belief_table` of a batch, without its split.

    Args:
        batch: of B stays and S events.
        chosen: bool[B, S], the beliefs to tell.
        modalities: names, in the order of ``batch.modality``.
        tasks: K of them.
        readouts: float[B, S, K].
    """
    rows = chosen.cpu()
    targets = targets_at(tasks, batch.targets[:, None].expand(-1, batch.hours.shape[1], -1), batch.hours)
    stays = batch.stay_ids[:, None].expand_as(batch.event_index)
    return belief_table(
        stays.cpu()[rows].numpy(),
        None,
        batch.event_index.cpu()[rows].numpy(),
        batch.hours.cpu()[rows].numpy(),
        np.array(modalities)[batch.modality.cpu()[rows].numpy()],
        tasks,
        beliefs_at(tasks, readouts).detach().cpu()[rows].double().numpy(),
        targets.detach().cpu()[rows].double().numpy(),
    )
