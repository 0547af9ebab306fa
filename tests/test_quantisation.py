"""Frozen weights in 4 and 16 bits: the right values, the right gradients, before and after an evaluation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trajectory_example import toy_batch, toy_model
from transformers import AutoConfig, AutoModel

from trajlm.backbones import build_backbone, load_trunk
from trajlm.checkpoint import Checkpoints, load_trainable, trainable_tensors
from trajlm.config import BackboneConfig, FinetuningConfig, Recipe
from trajlm.errors import TrajlmError
from trajlm.hardware import means_of
from trajlm.presets import families
from trajlm.quantisation import HalfLinear, adamw8bit, dequantised, is_four_bit
from trajlm.sequence_objective import SequenceObjective
from trajlm.training import LoopSettings, make_optimiser

pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a backbone on disk; `tiny` is wide enough for several blocks of 64 numbers a row."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights")
    trunk: Any = load_trunk(BackboneConfig(name="tiny"))
    trunk.save_pretrained(path)
    return path


def backbone_of(folder: Path, quantisation: str, **options) -> nn.Module:
    torch.manual_seed(1)
    return build_backbone(
        BackboneConfig(name=str(folder), tuning="lora", quantisation=quantisation, lora_dropout=0.0, **options)
    )


def matrices(backbone: nn.Module, kind: str) -> dict[str, nn.Module]:
    found = {n: m for n, m in backbone.named_modules() if is_four_bit(m) or isinstance(m, HalfLinear)}
    assert all(is_four_bit(m) == (kind == "nf4") for m in found.values())
    return found


def in_float(backbone: nn.Module, kind: str) -> nn.Module:
    """The same backbone with plain float32 layers that hold what the small weights stand for."""
    plain = copy.deepcopy(backbone)
    for name, layer in matrices(backbone, kind).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        weight = dequantised(layer) if kind == "nf4" else layer.weight.float()
        linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        parent, leaf = name.rsplit(".", 1)
        setattr(plain.get_submodule(parent), leaf, linear)
    return plain


def stir(backbone: nn.Module) -> None:
    """Adapters start as no change at all."""
    torch.manual_seed(2)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)


def gradients(backbone: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    backbone.train()
    backbone.zero_grad()
    # The last layer is a norm: what it leaves free is the direction alone.
    direction = torch.linspace(-1, 1, inputs.shape[-1])
    (backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state @ direction).square().mean().backward()
    assert inputs.grad is not None
    return [inputs.grad, *(p.grad.clone() for p in backbone.parameters() if p.requires_grad)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_train_eval_train_gives_the_gradients_of_the_float_weights(folder, kind, checkpointing):
    backbone = backbone_of(folder, kind, gradient_checkpointing=checkpointing)
    stir(backbone)
    plain, inputs = in_float(backbone, kind), torch.randn(2, 7, 64)
    expected = gradients(plain, inputs)
    assert len(expected) == 1 + 2 * 7 * 2
    for _ in range(2):
        for mine, theirs in zip(gradients(backbone, inputs), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            mine, theirs = (b.eval()(inputs_embeds=inputs, use_cache=False) for b in (backbone, plain))
        torch.testing.assert_close(mine.last_hidden_state, theirs.last_hidden_state, rtol=1e-4, atol=1e-5)
    if kind == "nf4":
        assert not any(m.support_avx512bf16_for_cpu for m in matrices(backbone, kind).values())


@pytest.mark.parametrize(("kind", "error"), [("nf4", (0.03, 0.13)), ("bf16", (1e-4, 3e-3))])
def test_small_weights_are_near_those_on_disk(folder, kind, error):
    """NF4 loses a tenth of a normal weight's spread, bfloat16 a few thousandths; neither loses nothing."""
    small, disk = (
        load_trunk(BackboneConfig(name=str(folder), quantisation=kind)),
        load_trunk(BackboneConfig(name=str(folder))),
    )
    for name, layer in matrices(small, kind).items():
        weight = dequantised(layer) if kind == "nf4" else layer.weight.float()
        true = disk.get_submodule(name).weight
        assert error[0] < float((weight - true).std() / true.std()) < error[1]
    assert len(matrices(small, kind)) == 14
    others = {p.dtype for n, p in small.named_parameters() if "norm" in n}
    assert others == {torch.float32}
    assert not any(p.requires_grad for p in small.parameters())


