"""The backbone's attention, watched or changed in chosen layers while everything else runs as always.

A backbone of transformers looks its attention up by name. Under a name of ours, a chosen layer hands its queries, keys
and mask to an observer, or loses the edges that are knocked out, and then runs the very function it ran before. Layers
that nobody asked for cost nothing more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trajlm.adapters import bare
from trajlm.backbones import hidden_width, text_config
from trajlm.errors import TrajlmError

HELD_AT_ONCE = 1 << 24  # attention weights of heads computed together: 64 MiB


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention as it runs.

    Attributes:
        query: float[B, heads, T, d].
        key: float[B, key heads, T, d]; key heads divide heads.
        mask: bool (True may be seen) or additive float [B or 1, 1 or heads, T, T]; None is plain causal.
        scaling: factor of the dot products.
        weights: float[B, heads, T, T] where the layer computes them itself; None where it never holds them.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    weights: Tensor | None = None

    def mean_weights(self, heads: Sequence[int] | None = None, rows: slice = slice(None)) -> Tensor:
        """float32[B, R, T]: weights of the querying positions ``rows``, averaged over heads (all, or those named).

        Heads are worked through a few at a time, so that one averaged map is the most that is held for long.
        """
        count = self.query.shape[1]
        named = list(range(count)) if heads is None else list(heads)
        if self.weights is not None:
            return self.weights[:, named, rows].float().mean(dim=1)
        batch, _, length, _ = self.query[:, :, rows].shape
        together = max(1, HELD_AT_ONCE // (batch * length * self.key.shape[2]))
        allowed = _rows_of_mask(self.mask, rows, self.query.shape[2], self.query.device)
        total: Tensor | None = None
        for start in range(0, len(named), together):
            part = self._weights_of(named[start : start + together], rows, allowed).sum(dim=1)
            total = part if total is None else total + part
        if total is None:
            raise TrajlmError("attention of no heads was asked for")
        return total / len(named)

    def mean_on(self, columns: Tensor, rows: slice) -> Tensor:
        """float32[B, R]: the part of :meth:`mean_weights` that falls on the positions ``columns`` bool[B, T].

        Those positions alone are averaged over heads.
        """
        asked = columns.any(dim=0).nonzero()[:, 0]
        on = columns[:, None, None, asked]
        if self.weights is not None:
            return (self.weights[:, :, rows][..., asked].float() * on).sum(dim=-1).mean(dim=1)
        allowed = _rows_of_mask(self.mask, rows, self.query.shape[2], self.query.device)
        count = self.query.shape[1]
        together = max(1, HELD_AT_ONCE // (len(columns) * allowed.shape[2] * self.key.shape[2]))
        parts = []
        for start in range(0, count, together):
            weights = self._weights_of(list(range(start, min(start + together, count))), rows, allowed)
            parts.append((weights[..., asked] * on).sum(dim=-1))
        return torch.cat(parts, dim=1).mean(dim=1)

    def _weights_of(self, heads: list[int], rows: slice, allowed: Tensor) -> Tensor:
        return self._scores_of(heads, rows, allowed).softmax(dim=-1)

    def _scores_of(self, heads: list[int], rows: slice, allowed: Tensor) -> Tensor:
        """float32[B, heads, R, T]: what the softmax sees."""
        shared = self.query.shape[1] // self.key.shape[1]
        query = self.query[:, heads, rows].float() * self.scaling
        mask = allowed if allowed.shape[1] == 1 else allowed[:, heads]
        scores = torch.matmul(query, self.key[:, [h // shared for h in heads]].float().transpose(2, 3))
        if mask.dtype == torch.bool:
            # The least number, not minus infinity: a padded row that may see nothing must not become NaN.
            return scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        return scores.add_(mask.float())


Observer = Callable[[AttentionCall], Tensor]


@dataclass
class Interception:
    """What the running forward pass is asked for.

    Attributes:
        observers: by layer, what to keep of it.
        blocked: by layer, bool[B or 1, T, T]: edges (querying position, seen position) that are knocked out.
        seen: by layer, what its observer returned.
        reached: layers whose edges were cut.
    """

    observers: dict[int, Observer] = field(default_factory=dict)
    blocked: dict[int, Tensor] = field(default_factory=dict)
    seen: dict[int, Tensor] = field(default_factory=dict)
    reached: set[int] = field(default_factory=set)


_running: list[Interception] = []


def _rows_of_mask(mask: Tensor | None, rows: slice, length: int, device: torch.device) -> Tensor:
    whole = causal_mask(length, device) if mask is None else mask
    return whole[:, :, rows]


def causal_mask(length: int, device: torch.device) -> Tensor:
    """bool[1, 1, T, T], True where a position may see another."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def _without(mask: Tensor | None, blocked: Tensor, length: int) -> Tensor:
    """The mask with edges knocked out."""
    allowed = causal_mask(length, blocked.device) if mask is None else mask
    left_out = blocked[:, None]
    if allowed.dtype != torch.bool:
        allowed, lowest = allowed.expand(-1, -1, length, -1), torch.finfo(allowed.dtype).min
        _check_rows(allowed > lowest / 2, left_out)
        return allowed.masked_fill(left_out, lowest)
    _check_rows(allowed, left_out)
    return allowed & ~left_out


