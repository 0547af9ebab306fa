"""Moments and gradients split over processes (DeepSpeed ZeRO, stages 1 and 2); weights stay whole on each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trajlm.config import Recipe
from trajlm.errors import TrajlmError

MOMENTS = ("exp_avg", "exp_avg_sq")

# As in trajlm.engines: by variable of the launcher its name, the values that are run, what to do about any other.
PLAIN_ZERO = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", {"1", "2"}, "split weights with recipes/accelerate/fsdp2.yaml"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (
        "deepspeed_config_file", {"none"}, "its settings would go past the recipe; leave it out",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", {"none", "auto"}, "training clips as it is; leave it out"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("offload_optimizer_device", {"none"}, "not supported; use none"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", {"none"}, "not supported; use none"),
}  # fmt: skip


def ready_deepspeed() -> None:
    """Raise TrajlmError where DeepSpeed is missing; on a machine without GPUs, have it leave sums to gloo."""
    if find_spec("deepspeed") is None:
        raise TrajlmError(
            "DeepSpeed is not installed: pip install trajlm[deepspeed]; recipes/accelerate/fsdp2.yaml does without"
        )
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # It would compile C++ of its own at the first run, into the user's home, to add numbers in shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def require_splittable_moments(recipe: Recipe) -> None:
    """Raise TrajlmError for what ZeRO does not train: 8-bit moments are scaled by blocks of one parameter each."""
    if recipe.finetuning.optimiser == "adamw8bit":
        raise TrajlmError(
            "finetuning.optimiser adamw8bit: not with DeepSpeed; use adamw, or recipes/accelerate/ddp.yaml"
        )


class SplitOptimiser(AcceleratedOptimizer):
    """Adam or AdamW with each process holding a part of the moments; they are told whole.

    ``Accelerator.backward`` clips, steps and drops the gradients; ``step`` and ``zero_grad`` are left with nothing.

    Args:
        zero: DeepSpeed's optimiser.
        trained: the parameters in the optimiser's order.
        state: their whole moments; a parameter without any begins.
    """

    def __init__(self, zero: Any, trained: list[nn.Parameter], state: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        super().__init__(zero, device_placement=False)
        self._trained = trained
        self._parts = [part for group in zero.optimizer.param_groups for part in group["params"]]
        step = next((slot["step"] for slot in state.values()), torch.tensor(0.0))
        for part in self._parts:
            zero.optimizer.state[part] = {"step": step.clone()} | {name: torch.zeros_like(part) for name in MOMENTS}
        # DeepSpeed does so after the step of the first group, before the others have any moments.
        zero._lazy_init_hp_params_optimizer_state()
        from deepspeed.utils import safe_set_full_optimizer_state

        for parameter, slot in state.items():
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, slot[name], name)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Nothing."""

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """``{"state": {index: moments}}`` as one process alone has it; every process has to ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self.optimizer.optimizer.state[self._parts[0]]["step"]
        slots = (
            {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS} for parameter in self._trained
        )
        return {"state": {index: {"step": step.clone()} | slot for index, slot in enumerate(slots)}}


def split_moments(
    accelerator: Accelerator, module: nn.Module, optimiser: torch.optim.Optimizer, clip_norm: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The module and its optimiser under DeepSpeed: call the first for the loss, which the module itself also gives.

    The module keeps its own parameters, whole and up to date after every step. Moments that the optimiser has, from a
    checkpoint, are split.
    """
    accelerator.free_memory()
    # One stay for a batch: DeepSpeed wants a number, and weighs nothing by it.
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": clip_norm,
    }  # fmt: skip
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state = dict(optimiser.state)
    optimiser.state.clear()
    engine, wrapped = accelerator.prepare(module, optimiser)
    return engine, SplitOptimiser(wrapped.optimizer, trained, state)
