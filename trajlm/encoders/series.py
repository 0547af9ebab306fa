"""Numeric events in order: hourly series, and single events as series of one step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.encoders.numeric import NumericInputs, last_step
from trajlm.views import NumericView


class SeriesLSTM(nn.Module):
    """LSTM over the steps of an input, its last hidden state projected (paper, B.1).

    Recurrent weights start orthogonal, input weights Xavier uniform. A step holds values, observed mask, with ``state``
    the carried-forward state, and log(1 + hours since the input's first step).
    """

    def __init__(self, features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.inputs = NumericInputs(features, config.state, config.values == "piecewise")
        self.lstm = nn.LSTM(self.inputs.width + 1, config.hidden_width, batch_first=True)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(parameter)
            elif name.startswith("weight_ih"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
        self.project = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_width, config.latent_width),
            nn.LayerNorm(config.latent_width),
        )

    def forward(self, view: NumericView) -> Tensor:
        """float[N, D] latents of N inputs; padding comes after the last real step and is never read."""
        elapsed = torch.log1p((view.hours - view.hours[:, :1]).clamp_min(0.0))
        steps = torch.cat([self.inputs(view.values, view.observed, view.state), elapsed[..., None]], dim=-1)
        hidden, _ = self.lstm(steps)
        return self.project(hidden[last_step(view)])
