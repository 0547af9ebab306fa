"""Memory of a training step from shapes alone: against sums by hand, real 4-bit layers and the whole depth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from trajlm import memory
from trajlm.backbones import load_trunk
from trajlm.config import BackboneConfig
from trajlm.memory import AllocationCount, step_memory
from trajlm.presets import presets

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 512,
}  # fmt: skip
LORA = BackboneConfig(name="tiny", tuning="lora")


def preset(family: str = "llama", **shape):
    return replace(presets()[f"tiny-{family.replace('_', '-')}"], shape={**SHAPE, **shape})


def test_allocations_are_those_of_a_sum_by_hand():
    first, second = nn.Linear(64, 256, bias=False), nn.Linear(256, 8, bias=False)
    inputs = torch.randn(32, 64)
    with AllocationCount([*first.parameters(), *second.parameters(), inputs]) as count:
        hidden = first(inputs)
        assert count.live == 4 * 32 * 256
        active = hidden.relu()
        assert count.live == 2 * 4 * 32 * 256
        del hidden  # relu keeps its result, not its input
        loss = second(active).sum()
        del active
        # The scalar loss may be rounded up to nothing but its own four bytes.
        assert count.live == 4 * 32 * 256 + 4
        loss.backward()
    gradients = 4 * (64 * 256 + 256 * 8)
    assert count.live == gradients + 4
    # At its fullest: both gradients, the hidden gradient, and what relu kept of it.
    assert gradients < count.peak <= gradients + 4 * 32 * (2 * 256 + 2 * 8) + 8


@pytest.mark.parametrize(("family", "checkpointing"), [("llama", True), ("phi3", False), ("gemma3_text", True)])
def test_the_real_depth_lies_on_the_line_through_two_shallow_ones(family, checkpointing, monkeypatch):
    config = replace(LORA, gradient_checkpointing=checkpointing)
    shape = {"pad_token_id": 0} if family == "phi3" else {}
    estimate = step_memory(preset(family, **shape), config, "adamw", 4, 128)
    monkeypatch.setattr(memory, "_LONG", 6)
    direct = step_memory(preset(family, **shape), config, "adamw", 4, 128)
    for name in ("weights", "adapters", "activations"):
        assert getattr(estimate, name) == pytest.approx(getattr(direct, name), rel=0.02), name


def test_weights_and_adapters_are_those_of_the_model():
    with torch.device("meta"):
        trunk = AutoModel.from_config(AutoConfig.for_model("llama", **SHAPE))
    numbers = sum(p.numel() for p in trunk.parameters())
    assert step_memory(preset(), LORA, "adamw", 1, 8).weights == 4 * numbers
    per_layer = 16 * sum(m.in_features + m.out_features for m in trunk.layers[0].modules() if isinstance(m, nn.Linear))
    assert step_memory(preset(), LORA, "adamw", 1, 8).adapters == 6 * per_layer * (4 + 4 + 4 + 8)
    assert step_memory(preset(), LORA, "adamw8bit", 1, 8).adapters == 6 * per_layer * (4 + 4 + 4 + 2)


def test_four_bit_weights_take_what_bitsandbytes_gives_them(tmp_path):
    pytest.importorskip("bitsandbytes")
    AutoModel.from_config(AutoConfig.for_model("llama", **SHAPE)).save_pretrained(tmp_path)
    config = replace(LORA, name=str(tmp_path), quantisation="nf4")
    held = 0
    for module in load_trunk(config).modules():
        for parameter in module.parameters(recurse=False):
            held += parameter.numel() * parameter.element_size()
            state: Any = getattr(parameter, "quant_state", None)
            held += 0 if state is None else state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert step_memory(preset(), replace(LORA, quantisation="nf4"), "adamw", 1, 8).weights == pytest.approx(
        held, rel=0.01
    )


def test_what_saves_memory_is_seen_to_save_it():
    def activations(stays: int = 4, positions: int = 128, **options) -> float:
        return step_memory(preset(), replace(LORA, **options), "adamw", stays, positions).activations

    plain = activations()
    assert activations(gradient_checkpointing=True) < 0.4 * plain
    assert activations(quantisation="nf4") < plain
    assert activations(stays=8) == pytest.approx(2 * plain, rel=0.25)


def test_a_step_is_put_on_the_smallest_gpu_that_holds_it():
    assert memory.smallest_gpu(memory.StepMemory(3e9, 1e9, 1e9)) == "16 GB"
    assert memory.smallest_gpu(memory.StepMemory(14e9, 1e9, 4e9)) == "24 GB"
    assert memory.smallest_gpu(memory.StepMemory(70e9, 1e9, 4e9)) == "more"
