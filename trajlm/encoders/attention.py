"""A small Transformer over parts of an input that may be absent, with one summary position in front."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Hidden, linear_head
from trajlm.errors import TrajlmError

LAYERS = 2  # where the settings name no number


class SummaryTransformer(nn.Module):
    """Layers of self-attention over a learned summary position and the parts that are present.

    The summary position is always present, so that an input of which nothing was observed still has a latent.

    Attributes:
        width: H of what comes in and out.
        depth: number of layers.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.width, self.depth = config.hidden_width, config.layers or LAYERS
        if self.width % config.heads:
            raise TrajlmError(
                f"encoder.hidden_width {self.width} does not divide into encoder.heads {config.heads}; "
                "choose another of the two"
            )
        self.summary = nn.Parameter(torch.randn(self.width) * self.width**-0.5)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                self.width, config.heads, 2 * self.width, config.dropout, batch_first=True, norm_first=True
            )
            for _ in range(self.depth)
        )

    def forward(self, parts: Tensor, present: Tensor) -> Hidden:
        """Run all layers.

        Args:
            parts: float[N, S, H]; what is absent is never read.
            present: bool[N, S].

        Returns:
            the summary and the parts after the last layer, not yet normalised; the levels are the summary after each.
        """
        n = len(parts)
        parts = parts.masked_fill(~present[..., None], 0.0)
        hidden = torch.cat([self.summary.expand(n, 1, -1).to(parts.dtype), parts], dim=1)
        absent = torch.cat([present.new_zeros(n, 1), ~present], dim=1)
        levels = []
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=absent)
            levels.append(hidden[:, 0])
        return Hidden(hidden[:, 0], hidden[:, 1:], present, levels)

    def head(self, config: EncoderConfig) -> nn.Module:
        """Last layers for what :meth:`forward` returns: float[..., H] to float[..., D]."""
        return nn.Sequential(nn.LayerNorm(self.width), linear_head(self.width, config))
