"""The engine of training is accelerate: what its launcher asks for is done or refused, never something else."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.utils import DistributedType, KwargsHandler

from trajlm.errors import TrajlmError
from trajlm.zero import PLAIN_ZERO, ready_deepspeed

SCRIPTS = "recipes/accelerate/ddp.yaml, fsdp2.yaml or deepspeed.yaml"

# By variable that the launcher sets: its name in a config file, the values that ask for nothing special, and what to
# do about any other.
PLAIN = {
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", {"no"}, "the recipe says it, backbone.precision; use 'no'"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps", {"1"}, "the recipe says it, finetuning.batch_size; use 1",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_backend", {"no"}, "nothing is compiled; use 'no'"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", {"false"}, f"not supported; use {SCRIPTS}"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", {"false"}, f"not supported; use {SCRIPTS}"),
}  # fmt: skip
PLAIN_FSDP = {
    "FSDP_VERSION": ("fsdp_version", {"2"}, "FSDP1 is not supported; use 2"),
    "FSDP_AUTO_WRAP_POLICY": (
        "fsdp_auto_wrap_policy", {"transformer_based_wrap"}, "layers are gathered singly; use TRANSFORMER_BASED_WRAP",
    ),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (
        "fsdp_transformer_layer_cls_to_wrap", {"", "none"}, "the backbone says it; leave it out",
    ),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "fsdp_cpu_ram_efficient_loading", {"false"}, "every process reads the weights; use false",
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing", {"false"}, "the recipe says it, backbone.gradient_checkpointing; use false",
    ),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", {"false"}, "not supported; use false"),
    "FSDP_IGNORED_MODULES": ("fsdp_ignored_modules", {"", "none"}, "not supported; leave it out"),
}  # fmt: skip


# Of one primitive per shape of input; batches rarely share a shape, and 1024 of them, oneDNN's own choice, take memory
# and keep the heap around them from being given back. A step needs fewer than this.
PRIMITIVES = 64

# How long processes wait for one another: the first alone fits baselines and measures, hours of it on a large cohort,
# where the default of ten minutes on GPUs would end the run. A launcher stops the others where one dies.
PATIENCE = timedelta(days=2)


def make_accelerator(unused_parameters: bool = False) -> Accelerator:
    """The engine; refuses what would run otherwise than asked for.

    ``accelerate launch --cpu --num_processes 2`` starts one process in silence; training on half the batch without
    saying so would be a silent error. So would mixed precision, compilation or accumulation that only one of one and
    several processes gets, and FSDP that accelerate turns into DDP on CPUs.

    Args:
        unused_parameters: a batch may leave parameters without gradient (an encoder whose modality nobody holds).
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRIMITIVES))  # read when first needed
    _require_plain(PLAIN)
    zero, sharded = _asked("ACCELERATE_USE_DEEPSPEED"), _asked("ACCELERATE_USE_FSDP")
    for name, asked, plain in (("FSDP", sharded, PLAIN_FSDP), ("DeepSpeed", zero, PLAIN_ZERO)):
        if asked:
            _require_plain(plain)
            if unused_parameters:
                raise TrajlmError(f"{name} splits the sequence model; encoders are small, pretrain them with DDP")
            if "LOCAL_RANK" not in os.environ:
                raise TrajlmError(f"{name} was asked for outside a process group; use accelerate launch or torchrun")
    if zero:
        ready_deepspeed()
    handlers: list[KwargsHandler] = [
        DistributedDataParallelKwargs(find_unused_parameters=unused_parameters),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    # Left to itself, accelerate starts processes on a machine without GPUs that know nothing of each other; and of
    # DeepSpeed it wants to hear of no CPUs once they do.
    cpu = not _computes_in_double()
    if zero:
        PartialState(cpu=cpu, timeout=PATIENCE)
    accelerator = Accelerator(cpu=cpu and not zero, kwargs_handlers=handlers)
    _require_processes(accelerator)
    if sharded and accelerator.device.type == "cpu":
        # Splitting works over gloo; only accelerate's own choice of engine knows no CPUs.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if sharded != accelerator.is_fsdp2:
        raise TrajlmError(f"FSDP was asked for and {accelerator.distributed_type.value} came up")
    if zero != splits_moments(accelerator):
        raise TrajlmError(f"DeepSpeed was asked for and {accelerator.distributed_type.value} came up")
    return accelerator


def _computes_in_double() -> bool:
    """Whether there is an accelerator for float64, in which hours and sums are kept; Apple's has none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found is not None and found.type != "mps"


def splits_moments(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed trains."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def _require_plain(settings: dict[str, tuple[str, set[str], str]]) -> None:
    for variable, (name, plain, what) in settings.items():
        asked = os.environ.get(variable)
        if asked is not None and asked.lower() not in plain:
            raise TrajlmError(f"accelerate's {name} is {asked!r}: {what}")


def _require_processes(accelerator: Accelerator) -> None:
    cores = os.cpu_count() or 1
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1 and torch.get_num_threads() < cores:
        print(
            f"computing with {torch.get_num_threads()} of {cores} cores; `accelerate launch` uses one unless "
            "--num_cpu_threads_per_process says more, plain python unless OMP_NUM_THREADS does"
        )
    came_up = accelerator.num_processes
    asked = os.environ.get("WORLD_SIZE", str(came_up))
    # accelerate's launcher names a meeting point only for several processes, and starts one alone where told --cpu.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= set(os.environ) and "WORLD_SIZE" not in os.environ:
        asked = "several"
    if asked != str(came_up):
        raise TrajlmError(
            f"{asked} processes were asked for and {came_up} came up; use accelerate launch "
            "--config_file recipes/accelerate/ddp.yaml --num_processes N, which also starts several on a CPU"
        )
