"""DeepSpeed ZeRO takes the steps of one process, for every kind of model; its moments go to disk whole and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes_example import in_processes, join
from test_engines import VARIANTS, objective_of
from trajectory_example import toy_batch

from trajlm.backbones import load_trunk
from trajlm.checkpoint import Checkpoints
from trajlm.config import BackboneConfig, Recipe
from trajlm.engines import make_accelerator
from trajlm.errors import TrajlmError
from trajlm.sequence_objective import SequenceObjective
from trajlm.zero import require_splittable_moments, split_moments

NF4 = "adapters on a base of 4 bits"
KINDS = [*VARIANTS, NF4]
CLIP = 0.5
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}


def objective(kind: str, weights: str) -> SequenceObjective:
    if kind == NF4:
        VARIANTS[NF4] = ({"tuning": "lora", "quantisation": "nf4"}, {})
    return objective_of(kind, weights).train()


def optimiser_of(module: SequenceObjective) -> torch.optim.Optimizer:
    """Two groups, as in training: adapters or backbone, and the rest."""
    groups: list[list] = [[], []]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups["backbone" in name].append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-2, weight_decay=0.1)


def plain_steps(module: SequenceObjective, optimiser: torch.optim.Optimizer, count: int) -> list[float]:
    norms = []
    for seed in range(count):
        torch.manual_seed(seed)
        module(toy_batch([6, 2, 4, 3])).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        optimiser.step()
        optimiser.zero_grad()
    return norms


def zero_steps(module, optimiser, accelerator, seeds) -> tuple[torch.optim.Optimizer, list[float]]:
    engine, split = split_moments(accelerator, module, optimiser, CLIP)
    norms = []
    for seed in seeds:
        torch.manual_seed(seed)
        accelerator.backward(engine(toy_batch([6, 2, 4, 3])))
        norms.append(float(accelerator.clip_grad_norm_([], CLIP)))
    return split, norms


def apart(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert set(mine) == set(theirs)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def trained(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def moments(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(t) for index, slot in state.items() for name, t in slot.items()}


def compare(kind: str, weights: str, out: Path, accelerator) -> dict[str, object]:
    alone = objective(kind, weights)
    own = optimiser_of(alone)
    expected = plain_steps(alone, own, 3)
    # Two steps, the way over the disk into another model, and the third.
    first, checkpoints = objective(kind, weights), Checkpoints(out / kind, accelerator.is_main_process)
    before = trained(first)
    split, norms = zero_steps(first, optimiser_of(first), accelerator, [0, 1])
    part = next(iter(split.optimizer.optimizer.state.values()))["exp_avg"].numel()
    checkpoints.save(first, split, {"step": 2, "epoch": 0}, {})
    accelerator.wait_for_everyone()
    again = objective(kind, weights)
    with torch.no_grad():
        for parameter in again.parameters():
            if parameter.requires_grad:
                parameter += 1
    restored = optimiser_of(again)
    checkpoints.restore(again, restored)
    split, third = zero_steps(again, restored, accelerator, [2])
    return {
        "norms": max(abs(a - b) / a for a, b in zip(expected, norms + third, strict=True)),
        "clipped": max(expected) / CLIP,
        "weights": apart(trained(again), trained(alone)),
        "moved": apart(trained(again), before),
        "moments": apart(moments(split), moments(own)),
        "share": part / sum(p.numel() for p in own.param_groups[0]["params"]),
    }


def worker(rank: int, port: int, out: str, weights: str, stage: int) -> None:
    join(rank, port, ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage), **ZERO)
    accelerator = make_accelerator()
    found = {kind: compare(kind, weights, Path(out), accelerator) for kind in KINDS}
    (Path(out) / f"found-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2])
def zero(tmp_path_factory, request):
    pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("zero")
    torch.manual_seed(0)
    load_trunk(BackboneConfig(name="tiny")).save_pretrained(out / "weights")
    in_processes(worker, str(out), str(out / "weights"), request.param)
    return [json.loads((out / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_over_a_checkpoint_are_those_of_one_process(kind, zero):
    for mine in (ranks[kind] for ranks in zero):
        assert mine["clipped"] > 1, "nothing was clipped"
        assert mine["moved"] > 0.01
        assert mine["norms"] < 1e-4
        assert mine["weights"] < 1e-4
        assert mine["moments"] < 1e-4
        assert 0.45 < mine["share"] < 0.6, "a process holds half of the moments"


def test_moments_of_8_bits_are_refused():
    recipe = Recipe()
    require_splittable_moments(recipe)
    recipe.finetuning.optimiser = "adamw8bit"
    with pytest.raises(TrajlmError, match="adamw8bit: not with DeepSpeed"):
        require_splittable_moments(recipe)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage is '3'.*fsdp2.yaml"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "5.0"}, "gradient_clipping is '5.0'"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device is 'cpu'"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload_param_device is 'nvme'"),
        ({}, "outside a process group"),
    ],
)
def test_what_would_run_otherwise_is_refused(variables, said, monkeypatch):
    for name, value in (ZERO | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrajlmError, match=said):
        make_accelerator()


def test_a_missing_package_is_named(monkeypatch):
    for name, value in (ZERO | {"LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trajlm.zero.find_spec", lambda name: None)
    with pytest.raises(TrajlmError, match=r"not installed: pip install trajlm\[deepspeed\]"):
        make_accelerator()


def test_encoders_are_pretrained_with_ddp(monkeypatch):
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrajlmError, match=r"DeepSpeed splits the sequence model.*DDP"):
        make_accelerator(unused_parameters=True)
