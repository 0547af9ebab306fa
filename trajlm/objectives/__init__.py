"""Alignment losses by name, under one loop: the paper's and the rivals it is measured against.

A loss takes latents float[B, M, D], present bool[B, M] and temperature float[], and gives float[], in nats. It
normalises, never reads an absent entry, and is a zero that carries a graph where the batch holds nothing to align. A
new one is one file and one line in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trajlm.alignment import masked_global_alignment_loss
from trajlm.objectives.one_versus_others import one_versus_others_loss
from trajlm.objectives.pairwise import pairwise_loss

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

OBJECTIVES: dict[str, Objective] = {
    "masked_global": masked_global_alignment_loss,
    "pairwise": pairwise_loss,
    "one_versus_others": one_versus_others_loss,
}
