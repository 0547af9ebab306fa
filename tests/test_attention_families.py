"""Attention is the backbone's own in every family: grouped keys, sliding windows, soft caps, sinks, none at all."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
import torch
from test_interpret import eager_maps
from trajectory_example import PAPER, toy_batch, toy_model
from transformers import AutoConfig, AutoModel

from trajlm.anchoring import read_with_static_share, static_share
from trajlm.errors import TrajlmError
from trajlm.interception import Interception, intercepted
from trajlm.interpret.attention import attention_table, event_attention, read_with_attention, stay_attention
from trajlm.trajectory import TrajectoryModel

COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 8,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 5},
    "qwen3": {**GROUPED, "head_dim": 8},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
               "attn_logit_softcapping": 0.3},
    "gemma3_text": {**GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": GROUPED,
    "gpt_neox": COMMON,
    "gpt_neo": {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "window_size": 4, "vocab_size": 8,
                "attention_types": [[["global", "local", "global"], 1]], "bos_token_id": None, "eos_token_id": None},
    "gpt_oss": {**GROUPED, "head_dim": 8, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
    "jamba": {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4,
              "mamba_dt_rank": 4},
}  # fmt: skip
WINDOWS = {"mistral": (0, 5), "gemma3_text": (0, 4), "gpt_neo": (1, 4), "gpt_oss": (0, 4)}  # layer, positions it sees


def family(name: str, **settings: Any) -> TrajectoryModel:
    """The toy model on a tiny backbone of this family, of random weights far from uniform attention."""
    torch.manual_seed(0)
    trunk = AutoModel.from_config(AutoConfig.for_model(name, **(FAMILIES.get(name, {}) | settings)))
    with torch.no_grad():
        for weight in (p for n, p in trunk.named_parameters() if p.ndim == 2 and ("q_proj" in n or "qkv" in n)):
            weight.mul_(20)
    toy = toy_model(**PAPER)
    parts = (toy.fitted_tasks, list(toy.timelines.modalities.values()), toy.features, 16)
    return TrajectoryModel(toy.encoders, trunk, *parts, **PAPER).eval()


@pytest.mark.parametrize("lengths", [[8], [8, 3]])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "jamba"])
def test_maps_are_the_backbones_own(name, lengths):
    model, batch = family(name), toy_batch(lengths)
    with torch.no_grad():
        plain = model(batch).readouts
    output, maps = read_with_attention(model, batch, [0, 1, -1])
    real = batch.present.repeat_interleave(2, dim=1)
    expected = eager_maps(model, batch)
    for layer in (0, 1, -1):
        torch.testing.assert_close(maps[layer][real], expected[layer][real], rtol=1e-5, atol=1e-5)
        assert not maps[layer].triu(1)[real].any()
        if name != "gpt_oss":  # its attention may also rest on a sink that is no position
            torch.testing.assert_close(maps[layer][real].sum(-1), torch.ones(int(real.sum())), rtol=1e-5, atol=1e-5)
    assert torch.equal(output.readouts[batch.present], plain[batch.present])
    assert maps[-1][0].std() > 0.05


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_hides_what_lies_before_it(name):
    layer, width = WINDOWS[name]
    _, maps = read_with_attention(family(name), toy_batch([8]), [layer])
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    seen = (columns <= rows) & (columns > rows - width)
    assert not maps[layer][0][~seen].any()
    assert (maps[layer][0][seen] > 0).float().mean() > 0.9


def test_a_head_is_that_head():
    model, batch = family("llama"), toy_batch([6, 4])
    trunk: Any = model.backbone
    _, every = read_with_attention(model, batch)
    alone = [read_with_attention(model, batch, heads=[h])[1][-1] for h in range(4)]
    torch.testing.assert_close(torch.stack(alone).mean(0), every[-1])
    trunk.set_attn_implementation("eager")
    sequence = model(batch).embeddings
    mask = batch.present.repeat_interleave(2, dim=1).long()
    attentions = trunk(inputs_embeds=sequence, attention_mask=mask, output_attentions=True).attentions
    for head in range(4):
        torch.testing.assert_close(alone[head][0], attentions[-1][0, head], rtol=1e-5, atol=1e-5)
    with pytest.raises(TrajlmError, match=r"heads 0 to 3, asked for \[4\]"):
        read_with_attention(model, batch, heads=[4])


def test_heads_worked_through_one_by_one_add_up_to_the_same(monkeypatch):
    model, batch = family("mistral"), toy_batch([7, 3])
    _, together = read_with_attention(model, batch)
    monkeypatch.setattr("trajlm.interception.HELD_AT_ONCE", 1)
    _, alone = read_with_attention(model, batch)
    torch.testing.assert_close(together[-1], alone[-1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neo"])
def test_the_share_alone_is_that_of_the_map(name):
    model, batch = family(name), toy_batch([8, 3, 5])
    output, maps = read_with_attention(model, batch, [-1])
    with torch.no_grad():
        alone, share = read_with_static_share(model, batch)
    torch.testing.assert_close(share, static_share(model, batch, maps[-1]), rtol=1e-5, atol=1e-6)
    assert torch.equal(alone.readouts, output.readouts)


def test_layers_without_attention_say_so():
    model, batch = family("jamba"), toy_batch([4])
    _, maps = read_with_attention(model, batch, [1])
    torch.testing.assert_close(maps[1].sum(-1), torch.ones(1, 8), rtol=1e-5, atol=1e-5)
    with pytest.raises(TrajlmError, match=r"layers \[2\] cannot be shown: this backbone \(jamba\) has no attention"):
        read_with_attention(model, batch, [-1])
    mamba = family("mamba", hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=8)
    with pytest.raises(TrajlmError, match="ablation and integrated gradients work for every backbone"):
        read_with_attention(mamba, batch)


def test_edges_of_a_family_with_ways_of_its_own_cannot_be_knocked_out():
    model, batch = family("gpt_neo"), toy_batch([4])
    blocked = torch.zeros(1, 8, 8, dtype=torch.bool)
    with (
        pytest.raises(TrajlmError, match="edges cannot be knocked out"),
        intercepted(model.backbone, Interception(blocked={0: blocked})),
    ):
        model(batch)


def test_a_map_as_a_table_and_by_event():
    model, batch = toy_model(), toy_batch([7])
    found = stay_attention(model, batch, layer=0, head=1)
    table = attention_table(found)
    assert table.height == 14 * 15 // 2
    for row in table.sample(30, seed=1).iter_rows(named=True):
        assert row["weight"] == found.weights[row["query"], row["key"]]
        assert row["query_event_index"] == row["query"] // 2
        assert row["key_kind"] == ["event", "predict"][row["key"] % 2]
    events = event_attention(found)
    looks = events.select(pl.sum_horizontal("on_static", "on_self", "on_earlier", "on_read_outs"))
    assert looks.to_series().to_list() == pytest.approx([1.0] * 7, abs=1e-5)
    weights = found.weights.astype(float)
    for event in range(7):
        later = [weights[2 * r + 1, 2 * event] for r in range(event + 1, 7)]
        row = events.row(event, named=True)
        assert row["from_last"] == weights[13, 2 * event]
        assert row["from_own"] == weights[2 * event + 1, 2 * event]
        assert row["from_later"] == (pytest.approx(sum(later) / len(later)) if later else None)
        assert row["on_static"] == weights[2 * event + 1, 0]
