"""How often a training stay is drawn, and what it then weighs (``finetuning.sampling``).

Balanced draws stays with and without the first probability's outcome equally often. A stay's loss is divided by how
much more often than uniformly it is drawn, so that every task's loss is, in expectation, the one of uniform sampling:
what a belief means, and how well it is calibrated, does not change; how much a batch tells of the rare outcome does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trajlm.errors import TrajlmError
from trajlm.tasks import BinaryTask, Task

Sampling = Literal["uniform", "balanced"]


def balanced_by(tasks: Sequence[Task]) -> tuple[int, BinaryTask]:
    """Place and task of the outcome that balanced draws go by, the first probability; a TrajlmError without one."""
    for k, task in enumerate(tasks):
        if isinstance(task, BinaryTask):
            return k, task
    raise TrajlmError("finetuning.sampling balanced needs a task with two outcomes, such as mortality")


def importance(tasks: Sequence[Task], targets: Tensor) -> Tensor:
    """float[B]: what the loss of a drawn stay counts for; 1 where the outcome is unknown.

    Args:
        tasks: K fitted tasks.
        targets: float[B, K], NaN where unknown.
    """
    k, task = balanced_by(tasks)
    share = 1 / (1 + task.positive_weight)  # of the known training stays, with the outcome
    outcome = targets[:, k]
    return torch.where(outcome.isnan(), 1.0, torch.where(outcome > 0, 2 * share, 2 * (1 - share)).to(targets.dtype))


def chances(tasks: Sequence[Task], targets: Tensor, sampling: Sampling) -> NDArray[np.float64] | None:
    """float64[N], the chance of each training stay to be the next one drawn; None draws each once per epoch.

    Args:
        tasks: K fitted tasks.
        targets: float[N, K] of the training stays.
        sampling: as of the settings.
    """
    if sampling == "uniform":
        return None
    odds = 1 / importance(tasks, targets).double().numpy()
    return odds / odds.sum()
