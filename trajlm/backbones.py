"""Causal language models by name: presets, LoRA, precision by hardware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, PretrainedConfig

from trajlm.config import BackboneConfig
from trajlm.errors import TrajlmError
from trajlm.weights import PACKAGED, locate


@dataclass(frozen=True)
class Preset:
    """A backbone whose weights start at random, built from a config."""

    config: Callable[[], PretrainedConfig]


def _llama(width: int, layers: int, heads: int) -> PretrainedConfig:
    # The vocabulary is never used: events enter as embeddings.
    return LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=width * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=8192,
    )


# Everything else is a name of packaged weights, a hub id or a local folder.
FROM_CONFIG = {
    "tiny": Preset(lambda: _llama(64, 2, 4)),
    "shallow": Preset(lambda: _llama(128, 1, 4)),
    "small": Preset(lambda: _llama(128, 4, 4)),
}


def uses_bf16(config: BackboneConfig, device: torch.device) -> bool:
    """Whether training runs under bfloat16 autocast: asked for, or worth it on this hardware."""
    if config.precision != "auto":
        return config.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    # Without tile instructions a CPU computes bfloat16 slower than float32.
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())


def tunes_fully(config: BackboneConfig) -> bool:
    """Whether every weight is trained: low-rank changes of random weights would learn little."""
    return config.tuning == "full" or (config.tuning == "auto" and starts_at_random(config))


def starts_at_random(config: BackboneConfig) -> bool:
    """Whether the weights are built from a config instead of loaded."""
    return config.name in FROM_CONFIG


def load_trunk(name: str, folder: Path | None = None) -> nn.Module:
    """The decoder without its language head, float32, causal.

    Args:
        name: preset, packaged weights, hub id or local folder.
        folder: weights saved with a run; they replace what the name stands for.
    """
    if folder is not None:
        return AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    if name in FROM_CONFIG:
        return AutoModel.from_config(FROM_CONFIG[name].config())
    source = locate(name)
    try:
        return AutoModel.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise TrajlmError(
            f"backbone {name!r} could not be loaded from {source}: {str(error).splitlines()[0]}"
        ) from error


def build_backbone(config: BackboneConfig) -> nn.Module:
    """The trunk, ready to train: every weight, or LoRA adapters on all its linear layers (B.2).

    Raises TrajlmError where LoRA finds no layer to adapt.
    """
    trunk: Any = load_trunk(config.name)
    # Events enter as embeddings, so the vocabulary never gets a gradient, which several processes would wait for.
    trunk.get_input_embeddings().requires_grad_(False)
    if config.gradient_checkpointing:
        trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if tunes_fully(config):
        return trunk
    return add_lora(trunk, config)


def add_lora(trunk: nn.Module, config: BackboneConfig) -> nn.Module:
    """Freeze the trunk and add low-rank adapters to all its linear layers."""
    adapted = get_peft_model(
        trunk,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            # all-linear reaches fused projections too, which the usual names miss in silence.
            target_modules="all-linear",
            base_model_name_or_path=config.name,
        ),
    )
    if not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise TrajlmError(f"backbone {config.name!r}: LoRA found no linear layer to adapt")
    return adapted


def bare_trunk(backbone: nn.Module, name: str) -> nn.Module:
    """The trunk as it was before adapters were added, for a preset whose random weights exist nowhere else."""
    if not isinstance(backbone, PeftModel):
        return backbone
    state = backbone.get_base_model().state_dict()
    bare = {key.replace(".base_layer.", "."): tensor for key, tensor in state.items() if ".lora_" not in key}
    trunk = load_trunk(name)
    trunk.load_state_dict(bare)
    return trunk


def load_adapter(trunk: nn.Module, folder: Path) -> nn.Module:
    """The trunk with adapters saved by ``save_pretrained``."""
    return PeftModel.from_pretrained(trunk, folder, is_trainable=False)


def hidden_width(backbone: nn.Module) -> int:
    """Width of the backbone's embeddings."""
    return int(text_config(backbone).hidden_size)


def text_config(backbone: nn.Module) -> PretrainedConfig:
    """The decoder's own settings, also where a model nests them."""
    config: Any = backbone.config
    return config.get_text_config()


def token_embeddings(backbone: nn.Module) -> torch.Tensor:
    """float32[V, H]: the backbone's vocabulary, detached."""
    trunk: Any = backbone
    return trunk.get_input_embeddings().weight.detach().float()


def describe(name: str) -> str:
    """One line on a backbone for logs and model cards."""
    try:
        config = FROM_CONFIG[name].config() if name in FROM_CONFIG else AutoConfig.from_pretrained(locate(name))
    except (OSError, ValueError) as error:
        raise TrajlmError(
            f"backbone {name!r} is no preset ({', '.join(FROM_CONFIG)}), packaged name ({', '.join(PACKAGED)}), local "
            f"folder or reachable hub id: {str(error).splitlines()[0]}"
        ) from error
    text = config.get_text_config()
    return f"{name} ({config.model_type}, {text.num_hidden_layers} layers, width {text.hidden_size})"
