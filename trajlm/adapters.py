"""Low-rank adapters where they were asked for, everywhere they were asked for, and learning.

peft adds adapters to whatever names match. On a model that fuses its projections most of the usual names match nothing,
and on one whose fused kernels read a layer's weight directly an adapter on it is never used; both go unnoticed in a
falling loss.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trajlm.config import BackboneConfig
from trajlm.distributed import whole
from trajlm.errors import TrajlmError
from trajlm.presets import family_of

# Beside a convolution, of state-space layers, these are read by fused kernels past an adapter.
READ_BY_KERNELS = {"dt_proj", "x_proj", "out_proj"}


def decoder_layers(trunk: nn.Module) -> nn.ModuleList:
    """The trunk's list of layers."""
    depth = _text_config(trunk).num_hidden_layers
    for module in trunk.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise TrajlmError(f"{type(trunk).__name__} has no list of {depth} layers; trajlm cannot adapt it")


def _text_config(trunk: nn.Module) -> Any:
    config: Any = trunk.config
    return config.get_text_config()


def linear_names(layer: nn.Module) -> set[str]:
    """Last names of the linear layers inside one layer of the decoder; numbered ones are left out."""
    names = {name.rsplit(".", 1)[-1] for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
    return {name for name in names if not name.isdigit()}


def _inspected(layers: nn.ModuleList) -> list[str]:
    """All linear layers of an unknown family but those that fused kernels may read past an adapter."""
    names = set().union(*map(linear_names, layers))
    if any(name.rsplit(".", 1)[-1] == "conv1d" for name, _ in layers.named_modules()):
        names -= READ_BY_KERNELS
    return sorted(names)


def lora_targets(trunk: nn.Module, wanted: Sequence[str], name: str) -> list[str]:
    """Which linear layers get adapters.

    Args:
        trunk: the decoder.
        wanted: their last names; empty takes the family's.
        name: of the backbone, for errors.

    Raises:
        TrajlmError: a name that occurs nowhere, a layer that would get no adapter, or (of names that were asked for) a
            name that occurs in some layers only while what the others hold in its stead was not asked for.
    """
    layers = decoder_layers(trunk)
    chosen = list(wanted) or list(family_of(_text_config(trunk).model_type).lora) or _inspected(layers)
    held = [linear_names(layer) for layer in layers]
    everywhere = set().union(*held)
    absent = [target for target in chosen if target not in everywhere]
    if absent or not chosen:
        raise TrajlmError(
            f"backbone {name!r}: LoRA was asked for on {', '.join(absent) or 'nothing'}, which no layer holds; its "
            f"linear layers are {', '.join(sorted(everywhere)) or 'none'} (backbone.lora_targets)"
        )
    for target in chosen if wanted else [None]:
        without = [i for i, names in enumerate(held) if target not in names]
        beside = set().union(*(names for names in held if target in names))
        bare = [i for i in without if not (held[i] - beside) & set(chosen)]
        if bare:
            what = f"{target} is not in" if target else "no adapter would be on"
            offered = ", ".join(sorted(set().union(*(held[i] - beside for i in bare)))) or "no other linear layer"
            raise TrajlmError(
                f"backbone {name!r}: {what} layers {_listed(bare)} of {len(held)}, which hold {offered}; name one of "
                "those too (backbone.lora_targets), or none to take the family's"
            )
    return chosen


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")


def adapted(backbone: nn.Module) -> bool:
    """Whether adapters of peft are around the backbone."""
    peft = sys.modules.get("peft")  # seconds to import: until a model needs it, none has its adapters
    return peft is not None and isinstance(backbone, peft.PeftModel)


def bare(backbone: nn.Module) -> Any:
    """The trunk inside its adapters, if it has any."""
    return backbone.get_base_model() if adapted(backbone) else backbone  # type: ignore[operator]


def add_lora(trunk: nn.Module, config: BackboneConfig) -> nn.Module:
    """Freeze the trunk and add low-rank adapters (:func:`lora_targets`)."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        trunk,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=lora_targets(trunk, config.lora_targets, config.name),
        ),
    )


@torch.no_grad()
def idle_adapters(backbone: nn.Module) -> list[str]:
    """Adapters that never got a gradient: B starts at zero, the first one moves it, and then A learns too."""
    if not adapted(backbone):
        return []
    ups = {name: parameter for name, parameter in backbone.named_parameters() if ".lora_B." in name}
    return [name.split(".lora_B.")[0] for name, parameter in ups.items() if not bool(whole(parameter).any())]


def require_learning_adapters(backbone: nn.Module, steps: int) -> None:
    """Raise TrajlmError where an adapter got no gradient in the first ``steps`` steps."""
    idle = idle_adapters(backbone)
    if idle:
        raise TrajlmError(
            f"{len(idle)} LoRA adapters got no gradient in {steps} steps, {idle[0]} among them: the backbone reads "
            "those weights past the adapter; leave them out of backbone.lora_targets"
        )
