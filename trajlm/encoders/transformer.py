"""Numeric series read by a Transformer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trajlm.config import EncoderConfig
from trajlm.encoders.attention import SummaryTransformer
from trajlm.encoders.base import Hidden, ProjectedEncoder, sines
from trajlm.encoders.series import SeriesInputs
from trajlm.schema import FittedFeature
from trajlm.views import NumericView

# Periods in hours of the sines that tell a step's time: half an hour, the finest bin, to six weeks.
SHORTEST, LONGEST = 0.5, 1000.0


class SeriesTransformer(ProjectedEncoder):
    """Self-attention over the steps of an input, which carry sines of the hours since its first step.

    Tokens are the steps; the levels are the summary after every layer.
    """

    def __init__(self, features: Sequence[FittedFeature], config: EncoderConfig) -> None:
        super().__init__()
        self.inputs = SeriesInputs(features, config)
        self.first = nn.Linear(self.inputs.width, config.hidden_width)
        self.body = SummaryTransformer(config)
        self.project = self.body.head(config)
        self.level_widths = (config.hidden_width,) * self.body.depth

    def read(self, view: NumericView, levels: bool) -> Hidden:
        """See :class:`ProjectedEncoder`."""
        elapsed = (view.hours - view.hours[:, :1]).clamp_min(0.0)
        steps = self.first(self.inputs(view)) + sines(elapsed, self.body.width, SHORTEST, LONGEST)
        return self.body(steps, view.steps)
