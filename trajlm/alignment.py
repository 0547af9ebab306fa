"""Masked Global Alignment: a contrastive loss over whichever modalities a stay holds (paper, 3.2, Eq. 1-5).

Pure functions of latents and presence. Latents are normalised here and nowhere else; entries of absent modalities are
replaced before any arithmetic, so whatever stands there (even NaN) changes neither a value nor a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE_BOUNDS = (0.01, 1.0)


def unit_latents(latents: Tensor, present: Tensor) -> Tensor:
    """``float[B, M, D]``: unit latents, zero where absent. Half precision is raised to float32."""
    if latents.ndim != 3 or present.shape != latents.shape[:2]:
        raise ValueError(
            f"expected latents float[B, M, D] and present bool[B, M], came {tuple(latents.shape)} and "
            f"{tuple(present.shape)}"
        )
    if present.dtype != torch.bool:
        raise ValueError(f"expected present of dtype bool, came {present.dtype}")
    if latents.dtype in (torch.float16, torch.bfloat16):
        latents = latents.float()
    return F.normalize(latents.masked_fill(~present[..., None], 0.0), dim=-1)


def global_representation(latents: Tensor, present: Tensor) -> Tensor:
    """Stable global representation ``g`` of every stay (Eq. 4).

    Args:
        latents: float[B, M, D], any length; normalised here.
        present: bool[B, M], True where observed.

    Returns:
        float[B, D], unit vectors; zero for a stay with nothing observed.
    """
    return F.normalize(unit_latents(latents, present).sum(dim=1), dim=-1)


def complementary_targets(latents: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """What stay j offers to anchors of modality m (Eq. 2-4).

    The complementary centroid, the unit mean of the stay's other observed modalities; where it holds no other, its
    global representation.

    Args:
        latents: float[B, M, D].
        present: bool[B, M].

    Returns:
        float[B, M, D] targets, and bool[B], True where the stay holds anything and so offers targets.
    """
    return _targets(unit_latents(latents, present), present)


def _targets(unit: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    # Summing the others, not subtracting from the total: no cancellation. The unit of a sum is the unit of its mean.
    others = 1.0 - torch.eye(present.shape[1], dtype=unit.dtype, device=unit.device)
    rest = torch.einsum("mk,jkd->jmd", others, unit)
    alone = present & (present.sum(dim=1, keepdim=True) == 1)
    # Where a stay holds m alone, the rest seen from m is zero and the global representation is m's own unit.
    return F.normalize(rest + unit * alone[..., None], dim=-1), present.any(dim=1)


def masked_global_alignment_loss(latents: Tensor, present: Tensor, temperature: Tensor) -> Tensor:
    """Masked Global Alignment loss (Eq. 5).

    Every observed modality of a stay with at least two must recognise the rest of its own stay among all stays of the
    batch. Stays with one modality serve as negatives only, stays with none take no part. The mean is taken over the
    anchors of a modality, then over the modalities that have an anchor.

    Args:
        latents: float[B, M, D], any length; normalised here.
        present: bool[B, M], True where observed; other entries are never read.
        temperature: float[], positive.

    Returns:
        float[]: the loss in nats; a zero that carries a graph when no modality has an anchor.
    """
    unit = unit_latents(latents, present)
    anchors = present & (present.sum(dim=1, keepdim=True) >= 2)
    targets, offers = _targets(unit, present)
    # Nothing below asks the device for a number. Where no stay offers a target none is hidden: there are no anchors.
    hidden = torch.zeros_like(offers, dtype=unit.dtype).masked_fill(~offers & offers.any(), float("-inf"))
    anchor, target = (unit / temperature).transpose(0, 1), targets.permute(1, 2, 0)
    similarity = torch.baddbmm(hidden.expand(len(anchor), 1, -1), anchor, target)  # [M, B, B]
    loss = -similarity.log_softmax(dim=2).diagonal(dim1=1, dim2=2)
    per_modality = anchors.sum(dim=0)
    mean = torch.where(anchors.T, loss, 0.0).sum(dim=1) / per_modality.clamp_min(1)
    return mean.sum() / (per_modality > 0).sum().clamp_min(1)


def missing_token_loss(missing_tokens: Tensor, latents: Tensor, present: Tensor) -> Tensor:
    """Pulls each token towards the stays that lack its modality.

    Eq. 5 gives missing tokens no gradient. One token serves every stay that lacks m, so the best it can be is the
    expected direction of those stays' global representation, which this loss has as its minimum.

    Args:
        missing_tokens: float[M, D].
        latents: float[B, M, D]; no gradient flows into them.
        present: bool[B, M].

    Returns:
        float[]: mean over absent (i, m) of stays with anything observed of 1 - cos(token, global representation);
        a zero that carries a graph when nothing is absent.
    """
    absent = ~present & present.any(dim=1, keepdim=True)
    target = global_representation(latents.detach(), present)
    tokens = F.normalize(missing_tokens.to(target.dtype), dim=-1)
    distance = (1.0 - target @ tokens.T).masked_fill(~absent, 0.0)
    return distance.sum() / absent.sum().clamp_min(1)


def inject_missing_tokens(latents: Tensor, present: Tensor, missing_tokens: Tensor) -> Tensor:
    """``float[B, M, D]``: the latent where present, the modality's token (float[M, D]) elsewhere (Eq. 1)."""
    return torch.where(present[..., None], latents, missing_tokens.to(latents.dtype))


def drop_modalities(present: Tensor, probability: float, generator: torch.Generator | None = None) -> Tensor:
    """Modality dropout: with ``probability`` mask one randomly chosen present modality of a stay, never the last.

    Args:
        present: bool[B, M].
        probability: of a stay to lose a modality.
        generator: source of randomness; the global one if None.

    Returns:
        bool[B, M], a subset of ``present``.
    """
    stays, modalities = present.shape
    chance = torch.rand(stays, generator=generator, device=present.device)
    order = torch.rand(stays, modalities, generator=generator, device=present.device).masked_fill(~present, -1.0)
    chosen = F.one_hot(order.argmax(dim=1), modalities).bool()
    loses = (chance < probability) & (present.sum(dim=1) >= 2)
    return present & ~(chosen & loses[:, None])
