"""Modalities removed at test time, each one and each pair: how much worse the beliefs of a whole cohort become."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from trajlm.alignment import inject_missing_tokens
from trajlm.arms import BASELINE_ARMS, SEQUENCE, paired_metrics
from trajlm.assemble import load_trajectory_model
from trajlm.belief_tables import belief_columns
from trajlm.checkpoint import data_fingerprint, read_run
from trajlm.columns import read_note
from trajlm.dataset import load_prepared
from trajlm.errors import TrajlmError
from trajlm.fusions import FUSIONS
from trajlm.interpret.ablation import cohort_batches, known_targets, last_hours
from trajlm.latents import Latents, StaticBatch, TrajectoryBatch
from trajlm.metrics import METRICS, Kind, bootstrap_interval
from trajlm.schema import HELD_OUT, NOTHING
from trajlm.static import StaticBaseline, load_fusion
from trajlm.tasks import beliefs_at, held_on, targets_at
from trajlm.trajectory import TrajectoryModel

REMOVAL_COLUMNS: dict[str, pl.DataType] = {
    "arm": pl.String(), "removed": pl.String(), "target": pl.String(), "metric": pl.String(), "value": pl.Float64(),
    "low": pl.Float64(), "high": pl.Float64(), "difference": pl.Float64(), "difference_low": pl.Float64(),
    "difference_high": pl.Float64(), "stays": pl.Int64(), "changed": pl.Int64(),
}  # fmt: skip


def removals(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Nothing, each modality, each pair."""
    return [(), *((name,) for name in modalities), *combinations(modalities, 2)]


def removal_name(removed: Sequence[str]) -> str:
    """As ``removed`` of a table says it."""
    return " + ".join(removed) or NOTHING


@torch.no_grad()
def sequence_without(
    model: TrajectoryModel, batches: Iterable[TrajectoryBatch], sets: Sequence[tuple[str, ...]]
) -> pl.DataFrame:
    """The last belief of every stay with the events of each set of modalities removed.

    Returns:
        one row per stay and set under which an event is left: stay_id, removed, changed (whether the stay lost an
        event), ``belief_<target>`` and ``target_<target>`` (null where unknown), both at the hour of the stay's own
        last event: a belief stated before is held on until then (:func:`trajlm.tasks.held_on`).
    """
    model.eval()
    frames = []
    for batch in batches:
        ends = last_hours(batch)
        targets = targets_at(model.fitted_tasks, batch.targets, ends)
        for removed in sets:
            lost = torch.isin(batch.modality, torch.tensor([model.encoders.modalities.index(m) for m in removed],
                                                           device=batch.modality.device)) & batch.present  # fmt: skip
            left = (batch.present & ~lost).any(dim=1)
            if left.any():
                kept = batch.select(left).keep(~lost[left])
                rows, last = torch.arange(int(left.sum())), kept.present.sum(dim=1).cpu() - 1
                readouts, passed = model(kept).readouts.cpu()[rows, last], (ends[left] - last_hours(kept)).cpu()
                changed = lost[left].any(dim=1)
                frames.append(_frame(model, kept.stay_ids, removed, changed, readouts, targets[left], passed))
    return pl.concat(frames)


@torch.no_grad()
def fusion_without(
    model: TrajectoryModel, fusion: StaticBaseline, batch: StaticBatch, sets: Sequence[tuple[str, ...]]
) -> pl.DataFrame:
    """The same of a static fusion: the removed modalities' latents give way to their missing tokens."""
    fusion.eval()
    frames = []
    tokens = model.encoders.missing_tokens.cpu()
    for removed in sets:
        lost = torch.tensor([name in removed for name in model.encoders.modalities]) & batch.present
        left = (batch.present & ~lost).any(dim=1)
        latents = inject_missing_tokens(batch.latents[left], (batch.present & ~lost)[left], tokens)
        present, hours = (batch.present & ~lost)[left], batch.hours[left]
        kept = StaticBatch(batch.stay_ids[left], latents, present, batch.targets[left], hours)
        changed, targets = lost[left].any(dim=1), targets_at(model.fitted_tasks, kept.targets, hours)
        readouts, passed = fusion.readouts(kept), torch.zeros(len(hours), dtype=hours.dtype)
        frames.append(_frame(model, kept.stay_ids, removed, changed, readouts, targets, passed))
    return pl.concat(frames)


