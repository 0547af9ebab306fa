"""Raw timelines through frozen encoders: what a sequence model reads of a stay whose latents no cache holds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trajlm.encoders.aligned import AlignedEncoders, Reach
from trajlm.errors import TrajlmError
from trajlm.inputs import InputReader
from trajlm.latents import TrajectoryBatch, fits
from trajlm.schema import Event, FittedFeature, Modality, Timeline
from trajlm.tasks import Task
from trajlm.views import single_events


class TimelineReader:
    """Reads timelines as the prepared folder that a model learned from was read.

    Args:
        encoders: frozen ones; batches are on their device.
        modalities, features, image_pixels: of that folder.
        reach: what an event's latent tells of (:meth:`AlignedEncoders.event_latents`).

    Attributes:
        modalities: by name.
        inputs: what reads the rows of events, by modality.
    """

    def __init__(
        self,
        encoders: AlignedEncoders,
        modalities: Sequence[Modality],
        features: Sequence[FittedFeature],
        image_pixels: int,
        reach: Reach,
    ) -> None:
        self._encoders, self._reach = encoders, reach
        self.modalities = {m.name: m for m in modalities}
        self.inputs = {m.name: InputReader(m, features, image_pixels) for m in modalities}

    def batch(self, timeline: Timeline, tasks: Sequence[Task], max_events: int) -> TrajectoryBatch:
        """A timeline as a batch of one, with the targets of these tasks.

        Events beyond ``max_events`` are left out (:func:`trajlm.latents.fits`), as are, with a warning, those of
        modalities that no encoder knows.

        Raises:
            TrajlmError: nothing is left to read.
        """
        names = self._encoders.modalities
        known = [i for i, e in enumerate(timeline.events) if e.modality in names]
        if len(known) < len(timeline.events):
            unread = sorted({e.modality for e in timeline.events} - set(names))
            warnings.warn(
                f"stay {timeline.stay_id}: the model never learned {unread}; such events are left out", stacklevel=4
            )
        if not known:
            raise TrajlmError(f"stay {timeline.stay_id} has no event that the model can read")
        latents, state = self._read([timeline.events[i] for i in known])
        device = latents.device
        read = fits(np.array([self.modalities[timeline.events[i].modality].static for i in known]), max_events)
        kept = [i for i, fit in zip(known, read, strict=True) if fit]
        rows = torch.from_numpy(read).to(device)
        hours = [timeline.events[i].hours_since_admission for i in kept]
        targets = [_number(timeline.stay_value(task.column)) for task in tasks]
        return TrajectoryBatch(
            torch.tensor([timeline.stay_id], device=device),
            latents[rows][None],
            state[rows][None],
            torch.tensor([[names.index(timeline.events[i].modality) for i in kept]], device=device),
            torch.tensor([hours], dtype=torch.float64, device=device),
            torch.tensor([kept], device=device),
            torch.ones(1, len(kept), dtype=torch.bool, device=device),
            torch.tensor([targets], dtype=torch.float32, device=device),
        )

    @torch.no_grad()
    def _read(self, events: Sequence[Event]) -> tuple[Tensor, Tensor]:
        """float[S, W] latents and float[S, V] carried-forward states of a stay's events."""
        device = next(self._encoders.parameters()).device
        latents = torch.zeros(len(events), self._encoders.event_width(self._reach), device=device)
        state = torch.zeros(len(events), self._encoders.state_width, device=device)
        for name in self._encoders.modalities:
            rows = [i for i, event in enumerate(events) if event.modality == name]
            if rows:
                view = self.inputs[name].event_view([events[i] for i in rows]).to(device)
                latents[rows] = self._encoders.event_latents(name, view, self._reach)
                state[rows] = self._encoders.carried_state(single_events(view))
        return latents, state


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