def test_a_four_bit_weight_with_doubled_quantisation_takes_little_more_than_four_bits(folder):
    backbone = load_trunk(BackboneConfig(name=str(folder), quantisation="nf4"))
    for layer in matrices(backbone, "nf4").values():
        weight: Any = layer.weight
        state = weight.quant_state
        assert state.quant_type == "nf4"
        assert state.nested
        assert state.blocksize == 64
        assert weight.numel() * 2 == layer.in_features * layer.out_features
        assert state.absmax.dtype == torch.uint8


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_every_way_of_computing_a_belief_agrees_with_small_weights(folder, kind):
    model = toy_model("lora", name=str(folder), quantisation=kind)
    stir(model.backbone)
    batch = toy_batch([8, 5, 1, 6])
    with torch.no_grad():
        padded, packed = model(batch).readouts, model(batch, packed=True).readouts
        torch.testing.assert_close(padded[batch.present], packed[batch.present], rtol=1e-4, atol=1e-4)
        first = batch.keep(torch.arange(8) < 4)
        torch.testing.assert_close(
            model(first).readouts[first.present], padded[:, :4][first.present], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_a_checkpoint_holds_what_was_trained_and_no_frozen_weight(folder, kind):
    model = toy_model("lora", name=str(folder), quantisation=kind)
    held = trainable_tensors(model)
    assert not [name for name in held if "base_layer" in name or "embed_tokens" in name]
    stir(model.backbone)
    changed = {name: tensor.clone() for name, tensor in trainable_tensors(model).items()}
    other = toy_model("lora", name=str(folder), quantisation=kind)
    load_trainable(other, changed)
    batch = toy_batch([5, 3])
    with torch.no_grad():
        assert torch.equal(model(batch).readouts, other(batch).readouts)


def test_eight_bit_adamw_goes_on_from_a_checkpoint_as_if_never_stopped(folder, tmp_path):
    settings = LoopSettings(1, 1, 3, 1e-2, 0.01, 0, eight_bit=True)

    def fresh():
        model = toy_model("lora", name=str(folder), quantisation="nf4")
        objective = SequenceObjective(model, FinetuningConfig(modality_dropout=0.0)).train()
        trained = [p for p in objective.parameters() if p.requires_grad]
        return objective, make_optimiser([{"params": trained, "factor": 1.0}], settings)

    def steps(objective, optimiser, count: int) -> None:
        for seed in range(count):
            torch.manual_seed(seed)
            objective(toy_batch([6, 3], seed)).backward()
            optimiser.step()
            optimiser.zero_grad()

    objective, optimiser = fresh()
    steps(objective, optimiser, 3)
    kinds = {v.dtype for slot in optimiser.state.values() for k, v in slot.items() if k == "state1"}
    assert torch.uint8 in kinds
    Checkpoints(tmp_path).save(objective, optimiser, {"step": 3, "epoch": 0}, {})
    resumed, again = fresh()
    assert Checkpoints(tmp_path).restore(resumed, again) is not None
    steps(objective, optimiser, 2)
    steps(resumed, again, 2)
    for (name, mine), theirs in zip(objective.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_eight_bit_adamw_moves_as_adamw_does():
    torch.manual_seed(0)
    start = torch.randn(128, 64)
    ends = []
    for kind in (lambda groups: adamw8bit(groups, 1e-2, 0.01), lambda groups: torch.optim.AdamW(groups, 1e-2)):
        weight = nn.Parameter(start.clone())
        optimiser = kind([{"params": [weight]}])
        for _ in range(20):
            (weight - 1.0).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        ends.append(weight.detach() - start)
    assert float((ends[0] - ends[1]).abs().mean()) < 0.1 * float(ends[1].abs().mean())


def test_what_cannot_be_quantised_is_refused(folder):
    with pytest.raises(TrajlmError, match=r"needs backbone\.tuning lora"):
        BackboneConfig(name=str(folder), tuning="full", quantisation="nf4")
    with pytest.raises(TrajlmError, match="starts at random"):
        build_backbone(BackboneConfig(name="tiny", tuning="lora", quantisation="nf4"))


def test_experts_in_one_tensor_are_not_left_in_full_size_in_silence(tmp_path):
    experts = {**families()["jamba"].tiny, "num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    AutoModel.from_config(AutoConfig.for_model("jamba", **experts)).save_pretrained(tmp_path)
    with pytest.raises(TrajlmError, match="holds its experts in one tensor"):
        load_trunk(BackboneConfig(name=str(tmp_path), quantisation="bf16"))


def test_a_missing_package_is_said_before_anything_is_loaded(monkeypatch):
    recipe = Recipe(backbone=BackboneConfig(name="x", quantisation="nf4"))
    told = means_of(recipe, families()["llama"], torch.device("cpu")).changes
    assert [line for line in told if "nf4 on the CPU" in line]
    monkeypatch.setattr("trajlm.hardware.find_spec", lambda name: None)
    for asked in (recipe, replace(Recipe(), finetuning=FinetuningConfig(optimiser="adamw8bit"))):
        with pytest.raises(TrajlmError, match=r"pip install 'trajlm\[quant\]'"):
            means_of(asked, families()["llama"], torch.device("cpu"))
