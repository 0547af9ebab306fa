"""Every family of backbones: every way of computing a belief agrees, or is refused; adapters learn everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from trajectory_example import timeline_of, toy_batch, toy_model
from transformers import AutoConfig, AutoModel, Gemma3Config
from transformers.utils import logging

from trajlm.adapters import decoder_layers, idle_adapters, linear_names, lora_targets, require_learning_adapters
from trajlm.backbones import build_backbone, config_of, load_trunk, shape_of, token_embeddings
from trajlm.config import BackboneConfig, FinetuningConfig, Recipe
from trajlm.errors import TrajlmError
from trajlm.hardware import means_of
from trajlm.latents import TrajectoryBatch
from trajlm.packing import SequenceReader, arrange, hidden_mask
from trajlm.presets import Family, families, family_of, presets, table
from trajlm.schema import Event
from trajlm.sequence_objective import SequenceObjective
from trajlm.trajectory import TrajectoryModel

logging.set_verbosity_error()
FAMILIES = sorted(families())
EXACT = [name for name in FAMILIES if not families()[name].inexact]
SLIDING = ["mistral", "phi3", "gemma3_text"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def tiny(family: str) -> str:
    return f"tiny-{family.replace('_', '-')}"


def loud(model: TrajectoryModel) -> TrajectoryModel:
    """Weights so large that what leaks from one stay or event into another shows."""
    torch.manual_seed(1)
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5)
    return model


def model_of(family: str, **options) -> TrajectoryModel:
    return loud(toy_model(name=tiny(family), **options))


def short_window(family: str, folder: Path) -> str:
    """A folder of weights whose sliding layers see three positions."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**families()[family].tiny, "sliding_window": 3})
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def readouts(model: TrajectoryModel, batch: TrajectoryBatch, **how) -> torch.Tensor:
    with torch.no_grad():
        return model(batch, **how).readouts


def each_alone(model: TrajectoryModel, batch: TrajectoryBatch) -> list[torch.Tensor]:
    rows = torch.arange(len(batch.stay_ids))
    return [readouts(model, batch.select(rows == i).keep(batch.present[i : i + 1]))[0] for i in rows.tolist()]


def require_alike(model: TrajectoryModel, batch: TrajectoryBatch, packs: bool) -> None:
    """Padded, packed and alone give the same; what is later changes nothing earlier."""
    alone = torch.cat(each_alone(model, batch))
    torch.testing.assert_close(readouts(model, batch)[batch.present], alone, **CLOSE)
    if packs:
        torch.testing.assert_close(readouts(model, batch, packed=True)[batch.present], alone, **CLOSE)
    other = replace(batch, latents=batch.latents.clone(), state=batch.state.clone())
    other.latents[:, 4:] = 10 * torch.randn_like(other.latents[:, 4:])
    other.state[:, 4:] = 10 * torch.randn_like(other.state[:, 4:])
    for packed in {False, packs}:
        before, after = readouts(model, batch, packed=packed), readouts(model, other, packed=packed)
        torch.testing.assert_close(before[:, :4], after[:, :4], **CLOSE)
        assert not torch.allclose(before[0, 4:], after[0, 4:], atol=1e-3)


EVENTS = [Event(0.0, "age", (0,), (70.0,))]
EVENTS += [Event(1.0 + h, "labs", (1 + h % 3, 1 + (h + 1) % 3), (0.7 * h, 3.0 - h)) for h in range(4)]
EVENTS += [Event(6.0, "note", text="worse"), Event(7.5, "labs", (2,), (4.0,))]


def require_streams_alike(model: TrajectoryModel) -> None:
    stream = model.stream()
    pushed = torch.tensor([list(stream.push(event).values()) for event in EVENTS])
    whole = model.beliefs(timeline_of(EVENTS))
    said = torch.tensor(whole.select(f"belief_{target}" for target in model.targets).to_numpy(), dtype=pushed.dtype)
    torch.testing.assert_close(pushed, said, **CLOSE)
    assert said.std(dim=0).min() > 1e-3


