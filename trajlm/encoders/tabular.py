"""Numeric events without inner order: descriptors, a lab panel, a severity score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.views import NumericView


class TabularMLP(nn.Module):
    """Linear, LayerNorm, ReLU, Dropout, Linear, LayerNorm over one row per input (paper, B.1).

    The row holds, per feature, the mean of its observed values over the input's steps and whether any was observed;
    with ``state`` also the carried-forward state after the last step. Absence is the mask, never a zero alone.
    """

    def __init__(self, features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.state = config.state
        width = features * (5 if config.state else 2)
        self.layers = nn.Sequential(
            nn.Linear(width, config.hidden_width),
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
        parts = [mean, (counts > 0).to(mean.dtype)]
        if self.state:
            last = view.steps.sum(dim=1) - 1
            parts.append(view.state[torch.arange(len(view), device=last.device), last])
        return self.layers(torch.cat(parts, dim=-1))
