"""Gradients of a loss over a whole batch with the activations of a part of it (Gao et al., 2021, gradient caching).

A contrastive loss needs the latents of all stays at once, but not what their encoders computed on the way. So: encode
in chunks and keep only the latents; take the loss and its gradient at the latents; encode each chunk once more, now
with a graph, and hand it its share of that gradient. Exact, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from trajlm.errors import TrajlmError


class Divisible(Protocol):
    """A batch that can be cut into smaller ones."""

    present: Tensor

    def chunks(self, size: int) -> Sequence[Divisible]:
        """The same stays in order, at most ``size`` at a time."""


class _Randomness:
    """The state of torch's generators, so that a second pass draws the dropout of the first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def refuse_batch_norm(module: nn.Module) -> None:
    """Raise TrajlmError where chunks would not add up to the batch: batch normalisation mixes the stays of a chunk."""
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in part.parameters()):
            raise TrajlmError(
                f"pretraining.chunk_size: {name} normalises over the batch, which chunks would change; leave "
                "chunk_size null, freeze that encoder, or choose one without batch normalisation"
            )


def cached_backward(
    encode: Callable[[Divisible], Tensor],
    loss_of: Callable[[Tensor], Tensor],
    batch: Divisible,
    chunk_size: int,
) -> Tensor:
    """Leave the gradients of ``loss_of(encode(batch))`` on the parameters of both, a chunk's activations at a time.

    Args:
        encode: a batch of B stays to latents float[B, M, D].
        loss_of: latents of the whole batch to the loss float[].
        batch: the stays.
        chunk_size: most stays to encode at once.

    Returns:
        float[]: the loss, detached.
    """
    chunks = batch.chunks(chunk_size)
    begun, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            begun.append(_Randomness(chunk.present.device))
            parts.append(encode(chunk))
    latents = torch.cat(parts).requires_grad_()
    loss = loss_of(latents)
    loss.backward()
    assert latents.grad is not None
    shares = latents.grad.split([len(part) for part in parts])
    for chunk, randomness, share in zip(chunks, begun, shares, strict=True):
        randomness.restore()
        again = encode(chunk)
        if again.requires_grad:
            again.backward(share)
    return loss.detach()