# Exactness


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_of_computing_a_belief_agrees(family):
    model, batch = model_of(family), toy_batch([8, 5, 1, 6])
    require_alike(model, batch, packs=family in EXACT)
    require_streams_alike(model)


@pytest.mark.parametrize("family", EXACT)
def test_hidden_read_outs_are_those_of_the_events_alone(family):
    """Against the backbone run on the events and one [PREDICT], for every event anew."""
    model, batch = model_of(family, predict_visible=False), toy_batch([8, 5])
    require_alike(model, batch, packs=True)
    require_streams_alike(model)
    with torch.no_grad():
        output, events = model(batch), model.embed(batch)
        for stay, length in enumerate([8, 5]):
            for count in range(1, length + 1):
                sequence = torch.cat([events[stay, :count], model.predict[None]])[None]
                last = model.backbone(inputs_embeds=sequence, use_cache=False).last_hidden_state[0, -1]
                torch.testing.assert_close(output.hidden[stay, count - 1], last, **CLOSE)
    visible = model_of(family)
    assert not torch.allclose(readouts(visible, batch)[0, 1:], output.readouts[0, 1:], atol=1e-3)


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("family", SLIDING)
def test_layers_with_a_sliding_window_keep_it(family, visible, tmp_path):
    model = loud(toy_model(name=short_window(family, tmp_path), predict_visible=visible))
    require_alike(model, toy_batch([8, 5, 1, 6]), packs=True)
    require_streams_alike(model)
    everything = loud(toy_model(name=tiny(family), predict_visible=visible))
    batch = toy_batch([8])
    assert not torch.allclose(readouts(model, batch)[0, 4:], readouts(everything, batch)[0, 4:], atol=1e-3)


@pytest.mark.parametrize("visible", [True, False])
def test_packed_and_hidden_agree_under_eager_attention(visible):
    model, batch = model_of("llama", predict_visible=visible), toy_batch([8, 5, 1, 6])
    usual = readouts(model, batch, packed=True)[batch.present]
    model.backbone.set_attn_implementation("eager")
    torch.testing.assert_close(readouts(model, batch, packed=True)[batch.present], usual, **CLOSE)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*EXACT}) + ["rwkv"])
def test_what_is_not_exact_is_refused_with_its_reason(family):
    recipe = Recipe()
    for name, value in (("batching", "packed"), ("predict_visible", False)):
        asked = replace(recipe, finetuning=replace(recipe.finetuning, **{name: value}))
        with pytest.raises(TrajlmError, match=f"finetuning.{name} .*{family} backbone, for .*; use"):
            means_of(asked, family_of(family), torch.device("cpu"))
    assert means_of(recipe, family_of(family), torch.device("cpu"))
    with pytest.raises(TrajlmError, match="predict_visible"):
        SequenceReader(None, family_of(family), predict_visible=False)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {*EXACT}))
def test_families_that_are_refused_packing_would_leak(family):
    """The refusal is for a reason: without it, stays of one row change each other's beliefs."""
    model, batch = model_of(family), toy_batch([8, 5, 1, 6])
    alone = readouts(model, batch)[batch.present]
    assert not torch.allclose(readouts(model, batch, packed=True)[batch.present], alone, atol=1e-3)


def test_packed_training_gives_the_gradients_of_padded_training():
    batch = toy_batch([8, 5, 1, 6])
    gradients = []
    for batching in ("padded", "packed"):
        model = model_of("llama")
        objective = SequenceObjective(model, FinetuningConfig(modality_dropout=0.0, batching=batching)).train()
        objective(batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda said, n=name: f"{n}: {said}", **CLOSE)


