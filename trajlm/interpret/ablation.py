"""What happens when a modality goes missing: beliefs and attention of a whole cohort, before and after (paper, 4.3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch

from trajlm.anchoring import read_with_static_share
from trajlm.dataset import Prepared
from trajlm.interpret.attention import shown_layer
from trajlm.interpret.edits import Ablation
from trajlm.latents import Latents, TrajectoryBatch
from trajlm.schema import NOTHING
from trajlm.tasks import beliefs_at, held_on, targets_at
from trajlm.trajectory import TrajectoryModel

MEANING = 2  # counted up when what an ablation tells changes: what a report kept of the old ones is then found anew


def known_targets(model: TrajectoryModel, prepared: Prepared, positions: np.ndarray) -> torch.Tensor:
    """float[N, K]: targets of these stays, NaN where unknown or outside what a task asks for."""
    columns = [
        prepared.stays[task.column].cast(pl.Float32).fill_null(float("nan")).to_numpy() for task in model.fitted_tasks
    ]
    known = torch.from_numpy(np.stack([column[positions] for column in columns], axis=1))
    usable = torch.stack([t.usable(known[:, k]) for k, t in enumerate(model.fitted_tasks)], dim=1)
    return torch.where(usable, known, float("nan"))


def cohort_batches(
    model: TrajectoryModel, prepared: Prepared, latents: Latents, positions: np.ndarray, size: int = 16
) -> Iterator[TrajectoryBatch]:
    """The timelines of these stays, ``size`` at a time in the order given, on the model's device.

    Stays in order of their length leave little padding.
    """
    for start in range(0, len(positions), size):
        stays = positions[start : start + size]
        targets = known_targets(model, prepared, stays)
        yield latents.trajectories(stays, targets, model.max_events).to(model.predict.device)


@torch.no_grad()
def cohort_ablation(
    model: TrajectoryModel, batches: Iterable[TrajectoryBatch], modalities: Sequence[str], layer: int | None = None
) -> pl.DataFrame:
    """Last belief and attention on static events of every stay, with nothing and with each modality ablated.

    Args:
        model: fine-tuned.
        batches: the cohort's timelines.
        modalities: to ablate, one at a time.
        layer: whose attention; None is the one that :func:`trajlm.interpret.attention.shown_layer` names, if any.

    Returns:
        one row per stay, and one more per modality it holds: stay_id, ablated ("nothing" or the modality), events
        left, event_index and hours_since_admission of the last event left, static_share (null without attention to
        show, or without a static event), and for each target t ``belief_<t>`` and ``target_<t>``, both at the hour of
        the stay's own last event: a belief that was stated earlier, as what is ablated came last, is held on until then
        (:func:`trajlm.tasks.held_on`). A stay that holds only the ablated modality has no belief left: its row says 0
        events and null.
    """
    model.eval()
    layer = shown_layer(model) if layer is None else layer
    found: list[dict[str, Any]] = []
    for batch in batches:
        ends = last_hours(batch)
        batch = replace(batch, targets=targets_at(model.fitted_tasks, batch.targets, ends))
        found.append(_last_beliefs(model, batch, NOTHING, layer, ends))
        for modality in modalities:
            kept = batch.modality != model.encoders.modalities.index(modality)
            holds = (~kept & batch.present).any(dim=1)
            remains = (kept & batch.present).any(dim=1)
            if (holds & remains).any():
                ablated = batch.select(holds & remains).keep(kept[holds & remains])
                found.append(_last_beliefs(model, ablated, modality, layer, ends[holds & remains]))
            if (holds & ~remains).any():
                found.append(_no_beliefs(model, batch.select(holds & ~remains), modality))
    names = list(found[0])
    columns = {name: np.concatenate([part[name] for part in found]) for name in names}
    frame = pl.DataFrame(columns).with_columns(pl.col(pl.Float64).fill_nan(None))
    return frame.with_columns(pl.col("event_index").cast(pl.Int64))


def last_hours(batch: TrajectoryBatch) -> torch.Tensor:
    """float64[B]: hours since admission of each timeline's last event."""
    return batch.hours.gather(1, batch.present.sum(dim=1, keepdim=True) - 1)[:, 0]


def _last_beliefs(
    model: TrajectoryModel, batch: TrajectoryBatch, ablated: str, layer: int | None, ends: torch.Tensor
) -> dict[str, np.ndarray]:
    """Columns of :func:`cohort_ablation`, beliefs held on to the hours ``ends``; NaN where unknown."""
    last = batch.present.sum(dim=1) - 1
    rows = torch.arange(len(last), device=last.device)
    if layer is None:
        output, share = model(batch), torch.full((len(last),), float("nan"))
    else:
        output, share = read_with_static_share(model, batch, layer)
    stated = beliefs_at(model.fitted_tasks, output.readouts[rows, last])
    beliefs = held_on(model.fitted_tasks, stated, ends - last_hours(batch)).cpu().double().numpy()
    found = (last + 1, batch.event_index[rows, last], batch.hours[rows, last], share)
    return _columns(model, batch, ablated, [part.cpu().numpy() for part in found], list(beliefs.T))


def _no_beliefs(model: TrajectoryModel, batch: TrajectoryBatch, ablated: str) -> dict[str, np.ndarray]:
    nothing = np.full(len(batch.stay_ids), np.nan)
    found = [np.zeros(len(nothing), dtype=np.int64), nothing, nothing, nothing]
    return _columns(model, batch, ablated, found, [nothing] * len(model.targets))


