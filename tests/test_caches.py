"""Attention of a streamed event to what a backbone remembers of its stay."""

from __future__ import annotations

import pytest
import torch
from trajectory_example import toy_model
from transformers import AttentionInterface

from trajlm.caches import GROUPED, attend_grouped
from trajlm.schema import Event


@pytest.mark.parametrize("heads", [2, 6])
def test_grouped_attention_is_that_of_repeated_keys(heads):
    """By hand: every head's own softmax over the keys that it shares with others."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, heads, 2, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 5)
    mask = torch.zeros(3, 1, 2, 7).masked_fill(torch.rand(3, 1, 2, 7) < 0.3, torch.finfo(torch.float32).min)
    mask[..., 0] = 0.0
    found, _ = attend_grouped(torch.nn.Identity(), query, key, value, mask, scaling=0.3)
    for head in range(heads):
        own = head // (heads // 2)
        scores = 0.3 * query[:, head] @ key[:, own].transpose(1, 2) + mask[:, 0]
        torch.testing.assert_close(found[:, :, head], scores.softmax(dim=-1) @ value[:, own], rtol=1e-5, atol=1e-6)


def test_a_stream_groups_heads_and_leaves_the_backbone_as_it_was(monkeypatch):
    model = toy_model()
    config, asked = model.sequence_reader.config, []
    assert config.num_key_value_heads < config.num_attention_heads
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        GROUPED,
        lambda *a, **k: asked.append(a[2].shape[1]) or attend_grouped(*a, **k),
    )
    model.stream().push(Event(0.0, "age", (0,), (60.0,)))
    assert asked == [config.num_key_value_heads] * config.num_hidden_layers
    assert config._attn_implementation == "sdpa"
