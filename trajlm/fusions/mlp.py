"""Late fusion by concatenation (paper, 3.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConcatenationMLP(nn.Module):
    """The latents of all modalities side by side, missing tokens where absent, through an MLP.

    Args:
        modalities: M.
        latent_width: D.
        width: H of the fused vector.
        dropout: before and after the hidden layer.
    """

    def __init__(self, modalities: int, latent_width: int, width: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(modalities * latent_width, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, latents: Tensor, present: Tensor) -> Tensor:
        """float[B, H] of latents float[B, M, D] and present bool[B, M] (the tokens already tell absence)."""
        if latents.shape[:2] != present.shape:
            raise ValueError(f"expected present {tuple(latents.shape[:2])}, came {tuple(present.shape)}")
        return self.layers(torch.flatten(latents, start_dim=1))
