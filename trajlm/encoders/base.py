"""What every encoder gives: a latent, and for fusions that need more than one vector its tokens and its levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig


@dataclass
class Encoding:
    """What an encoder made of N inputs; parts that nobody asked for are None and were not computed.

    Attributes:
        latent: float[N, D].
        tokens: float[N, S, D], one vector per part of the input (time steps, features, measurements, word pieces,
            patches), through the same last layers as the latent.
        token_present: bool[N, S], False for padding and for what was not observed; such tokens are zero.
        levels: float[N, W] each, one vector per intermediate layer, first to last; W as in ``level_widths``.
    """

    latent: Tensor
    tokens: Tensor | None = None
    token_present: Tensor | None = None
    levels: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) != (self.token_present is None):
            raise ValueError("encoding: tokens and token_present come together")
        if self.tokens is not None and self.token_present is not None:
            n, d = self.latent.shape
            s = self.tokens.shape[1]
            if tuple(self.tokens.shape) != (n, s, d) or tuple(self.token_present.shape) != (n, s):
                raise ValueError(
                    f"encoding: expected tokens [{n}, S, {d}] and token_present [{n}, S], came "
                    f"{tuple(self.tokens.shape)} and {tuple(self.token_present.shape)}"
                )
            self.tokens = self.tokens.masked_fill(~self.token_present[..., None], 0.0)


class Encoder(nn.Module, ABC):
    """Reads N present inputs of one modality.

    Attributes:
        level_widths: width of every level, first to last.
        reads_in_order: the token of a step is the latent of the steps up to it, so that one reading of a series gives
            what was known after each; :meth:`advance` then reads one step more.
    """

    level_widths: tuple[int, ...]
    reads_in_order = False

    @abstractmethod
    def encode(self, view, *, tokens: bool = False, levels: bool = False) -> Encoding:
        """The inputs of a view; only what is asked for is computed."""

    def forward(self, view) -> Tensor:
        """float[N, D] latents."""
        return self.encode(view).latent

    def advance(self, view, carried: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Read one more step of N inputs, where the encoder reads in order.

        Args:
            view: the next step of every input, ``S = 1``.
            carried: what the call on the step before returned; None at the first.

        Returns:
            float[N, D] latents of the steps so far, and what the next call needs.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read in order")


@dataclass
class Hidden:
    """What an encoder holds before its last layers.

    Attributes:
        summary: float[N, W].
        parts: float[N, S, W].
        present: bool[N, S].
        levels: float[N, W_l] each, where asked for.
    """

    summary: Tensor
    parts: Tensor
    present: Tensor
    levels: list[Tensor]


class ProjectedEncoder(Encoder):
    """An encoder whose latent and tokens are its hidden values through the same last layers.

    Attributes:
        project: float[..., W] to float[..., D].
    """

    project: nn.Module

    @abstractmethod
    def read(self, view, levels: bool) -> Hidden:
        """Hidden values of the inputs of a view; levels only where asked for."""

    def encode(self, view, *, tokens: bool = False, levels: bool = False) -> Encoding:
        """See :class:`Encoder`."""
        hidden = self.read(view, levels)
        return Encoding(
            self.project(hidden.summary),
            self.project(hidden.parts) if tokens else None,
            hidden.present if tokens else None,
            tuple(hidden.levels) if levels else None,
        )


def linear_head(width: int, config: EncoderConfig) -> nn.Sequential:
    """Hidden values float[..., width] to float[..., D]: Dropout, Linear, LayerNorm."""
    return nn.Sequential(
        nn.Dropout(config.dropout), nn.Linear(width, config.latent_width), nn.LayerNorm(config.latent_width)
    )


def mlp_head(width: int, config: EncoderConfig) -> nn.Sequential:
    """Values of a pretrained or bag-of-words model float[..., width] to float[..., D], with one hidden layer."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, config.hidden_width),
        nn.ReLU(),
        nn.Dropout(config.dropout),
        nn.Linear(config.hidden_width, config.latent_width),
        nn.LayerNorm(config.latent_width),
    )


def masked_mean(values: Tensor, present: Tensor) -> Tensor:
    """float[N, W]: mean over the present of float[N, S, W], zero where nothing is; what is absent is never read."""
    kept = values.masked_fill(~present[..., None], 0.0)
    return kept.sum(dim=1) / present.sum(dim=1, keepdim=True).clamp_min(1).to(values.dtype)


def sines(positions: Tensor, width: int, shortest: float, longest: float) -> Tensor:
    """float[..., width]: sines and cosines of float[...] positions, periods from ``shortest`` to ``longest``."""
    waves = (width + 1) // 2
    periods = torch.logspace(0, 1, waves, base=longest / shortest, device=positions.device) * shortest
    angle = positions[..., None] * (2 * torch.pi / periods)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :width]
