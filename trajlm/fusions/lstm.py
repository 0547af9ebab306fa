"""Late fusion by an LSTM over the set of modality embeddings (paper, 3.4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ModalityLSTM(nn.Module):
    """The latents of all modalities read one after another in their fixed order, missing tokens where absent.

    Args:
        modalities: M; the order stands for which is which.
        latent_width: D.
        width: H of the fused vector, the state after the last modality.
        dropout: before the LSTM and on its result.
    """

    def __init__(self, modalities: int, latent_width: int, width: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.width, self.modalities = width, modalities
        self.before, self.after = nn.Dropout(dropout), nn.Dropout(dropout)
        self.lstm = nn.LSTM(latent_width, width, batch_first=True)
        for name, weight in self.lstm.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(weight)
            elif "weight_ih" in name:
                nn.init.xavier_uniform_(weight)

    def forward(self, latents: Tensor, present: Tensor) -> Tensor:
        """float[B, H] of latents float[B, M, D] and present bool[B, M] (the tokens already tell absence)."""
        if latents.shape[:2] != present.shape or latents.shape[1] != self.modalities:
            raise ValueError(
                f"expected latents and present of {self.modalities} modalities, came {tuple(latents.shape[:2])} and "
                f"{tuple(present.shape)}"
            )
        _, (last, _) = self.lstm(self.before(latents))
        return self.after(torch.relu(last[-1]))
