"""Frozen encoders run once over every event; latents are memory-mapped and served as batches of trajectories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trajlm.checkpoint import fingerprint
from trajlm.columns import ColumnWriter, column_folder, open_column, read_note
from trajlm.dataset import ModalityStore, Prepared
from trajlm.encoders.aligned import AlignedEncoders, Reach
from trajlm.errors import TrajlmError
from trajlm.views import STATE_PARTS, NumericView, View, carried_forward, runs

CHUNK = 64  # stays encoded at once
EVENTS_AT_ONCE = 500_000  # about so many are read from the prepared folder at once


@dataclass
class TrajectoryBatch:
    """B timelines of up to S events, right-padded.

    Attributes:
        stay_ids: int64[B].
        latents: float[B, S, D].
        state: float[B, S, V], the carried-forward state of the event's own features (:class:`CarriedState`: value,
            whether ever observed, log(1 + hours since), mean so far; 4 per feature), zero beyond them and at padding.
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
        hours: float[B], hours since admission of the last event seen.
    """

    stay_ids: Tensor
    latents: Tensor
    present: Tensor
    targets: Tensor
    hours: Tensor

    def to(self, device: torch.device) -> StaticBatch:
        """The same batch on a device."""
        return StaticBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


class Latents:
    """Cached latents of a prepared folder, memory-mapped. The sequence model reads nothing else of its events.

    Of every event that the model reads there is one row, stay after stay in order of time. Beside its latent stand its
    own standardised measurements; the carried-forward state, which is far wider, is put together again when a batch is.

    Attributes:
        events: float32[E, W] (:meth:`AlignedEncoders.event_width`).
        hours: float64[E], hours since admission.
        modality: int16[E], position in ``modalities``.
        event_index: int32[E], position in the stay's whole timeline.
        stays: float32[N, M, D], the whole stay's latent per modality, missing tokens where absent; N encoded stays.
        present: bool[N, M].
        modalities: M names.
    """

    def __init__(self, folder: Path, prepared: Prepared, modalities: Sequence[str]) -> None:
        about = read_note(folder)
        if about is None:
            raise TrajlmError(f"{folder} holds no whole latents; run finetune.py again to encode the events")
        mapped = {name: open_column(folder, about, name) for name in about["columns"]}
        self.events, self.hours, self.modality = mapped["events"], mapped["hours"], mapped["modality"]
        self.event_index, self.stays, self.present = mapped["event_index"], mapped["stays"], mapped["present"]
        self._measured, self._columns, self._values = mapped["measured"], mapped["columns"], mapped["values"]
        self.modalities = tuple(modalities)
        self._cells = np.concatenate([[0], np.cumsum(self._measured, dtype=np.int64)])
        self._place = np.full(len(prepared.stays), -1)
        self._place[mapped["positions"]] = np.arange(len(mapped["positions"]))
        self._bounds = np.concatenate([[0], np.cumsum(mapped["counts"], dtype=np.int64)])
        self._features = [sum(f.modality == m for f in prepared.features) for m in self.modalities]
        listed = {m.name: m.static for m in prepared.modalities}
        self._static = np.array([listed[m] for m in self.modalities])
        self._stay_ids = prepared.stays["stay_id"].to_numpy()
        self._prepared = prepared

    def places(self, stays: np.ndarray) -> np.ndarray:
        """int[N]: where the cache holds these stays (positions)."""
        places = self._place[stays]
        if (places < 0).any():
            raise ValueError(f"stay {self._stay_ids[stays[np.argmin(places)]]} was never encoded")
        return places

    def rows(self, stay: int, max_events: int) -> np.ndarray:
        """Rows of the stay's events that are read (:func:`fits`)."""
        place = int(self.places(np.array([stay]))[0])
        rows = np.arange(self._bounds[place], self._bounds[place + 1])
        return rows[fits(self._static[self.modality[rows]], max_events)]

    def trajectories(self, stays: np.ndarray, targets: Tensor, max_events: int) -> TrajectoryBatch:
        """The timelines of these stays (positions); ``targets`` float[B, K] goes along."""
        chosen = [self.rows(stay, max_events) for stay in stays]
        lengths = np.array([len(rows) for rows in chosen])
        rows = np.concatenate(chosen)
        present = np.arange(lengths.max()) < lengths[:, None]
        first = np.repeat(np.cumsum(lengths) - lengths, lengths)

        def padded(flat: np.ndarray, dtype: type) -> Tensor:
            table = np.zeros((*present.shape, *flat.shape[1:]), dtype=dtype)
            table[present] = flat
            return torch.from_numpy(table)

        return TrajectoryBatch(
            stay_ids=torch.from_numpy(self._stay_ids[stays]),
            latents=padded(self.events[rows], np.float32),
            state=padded(self.carried_state(rows, first), np.float32),
            modality=padded(self.modality[rows], np.int64),
            hours=padded(self.hours[rows], np.float64),
            event_index=padded(self.event_index[rows], np.int64),
            present=torch.from_numpy(present),
            targets=targets,
        )

    def carried_state(self, rows: np.ndarray, first: np.ndarray) -> np.ndarray:
        """float32[N, V] carried-forward state of events, as :meth:`AlignedEncoders.carried_state` gives it.

        Args:
            rows: int[N], events of stays from their beginning on, stay after stay.
            first: int[N], where in ``rows`` the event's stay begins.
        """
        state = np.zeros((len(rows), STATE_PARTS * max(self._features)), dtype=np.float32)
        kinds = self.modality[rows]
        for index, width in enumerate(self._features):
            own = np.flatnonzero(kinds == index)
            if width and len(own):
                values, observed = self._dense(rows[own], width)
                begins = np.searchsorted(own, first[own])
                state[own, : STATE_PARTS * width] = carried_forward(values, observed, self.hours[rows[own]], begins)
        return state

    def _dense(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """float32[N, F] standardised values and bool[N, F] whether observed, of events of one modality."""
        lengths = self._measured[rows].astype(np.int64)
        cells = runs(self._cells[rows], lengths)
        at = np.repeat(np.arange(len(rows)), lengths), self._columns[cells]
        values, observed = np.zeros((len(rows), width), np.float32), np.zeros((len(rows), width), bool)
        values[at], observed[at] = self._values[cells], True
        return values, observed

    def static(self, stays: np.ndarray, targets: Tensor) -> StaticBatch:
        """One latent per modality of these stays."""
        places = self.places(stays)
        return StaticBatch(
            torch.from_numpy(self._stay_ids[stays]),
            torch.from_numpy(self.stays[places]),
            torch.from_numpy(self.present[places]),
            targets,
            torch.from_numpy(self._prepared.hours[self._prepared.bounds[stays + 1] - 1]),
        )


def fits(static: np.ndarray, most: int) -> np.ndarray:
    """bool[S]: which of a timeline's events are read: the first ``most``, and every static one after them.

    Nothing later decides whether an event is read, so a stream keeps to the same rule; dropping the oldest instead
    would let the length of the whole stay decide what an early belief may see.
    """
    return static | (np.arange(len(static)) < most)


def cache_latents(
    prepared: Prepared, encoders: AlignedEncoders, stays: np.ndarray, folder: Path, key: str, reach: Reach = "own"
) -> Latents:
    """Encode every event of these stays once, or open what an earlier call with the same key left.

    Args:
        prepared: the records.
        encoders: frozen; put into evaluation mode.
        stays: positions of the stays to encode.
        folder: where the columns lie; they appear there when all are whole.
        key: hash of encoders and records; another key, reach or other stays mean another cache, never a stale one.
        reach: what an event's latent tells of (:meth:`AlignedEncoders.event_latents`).
    """
    stays = np.sort(stays)
    identity = {"key": key, "stays": fingerprint(stays.tolist()), "reach": reach}
    if not _lies(folder, identity):
        with column_folder(folder, identity) as columns:
            _encode(prepared, encoders.eval(), stays, columns, reach)
    return Latents(folder, prepared, encoders.modalities)


def _lies(folder: Path, identity: Mapping[str, object]) -> bool:
    """Whether the folder is whole and was written for this."""
    about = read_note(folder)
    return about is not None and {name: about.get(name) for name in identity} == identity


class KnownLatents:
    """Whole-stay latents of what was known by an hour, encoded once and kept beside the events' own.

    Args:
        prepared: the records.
        encoders: frozen; put into evaluation mode.
        stays: positions of the stays to encode.
        folder: where the hours' columns lie, a folder for each.
        key: as of :func:`cache_latents`.
        first: a context in which one process writes what the others then read.
    """

    def __init__(
        self,
        prepared: Prepared,
        encoders: AlignedEncoders,
        stays: np.ndarray,
        folder: Path,
        key: str,
        first: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.prepared, self.encoders, self.stays = prepared, encoders, np.sort(stays)
        self.folder, self.key, self.first = folder, key, first
        self._read: dict[float, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, hours: float) -> tuple[np.ndarray, np.ndarray]:
        """float32[N, M, D] latents, missing tokens where absent, and bool[N, M] presence.

        N stays of the prepared folder, of which only the rows of ``stays`` are filled, the latents of others are NaN.
        """
        if hours not in self._read:
            folder = self.folder / f"{hours:g}h"
            identity = {"key": self.key, "stays": fingerprint(self.stays.tolist()), "hours": hours}
            with self.first():
                if not _lies(folder, identity):
                    with column_folder(folder, identity) as columns:
                        self._encode(hours, columns)
            self._read[hours] = self._columns(folder)
        return self._read[hours]

    @torch.no_grad()
    def _encode(self, hours: float, columns: ColumnWriter) -> None:
        known, encoders = self.prepared.until(hours), self.encoders.eval()
        for part, stores in known.in_parts(self.stays, EVENTS_AT_ONCE):
            for start in range(0, len(part), CHUNK):
                batch = known.stay_batch(part[start : start + CHUNK], encoders.modalities, stores=stores)
                latents = encoders(batch.to(encoders.missing_tokens.device))
                columns.append("stays", latents.float().cpu().numpy())
                columns.append("present", batch.present.numpy())

    def _columns(self, folder: Path) -> tuple[np.ndarray, np.ndarray]:
        about = read_note(folder)
        if about is None:
            raise TrajlmError(f"{folder}: not whole; delete it and fine-tune again")
        wide = (len(self.prepared.stays), len(self.encoders.modalities))
        latents, present = np.full((*wide, self.encoders.latent_width), np.nan, np.float32), np.zeros(wide, dtype=bool)
        latents[self.stays] = open_column(folder, about, "stays")
        present[self.stays] = open_column(folder, about, "present")
        return latents, present


@torch.no_grad()
def _encode(
    prepared: Prepared, encoders: AlignedEncoders, stays: np.ndarray, columns: ColumnWriter, reach: Reach
) -> None:
    with tqdm(total=len(stays), desc="latents", unit="stay", mininterval=2.0) as progress:
        for part, stores in prepared.in_parts(stays, EVENTS_AT_ONCE):
            for start in range(0, len(part), CHUNK):
                chunk = part[start : start + CHUNK]
                _encode_chunk(prepared, encoders, chunk, stores, columns, reach)
                progress.update(len(chunk))


def _encode_chunk(
    prepared: Prepared,
    encoders: AlignedEncoders,
    chunk: np.ndarray,
    stores: Mapping[str, ModalityStore],
    columns: ColumnWriter,
    reach: Reach,
) -> None:
    device = encoders.missing_tokens.device
    batch = prepared.stay_batch(chunk, encoders.modalities, stores=stores)
    columns.append("positions", chunk.astype(np.int64))
    columns.append("stays", encoders(batch.to(device)).float().cpu().numpy())
    columns.append("present", batch.present.numpy())
    found = []
    for index, name in enumerate(encoders.modalities):
        held = chunk[batch.present[:, index].numpy()]
        if len(held):
            view, rows = stores[name].event_view(held)
            latents = encoders.event_latents(name, view.to(device), reach).float().cpu().numpy()
            found.append((rows, np.full(len(rows), index, dtype=np.int16), latents, *_measurements(view)))
    rows, modality, latents, measured = (np.concatenate(parts) for parts in zip(*(f[:4] for f in found), strict=True))
    order = np.argsort(rows)
    stay = np.searchsorted(prepared.bounds, rows[order], side="right") - 1
    columns.append("counts", np.bincount(np.searchsorted(chunk, stay), minlength=len(chunk)))
    columns.append("events", latents[order])
    columns.append("hours", prepared.hours[rows[order]])
    columns.append("modality", modality[order])
    columns.append("event_index", (rows[order] - prepared.bounds[stay]).astype(np.int32))
    columns.append("measured", measured[order])
    # The cells of an event stay together while events of all modalities take their places.
    cells = np.argsort(np.repeat(rows, measured), kind="stable")
    columns.append("columns", np.concatenate([f[4] for f in found])[cells])
    columns.append("values", np.concatenate([f[5] for f in found])[cells])


def _measurements(view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int32[E], measurements of each of E events; of all of them int32[K] columns and float32[K] values."""
    if not isinstance(view, NumericView):
        return np.zeros(len(view), np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
    observed, values = view.observed[view.steps].numpy(), view.values[view.steps].numpy()
    return observed.sum(axis=1, dtype=np.int32), observed.nonzero()[1].astype(np.int32), values[observed]
