"""Memory of one training step, computed on shapes alone: no weights, no GPU.

The step runs on fake tensors, which have sizes and no contents, while every allocation and release is counted. So any
attention backbone is covered, with adapters, checkpointing and autocast as they are, and nothing is a formula of ours
but what the optimiser holds and how 4-bit weights are packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel

from trajlm.adapters import READ_BY_KERNELS, add_lora
from trajlm.backbones import shape_of
from trajlm.config import BackboneConfig
from trajlm.errors import TrajlmError
from trajlm.presets import Preset, presets
from trajlm.quantisation import HalfLinear, settle

GB = 1e9
CONTEXT_GB = 1.0  # a CUDA context and its libraries, about
GPUS_GB = (16, 24, 40, 80)
# Per number of a 4-bit weight: half a byte, one byte of scale per 64, four bytes of the scales' scale per 64 x 256.
FOUR_BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_SHORT, _LONG = 2, 4  # depths that are run; layers are alike, so the real depth lies on the line through them


class AllocationCount(TorchDispatchMode):
    """Counts the bytes of every tensor that is made inside it, until it is let go.

    Args:
        known: tensors that were there before, whose views are no allocations.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class _FourBit(torch.autograd.Function):
    """What a 4-bit product keeps and needs: the weight is unpacked for each pass and let go; no input is kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, out_features: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.out_features = out_features
        return F.linear(inputs, _unpacked(packed, out_features, inputs))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradients[0] @ _unpacked(packed, ctx.out_features, gradients[0]), None, None


def _unpacked(packed: Tensor, out_features: int, like: Tensor) -> Tensor:
    return like.new_empty(out_features, packed.numel() * 2 // out_features)


class _FourBitLinear(HalfLinear):
    def forward(self, input: Tensor) -> Tensor:
        return _FourBit.apply(input.to(torch.bfloat16), self.weight, self.out_features)


def _pack(trunk: nn.Module) -> None:
    for name, module in trunk.named_modules():
        if isinstance(module, HalfLinear) and name.rsplit(".", 1)[-1] not in READ_BY_KERNELS:
            packed = torch.empty(module.weight.numel() // 2, dtype=torch.uint8)
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.__class__ = _FourBitLinear


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step of the backbone.

    Attributes:
        weights: frozen weights, the vocabulary among them.
        adapters: adapters, their gradients, moments and running means.
        activations: what the step holds beside those at its fullest moment.
    """

    weights: float
    adapters: float
    activations: float

    @property
    def total(self) -> float:
        """Bytes in all, without a CUDA context."""
        return self.weights + self.adapters + self.activations


def step_memory(
    preset: Preset, config: BackboneConfig, optimiser: str, stays: int, positions: int, bf16: bool = True
) -> StepMemory:
    """Memory of one LoRA step of an attention backbone.

    Args:
        preset: whose shape is run.
        config: adapters, quantisation and gradient checkpointing.
        optimiser: adamw or adamw8bit.
        stays, positions: the batch, B x T; an event takes two positions.
        bf16: under bfloat16 autocast.
    """
    depth = preset.shape["num_hidden_layers"]
    short, long = (_run(preset, config, layers, stays, positions, bf16) for layers in (_SHORT, _LONG))

    def at_depth(name: str) -> float:
        slope = (short[name], long[name])
        return slope[0] + (slope[1] - slope[0]) * (depth - _SHORT) / (_LONG - _SHORT)

    moments = 8 if optimiser == "adamw" else 2
    trained = at_depth("trained")
    return StepMemory(at_depth("weights"), trained * (4 + 4 + 4 + moments), at_depth("peak") - 4 * trained)


def _run(
    preset: Preset, config: BackboneConfig, layers: int, stays: int, positions: int, bf16: bool
) -> dict[str, float]:
    shape = AutoConfig.for_model(preset.family.model_type, **{**preset.shape, "num_hidden_layers": layers})
    with torch.device("meta"):
        trunk = _held(shape, config.quantisation)
        if config.gradient_checkpointing:
            trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        weights = _size(trunk)
        backbone = add_lora(trunk, replace(config, name=preset.name)).train()
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    with FakeTensorMode():
        _fake(backbone)
        events = torch.empty(stays, positions, shape.hidden_size, requires_grad=True)
        mask = torch.empty(1, 1, positions, positions)
        masks = dict.fromkeys(set(shape.layer_types), mask) if preset.family.masks == "by_layer" else mask
        with AllocationCount([*backbone.parameters(), *backbone.buffers(), events, mask]) as count:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                states = backbone(inputs_embeds=events * 1.0, attention_mask=masks, use_cache=False).last_hidden_state
            loss = states[:, 1::2].float().sum()
            del states
            loss.backward()
    return {"weights": weights, "trained": trained, "peak": count.peak}


def _fake(backbone: nn.Module) -> None:
    """Put fake tensors, of a device that computes, in the place of those on the meta device."""
    for module in backbone.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            module.register_parameter(name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)


def _held(shape: Any, quantisation: str) -> Any:
    """A trunk on the meta device, its weights held as they would be."""
    with torch.device("meta"):
        trunk = AutoModel.from_config(shape)
        if quantisation != "none":
            settle(trunk)
        if quantisation == "nf4":
            _pack(trunk)
    return trunk


def _size(trunk: nn.Module) -> float:
    return sum(_bytes(module, own) for module in trunk.modules() for own in module.parameters(recurse=False))


def _weights(preset: Preset) -> float:
    return _size(_held(shape_of(preset.name), "nf4"))


def _bytes(module: nn.Module, parameter: nn.Parameter) -> float:
    if isinstance(module, _FourBitLinear) and parameter.dtype == torch.uint8:
        return 2 * parameter.numel() * FOUR_BIT_BYTES
    return parameter.numel() * parameter.element_size()


def smallest_gpu(memory: StepMemory) -> str:
    """The smallest usual GPU that holds the step, a CUDA context and a tenth in reserve."""
    needed = (memory.total / GB + CONTEXT_GB) * 1.1
    return next((f"{size} GB" for size in GPUS_GB if needed <= size), "more")


# What the table shows: frozen weights, and whether activations are computed again in the backward pass.
_RECIPES = {
    "nf4, checkpointing": BackboneConfig(tuning="lora", quantisation="nf4", gradient_checkpointing=True),
    "nf4": BackboneConfig(tuning="lora", quantisation="nf4"),
    "bf16, checkpointing": BackboneConfig(tuning="lora", quantisation="bf16", gradient_checkpointing=True),
}


def table(stays: int, events: int) -> str:
    """Markdown: memory of a step of every pretrained preset, and the GPU that holds it.

    Args:
        stays: per step and GPU.
        events: of the longest of them.
    """
    lines = [
        f"| {stays} stays of {events} events | weights, nf4 | " + " | ".join(_RECIPES) + " |",
        "|---|---|" + "---|" * len(_RECIPES),
    ]
    for preset in presets().values():
        if not preset.random:
            lines.append(f"| {preset.name} | " + " | ".join(_cells(preset, stays, 2 * events)) + " |")
    return "\n".join(lines)


def _cells(preset: Preset, stays: int, positions: int) -> list[str]:
    try:
        cells = [f"{_weights(preset) / GB:.1f} GB"]
    except TrajlmError:
        return ["experts are not"] + [""] * len(_RECIPES)
    for config in _RECIPES.values():
        if preset.family.recurrent:  # what its scan keeps is up to its kernels
            cells.append("")
            continue
        memory = step_memory(preset, config, "adamw8bit", stays, positions)
        cells.append(f"{memory.total / GB:.1f} GB: {smallest_gpu(memory)}")
    return cells