def _columns(
    model: TrajectoryModel,
    batch: TrajectoryBatch,
    ablated: str,
    found: Sequence[np.ndarray],
    beliefs: Sequence[np.ndarray],
) -> dict[str, np.ndarray]:
    names = ("events", "event_index", "hours_since_admission", "static_share")
    columns = {"stay_id": batch.stay_ids.cpu().numpy(), "ablated": np.full(len(batch.stay_ids), ablated)}
    for name, values in zip(names, found, strict=True):
        columns[name] = values if name == "events" else values.astype(np.float64)
    for k, target in enumerate(model.targets):
        columns[f"belief_{target}"] = beliefs[k]
        columns[f"target_{target}"] = batch.targets[:, k].cpu().double().numpy()
    return columns


@torch.no_grad()
def ablation_trajectories(
    model: TrajectoryModel, batch: TrajectoryBatch, ablations: Sequence[Ablation]
) -> pl.DataFrame:
    """Beliefs of one stay or many after every event, with nothing ablated and under each ablation.

    Args:
        model: fine-tuned.
        batch: of the stays (:meth:`TrajectoryModel.encode_timeline`, or :func:`cohort_batches`).
        ablations: what to take away; their names must differ.

    Returns:
        one row per stay, ablation and event that is still there: stay_id, ablated ("nothing" or the ablation's name),
        event_index, hours_since_admission, modality, replaced (the event shows its missing token), and for each target
        ``belief_<t>`` and ``drift_<t>``: the belief minus that after the same event with nothing ablated. A stay that
        an ablation does not touch has no rows for it, nor has one that would keep no event.
    """
    model.eval()
    whole = model.belief_frame(batch, model(batch).readouts).drop("split")
    frames = [whole.with_columns(pl.lit(NOTHING).alias("ablated"), pl.lit(False).alias("replaced"))]
    for ablation in ablations:
        chosen = ablation.chosen(model, batch)
        usable = chosen.any(dim=1)
        if ablation.how == "removed":
            usable &= (batch.present & ~chosen).any(dim=1)
        if usable.any():
            touched = batch.select(usable)
            ablated = ablation.apply(model, touched)
            frame = model.belief_frame(ablated, model(ablated).readouts).drop("split")
            taken = pl.DataFrame({"stay_id": touched.stay_ids[chosen[usable].nonzero()[:, 0]].cpu().numpy(),
                                  "event_index": touched.event_index[chosen[usable]].cpu().numpy()})  # fmt: skip
            frame = frame.join(
                taken.with_columns(replaced=True), on=["stay_id", "event_index"], how="left", maintain_order="left"
            )
            frames.append(
                frame.with_columns(pl.lit(ablation.name).alias("ablated"), pl.col("replaced").fill_null(False))
            )
    return _with_drift(pl.concat(frames, how="diagonal"), whole, model.targets)


def _with_drift(frames: pl.DataFrame, whole: pl.DataFrame, targets: Sequence[str]) -> pl.DataFrame:
    before = whole.select("stay_id", "event_index", *(pl.col(f"belief_{t}").alias(f"before_{t}") for t in targets))
    both = frames.join(before, on=["stay_id", "event_index"], how="left", maintain_order="left")
    drifts = [(pl.col(f"belief_{t}") - pl.col(f"before_{t}")).alias(f"drift_{t}") for t in targets]
    columns = ["stay_id", "ablated", "event_index", "hours_since_admission", "modality", "replaced"]
    beliefs = [name for t in targets for name in (f"belief_{t}", f"drift_{t}")]
    return both.with_columns(drifts).select(*columns, *beliefs)


def anchoring(ablations: pl.DataFrame, targets: Sequence[str]) -> pl.DataFrame:
    """Every stay before and after each ablation.

    Returns:
        stay_id, ablated, target, share_before, share_after (attention on static events), belief_before, belief_after.
    """
    before = ablations.filter(pl.col("ablated") == NOTHING)
    after = ablations.filter((pl.col("ablated") != NOTHING) & (pl.col("events") > 0))
    both = after.join(before, on="stay_id", suffix="_before")
    frames = [
        both.select(
            "stay_id",
            "ablated",
            pl.lit(target).alias("target"),
            pl.col("static_share_before").alias("share_before"),
            pl.col("static_share").alias("share_after"),
            pl.col(f"belief_{target}_before").alias("belief_before"),
            pl.col(f"belief_{target}").alias("belief_after"),
        )
        for target in targets
    ]
    return pl.concat(frames)


def most_divergent_stays(changes: pl.DataFrame, target: str, most: int) -> list[int]:
    """Stays whose last belief moved most under any ablation, largest first."""
    moved = (
        changes.filter(pl.col("target") == target)
        .with_columns((pl.col("belief_after") - pl.col("belief_before")).abs().alias("moved"))
        .group_by("stay_id")
        .agg(pl.col("moved").max())
        .sort(["moved", "stay_id"], descending=[True, False])
    )
    return [int(s) for s in moved["stay_id"].head(most)]


def ablated_cohort(ablations: pl.DataFrame, modality: str) -> pl.DataFrame:
    """The whole cohort as it would look without a modality: stays that never held it keep their belief.

    Stays that hold nothing else have no belief then and are left out.
    """
    changed = ablations.filter(pl.col("ablated") == modality)
    untouched = ablations.filter(pl.col("ablated") == NOTHING).join(changed, on="stay_id", how="anti")
    return pl.concat([changed.filter(pl.col("events") > 0), untouched]).sort("stay_id")