def test_rows_hold_every_stay_once_and_little_else():
    lengths = torch.randint(2, 200, (37,), generator=torch.Generator().manual_seed(0))
    for width, most in ((64, None), (4096, None), (64, 1)):
        layout = arrange(lengths.tolist(), width, most)
        places = layout.places(lengths)
        assert places.unique().numel() == int(lengths.sum())
        assert int(places.max()) < layout.rows * layout.length
        assert (layout.rows == 1) == (most == 1)
        assert 1 - int(lengths.sum()) / (layout.rows * layout.length) < 0.05
    first = torch.cumsum(lengths, 0) - lengths
    assert torch.equal(places[first], layout.row * layout.length + layout.start)
    assert arrange([100, 2, 2], 4096).rows <= 2


def test_the_hidden_mask_written_out():
    """Two stays in one row, the second of them cut off by the row's end, against a plain loop."""
    stay, step = torch.tensor([[0, 0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    mask = hidden_mask(stay, step)[0, 0] == 0
    for q in range(7):
        for k in range(7):
            same = stay[0, q] == stay[0, k]
            may = same and (k == q or (k < q and step[0, k] % 2 == 0))
            assert bool(mask[q, k]) == bool(may), (q, k)


# Presets


@pytest.mark.parametrize("name", [name for name, preset in presets().items() if preset.billions])
def test_a_shape_has_the_parameters_that_were_published(name):
    with torch.device("meta"):
        trunk = AutoModel.from_config(shape_of(name))
    config = shape_of(name)
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    billions = (sum(p.numel() for p in trunk.parameters()) + head) / 1e9
    assert billions == pytest.approx(presets()[name].billions, rel=0.01)
    assert lora_targets(trunk, [], name) == list(presets()[name].family.lora)


def test_the_table_holds_what_was_promised():
    assert len([p for p in presets().values() if p.paper]) == 6
    assert {"tiny", "shallow", "small", "smollm2-135m", *map(tiny, FAMILIES)} <= set(presets())
    assert [line.split(" | ")[0].removeprefix("| ").removesuffix(" (paper)") for line in table().splitlines()[2:]] == [
        *presets()
    ]
    for preset, line in zip(presets().values(), table().splitlines()[2:], strict=True):
        assert preset.licence in line
        assert ("unconfirmed" in line) == preset.unconfirmed
    small = config_of("small")
    assert (small.model_type, small.hidden_size, small.num_hidden_layers, small.num_key_value_heads) == (
        "llama", 128, 4, 2,
    )  # fmt: skip


def test_a_name_that_leads_nowhere_says_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrajlmError, match="is no preset"):
        config_of("someone/no-such-model")
    with pytest.raises(TrajlmError, match=r"accept its licence at https://huggingface.co/meta-llama/Meta-Llama-3-8B"):
        load_trunk(BackboneConfig(name="llama-3-8b"))


def test_of_a_model_that_sees_pictures_the_decoder_is_read(tmp_path):
    config = Gemma3Config(
        text_config={**families()["gemma3_text"].tiny, "vocab_size": 300},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        image_token_index=299, boi_token_index=297, eoi_token_index=298,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    trunk = build_backbone(BackboneConfig(name=str(tmp_path)))
    assert not any("vision" in name for name, _ in trunk.named_parameters())
    assert {name.split(".layers.")[1].split(".")[0] for name, _ in trunk.named_parameters() if "lora_A" in name} == {
        "0", "1",
    }  # fmt: skip


def test_the_vocabulary_is_what_the_layers_see():
    """Gemma scales its table on the way in."""
    trunk = build_backbone(BackboneConfig(name="tiny-gemma3-text"))
    assert torch.allclose(token_embeddings(trunk), trunk.get_input_embeddings().weight * 32**0.5, rtol=1e-3)


# Adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_on_every_layer_and_every_one_learns(family):
    model = loud(toy_model("lora", name=tiny(family)))
    objective = SequenceObjective(model, FinetuningConfig(modality_dropout=0.0)).train()
    adapters = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert {n.split(".layers.")[1].split(".")[0] for n in adapters} == {"0", "1"}
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in adapters} == set(families()[family].lora)
    assert idle_adapters(model.backbone)
    optimiser = torch.optim.AdamW(adapters.values(), lr=1e-2)
    learned = set()
    for _ in range(2):
        objective(toy_batch([8, 5, 1])).backward()
        learned |= {n for n, p in adapters.items() if p.grad is not None and p.grad.any()}
        optimiser.step()
        optimiser.zero_grad()
    assert learned == set(adapters)
    require_learning_adapters(model.backbone, 2)


def test_an_adapter_that_is_never_used_is_an_error():
    """Falcon-Mamba multiplies by the weight of dt_proj itself."""
    torch.manual_seed(0)
    config = BackboneConfig(name="tiny-falcon-mamba", tuning="lora", lora_targets=["in_proj", "dt_proj"])
    backbone = build_backbone(config)
    optimiser = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        backbone(inputs_embeds=torch.randn(2, 6, 32), use_cache=False).last_hidden_state.square().mean().backward()
        optimiser.step()
    with pytest.raises(TrajlmError, match=r"2 LoRA adapters got no gradient in 3 steps, .*dt_proj"):
        require_learning_adapters(backbone, 3)


@pytest.mark.parametrize(
    ("family", "wanted", "said"),
    [
        (
            "phi3",
            families()["llama"].lora,
            "q_proj, k_proj, v_proj, gate_proj, up_proj, which no layer holds; .*qkv_proj",
        ),
        ("phi3", ["o_proj", "qkv"], "on qkv, which no layer holds"),
        ("jamba", ["q_proj", "gate_proj"], "q_proj is not in layers 0 of 2, which hold .*in_proj"),
        ("granitemoehybrid", ["in_proj"], "in_proj is not in layers 1 of 2, which hold k_proj, o_proj"),
    ],
)
def test_adapters_that_would_be_missing_somewhere_are_an_error(family, wanted, said):
    with pytest.raises(TrajlmError, match=said):
        build_backbone(BackboneConfig(name=tiny(family), tuning="lora", lora_targets=list(wanted)))


def test_a_list_of_ones_own_may_differ_by_the_kind_of_layer():
    trunk = load_trunk(BackboneConfig(name="tiny-jamba"))
    assert lora_targets(trunk, ["q_proj", "in_proj"], "x") == ["q_proj", "in_proj"]
    assert lora_targets(trunk, ["down_proj"], "x") == ["down_proj"]


@pytest.mark.parametrize(
    ("model_type", "options", "skipped"),
    [("gpt_neox", {}, set()), ("mamba", {"state_size": 8}, {"dt_proj", "x_proj", "out_proj"})],
)
def test_an_unknown_family_is_inspected(model_type, options, skipped, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModel.from_config(AutoConfig.for_model(model_type, vocab_size=8, **sizes, **options)).save_pretrained(tmp_path)
    assert family_of(model_type) == Family(model_type)
    trunk = load_trunk(BackboneConfig(name=str(tmp_path)))
    assert set(lora_targets(trunk, [], "x")) == linear_names(decoder_layers(trunk)[0]) - skipped
    model = loud(toy_model("lora", name=str(tmp_path)))
    require_alike(model, toy_batch([8, 5, 1, 6]), packs=False)
    require_streams_alike(model)
    with pytest.raises(TrajlmError, match="not been tested"):
        toy_model(name=str(tmp_path), predict_visible=False)


# Attention by the hardware


@pytest.mark.parametrize(
    ("asked", "family", "attention", "changed"),
    [
        ("auto", "llama", "sdpa", False),
        ("flash", "llama", "sdpa", True),
        ("eager", "llama", "eager", False),
        ("auto", "mamba2", "sdpa", False),
    ],
)
def test_what_the_machine_lacks_is_replaced_aloud(asked, family, attention, changed):
    recipe = Recipe(backbone=BackboneConfig(attention=asked, precision="fp32"))
    means = means_of(recipe, families()[family], torch.device("cpu"))
    assert means.attention == attention
    assert bool(means.changes) == changed
    assert all("flash needs a CUDA GPU" in change for change in means.changes)
