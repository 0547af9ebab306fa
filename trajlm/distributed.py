"""What several processes hold together: latents gathered with gradients, weights of which each has a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


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


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process may hold a part; every process has to ask at the same point."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one after the other; every process takes part, those that do not ``keep`` get none."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu()
    return found


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as ``like`` is; every process brings the whole."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
