"""What accelerate is asked for is done or refused; a module split over processes computes what the whole one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from processes_example import in_processes, join
from torch import nn
from torch.distributed.tensor import DTensor
from trajectory_example import toy_batch, toy_model

from trajlm.adapters import decoder_layers
from trajlm.backbones import load_trunk
from trajlm.checkpoint import Checkpoints
from trajlm.config import BackboneConfig, FinetuningConfig, Recipe
from trajlm.distributed import whole
from trajlm.engines import make_accelerator
from trajlm.errors import TrajlmError
from trajlm.sequence_objective import SequenceObjective
from trajlm.sharding import require_splittable, shard, unshard

CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}

# Settings of a model, and of its fine-tuning.
VARIANTS: dict[str, tuple[dict, dict]] = {
    "full": ({}, {}),
    "adapters on a frozen base": ({"tuning": "lora"}, {}),
    "adapters on a base of 16 bits": ({"tuning": "lora", "quantisation": "bf16"}, {}),
    "packed": ({}, {"batching": "packed"}),
    "hidden read-outs, learned kinds": ({"predict_visible": False, "modality_embedding": True}, {}),
    "a prompt": ({"prompt_ids": [1, 2, 3]}, {}),
    "state spaces": ({"name": "tiny-mamba2"}, {}),
    "hybrid": ({"name": "tiny-zamba2"}, {}),
}


def objective_of(variant: str, weights: str) -> SequenceObjective:
    model, finetuning = VARIANTS[variant]
    named = {"name": weights} if "quantisation" in model else {}
    return SequenceObjective(toy_model(**model, **named), FinetuningConfig(modality_dropout=0.0, **finetuning))


def gradients_of(module: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients on one batch, the same on every process; dropout is the same draw."""
    torch.manual_seed(5)
    module.train()
    loss = module(toy_batch([6, 2, 4, 3]))
    loss.backward()
    named = {n: whole(p.grad) for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return float(loss), named


def compare(variant: str, weights: str, out: Path, accelerator) -> dict[str, float]:
    plain = objective_of(variant, weights)
    loss, gradients = gradients_of(plain)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    module = objective_of(variant, weights)
    optimiser = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    twin = shard(accelerator, module, optimiser)
    emptied = sum(p.numel() for p in module.parameters())
    layer = decoder_layers(twin.model.backbone)[0]
    split = [p for p in layer.parameters() if isinstance(p, DTensor)]
    again, mine = gradients_of(twin)
    assert set(mine) == set(gradients)
    checkpoints = Checkpoints(out / variant, accelerator.is_main_process)
    checkpoints.save(twin, optimiser, {"step": 1, "epoch": 0}, {})
    unshard(twin, module)
    accelerator.free_memory()
    after = module.state_dict()
    return {
        "loss": abs(again - loss),
        "gradient": max(float((mine[n] - g).abs().max() / g.abs().max().clamp_min(1e-3)) for n, g in gradients.items()),
        "emptied": emptied,
        "local": sum(p.to_local().numel() for p in split) / sum(p.numel() for p in layer.parameters()),
        "unlike": sum(not torch.equal(after[name], tensor) for name, tensor in before.items()),
        "still_split": sum(isinstance(p, DTensor) for p in module.parameters()),
        "beliefs": abs(gradients_of(module)[0] - loss),
    }


def worker(rank: int, port: int, out: str, weights: str) -> None:
    join(rank, port, **FSDP)
    accelerator = make_accelerator()
    found = {variant: compare(variant, weights, Path(out), accelerator) for variant in VARIANTS}
    (Path(out) / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    out = tmp_path_factory.mktemp("split")
    torch.manual_seed(0)
    load_trunk(BackboneConfig(name="tiny")).save_pretrained(out / "weights")
    in_processes(worker, str(out), str(out / "weights"))
    return out, [json.loads((out / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_split_module_computes_what_the_whole_one_does(variant, split):
    out, found = split
    for mine in (ranks[variant] for ranks in found):
        assert mine["loss"] < 1e-5
        assert mine["gradient"] < 1e-4
        assert mine["emptied"] == 0, "the whole parameters were kept beside the split ones"
        assert 0.4 < mine["local"] < 0.6, "a process holds half of each layer"
        assert mine["unlike"] == mine["still_split"] == 0
        assert mine["beliefs"] < 1e-6
    assert (out / variant / "step-000000001-epoch-000000" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision is 'bf16': the recipe says it, backbone.precision"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "gradient_accumulation_steps is '4'.*batch_size"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        (FSDP | {"FSDP_VERSION": "1"}, "FSDP1 is not supported"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "fsdp_auto_wrap_policy is 'NO_WRAP'"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "every process reads the weights"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "backbone.gradient_checkpointing"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (FSDP | {"FSDP_IGNORED_MODULES": "head"}, "fsdp_ignored_modules"),
        (FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}, "the backbone says it"),
        (FSDP, "outside a process group"),
    ],
)
def test_what_would_run_otherwise_is_refused(variables, said, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrajlmError, match=said):
        make_accelerator()


def test_encoders_are_not_split(monkeypatch):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrajlmError, match="pretrain them with DDP"):
        make_accelerator(unused_parameters=True)


@pytest.mark.parametrize(
    ("section", "setting", "value"),
    [
        ("backbone", "quantisation", "nf4"),
        ("finetuning", "optimiser", "adamw8bit"),
        ("finetuning", "drift_penalty", 1.0),
        ("finetuning", "anchoring_penalty", 1.0),
    ],
)
def test_what_cannot_be_split_is_refused(section, setting, value):
    recipe = Recipe()
    require_splittable(recipe)
    setattr(getattr(recipe, section), setting, value)
    with pytest.raises(TrajlmError, match=f"{section}.{setting}.*: not with FSDP"):
        require_splittable(recipe)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files_are_accelerates(path):
    """Its own reader takes them, and takes every key."""
    config = load_config_from_file(str(path))
    assert config.num_processes == 2
    assert config.mixed_precision == "no"
    told = yaml.safe_load(path.read_text())
    assert all(getattr(config, key) for key in told if key not in {"use_cpu"})