def _frame(
    model: TrajectoryModel,
    stay_ids: Tensor,
    removed: Sequence[str],
    changed: Tensor,
    readouts: Tensor,
    targets: Tensor,
    passed: Tensor,
) -> pl.DataFrame:
    tasks = [task.cpu() for task in model.fitted_tasks]
    beliefs = held_on(tasks, beliefs_at(tasks, readouts), passed).double().numpy()
    columns = {
        "stay_id": stay_ids.cpu().numpy(),
        "removed": [removal_name(removed)] * len(stay_ids),
        "changed": changed.cpu().numpy(),
    }
    return pl.DataFrame(columns | belief_columns(tasks, beliefs, targets.cpu().double().numpy()))


def removal_rows(
    beliefs: pl.DataFrame, stays: pl.DataFrame, targets: Sequence[tuple[str, Kind]], arm: str, resamples: int, seed: int
) -> pl.DataFrame:
    """Figures with each set removed, and their paired difference to nothing removed, on the same stays.

    Args:
        beliefs: of one of the functions above.
        stays: ``stay_id, subject_id``.
        targets: (name, kind).
        arm: whose beliefs these are.
        resamples, seed: of the patient-level bootstrap.

    Returns:
        REMOVAL_COLUMNS, null where undefined; ``changed`` counts the stays that lost something.
    """
    rows: list[tuple[object, ...]] = []
    whole = beliefs.filter(pl.col("removed") == NOTHING)
    for removed in beliefs["removed"].unique(maintain_order=True):
        own = beliefs.filter(pl.col("removed") == removed).join(whole, on="stay_id", suffix="_whole")
        own = own.join(stays.select("stay_id", "subject_id"), on="stay_id").sort("stay_id")
        for target, kind in targets:
            known = own.filter(pl.col(f"target_{target}").is_not_null())
            names = (f"target_{target}", f"belief_{target}", f"belief_{target}_whole")
            y, b, before = (known[name].cast(pl.Float64).to_numpy() for name in names)
            people = known["subject_id"].to_numpy()
            for row in paired_metrics(kind, y, b, before, people, resamples, seed) if known.height else ():
                metric = METRICS[row["metric"]][0]
                value, ends = float(metric(y, b)), bootstrap_interval(metric, y, b, people, resamples, seed)
                rows.append((arm, removed, target, row["metric"], value, *ends, row["value"], row["low"], row["high"],
                             known.height, int(known["changed"].sum())))  # fmt: skip
    return pl.DataFrame(rows, schema=REMOVAL_COLUMNS, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))


def run_removals(run: Path, targets: Sequence[tuple[str, Kind]], resamples: int) -> pl.DataFrame:
    """REMOVAL_COLUMNS of a run's sequence model and static fusions, on its held-out stays.

    Raises:
        TrajlmError: the prepared folder or the latents that the run was made from are no longer there.
    """
    about = read_run(run)
    prepared = load_prepared(about["recipe"]["data"])
    if data_fingerprint(prepared.folder) != about["inputs"]["data"]:
        raise TrajlmError(f"{prepared.folder} is no longer what {run} was made from")
    if read_note(run / "latents") is None:
        raise TrajlmError(f"{run} has no latents/ any more: modalities cannot be removed from it")
    model = load_trajectory_model(run)
    latents = Latents(run / "latents", prepared, model.encoders.modalities)
    beliefs = pl.read_parquet(run / "beliefs.parquet").filter(pl.col("split") == HELD_OUT)
    positions = np.array([prepared.position(stay) for stay in beliefs["stay_id"].unique().sort()])
    sets = removals(model.encoders.modalities)
    found = {SEQUENCE: sequence_without(model, cohort_batches(model, prepared, latents, positions), sets)}
    for name in FUSIONS:
        fusion = load_fusion(run, name, latents, model.fitted_tasks)
        if fusion is not None:
            batch = latents.static(positions, known_targets(model, prepared, positions))
            found[BASELINE_ARMS[name]] = fusion_without(model, fusion, batch, sets)
    frames = [removal_rows(frame, prepared.stays, targets, arm, resamples, 0) for arm, frame in found.items()]
    return pl.concat(frames)
