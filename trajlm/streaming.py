"""Beliefs as events arrive, of one stay or of many at once; what is remembered can be saved and restored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from trajlm.caches import memory_of
from trajlm.checkpoint import fingerprint, write_tensors, write_text
from trajlm.errors import TrajlmError
from trajlm.latents import TrajectoryBatch
from trajlm.schema import Event
from trajlm.trajectory import TrajectoryModel
from trajlm.views import CarriedState, NumericView, View

STATE, TENSORS = "stream.json", "stream.safetensors"
CARRIED = fields(CarriedState)


@dataclass
class _Read:
    """One event as the model reads it.

    Attributes:
        latent, state: float[W] and float[V].
        modality: position.
        hours: since admission.
        after: what an encoder that reads in order needs for its next event; empty for others.
        carried: the state of its modality after it; None for payloads that are no numbers.
    """

    latent: Tensor
    state: Tensor
    modality: int
    hours: float
    after: tuple[Tensor, ...] = ()
    carried: CarriedState | None = None


@dataclass
class _Seen:
    """Events of one modality, an event a stay.

    Attributes:
        stays: which.
        view: the events.
        carried: the states after them; empty for payloads that are no numbers.
    """

    stays: list[int]
    view: View
    carried: list[CarriedState]


@dataclass
class _Stay:
    """What is remembered of a stay beside the backbone's memory.

    Attributes:
        slot: its place in that memory.
        hours: of its last event.
        events: how many were read.
        carried: the state of every numeric modality.
        newest: the newest event of every modality, by name; the last to come stands last.
    """

    slot: int
    hours: float = float("-inf")
    events: int = 0
    carried: dict[str, CarriedState] = field(default_factory=dict)
    newest: dict[str, _Read] = field(default_factory=dict)


class BeliefStreams:
    """Reads many stays event by event; each belief costs one event, not the stay again.

    Args:
        model: put into evaluation mode.
    """

    def __init__(self, model: TrajectoryModel) -> None:
        self.model = model.eval()
        self._memory = memory_of(model.sequence_reader)
        self._missing = model.missing_tokens().detach() if model.newest is not None else None
        self._stays: dict[int, _Stay] = {}
        self._free: list[int] = []

    @property
    def stay_ids(self) -> list[int]:
        """The stays that are remembered."""
        return list(self._stays)

    @torch.inference_mode()
    def push(self, events: Mapping[int, Event]) -> dict[int, dict[str, float] | None]:
        """Beliefs after one more event of each of these stays, all through the backbone together.

        Args:
            events: by stay id; a stay that is not known yet begins.

        Returns:
            by stay id the belief by target (probability, or hours), or None where the event was not read: it is not
            static and the stay has had its ``max_events`` (:func:`trajlm.latents.fits`).

        Raises TrajlmError, with nothing read of any stay, for an event earlier than the stay's last one, or of a
        modality or feature that the model never learned.
        """
        for stay_id, event in events.items():
            self._check(stay_id, event)
        model = self.model
        read = {s: e for s, e in events.items() if model.timelines.modalities[e.modality].static or self._room(s)}
        beliefs: dict[int, dict[str, float] | None] = dict.fromkeys(events)
        if not read:
            return beliefs
        views = self._views(read)
        known = [stay_id for stay_id in read if stay_id in self._stays]
        fresh = [stay_id for stay_id in read if stay_id not in self._stays]
        for stay_id in fresh:
            self._stays[stay_id] = _Stay(self._free.pop() if self._free else len(self._stays))
        found = self._encode(read, views)
        for group in (known, fresh):
            if group:
                readouts = self._step([self._stays[s] for s in group], [found[s] for s in group], group is fresh)
                by_target = model.beliefs_of(readouts)
                for row, stay_id in enumerate(group):
                    beliefs[stay_id] = {target: float(belief[row]) for target, belief in by_target.items()}
                    self._remember(self._stays[stay_id], read[stay_id], found[stay_id])
        return beliefs

    def forget(self, stay_id: int) -> None:
        """Drop a stay, for instance one that has left the unit."""
        stay = self._stays.pop(stay_id, None)
        if stay is None:
            raise TrajlmError(f"stay {stay_id} is not in the streams")
        self._memory.forget(stay.slot)
        self._free.append(stay.slot)

    def _room(self, stay_id: int) -> bool:
        return stay_id not in self._stays or self._stays[stay_id].events < self.model.max_events

    def _check(self, stay_id: int, event: Event) -> None:
        last = self._stays[stay_id].hours if stay_id in self._stays else float("-inf")
        if event.hours_since_admission < last:
            raise TrajlmError(
                f"an event at {event.hours_since_admission} h came after one at {last} h; push events in order of time"
            )
        if event.modality not in self.model.encoders.modalities:
            raise TrajlmError(
                f"the model never learned {event.modality!r}; it reads {', '.join(self.model.encoders.modalities)}"
            )

    def _views(self, events: Mapping[int, Event]) -> dict[str, _Seen]:
        """The events by modality."""
        seen: dict[str, _Seen] = {}
        for name in self.model.encoders.modalities:
            own = [stay_id for stay_id, event in events.items() if event.modality == name]
            if own:
                seen[name] = self._view(name, own, [events[s] for s in own])
        return seen

    def _view(self, name: str, stays: list[int], events: Sequence[Event]) -> _Seen:
        reader = self.model.timelines.inputs[name]
        if reader.modality.kind != "numeric":
            return _Seen(stays, reader.payload_view(events), [])
        values, observed, hours = reader.measured(events)
        carried = []
        for row, stay_id in enumerate(stays):
            held = self._stays[stay_id].carried if stay_id in self._stays else {}
            before = held.get(name, CarriedState.unobserved(values.shape[1]))
            carried.append(before.advance(values[row], observed[row], hours[row]))
        states = np.stack([state.features(hour) for state, hour in zip(carried, hours, strict=True)])
        parts = (values, observed, states, hours.astype(np.float32), np.ones(len(events), dtype=bool))
        return _Seen(stays, NumericView(*(torch.from_numpy(part[:, None]) for part in parts)), carried)

    def _encode(self, events: Mapping[int, Event], views: Mapping[str, _Seen]) -> dict[int, _Read]:
        encoders, device = self.model.encoders, self.model.predict.device
        found = {}
        for name, seen in views.items():
            placed, index = seen.view.to(device), encoders.modalities.index(name)
            states = encoders.carried_state(placed)
            for rows, latents, after in self._advance(name, seen.stays, placed):
                for row, latent in zip(rows, latents, strict=True):
                    stay_id = seen.stays[row]
                    hours, carried = events[stay_id].hours_since_admission, seen.carried[row] if seen.carried else None
                    found[stay_id] = _Read(latent, states[row], index, hours, after or (), carried)
        return found

    def _advance(
        self, name: str, stays: Sequence[int], view: View
    ) -> Iterator[tuple[list[int], Tensor, tuple[Tensor, ...] | None]]:
        """Rows of a view with their latents: all at once, or one by one where an encoder goes on from each's past."""
        encoders, reach = self.model.encoders, self.model.reach
        if reach == "own" or not encoders.reads_history(name):
            yield list(range(len(stays))), encoders.advance(name, view, reach, None)[0], None
            return
        for row, stay_id in enumerate(stays):
            held = self._stays[stay_id].newest.get(name)
            before = held.after if held is not None else None
            yield [row], *encoders.advance(name, view.select(torch.tensor([row])), reach, before or None)

    def _step(self, stays: Sequence[_Stay], events: Sequence[_Read], fresh: bool) -> Tensor:
        """float[N, K] read-outs after one event of each stay; ``fresh`` ones begin with what stands before events."""
        model = self.model
        reads = [[*stay.newest.values(), event] for stay, event in zip(stays, events, strict=True)]
        order = torch.tensor([stay.events for stay in stays], device=model.predict.device)
        batch = _batch(reads, len(model.targets))
        last = torch.tensor([len(r) - 1 for r in reads], device=order.device)
        # Only the last event's place in its stay is wanted; the newest of each modality before it are read for context.
        places = order[:, None] - last[:, None] + torch.arange(batch.present.shape[1], device=order.device)
        inputs = model.inputs(batch)
        embedded = model.embed(batch, places.clamp_min(0), self._missing, inputs)
        newest = torch.arange(len(reads), device=order.device), last
        direct, embedded = model.direct(batch, embedded, inputs)[newest], embedded[newest][:, None]
        sequence = torch.cat([embedded, model.predict.expand_as(embedded)], dim=1)
        if fresh:
            sequence = model.behind_prompt(sequence)
        hidden = self._memory.read(model.backbone, sequence, [stay.slot for stay in stays])
        return model.readouts_of(hidden[:, -1:])[:, 0] + direct

    def _remember(self, stay: _Stay, event: Event, read: _Read) -> None:
        stay.hours, stay.events = event.hours_since_admission, stay.events + 1
        # Last in, last read: the order of the newest events is that of the stay.
        stay.newest.pop(event.modality, None)
        stay.newest[event.modality] = read
        if read.carried is not None:
            stay.carried[event.modality] = read.carried

    def save(self, folder: Path | str) -> None:
        """Write everything remembered as safetensors and JSON; the JSON, written last, names the model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STATE).unlink(missing_ok=True)
        tensors: dict[str, Tensor] = {}
        told: dict[str, Any] = {}
        for stay_id, stay in self._stays.items():
            told[str(stay_id)] = {
                "hours": stay.hours,
                "events": stay.events,
                "newest": [{"modality": n, "index": r.modality, "hours": r.hours} for n, r in stay.newest.items()],
                "carried": list(stay.carried),
            }
            held = {f"memory.{n}": t for n, t in self._memory.tensors(stay.slot).items()}
            for name, read in stay.newest.items():
                held |= {f"newest.{name}.latent": read.latent, f"newest.{name}.state": read.state}
                held |= {f"newest.{name}.after.{i}": tensor for i, tensor in enumerate(read.after)}
            for name, state in stay.carried.items():
                held |= {f"carried.{name}.{f.name}": torch.from_numpy(getattr(state, f.name)) for f in CARRIED}
            tensors |= {f"{stay_id}/{name}": tensor for name, tensor in held.items()}
        write_tensors(folder / TENSORS, tensors)
        write_text(folder / STATE, json.dumps({"model": model_fingerprint(self.model), "stays": told}, indent=1))

    @classmethod
    def load(cls, model: TrajectoryModel, folder: Path | str) -> BeliefStreams:
        """Streams that go on where :meth:`save` was called; another model than that one's is an error."""
        folder = Path(folder)
        if not (folder / STATE).is_file():
            raise TrajlmError(f"{folder} holds no saved stream: no {STATE}")
        about = json.loads((folder / STATE).read_text())
        if about["model"] != model_fingerprint(model):
            raise TrajlmError(f"{folder} was saved by a stream of another model; its states mean nothing to this one")
        streams, device = cls(model), model.predict.device
        tensors = {name: tensor.to(device) for name, tensor in load_file(folder / TENSORS).items()}
        for slot, (stay_id, told) in enumerate(about["stays"].items()):
            own = {n.removeprefix(f"{stay_id}/"): t for n, t in tensors.items() if n.startswith(f"{stay_id}/")}
            streams._stays[int(stay_id)] = _restored(slot, told, own)
            memory = {n.removeprefix("memory."): t for n, t in own.items() if n.startswith("memory.")}
            streams._memory.put(slot, memory)
        return streams


