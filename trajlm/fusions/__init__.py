"""Static fusions: one latent per modality to one vector per stay, one file each.

A fusion is built of (modalities M, latent width D), has a ``width`` H, and maps latents float[B, M, D] and present
bool[B, M] to float[B, H].
"""

from __future__ import annotations

from trajlm.fusions.lstm import ModalityLSTM
from trajlm.fusions.mlp import ConcatenationMLP

FUSIONS: dict[str, type[ConcatenationMLP] | type[ModalityLSTM]] = {"mlp": ConcatenationMLP, "lstm": ModalityLSTM}
