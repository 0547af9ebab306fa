"""Plain contrastive alignment of two modalities at a time, as CLIP aligns pictures and captions."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from trajlm.alignment import unit_latents


def pairwise_loss(latents: Tensor, present: Tensor, temperature: Tensor) -> Tensor:
    """Mean over pairs of modalities of the symmetric contrastive loss on the stays that hold both.

    Args:
        latents: float[B, M, D], any length; normalised here.
        present: bool[B, M], True where observed; other entries are never read.
        temperature: float[], positive.

    Returns:
        float[]: the loss in nats; a zero that carries a graph where no stay holds two modalities.
    """
    unit = unit_latents(latents, present)
    losses = []
    for one, other in combinations(range(present.shape[1]), 2):
        both = present[:, one] & present[:, other]
        if both.any():
            similarity = unit[both, one] @ unit[both, other].T / temperature
            own = torch.arange(len(similarity), device=similarity.device)
            losses.append((F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2)
    return torch.stack(losses).mean() if losses else unit.sum() * 0.0 + temperature * 0.0