def _restored(slot: int, told: dict[str, Any], tensors: dict[str, Tensor]) -> _Stay:
    stay = _Stay(slot, told["hours"], told["events"])
    for entry in told["newest"]:
        name = entry["modality"]
        latent, state = tensors[f"newest.{name}.latent"], tensors[f"newest.{name}.state"]
        after = sorted(
            (key for key in tensors if key.startswith(f"newest.{name}.after.")),
            key=lambda key: int(key.rsplit(".", 1)[1]),
        )
        own = tuple(tensors[key] for key in after)
        stay.newest[name] = _Read(latent, state, entry["index"], entry["hours"], own)
    for name in told["carried"]:
        stay.carried[name] = CarriedState(*(tensors[f"carried.{name}.{f.name}"].cpu().numpy() for f in CARRIED))
    return stay


def model_fingerprint(model: TrajectoryModel) -> str:
    """Hex digest of every weight and of how events are read."""
    return fingerprint(model.reading, *(tensor for _, tensor in sorted(model.state_dict().items())))


def _batch(reads: Sequence[Sequence[_Read]], targets: int) -> TrajectoryBatch:
    """Events of several stays, right-padded."""
    every = [event for events in reads for event in events]
    lengths, device = torch.tensor([len(events) for events in reads]), every[0].latent.device
    present = torch.arange(int(lengths.max())) < lengths[:, None]

    def padded(rows: Tensor) -> Tensor:
        wide = rows.new_zeros(*present.shape, *rows.shape[1:])
        wide[present] = rows
        return wide.to(device)

    modality = padded(torch.tensor([event.modality for event in every]))
    return TrajectoryBatch(
        torch.zeros(len(reads), dtype=torch.long, device=device),
        padded(torch.stack([event.latent for event in every])),
        padded(torch.stack([event.state for event in every])),
        modality,
        padded(torch.tensor([event.hours for event in every], dtype=torch.float64)),
        torch.zeros_like(modality),
        present.to(device),
        torch.full((len(reads), targets), float("nan"), device=device),
    )


class BeliefStream:
    """Reads one stay event by event; see :class:`BeliefStreams`."""

    def __init__(self, model: TrajectoryModel) -> None:
        self.streams = BeliefStreams(model)

    def push(self, event: Event) -> dict[str, float] | None:
        """Belief by target (probability, or hours) after one more event; see :meth:`BeliefStreams.push`."""
        return self.streams.push({0: event})[0]

    def save(self, folder: Path | str) -> None:
        """See :meth:`BeliefStreams.save`."""
        self.streams.save(folder)

    @classmethod
    def load(cls, model: TrajectoryModel, folder: Path | str) -> BeliefStream:
        """See :meth:`BeliefStreams.load`."""
        stream = cls(model)
        stream.streams = BeliefStreams.load(model, folder)
        return stream
