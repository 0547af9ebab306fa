"""Gather across processes with gradients, so that the negatives of a contrastive loss are the global batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


def several_processes() -> bool:
    """Whether this is one of several processes that compute together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes, as DDP does after a backward pass of its own; nothing with one process.

    A parameter without gradient on some processes counts as zero there; without one on any it stays without, so that
    the optimiser leaves it alone.
    """
    if not several_processes():
        return
    trained = [p for p in parameters if p.requires_grad]
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    for parameter, anywhere in zip(trained, used.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rank = dist.get_rank()
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Every process holds the same global loss; DDP averages parameter gradients, so the sum here is what makes
        # N processes give the gradient of one.
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.rank * ctx.rows : (ctx.rank + 1) * ctx.rows]


def gather_stays(latents: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The global batch from every process's share, in order of rank; unchanged with one process.

    Args:
        latents: float[B, M, D], B may differ between processes.
        present: bool[B, M].

    Returns:
        float[N * P, M, D] and bool[N * P, M], where P is the largest share; shorter ones are filled with stays that
        hold nothing, which take no part in the loss.
    """
    if not several_processes():
        return latents, present
    largest = torch.tensor(latents.shape[0], device=latents.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    filler = int(largest) - latents.shape[0]
    latents = torch.nn.functional.pad(latents, (0, 0, 0, 0, 0, filler))
    padded = torch.nn.functional.pad(present, (0, 0, 0, filler))
    gathered: Tensor = _GatherWithGradient.apply(latents)
    parts = [torch.empty_like(padded, dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded.to(torch.uint8))
    return gathered, torch.cat(parts).bool()
