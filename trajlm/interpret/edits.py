"""Timelines with events taken away: a modality, single events, a span of hours; of one stay or of a cohort.

An event also lives on in what later events of its modality carry forward (:class:`trajlm.views.CarriedState`), and an
encoder may have read that into their latents. So later states are recomputed without the ablated events, and the events
whose state changed are encoded anew. ``carried="kept"`` leaves them as they were, as :meth:`TrajectoryBatch.keep` does:
the event is gone and what it measured is still known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from trajlm.errors import TrajlmError
from trajlm.latents import TrajectoryBatch
from trajlm.reading import newest_position
from trajlm.trajectory import TrajectoryModel
from trajlm.views import STATE_PARTS, NumericView

How = Literal["removed", "missing_token"]
Carried = Literal["forgotten", "kept"]


@dataclass(frozen=True)
class Ablation:
    """Which events are taken away: those that meet every condition given.

    Attributes:
        name: as tables say it.
        modalities: names; None is any.
        events: ``event_index`` of the events; None is any.
        hours: (first, last) hours since admission, both included; None is any time.
        how: removed closes the gap; missing_token leaves the event's place and hour and shows its modality's missing
            token there, with what the events left had carried forward by then.
        carried: forgotten takes the events' values out of what later events carry forward; kept leaves them known.
    """

    name: str
    modalities: tuple[str, ...] | None = None
    events: tuple[int, ...] | None = None
    hours: tuple[float, float] | None = None
    how: How = "removed"
    carried: Carried = "forgotten"

    def chosen(self, model: TrajectoryModel, batch: TrajectoryBatch) -> Tensor:
        """bool[B, S]: the events of a batch that are ablated. Raises TrajlmError for an unknown modality."""
        found = batch.present.clone()
        if self.modalities is not None:
            known = model.encoders.modalities
            unknown = sorted(set(self.modalities) - set(known))
            if unknown:
                raise TrajlmError(f"the model never learned {unknown[0]!r}; it reads {', '.join(known)}")
            found &= _among(batch.modality, [known.index(name) for name in self.modalities])
        if self.events is not None:
            found &= _among(batch.event_index, self.events)
        if self.hours is not None:
            found &= (batch.hours >= self.hours[0]) & (batch.hours <= self.hours[1])
        return found

    def apply(self, model: TrajectoryModel, batch: TrajectoryBatch) -> TrajectoryBatch:
        """The batch without the events it chooses; see :func:`ablate`."""
        return ablate(model, batch, self.chosen(model, batch), self.how, self.carried)


def _among(values: Tensor, wanted: Sequence[int]) -> Tensor:
    return torch.isin(values, torch.tensor(list(wanted), dtype=values.dtype, device=values.device))


@torch.no_grad()
def ablate(
    model: TrajectoryModel,
    batch: TrajectoryBatch,
    chosen: Tensor,
    how: How = "removed",
    carried: Carried = "forgotten",
) -> TrajectoryBatch:
    """Timelines without the events of ``chosen`` bool[B, S].

    Nothing of the ablated events is left in the batch where they are ``forgotten``: their values may be anything.

    Raises:
        TrajlmError: a stay would lose its last event, or one of two events of a modality at the same hour alone.
    """
    chosen = chosen & batch.present
    left = (batch.present & ~chosen).any(dim=1)
    if how == "removed" and not left.all():
        stay = int(batch.stay_ids[~left][0])
        raise TrajlmError(f"stay {stay}: no event is left; replace its events by the missing token, or leave it out")
    if carried == "forgotten":
        batch = _forget(model, batch, chosen)
    if how == "removed":
        return batch.keep(~chosen)
    tokens = model.encoders.missing_latents(model.reach)[batch.modality]
    state = batch.state.masked_fill(chosen[..., None], 0.0) if carried == "kept" else batch.state
    return replace(batch, latents=torch.where(chosen[..., None], tokens, batch.latents), state=state)


def _forget(model: TrajectoryModel, batch: TrajectoryBatch, chosen: Tensor) -> TrajectoryBatch:
    """States and later latents as they would be without the chosen events; those at the chosen ones as of that hour."""
    latents, state = batch.latents.clone(), batch.state.clone()
    for index, name in enumerate(model.encoders.modalities):
        own = (batch.modality == index) & batch.present
        features = model.encoders.features[name]
        if features and (own & chosen).any():
            _check_ties(batch, own, chosen, index, name)
            # Stays that lose nothing of this modality are left as they are.
            lost = own & (own & chosen).any(dim=1, keepdim=True)
            read = lost & ~chosen
            known, view = _recarried(batch, own, read, features)
            state[..., : known.shape[-1]] = torch.where(lost[..., None], known, state[..., : known.shape[-1]])
            if read.any():
                latents[read] = model.encoders.event_latents(name, view, model.reach).to(latents.dtype)
    return replace(batch, latents=latents, state=state)


def _check_ties(batch: TrajectoryBatch, own: Tensor, chosen: Tensor, index: int, name: str) -> None:
    """Of two events of a modality at the same hour, the state cannot tell which one measured a value."""
    newest = newest_position(batch.modality, batch.present, index)
    before = torch.cat([torch.full_like(newest[:, :1], -1), newest[:, :-1]], dim=1)
    at = before.clamp_min(0)
    tied = own & (before >= 0) & (batch.hours.gather(1, at) == batch.hours) & (chosen.gather(1, at) != chosen)
    if tied.any():
        stay, event = (int(i) for i in tied.nonzero()[0])
        raise TrajlmError(
            f"stay {int(batch.stay_ids[stay])} holds several {name} events at {float(batch.hours[stay, event]):g} h; "
            "ablate all of them or none"
        )


def _recarried(batch: TrajectoryBatch, own: Tensor, kept: Tensor, features: int) -> tuple[Tensor, NumericView]:
    """What the events of ``kept`` bool[B, S] carry forward, and the stays with such events as series of these alone.

    The first is float[B, S, 4 F] by each event's hour, of F features as in :class:`TrajectoryBatch`; zero where nothing
    was observed.
    """
    value, ever, since, _ = batch.state[..., : STATE_PARTS * features].split(features, dim=-1)
    # An event measured what it carries with an age of exactly zero.
    observed = (ever > 0) & (since == 0) & own[..., None]
    counted = observed & kept[..., None]
    place = torch.arange(own.shape[1], device=own.device)[None, :, None].expand_as(observed)
    source = torch.where(counted, place, -1).cummax(dim=1).values
    known, at = source >= 0, source.clamp_min(0)
    last = batch.hours[..., None].expand(-1, -1, features).gather(1, at)
    age = torch.log1p(torch.where(known, batch.hours[..., None] - last, 0.0)).to(value.dtype)
    values = torch.where(known, value.gather(1, at), 0.0)
    total = torch.where(counted, value, 0.0).double().cumsum(dim=1)
    mean = (total / counted.cumsum(dim=1).clamp_min(1)).to(value.dtype)
    state = torch.cat([values, known.to(value.dtype), age, mean], dim=-1)
    stays = kept.any(dim=1)
    if not stays.any():
        return state, NumericView(*(part[stays] for part in (values, observed, state, batch.hours.float(), kept)))
    count = kept[stays].sum(dim=1, keepdim=True)
    # Kept events first, in order; beyond them the last one, so that time stands still there.
    order = (~kept[stays]).long().argsort(dim=1, stable=True)[:, : int(count.max())]
    place = torch.arange(order.shape[1], device=own.device)
    steps = place < count
    rows, at = stays.nonzero(), order.gather(1, place.minimum(count - 1))
    seen = observed[rows, at] & steps[..., None]
    return state, NumericView(values[rows, at] * seen, seen, state[rows, at], batch.hours[rows, at].float(), steps)


def stacked(batches: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
    """Several batches as one, padded to the longest."""
    longest = max(batch.present.shape[1] for batch in batches)

    def padded(tensor: Tensor) -> Tensor:
        missing = longest - tensor.shape[1]
        return torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], dim=1)

    whole = {"stay_ids", "targets"}
    joined = {
        field.name: torch.cat([getattr(b, field.name) if field.name in whole else padded(getattr(b, field.name))
                               for b in batches])
        for field in fields(TrajectoryBatch)
    }  # fmt: skip
    return TrajectoryBatch(**joined)


def repeated(batch: TrajectoryBatch, times: int) -> TrajectoryBatch:
    """A batch of one timeline, ``times`` times over."""
    if len(batch.stay_ids) != 1:
        raise ValueError(f"expected one timeline, came {len(batch.stay_ids)}")
    rows = torch.zeros(times, dtype=torch.long, device=batch.stay_ids.device)
    return batch.select(rows)
