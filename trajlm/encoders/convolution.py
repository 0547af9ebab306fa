"""Numeric series read by a temporal convolution."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Hidden, ProjectedEncoder, linear_head, masked_mean
from trajlm.encoders.series import SeriesInputs
from trajlm.schema import FittedFeature
from trajlm.views import NumericView

BLOCKS = 3  # where the settings name no number; with doubling dilation they see 15 steps


class _Block(nn.Module):
    """A dilated convolution over three steps with a way around it; padding counts as the zeros beyond an end."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.after = nn.Sequential(nn.ReLU(), nn.Dropout(dropout))

    def forward(self, hidden: Tensor, padding: Tensor) -> Tensor:
        """float[N, S, H] of the same, ``padding`` bool[N, S, 1]."""
        read = self.norm(hidden).masked_fill(padding, 0.0)
        return hidden + self.after(self.convolution(read.mT).mT)


class TemporalConvolution(ProjectedEncoder):
    """Dilated residual convolutions over the steps, before and after, then their mean.

    An input is whole when it is encoded, so nothing is gained by looking back alone. Tokens are the steps; the levels
    are the mean over the steps after every block.
    """

    def __init__(self, features: Sequence[FittedFeature], config: EncoderConfig) -> None:
        super().__init__()
        self.inputs = SeriesInputs(features, config)
        self.first = nn.Linear(self.inputs.width, config.hidden_width)
        depth = config.layers or BLOCKS
        self.blocks = nn.ModuleList(_Block(config.hidden_width, 2**i, config.dropout) for i in range(depth))
        self.project = linear_head(config.hidden_width, config)
        self.level_widths = (config.hidden_width,) * depth

    def read(self, view: NumericView, levels: bool) -> Hidden:
        """See :class:`ProjectedEncoder`."""
        hidden, padding, found = self.first(self.inputs(view)), ~view.steps[..., None], []
        for block in self.blocks:
            hidden = block(hidden, padding)
            if levels:
                found.append(masked_mean(hidden, view.steps))
        return Hidden(masked_mean(hidden, view.steps), hidden, view.steps, found)
