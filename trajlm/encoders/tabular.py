"""Numeric events without inner order: descriptors, a lab panel, a severity score."""

from __future__ import annotations

from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.encoders.numeric import NumericInputs, last_step
from trajlm.views import NumericView


class TabularMLP(nn.Module):
    """Linear, LayerNorm, ReLU, Dropout, Linear, LayerNorm over one row per input (paper, B.1).

    The row holds, per feature, the mean of its observed values over the input's steps and whether any was observed;
    with ``state`` also the carried-forward state after the last step. Absence is the mask, never a zero alone.
    """

    def __init__(self, features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.inputs = NumericInputs(features, config.state, config.values == "piecewise")
        self.layers = nn.Sequential(
            nn.Linear(self.inputs.width, config.hidden_width),
            nn.LayerNorm(config.hidden_width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden_width, config.latent_width),
            nn.LayerNorm(config.latent_width),
        )

    def forward(self, view: NumericView) -> Tensor:
        """float[N, D] latents of N inputs."""
        counts = view.observed.sum(dim=1)
        mean = (view.values * view.observed).sum(dim=1) / counts.clamp_min(1)
        return self.layers(self.inputs(mean, counts > 0, view.state[last_step(view)]))
