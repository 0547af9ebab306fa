"""Causal language models by name: presets, hub ids and folders, loaded as the recipe and the hardware ask for."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PretrainedConfig

from trajlm.adapters import adapted, add_lora, bare
from trajlm.config import BackboneConfig
from trajlm.errors import TrajlmError
from trajlm.presets import Family, family_of, presets
from trajlm.quantisation import loading_options, settle
from trajlm.weights import PACKAGED, locate

MOST_SAMPLED = 1 << 16  # rows of a vocabulary that are looked at


def tunes_fully(config: BackboneConfig) -> bool:
    """Whether every weight is trained: low-rank changes of random weights would learn little."""
    return config.tuning == "full" or (config.tuning == "auto" and starts_at_random(config))


def starts_at_random(config: BackboneConfig) -> bool:
    """Whether the weights are built from a config instead of loaded."""
    return config.name in presets() and presets()[config.name].random


def config_of(name: str) -> PretrainedConfig:
    """The decoder's settings, without its weights; of a preset with random weights from the table alone.

    Raises TrajlmError where the name leads nowhere.
    """
    preset = presets().get(name)
    if preset and preset.random:
        return shape_of(name)
    try:
        config: Any = AutoConfig.from_pretrained(_source(name))
    except (OSError, ValueError) as error:
        raise TrajlmError(f"{_unreachable(name)}: {str(error).splitlines()[0]}") from error
    return config.get_text_config()


def shape_of(name: str) -> PretrainedConfig:
    """The settings that the table gives for a preset: what can be known of it without a hub."""
    preset = presets()[name]
    return AutoConfig.for_model(preset.family.model_type, **preset.shape)


def _source(name: str) -> str:
    """Where the weights of a name are: packaged ones first, then what the table names, then the name itself."""
    preset = presets().get(name)
    return locate(preset.hub if preset and name not in PACKAGED else name)


def _unreachable(name: str) -> str:
    preset = presets().get(name)
    if preset is None:
        near = difflib.get_close_matches(name, presets(), n=1)
        nearest = f"the nearest is {near[0]!r}, " if near else ""
        return (
            f"backbone {name!r} is no preset ({nearest}`trajlm backbones` lists them), "
            f"packaged name ({', '.join(PACKAGED)}), local folder or reachable hub id"
        )
    licence = f"accept its licence at https://huggingface.co/{preset.hub} and log in, or " if preset.gated else ""
    return f"backbone {name!r} could not be had from {preset.hub}; {licence}name a local folder of its weights"


def load_trunk(config: BackboneConfig, folder: Path | None = None, compute: torch.dtype = torch.float32) -> nn.Module:
    """The decoder without its language head, causal, float32 unless quantised.

    Args:
        config: whose ``name`` is a preset, packaged weights, a hub id or a local folder.
        folder: weights saved with a run; they replace what the name stands for.
        compute: what 4-bit weights are multiplied in.
    """
    name = config.name
    if folder is None and starts_at_random(config):
        if config.quantisation != "none":
            raise TrajlmError(
                f"backbone {name!r} starts at random: backbone.quantisation {config.quantisation} needs pretrained "
                "weights, a hub id or a folder"
            )
        return AutoModel.from_config(config_of(name))
    options = {"dtype": torch.float32, **loading_options(config.quantisation, compute)}
    source = str(folder or _source(name))
    try:
        trunk = AutoModel.from_pretrained(source, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise TrajlmError(f"{_unreachable(name)}: {str(error).splitlines()[0]}") from error
    # Of a model that also sees pictures only the decoder is read.
    trunk = trunk if trunk.config.get_text_config() is trunk.config else trunk.get_decoder()
    return trunk if config.quantisation == "none" else settle(trunk)


def build_backbone(config: BackboneConfig, compute: torch.dtype = torch.float32) -> nn.Module:
    """The trunk, ready to train: every weight, or LoRA adapters on its linear layers (B.2).

    Args:
        config: name, tuning, adapters, quantisation.
        compute: what 4-bit weights are multiplied in.

    Raises TrajlmError where adapters would go nowhere, or not everywhere they were asked for.
    """
    trunk: Any = load_trunk(config, compute=compute)
    # Events enter as embeddings, so the vocabulary never gets a gradient, which several processes would wait for.
    trunk.get_input_embeddings().requires_grad_(False)
    if config.gradient_checkpointing:
        trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if tunes_fully(config):
        return trunk
    return add_lora(trunk, config)


def use_attention(backbone: nn.Module, kind: str) -> nn.Module:
    """The same backbone, computing its attention with another implementation: flash, sdpa or eager."""
    trunk = bare(backbone)
    if traits(backbone).attention:
        trunk.set_attn_implementation("flash_attention_2" if kind == "flash" else kind)
    return backbone


def bare_trunk(backbone: nn.Module, config: BackboneConfig) -> nn.Module:
    """The trunk as it was before adapters were added, for a preset whose random weights exist nowhere else."""
    if not adapted(backbone):
        return backbone
    state = bare(backbone).state_dict()
    plain = {key.replace(".base_layer.", "."): tensor for key, tensor in state.items() if ".lora_" not in key}
    trunk = load_trunk(config)
    trunk.load_state_dict(plain)
    return trunk


def load_adapter(trunk: nn.Module, folder: Path) -> nn.Module:
    """The trunk with adapters saved by ``save_pretrained``."""
    from peft import PeftModel

    return PeftModel.from_pretrained(trunk, folder, is_trainable=False)


def hidden_width(backbone: nn.Module) -> int:
    """Width of the backbone's embeddings."""
    return int(text_config(backbone).hidden_size)


def text_config(backbone: nn.Module) -> PretrainedConfig:
    """The decoder's own settings, also where a model nests them."""
    config: Any = backbone.config
    return config.get_text_config()


def traits(backbone: nn.Module) -> Family:
    """What is true of the backbone's family."""
    return family_of(text_config(backbone).model_type)


@torch.no_grad()
def token_embeddings(backbone: nn.Module) -> torch.Tensor:
    """float32[V, H]: the backbone's vocabulary as its layers see it, evenly thinned where it is large.

    Some families scale what the table holds; that scale is in the module, not in its weight.
    """
    trunk: Any = backbone
    table = trunk.get_input_embeddings()
    step = -(-table.weight.shape[0] // MOST_SAMPLED)
    return table(torch.arange(0, table.weight.shape[0], step, device=table.weight.device)).float()


def prompt_tokens(prompt: str | None, name: str) -> list[int]:
    """A text as tokens of a backbone's own vocabulary; none for no text.

    Raises TrajlmError where the backbone has no tokenizer.
    """
    if not prompt:
        return []
    preset = presets().get(name)
    if preset and preset.random:
        raise TrajlmError(f"finetuning.prompt: backbone {name!r} starts at random and has no tokenizer; set it to null")
    try:
        tokenizer = AutoTokenizer.from_pretrained(_source(name))
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise TrajlmError(
            f"finetuning.prompt: backbone {name!r} has no tokenizer that could be read: {said}"
        ) from error
    return list(tokenizer(prompt)["input_ids"])


def describe(name: str) -> str:
    """One line on a backbone for logs and model cards."""
    config = config_of(name)
    return f"{name} ({config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size})"
