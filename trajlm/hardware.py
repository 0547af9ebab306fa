"""What this machine makes of a recipe's backbone: the same recipe runs everywhere, and says what it changed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from trajlm.config import BackboneConfig, Recipe
from trajlm.errors import TrajlmError
from trajlm.packing import require_exact
from trajlm.presets import Family


@dataclass(frozen=True)
class Means:
    """How the sequence model is computed here.

    Attributes:
        attention: flash (in training; beliefs are computed under sdpa), sdpa or eager.
        bf16: training runs under bfloat16 autocast.
        changes: what differs from what was asked for, or would on a GPU; one line each.
    """

    attention: str
    bf16: bool
    changes: tuple[str, ...]


def means_of(recipe: Recipe, family: Family, device: torch.device) -> Means:
    """Choose by the hardware what the recipe leaves open, and by what works what it asks for.

    Raises TrajlmError where a setting asks for what the family does not compute exactly, or a package is missing.
    """
    config, finetuning = recipe.backbone, recipe.finetuning
    if finetuning.batching == "packed":
        require_exact(family, "finetuning.batching packed", "by_length")
    if not finetuning.predict_visible:
        require_exact(family, "finetuning.predict_visible false", "true")
    if (config.quantisation == "nf4" or finetuning.optimiser == "adamw8bit") and find_spec("bitsandbytes") is None:
        raise TrajlmError("4-bit weights and 8-bit AdamW need bitsandbytes: pip install 'trajlm[quant]'")
    changes: list[str] = []
    attention = _attention(config.attention, family, finetuning.predict_visible, device, changes)
    bf16 = uses_bf16(config, device)
    if device.type == "cpu" and config.quantisation == "nf4":
        changes.append("backbone.quantisation: nf4 on the CPU saves the memory it saves on a GPU, and no time")
    if device.type == "cpu" and config.precision == "auto" and not bf16:
        changes.append("backbone.precision: float32, as this CPU has no bfloat16 tiles")
    return Means(attention, bf16, tuple(changes))


def _attention(asked: str, family: Family, predict_visible: bool, device: torch.device, changes: list[str]) -> str:
    if not family.attention:
        return "sdpa"
    if asked not in {"auto", *family.attention}:
        raise TrajlmError(
            f"backbone.attention {asked}: {family.model_type} has {', '.join(family.attention)}; choose one or auto"
        )
    if asked not in {"auto", "flash"} or "flash" not in family.attention:
        return "sdpa" if asked == "auto" else asked
    lacking = []
    if device.type != "cuda":
        lacking.append("a CUDA GPU")
    if find_spec("flash_attn") is None:
        lacking.append("the package flash-attn")
    if not predict_visible:
        lacking.append("visible [PREDICT]s, for it takes no mask of ours")
    if not lacking:
        return "flash"
    if asked == "flash":
        changes.append(f"backbone.attention: sdpa, as flash needs {' and '.join(lacking)}")
    return "sdpa"


def uses_bf16(config: BackboneConfig, device: torch.device) -> bool:
    """Whether training runs under bfloat16 autocast: asked for, or worth it on this hardware."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without tile instructions a CPU computes bfloat16 slower than float32.
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
