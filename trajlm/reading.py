"""How an event becomes an embedding of the backbone: its latent, its state, its time and what stands beside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trajlm.encoders.numeric import AGE_KNOTS, OUTERMOST, VALUE_KNOTS, PiecewiseShares
from trajlm.views import STATE_PARTS


class WaveEncoding(nn.Module):
    """Sines and cosines of a number, periods from 0.5 to 1,000, mapped to LLM width.

    Of hours since admission these are half an hour to six weeks; of places in a timeline, two to a thousand events.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float, waves: int = 16) -> None:
        super().__init__()
        periods = torch.logspace(np.log10(0.5), 3.0, waves)
        self.register_buffer("frequencies", 2 * torch.pi / periods)
        self.project = nn.Linear(2 * waves, width)
        nn.init.normal_(self.project.weight, std=0.1 * scale)
        nn.init.zeros_(self.project.bias)

    def forward(self, numbers: Tensor) -> Tensor:
        """float[..., H] of float[...]."""
        angle = numbers[..., None] * self.frequencies
        return self.project(torch.cat([angle.sin(), angle.cos()], dim=-1))


def to_width(width: int, scale: float) -> nn.Sequential:
    """Hidden values to LLM width; starts with the spread of the backbone's own token embeddings."""
    last = nn.LayerNorm(width)
    nn.init.constant_(last.weight, scale)
    return nn.Sequential(nn.GELU(), nn.Linear(width, width), last)


class Projector(nn.Module):
    """The first layer an event of one modality meets: its latent and, where asked for, its state beside.

    A frozen latent keeps what aligns with other modalities; a threshold of one laboratory value need not be in it.

    Args:
        latent_width: D.
        features: F of the modality whose state is read; 0 reads the latent alone.
        reads_latent: False reads the state alone.
        reads_mean: True reads of the state also the mean of every feature's values so far.
        width: H.
        input_dropout: in training, share of inputs left out.
    """

    def __init__(
        self,
        latent_width: int,
        features: int,
        reads_latent: bool,
        reads_mean: bool,
        width: int,
        input_dropout: float,
    ) -> None:
        super().__init__()
        self.features, self.reads_latent, self.reads_mean = features, reads_latent, reads_mean
        self.values, self.ages = PiecewiseShares(VALUE_KNOTS), PiecewiseShares(AGE_KNOTS)
        coded = features * (3 + self.values.shares + self.ages.shares + reads_mean * (1 + self.values.shares))
        self.dropout = nn.Dropout(input_dropout)
        self.layer = nn.Linear(latent_width * reads_latent + coded, width)

    def forward(self, latents: Tensor, state: Tensor) -> Tensor:
        """float[N, H] of latents float[N, D] and state float[N, V]."""
        return self.project(self.inputs(latents, state))

    def project(self, inputs: Tensor) -> Tensor:
        """float[N, H] of float[N, I] that :meth:`inputs` gave."""
        return self.layer(self.dropout(inputs))

    def inputs(self, latents: Tensor, state: Tensor) -> Tensor:
        """float[N, I]: what is read of latents float[N, D] and state float[N, V]."""
        parts = [latents] if self.reads_latent else []
        if self.features:
            known = state[:, : STATE_PARTS * self.features].clamp(-OUTERMOST, OUTERMOST)
            value, ever, since, mean = known.chunk(STATE_PARTS, dim=-1)
            seen = ever.repeat_interleave(self.values.shares, dim=-1)
            parts += [value, ever, since, self.values(value) * seen, self.ages(since)]
            if self.reads_mean:
                parts += [mean, self.values(mean) * seen]
        return torch.cat(parts, dim=-1)


class NewestFusion(nn.Module):
    """An event together with the newest event of every other modality, as one.

    Every modality contributes its newest event so far, how old that is and whether it is the event at hand; a modality
    not seen yet contributes its missing token (Eq. 1). Nothing later than the event enters.
    """

    def __init__(self, modalities: int, width: int) -> None:
        super().__init__()
        self.age = nn.Parameter(0.1 * torch.randn(modalities, width))
        self.new = nn.Parameter(0.1 * torch.randn(modalities, width))

    def forward(self, events: Tensor, missing: Tensor, modality: Tensor, hours: Tensor, present: Tensor) -> Tensor:
        """float[B, S, H].

        Args:
            events: float[B, S, H], each event alone.
            missing: float[M, H], the missing tokens.
            modality, hours, present: of a :class:`TrajectoryBatch`.
        """
        position = torch.arange(events.shape[1], device=events.device).expand_as(modality)
        total = torch.zeros_like(events)
        for index, token in enumerate(missing):
            newest = newest_position(modality, present, index)
            at = newest.clamp_min(0)
            # Padding stands at hour 0, before the event it would look back to.
            age = torch.log1p((hours - hours.gather(1, at)).clamp_min(0.0))[..., None].to(events.dtype)
            held = events.gather(1, at[..., None].expand_as(events)) + age * self.age[index]
            held = held + (newest == position)[..., None] * self.new[index]
            total = total + torch.where((newest >= 0)[..., None], held, token)
        return total


def newest_position(modality: Tensor, present: Tensor, index: int) -> Tensor:
    """int64[B, S]: position of the newest event of modality ``index`` up to and with each event; -1 before the first.

    Args:
        modality, present: int64[B, S] and bool[B, S] of a :class:`TrajectoryBatch`.
        index: the modality.
    """
    position = torch.arange(modality.shape[1], device=modality.device).expand_as(modality)
    return torch.where(present & (modality == index), position, -1).cummax(dim=1).values


def counted_readouts(hours: Tensor, present: Tensor, at: str, landmarks: Sequence[float]) -> Tensor:
    """bool[B, S]: after which events a belief counts.

    Args:
        hours, present: of a :class:`TrajectoryBatch`.
        at: ``event`` counts all; ``hour`` the last event up to every full hour, ``landmarks`` up to each of these and
            the last of the stay. An event at exactly that time belongs to it.
        landmarks: hours since admission, rising.
    """
    if at == "event":
        return present
    edges = torch.tensor(landmarks, dtype=hours.dtype, device=hours.device)
    period = hours.ceil() if at == "hour" else torch.bucketize(hours.contiguous(), edges)
    goes_on = (period[:, 1:] == period[:, :-1]) & present[:, 1:]
    return present & ~nn.functional.pad(goes_on, (0, 1), value=False)
