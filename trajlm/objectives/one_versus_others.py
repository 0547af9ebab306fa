"""One-Versus-Others: every modality against the mean of all the others, on complete stays (paper, 2)."""

from __future__ import annotations

from torch import Tensor

from trajlm.alignment import masked_global_alignment_loss


def one_versus_others_loss(latents: Tensor, present: Tensor, temperature: Tensor) -> Tensor:
    """What Masked Global Alignment generalises: with every modality observed both are the same loss.

    A stay that lacks any modality is no anchor and no negative: the batch is cut down to its complete stays.

    Args:
        latents: float[B, M, D], any length; normalised here.
        present: bool[B, M], True where observed; other entries are never read.
        temperature: float[], positive.

    Returns:
        float[]: the loss in nats; a zero that carries a graph without a complete stay.
    """
    complete = present.all(dim=1, keepdim=True)
    return masked_global_alignment_loss(latents, present & complete, temperature)
