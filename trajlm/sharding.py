"""A module's weights split over processes for training (FSDP2), and whole again after it."""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from trajlm.adapters import decoder_layers
from trajlm.config import Recipe
from trajlm.distributed import whole
from trajlm.errors import TrajlmError


def shard(accelerator: Accelerator, module: nn.Module, optimiser: torch.optim.Optimizer) -> nn.Module:
    """A twin of a module whose parameters are split over the processes; ``optimiser`` trains the twin's.

    The module itself keeps its shape and loses its parameters' memory until :func:`unshard`. Each layer of a decoder
    is gathered on its own, just before it is needed; so are tables of embeddings, which events never look up.
    """
    held = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in held})
    plugin = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(unit).__name__ for unit in _units(twin)})
    accelerator.prepare(twin, optimiser)
    if not isinstance(twin, FSDPModule):
        raise RuntimeError("accelerate did not split the module")
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return twin


@torch.no_grad()
def unshard(twin: nn.Module, module: nn.Module) -> None:
    """Give the module the whole parameters and the buffers of its twin, on every process."""
    parts = dict(twin.named_parameters())
    for name, parameter in module.named_parameters():
        parameter.data = whole(parts[name])
    buffers = dict(twin.named_buffers())
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])


def _units(module: nn.Module) -> list[nn.Module]:
    backbones = [getattr(part, "backbone", None) for part in module.modules()]
    layers = [layer for backbone in backbones if isinstance(backbone, nn.Module) for layer in decoder_layers(backbone)]
    return layers + [part for part in module.modules() if isinstance(part, nn.Embedding)]


def require_splittable(recipe: Recipe) -> None:
    """Raise TrajlmError for what FSDP does not train.

    The kernels of 4-bit weights and 8-bit moments know no split tensors. A penalty reads some batches a second time,
    on some processes only, while the others wait for layers to gather.
    """
    config = recipe.finetuning
    refused = {
        "backbone.quantisation nf4": (recipe.backbone.quantisation == "nf4", "bf16 or none"),
        "finetuning.optimiser adamw8bit": (config.optimiser == "adamw8bit", "adamw"),
        "finetuning.drift_penalty": (config.drift_penalty > 0, "0"),
        "finetuning.anchoring_penalty": (config.anchoring_penalty > 0, "0"),
    }
    for setting, (asked, instead) in refused.items():
        if asked:
            raise TrajlmError(f"{setting}: not with FSDP; use {instead}, or recipes/accelerate/ddp.yaml")