def _check_rows(allowed: Tensor, left_out: Tensor) -> None:
    emptied = allowed.any(dim=-1) & ~(allowed & ~left_out).any(dim=-1)
    if emptied.any():
        position = int(emptied.nonzero()[0, -1])
        raise TrajlmError(f"knock-out leaves position {position} nothing to attend to; leave it at least itself")


def _intercepting(own: Callable[..., tuple[Tensor, Tensor | None]] | None) -> Callable[..., tuple[Tensor, Any]]:
    """An attention function that does what ``own`` does; None stands for the modelling file's eager one."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        run = own or sys.modules[type(module).__module__].eager_attention_forward
        layer, now = int(module.layer_idx), _running[-1]  # type: ignore[arg-type]
        if layer in now.blocked:
            attention_mask = _without(attention_mask, now.blocked[layer], key.shape[2])
            now.reached.add(layer)
        output, weights = run(module, query, key, value, attention_mask, **options)
        if layer in now.observers:
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            call = AttentionCall(query, key, attention_mask, scaling, weights)
            now.seen[layer] = now.observers[layer](call)
        return output, weights

    return forward


# Families whose scores are bent (soft caps, sinks) run eager attention, which hands its weights over.
_NAMES = {"sdpa": "trajlm_sdpa", "eager": "trajlm_eager"}
AttentionInterface.register(_NAMES["sdpa"], _intercepting(sdpa_attention_forward))
AttentionInterface.register(_NAMES["eager"], _intercepting(None))
for _kind, _name in _NAMES.items():
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_kind])


def layer_numbers(backbone: nn.Module, layers: Sequence[int]) -> list[int]:
    """These layers counted from 0; negative ones count from the end. Raises TrajlmError for one that does not exist."""
    count = depth(backbone)
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong:
        raise TrajlmError(f"the backbone has layers 0 to {count - 1} (or -1 to -{count}), asked for {wrong}")
    return [layer % count for layer in layers]


@contextmanager
def intercepted(backbone: nn.Module, interception: Interception) -> Iterator[Interception]:
    """Run the backbone under an interception while the block lasts.

    Raises:
        TrajlmError: at the end, for a layer that was to be watched or changed and has no attention that can be
            (state-space layers; families that do not look their attention up by name can be watched where they return
            their weights, and not changed).
    """
    trunk = bare(backbone)
    before = trunk.config._attn_implementation
    looks_up = bool(getattr(trunk, "_can_set_attn_implementation", lambda: False)())
    hooks = [] if looks_up else _weight_hooks(trunk, interception)
    if not looks_up and interception.blocked:
        raise TrajlmError(no_attention(trunk, "edges cannot be knocked out"))
    _running.append(interception)
    try:
        if looks_up:
            # Kernels that never hold their weights (flash attention) give way to sdpa, which computes the same.
            trunk.set_attn_implementation(_NAMES.get(before, _NAMES["sdpa"]))
        yield interception
        silent = sorted(set(interception.observers) - set(interception.seen))
        if silent:
            raise TrajlmError(no_attention(trunk, f"layers {silent} cannot be shown"))
    finally:
        _running.pop()
        if looks_up:
            trunk.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def attention_layers(backbone: nn.Module) -> list[int]:
    """Layers whose attention can be watched, found by running two positions through the backbone; maybe none."""
    interception = Interception(dict.fromkeys(layer_numbers(backbone, range(depth(backbone))), lambda call: call.query))
    # As a sequence comes to it, whatever the weights are held in.
    two = torch.zeros(1, 2, hidden_width(backbone), device=next(backbone.parameters()).device)
    with suppress(TrajlmError), intercepted(backbone, interception):
        backbone(inputs_embeds=two, use_cache=False)
    return sorted(interception.seen)


def depth(backbone: nn.Module) -> int:
    """How many layers the backbone has."""
    return int(text_config(backbone).num_hidden_layers)


def no_attention(trunk: Any, what: str) -> str:
    """What to tell a user whose backbone has no attention there."""
    return (
        f"{what}: this backbone ({trunk.config.model_type}) has no attention there that can be reached; ablation and "
        "integrated gradients work for every backbone"
    )


def _weight_hooks(trunk: nn.Module, interception: Interception) -> list[Any]:
    """Take the weights from attention modules that return them, in families that have their own way."""

    def hook(layer: int) -> Callable[..., None]:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            for part in output if isinstance(output, tuple) else ():
                if isinstance(part, Tensor) and part.ndim == 4 and part.shape[-1] == part.shape[-2]:
                    call = AttentionCall(part[..., :1], part[..., :1], None, 1.0, part)
                    interception.seen[layer] = interception.observers[layer](call)

        return take

    hooks = []
    for module in trunk.modules():
        layer = getattr(module, "layer_idx", getattr(module, "layer_id", None))
        if type(module).__name__.endswith("Attention") and layer in interception.observers:
            hooks.append(module.register_forward_hook(hook(int(layer))))
    return hooks
