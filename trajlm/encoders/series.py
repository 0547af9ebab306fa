"""Numeric events in order: hourly series, and single events as series of one step, read by a recurrent network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.encoders.base import Hidden, ProjectedEncoder, linear_head
from trajlm.encoders.numeric import NumericInputs, last_step
from trajlm.schema import FittedFeature
from trajlm.views import NumericView


class SeriesInputs(nn.Module):
    """What a series encoder reads of every step.

    Values, observed mask, with ``state`` the carried-forward state, and log(1 + hours since the input's first step).
    """

    def __init__(self, features: Sequence[FittedFeature], config: EncoderConfig) -> None:
        super().__init__()
        self.inputs = NumericInputs(features, config)
        self.width = self.inputs.width + 1

    def forward(self, view: NumericView, first_hours: Tensor | None = None) -> Tensor:
        """float[N, S, W]; zero at padding, whatever stands there.

        Args:
            view: the steps.
            first_hours: float[N, 1], hour of each input's first step where it is not the view's.
        """
        elapsed = torch.log1p((view.hours - (view.hours[:, :1] if first_hours is None else first_hours)).clamp_min(0.0))
        rows = self.inputs(view.values, view.observed, view.state).flatten(start_dim=-2)
        return torch.cat([rows, elapsed[..., None]], dim=-1).masked_fill(~view.steps[..., None], 0.0)


class Recurrent(ProjectedEncoder):
    """A recurrent network over the steps of an input, its last hidden state projected (paper, B.1).

    Recurrent weights start orthogonal, gate by gate, input weights Xavier uniform. Tokens are the hidden states of the
    steps, each the latent of the steps up to it; the levels are the last hidden state of every layer.

    Args:
        cell: nn.LSTM or nn.GRU.
        features: of the modality, in order.
        config: settings of the encoders.
    """

    reads_in_order = True

    def __init__(
        self, cell: type[nn.LSTM] | type[nn.GRU], features: Sequence[FittedFeature], config: EncoderConfig
    ) -> None:
        super().__init__()
        self.inputs = SeriesInputs(features, config)
        widths = [self.inputs.width] + [config.hidden_width] * (config.layers or 1)
        # A layer each: one module of several would show the last layer's steps alone.
        self.layers = nn.ModuleList(cell(w, config.hidden_width, batch_first=True) for w in widths[:-1])
        for layer in self.layers:
            start_recurrent(layer)
        self.between = nn.Dropout(config.dropout)
        self.project = linear_head(config.hidden_width, config)
        self.level_widths = tuple(widths[1:])

    def read(self, view: NumericView, levels: bool) -> Hidden:
        """See :class:`ProjectedEncoder`; padding comes after the last real step and is never read."""
        hidden, last, found = self.inputs(view), last_step(view), []
        for i, layer in enumerate(self.layers):
            hidden, _ = layer(self.between(hidden) if i else hidden)
            if levels:
                found.append(hidden[last])
        return Hidden(hidden[last], hidden, view.steps, found)

    def advance(self, view: NumericView, carried: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See :class:`Encoder`; carried are the first step's hour and every layer's state."""
        first, *before = carried if carried is not None else (view.hours[:, :1],)
        hidden, after = self.inputs(view, first), [first]
        for i, layer in enumerate(self.layers):
            width = 2 if isinstance(layer, nn.LSTM) else 1
            state = tuple(before[i * width : (i + 1) * width])
            given = (state if width == 2 else state[0]) if state else None
            hidden, state = layer(self.between(hidden) if i else hidden, given)
            after += state if width == 2 else [state]
        return self.project(hidden[:, -1]), tuple(after)


def start_recurrent(layer: nn.Module) -> None:
    """Orthogonal recurrent weights, a square matrix per gate; Xavier uniform input weights; zero biases (B.1)."""
    for name, parameter in layer.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.split(parameter.shape[1]):
                nn.init.orthogonal_(gate)
        elif name.startswith("weight_ih"):
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
