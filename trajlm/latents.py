"""Frozen encoders run once over every event; latents are memory-mapped and served as batches of trajectories."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trajlm.checkpoint import write_text
from trajlm.dataset import Prepared
from trajlm.encoders.aligned import AlignedEncoders

CHUNK = 64  # stays encoded at once


@dataclass
class TrajectoryBatch:
    """B timelines of up to S events, right-padded.

    Attributes:
        stay_ids: int64[B].
        latents: float[B, S, D].
        state: float[B, S, V], the carried-forward state of the event's own features (:class:`CarriedState`: value,
            whether ever observed, log(1 + hours since); 3 per feature), zero beyond them and at padding.
        modality: int64[B, S], position in the model's modalities; 0 at padding.
        hours: float64[B, S], hours since admission; 0 at padding.
        event_index: int64[B, S], position of the event in the stay's whole timeline; 0 at padding.
        present: bool[B, S], False at padding.
        targets: float[B, K], NaN where unknown; K tasks in order.
    """

    stay_ids: Tensor
    latents: Tensor
    state: Tensor
    modality: Tensor
    hours: Tensor
    event_index: Tensor
    present: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        b, s, _ = self.latents.shape
        for name in ("modality", "hours", "event_index", "present"):
            if tuple(getattr(self, name).shape) != (b, s):
                raise ValueError(f"trajectory batch: expected {name} [{b}, {s}], came {getattr(self, name).shape}")
        if tuple(self.state.shape[:2]) != (b, s):
            raise ValueError(f"trajectory batch: expected state [{b}, {s}, V], came {tuple(self.state.shape)}")
        if len(self.stay_ids) != b or len(self.targets) != b:
            raise ValueError(f"trajectory batch: {b} timelines, {len(self.stay_ids)} ids, {len(self.targets)} targets")
        if not self.present[:, 0].all() or (self.present[:, 1:] & ~self.present[:, :-1]).any():
            raise ValueError("trajectory batch: every timeline needs an event, and padding belongs at the end")
        if not self.latents[self.present].isfinite().all():
            raise ValueError("trajectory batch: latents are not finite; the event was never encoded")

    def to(self, device: torch.device) -> TrajectoryBatch:
        """The same batch on a device."""
        return TrajectoryBatch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def select(self, stays: Tensor) -> TrajectoryBatch:
        """The timelines of ``stays`` bool[B]."""
        return TrajectoryBatch(*(getattr(self, field.name)[stays] for field in fields(self)))

    def followed_by(self, later: TrajectoryBatch) -> TrajectoryBatch:
        """These timelines, none of them padded, with the events of ``later`` after them."""
        joined = {
            name: torch.cat([getattr(self, name), getattr(later, name)], dim=1)
            for name in ("latents", "state", "modality", "hours", "event_index", "present")
        }
        return replace(later, **joined)

    def keep(self, kept: Tensor) -> TrajectoryBatch:
        """The same timelines with only the events of ``kept`` bool[B, S], moved together again."""
        kept = kept & self.present
        longest = int(kept.sum(dim=1).max())
        order = (~kept).long().argsort(dim=1, stable=True)[:, :longest]
        present = kept.gather(1, order)

        def moved(wide: Tensor) -> Tensor:
            chosen = wide.gather(1, order[..., None].expand(-1, -1, wide.shape[-1]))
            return chosen.masked_fill(~present[..., None], 0.0)

        return replace(
            self,
            latents=moved(self.latents),
            state=moved(self.state),
            modality=self.modality.gather(1, order).masked_fill(~present, 0),
            hours=self.hours.gather(1, order).masked_fill(~present, 0.0),
            event_index=self.event_index.gather(1, order).masked_fill(~present, 0),
            present=present,
        )


@dataclass
class StaticBatch:
    """B stays, one latent per modality.

    Attributes:
        stay_ids: int64[B].
        latents: float[B, M, D], missing tokens where absent.
        present: bool[B, M].
        targets: float[B, K], NaN where unknown.
    """

    stay_ids: Tensor
    latents: Tensor
    present: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> StaticBatch:
        """The same batch on a device."""
        return StaticBatch(*(getattr(self, n).to(device) for n in ("stay_ids", "latents", "present", "targets")))


class Latents:
    """Cached latents of a prepared folder.

    Attributes:
        events: float32[E, D], row for row the prepared folder's events; NaN for events that were not encoded.
        states: float32[E, V], their carried-forward state; NaN likewise.
        stays: float32[N, M, D], the whole stay's latent per modality, missing tokens where absent.
        present: bool[N, M].
        modalities: M names.
    """

    def __init__(self, folder: Path, prepared: Prepared, modalities: Sequence[str]) -> None:
        self.events: np.ndarray = np.load(folder / "events.npy", mmap_mode="r", allow_pickle=False)
        self.states: np.ndarray = np.load(folder / "states.npy", mmap_mode="r", allow_pickle=False)
        self.stays: np.ndarray = np.load(folder / "stays.npy", mmap_mode="r", allow_pickle=False)
        self.present: np.ndarray = np.load(folder / "present.npy", mmap_mode="r", allow_pickle=False)
        self.modalities = tuple(modalities)
        self._prepared = prepared
        names = [m.name for m in prepared.modalities]
        to_model = {names.index(name): i for i, name in enumerate(self.modalities)}
        self._model_index = np.array([to_model.get(i, -1) for i in range(len(names))])
        self._static = np.array([m.static for m in prepared.modalities])

    def rows(self, stay: int, max_events: int) -> np.ndarray:
        """Rows of the stay's encoded events, at most ``max_events``: all static ones, then the earliest."""
        rows = np.arange(self._prepared.bounds[stay], self._prepared.bounds[stay + 1])
        kinds = self._prepared.modality_index[rows]
        rows, kinds = rows[self._model_index[kinds] >= 0], kinds[self._model_index[kinds] >= 0]
        return rows[static_and_earliest(self._static[kinds], max_events)]

    def trajectories(self, stays: np.ndarray, targets: Tensor, max_events: int) -> TrajectoryBatch:
        """The timelines of these stays (positions); ``targets`` float[B, K] goes along."""
        rows = [self.rows(stay, max_events) for stay in stays]
        longest, width = max(len(r) for r in rows), self.events.shape[1]
        latents = np.zeros((len(rows), longest, width), dtype=np.float32)
        state = np.zeros((len(rows), longest, self.states.shape[1]), dtype=np.float32)
        modality = np.zeros((len(rows), longest), dtype=np.int64)
        hours = np.zeros((len(rows), longest))
        event_index = np.zeros((len(rows), longest), dtype=np.int64)
        present = np.zeros((len(rows), longest), dtype=bool)
        for i, r in enumerate(rows):
            latents[i, : len(r)] = self.events[r]
            state[i, : len(r)] = self.states[r]
            modality[i, : len(r)] = self._model_index[self._prepared.modality_index[r]]
            hours[i, : len(r)] = self._prepared.hours[r]
            event_index[i, : len(r)] = r - self._prepared.bounds[stays[i]]
            present[i, : len(r)] = True
        return TrajectoryBatch(
            stay_ids=torch.from_numpy(self._prepared.stays["stay_id"].to_numpy()[stays]),
            latents=torch.from_numpy(latents),
            state=torch.from_numpy(state),
            modality=torch.from_numpy(modality),
            hours=torch.from_numpy(hours),
            event_index=torch.from_numpy(event_index),
            present=torch.from_numpy(present),
            targets=targets,
        )

    def last_events(self, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64[N] index and float64[N] hours since admission of the last event of each of these stays."""
        bounds = self._prepared.bounds
        return bounds[stays + 1] - bounds[stays] - 1, self._prepared.hours[bounds[stays + 1] - 1]

    def static(self, stays: np.ndarray, targets: Tensor) -> StaticBatch:
        """One latent per modality of these stays."""
        stay_ids = torch.from_numpy(self._prepared.stays["stay_id"].to_numpy()[stays])
        return StaticBatch(
            stay_ids, torch.from_numpy(self.stays[stays]), torch.from_numpy(self.present[stays]), targets
        )


def static_and_earliest(static: np.ndarray, most: int) -> np.ndarray:
    """bool[S]: which of a timeline's events fit into ``most``: every static one, then the earliest others.

    Static events alone may exceed ``most``; they are never left out. Dropping the oldest instead would let the length
    of the whole stay decide what an early belief may see.
    """
    room = max(0, most - int(static.sum()))
    return static | (np.cumsum(~static) <= room)


def cache_latents(prepared: Prepared, encoders: AlignedEncoders, stays: np.ndarray, folder: Path, key: str) -> Latents:
    """Encode every event of these stays once, or open what an earlier call with the same key left.

    Args:
        prepared: the records.
        encoders: frozen; put into evaluation mode.
        stays: positions of the stays to encode.
        folder: where the arrays lie.
        key: hash of encoders and records; another key means another cache, never a stale one.
    """
    note = folder / "key.json"
    identity = {"key": key, "stays": len(stays)}
    if not note.exists() or json.loads(note.read_text()) != identity:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _encode(prepared, encoders.eval(), stays, folder)
        write_text(note, json.dumps(identity))
    return Latents(folder, prepared, encoders.modalities)


@torch.no_grad()
def _encode(prepared: Prepared, encoders: AlignedEncoders, stays: np.ndarray, folder: Path) -> None:
    width = encoders.latent_width
    shape = (len(prepared.stays), len(encoders.modalities))
    device = encoders.missing_tokens.device

    def array(name: str, *dims: int) -> np.memmap:
        return np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float32, shape=dims)

    events, whole = array("events.npy", len(prepared.hours), width), array("stays.npy", *shape, width)
    states = array("states.npy", len(prepared.hours), encoders.state_width)
    events[:], whole[:], states[:] = np.nan, np.nan, np.nan
    present = np.zeros(shape, dtype=bool)
    with tqdm(total=len(stays), desc="latents", unit="stay", mininterval=2.0) as progress:
        for start in range(0, len(stays), CHUNK):
            chunk = stays[start : start + CHUNK]
            batch = prepared.stay_batch(chunk, encoders.modalities)
            whole[chunk] = encoders(batch.to(device)).float().cpu().numpy()
            present[chunk] = batch.present.numpy()
            for column, name in enumerate(encoders.modalities):
                held = chunk[batch.present[:, column].numpy()]
                if len(held):
                    view, rows = prepared.stores[name].event_view(held)
                    view = view.to(device)
                    events[rows] = encoders.encode(name, view).float().cpu().numpy()
                    states[rows] = encoders.carried_state(view).cpu().numpy()
            progress.update(len(chunk))
    events.flush()
    states.flush()
    whole.flush()
    np.save(folder / "present.npy", present, allow_pickle=False)
