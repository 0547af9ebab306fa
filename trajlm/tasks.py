"""What is predicted: target, loss, and how a read-out becomes a belief. One entry of ``TASKS`` per task."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trajlm.errors import TrajlmError
from trajlm.schema import LENGTH_OF_STAY, MORTALITY


class Task(nn.Module, ABC):
    """One target of a stay.

    What is fitted on the training stays (class balance, scale) lies in buffers, so it is saved with the weights.

    Attributes:
        target: name of the target; ``target_<target>`` in ``stays.parquet``, ``belief_<target>`` in beliefs.
        kind: whether a belief is a probability or a number of hours.
        title: how a report writes it.
    """

    target: str
    kind: Literal["probability", "hours"]
    title: str

    @property
    def column(self) -> str:
        """The target's column in ``stays.parquet``."""
        return f"target_{self.target}"

    def usable(self, targets: Tensor) -> Tensor:
        """bool[...]: targets that are known and inside what the task asks for; NaN is unknown."""
        return ~targets.isnan()

    @abstractmethod
    def fit(self, targets: Tensor) -> None:
        """Learn balance or scale from float[N] targets of the training stays, NaN where unknown."""

    @abstractmethod
    def loss(self, readout: Tensor, targets: Tensor) -> Tensor:
        """float[...] loss of each read-out float[...]; zero where the target is not usable."""

    @abstractmethod
    def belief(self, readout: Tensor) -> Tensor:
        """float[...]: probability, or hours."""


class BinaryTask(Task):
    """Weighted binary cross-entropy (B.3): positives weigh as much as negatives.

    The weight shifts the optimal logit by its logarithm; a belief takes that shift back, so that it is a probability in
    the training population and not in a balanced one.
    """

    kind = "probability"
    positive_weight: Tensor

    def __init__(self, target: str, title: str) -> None:
        super().__init__()
        self.target, self.title = target, title
        self.register_buffer("positive_weight", torch.tensor(1.0))

    def fit(self, targets: Tensor) -> None:
        """Negatives per positive. One class only cannot be learned: an error."""
        known = targets[self.usable(targets)]
        positives = int((known == 1).sum())
        if positives == 0 or positives == len(known):
            raise TrajlmError(
                f"task {self.target}: the training stays hold {positives} positives among {len(known)} known targets; "
                "both outcomes are needed: prepare more stays or drop the task from finetuning.tasks"
            )
        self.positive_weight.fill_((len(known) - positives) / positives)

    def loss(self, readout: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        usable = self.usable(targets)
        filled = torch.where(usable, targets, 0.0)
        loss = F.binary_cross_entropy_with_logits(
            readout, filled, pos_weight=self.positive_weight.to(readout.dtype), reduction="none"
        )
        return torch.where(usable, loss, 0.0)

    def belief(self, readout: Tensor) -> Tensor:
        """Probability of the outcome."""
        return torch.sigmoid(readout - self.positive_weight.log())


class HoursTask(Task):
    """Squared error of log(1 + hours), standardised on the training stays (B.3).

    Targets outside ``[shortest, longest]`` hours are treated as unknown, in training and in metrics.
    """

    kind = "hours"
    mean: Tensor
    std: Tensor

    def __init__(self, target: str, title: str, shortest: float, longest: float) -> None:
        super().__init__()
        self.target, self.title, self.shortest, self.longest = target, title, shortest, longest
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def usable(self, targets: Tensor) -> Tensor:
        """Known, and within the range."""
        return (targets >= self.shortest) & (targets <= self.longest)

    def fit(self, targets: Tensor) -> None:
        """Mean and deviation of log(1 + hours)."""
        known = torch.log1p(targets[self.usable(targets)])
        if len(known) < 2 or known.std() == 0:
            raise TrajlmError(f"task {self.target}: {len(known)} usable training targets are too few to learn from")
        self.mean.fill_(known.mean())
        self.std.fill_(known.std())

    def loss(self, readout: Tensor, targets: Tensor) -> Tensor:
        """Squared error in units of the training deviation of log(1 + hours)."""
        usable = self.usable(targets)
        scaled = (torch.log1p(torch.where(usable, targets, 0.0)) - self.mean) / self.std
        return torch.where(usable, (readout - scaled) ** 2, 0.0)

    def belief(self, readout: Tensor) -> Tensor:
        """Hours, never below zero."""
        return torch.expm1(readout * self.std + self.mean).clamp_min(0.0)


TASKS = {
    "mortality": lambda: BinaryTask(MORTALITY.removeprefix("target_"), "in-hospital death"),
    "length_of_stay": lambda: HoursTask(LENGTH_OF_STAY.removeprefix("target_"), "length of stay", 12.0, 720.0),
}


def build_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, in order; an unknown name is an error that tells the nearest."""
    for name in names:
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
            raise TrajlmError(
                f"finetuning.tasks: {name!r} is not known; the nearest is {nearest!r}, all are {', '.join(TASKS)}"
            )
    return [TASKS[name]() for name in names]


def stay_losses(tasks: Sequence[Task], readouts: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Loss of every stay: per task the weighted mean over its read-outs, summed over tasks.

    Args:
        tasks: K tasks.
        readouts: float[B, S, K].
        targets: float[B, K], NaN where unknown.
        weights: float[B, S], not negative; zero for padding. Normalised here per stay, so long stays do not dominate.

    Returns:
        float[B].
    """
    share = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
    total = readouts.new_zeros(readouts.shape[0])
    for k, task in enumerate(tasks):
        per_readout = task.loss(readouts[..., k], targets[:, k, None].expand(-1, readouts.shape[1]))
        total = total + (per_readout * share).sum(dim=1)
    return total
