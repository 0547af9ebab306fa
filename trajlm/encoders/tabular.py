"""Numeric events without inner order: descriptors, a lab panel, a severity score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Encoder, Encoding
from trajlm.encoders.numeric import NumericInputs, last_step
from trajlm.schema import FittedFeature
from trajlm.views import STATE_PARTS, NumericView


class TabularMLP(Encoder):
    """Linear, LayerNorm, ReLU, Dropout, Linear, LayerNorm over one row per input (paper, B.1).

    The row holds, per feature, the mean of its observed values over the input's steps and whether any was observed;
    with ``state`` also the carried-forward state after the last step. Absence is the mask, never a zero alone.

    Tokens are the features: each is the latent that the input would have, were it the only one known. The one level is
    the hidden layer.
    """

    def __init__(self, features: Sequence[FittedFeature], config: EncoderConfig) -> None:
        super().__init__()
        self.inputs = NumericInputs(features, config)
        self.first = nn.Linear(self.inputs.width, config.hidden_width)
        self.hidden = nn.Sequential(nn.LayerNorm(config.hidden_width), nn.ReLU())
        self.last = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_width, config.latent_width),
            nn.LayerNorm(config.latent_width),
        )
        self.level_widths = (config.hidden_width,)

    def encode(self, view: NumericView, *, tokens: bool = False, levels: bool = False) -> Encoding:
        """See :class:`Encoder`."""
        seen = view.observed & view.steps[..., None]
        counts = seen.sum(dim=1)
        mean = view.values.masked_fill(~seen, 0.0).sum(dim=1) / counts.clamp_min(1)
        state = view.state[last_step(view)]
        rows = self.inputs(mean, counts > 0, state)  # [N, F, K]
        hidden = self.hidden(self.first(rows.flatten(start_dim=1)))
        encoding = Encoding(self.last(hidden), levels=(hidden,) if levels else None)
        if not tokens:
            return encoding
        weight = self.first.weight.unflatten(1, rows.shape[1:])
        alone = torch.einsum("nfk,hfk->nfh", rows, weight) + self.first.bias
        known = (counts > 0) | (state.chunk(STATE_PARTS, dim=-1)[1] > 0) if self.inputs.state else counts > 0
        return Encoding(encoding.latent, self.last(self.hidden(alone)), known, encoding.levels)
