"""What is predicted: target, loss, and how a read-out becomes a belief. One entry of ``TASKS`` per task."""

from __future__ import annotations

import copy
import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
        group: name of the family of targets whose macro mean is reported; None stands alone.
        share: weight in the loss, so that a family weighs as one target.
    """

    target: str
    kind: Literal["probability", "hours"]
    title: str
    group: str | None = None
    share: float = 1.0

    @property
    def column(self) -> str:
        """The column in ``stays.parquet`` that tells the target."""
        return f"target_{self.target}"

    def at(self, targets: Tensor, hours: Tensor) -> Tensor:
        """float[...]: the target of a belief held ``hours`` after admission, from the stay's; most never change."""
        return targets

    def held_on(self, beliefs: Tensor, hours: Tensor) -> Tensor:
        """float[...]: beliefs as they would read ``hours`` later, if nothing were learnt meanwhile."""
        return beliefs

    def usable(self, targets: Tensor) -> Tensor:
        """bool[...]: targets that are known and inside what the task asks for; NaN is unknown."""
        return ~targets.isnan()

    @abstractmethod
    def fit(self, targets: Tensor) -> None:
        """Learn balance or scale from float[N] targets of the training stays, NaN where unknown."""

    def label(self, targets: Tensor) -> Tensor:
        """float[...]: what a read-out is to come near, from usable targets; of a probability the outcome itself."""
        return targets

    @abstractmethod
    def loss(self, readout: Tensor, targets: Tensor) -> Tensor:
        """float[...] loss of each read-out float[...]; zero where the target is not usable."""

    @abstractmethod
    def belief(self, readout: Tensor) -> Tensor:
        """float[...]: probability, or hours."""

    @property
    def shift(self) -> Tensor:
        """float[]: by how much the balance of classes moves the best read-out."""
        return torch.tensor(0.0)

    def unbalanced(self) -> Task:
        """A copy for which every stay weighs alike."""
        return copy.deepcopy(self)


class BinaryTask(Task):
    """Weighted binary cross-entropy (B.3): positives weigh as much as negatives.

    The weight shifts the optimal logit by its logarithm; a belief takes that shift back, so that it is a probability in
    the training population and not in a balanced one.

    Args:
        target, title: as of every task.
        focal_gamma: above 0 the loss of a read-out is multiplied by (1 - p)^gamma, where p is what it gave to the true
            outcome: easy stays count less (Lin et al. 2017, arXiv 1708.02002).
    """

    kind = "probability"
    positive_weight: Tensor

    def __init__(self, target: str, title: str, focal_gamma: float = 0.0) -> None:
        super().__init__()
        self.target, self.title, self.focal_gamma = target, title, focal_gamma
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
        """Cross-entropy in nats, focal where so set."""
        usable = self.usable(targets)
        filled = torch.where(usable, targets, 0.0)
        loss = F.binary_cross_entropy_with_logits(
            readout, filled, pos_weight=self.positive_weight.to(readout.dtype), reduction="none"
        )
        if self.focal_gamma > 0:
            wrong = torch.sigmoid(torch.where(filled > 0, -readout, readout))
            loss = loss * wrong**self.focal_gamma
        return torch.where(usable, loss, 0.0)

    def belief(self, readout: Tensor) -> Tensor:
        """Probability of the outcome."""
        return torch.sigmoid(readout - self.shift)

    @property
    def shift(self) -> Tensor:
        """Logarithm of the weight of positives."""
        return self.positive_weight.log()

    def unbalanced(self) -> BinaryTask:
        """A copy whose positives weigh as negatives do, and easy stays as hard ones."""
        other = copy.deepcopy(self)
        other.positive_weight.fill_(1.0)
        other.focal_gamma = 0.0
        return other


class PhenotypeTask(BinaryTask):
    """One of the 25 phenotypes; a rare one may have no positive training stay, and then teaches nothing."""

    group = "phenotyping"

    def __init__(self, name: str, focal_gamma: float = 0.0) -> None:
        super().__init__(f"phenotype_{name}", name.replace("_", " "), focal_gamma)
        self.share = 1 / len(PHENOTYPES)

    def fit(self, targets: Tensor) -> None:
        """Negatives per positive; 1 where one outcome is never seen."""
        known = targets[self.usable(targets)]
        if 0 < int((known == 1).sum()) < len(known):
            super().fit(targets)


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

    @property
    def shift(self) -> Tensor:
        """Nothing is balanced."""
        return self.mean.new_zeros(())

    def label(self, targets: Tensor) -> Tensor:
        """log(1 + hours), standardised."""
        return (torch.log1p(targets) - self.mean) / self.std

    def loss(self, readout: Tensor, targets: Tensor) -> Tensor:
        """Squared error in units of the training deviation of log(1 + hours)."""
        usable = self.usable(targets)
        return torch.where(usable, (readout - self.label(torch.where(usable, targets, 0.0))) ** 2, 0.0)

    def belief(self, readout: Tensor) -> Tensor:
        """Hours, never below zero."""
        return torch.expm1(readout * self.std + self.mean).clamp_min(0.0)


class RemainingHoursTask(HoursTask):
    """Hours left in the unit from a belief on: the stay's hours in the unit less the belief's time."""

    def __init__(self) -> None:
        super().__init__("remaining_length_of_stay_hours", "remaining length of stay", 0.0, 8760.0)

    @property
    def column(self) -> str:
        """How long the stay lasted in the unit."""
        return HOURS_IN_UNIT

    def at(self, targets: Tensor, hours: Tensor) -> Tensor:
        """What is left of float[...] hours in the unit; unknown (NaN) after the stay has ended."""
        left = targets - hours.to(targets.dtype)
        return torch.where(left >= 0, left, float("nan"))

    def held_on(self, beliefs: Tensor, hours: Tensor) -> Tensor:
        """Less by the time that has passed, never below zero."""
        return (beliefs - hours.to(beliefs.dtype)).clamp_min(0.0)

    def fit(self, targets: Tensor) -> None:
        """Mean and deviation of log(1 + what is left at FITTED_AT), of stays that have not ended by then."""
        known = targets[self.usable(targets)]
        if len(known) and bool((known == known[0]).all()):
            raise TrajlmError(
                f"task {self.target}: hours_in_unit is {float(known[0]):g} of every training stay, so the release does "
                "not tell how long stays lasted in the unit; drop the task from finetuning.tasks"
            )
        super().fit(self.at(known[:, None], torch.tensor(FITTED_AT)).flatten())


HOURS_IN_UNIT = "hours_in_unit"
FITTED_AT = (0.0, 6.0, 12.0, 24.0, 48.0)  # hours since admission, for the scale of the loss alone


def beliefs_at(tasks: Sequence[Task], readouts: Tensor) -> Tensor:
    """float[..., K]: beliefs, probabilities or hours, from read-outs float[..., K]."""
    return torch.stack([task.belief(readouts[..., k]) for k, task in enumerate(tasks)], dim=-1)


def targets_at(tasks: Sequence[Task], targets: Tensor, hours: Tensor) -> Tensor:
    """float[..., K]: targets of beliefs held at float[...] hours, from the stays' targets float[..., K]."""
    return torch.stack([task.at(targets[..., k], hours) for k, task in enumerate(tasks)], dim=-1)


def held_on(tasks: Sequence[Task], beliefs: Tensor, hours: Tensor) -> Tensor:
    """float[..., K]: beliefs float[..., K] as they would read float[...] hours later, with nothing learnt meanwhile."""
    return torch.stack([task.held_on(beliefs[..., k], hours) for k, task in enumerate(tasks)], dim=-1)


# ``target_phenotype_<name>`` of stays.parquet.
PHENOTYPES = (
    "acute_and_unspecified_renal_failure",
    "acute_cerebrovascular_disease",
    "acute_myocardial_infarction",
    "cardiac_dysrhythmias",
    "chronic_kidney_disease",
    "chronic_obstructive_pulmonary_disease_and_bronchiectasis",
    "complications_of_surgical_procedures_or_medical_care",
    "conduction_disorders",
    "congestive_heart_failure_nonhypertensive",
    "coronary_atherosclerosis_and_other_heart_disease",
    "diabetes_mellitus_with_complications",
    "diabetes_mellitus_without_complication",
    "disorders_of_lipid_metabolism",
    "essential_hypertension",
    "fluid_and_electrolyte_disorders",
    "gastrointestinal_hemorrhage",
    "hypertension_with_complications_and_secondary_hypertension",
    "other_liver_diseases",
    "other_lower_respiratory_disease",
    "other_upper_respiratory_disease",
    "pleurisy_pneumothorax_pulmonary_collapse",
    "pneumonia",
    "respiratory_failure_insufficiency_arrest",
    "septicemia",
    "shock",
)

TASKS: dict[str, Callable[[float], list[Task]]] = {
    "mortality": lambda gamma: [BinaryTask(MORTALITY.removeprefix("target_"), "in-hospital death", gamma)],
    "length_of_stay": lambda _: [HoursTask(LENGTH_OF_STAY.removeprefix("target_"), "length of stay", 12.0, 720.0)],
    "remaining_length_of_stay": lambda _: [RemainingHoursTask()],
    "phenotyping": lambda gamma: [PhenotypeTask(name, gamma) for name in PHENOTYPES],
}
# Any other target of a prepared folder, such as a label of MEDS, by what stands before its name.
LABELS: dict[str, Callable[[str, float], Task]] = {
    "label:": lambda name, gamma: BinaryTask(name, name.replace("_", " "), gamma),
    "hours:": lambda name, _: HoursTask(name, name.replace("_", " "), 0.0, float("inf")),
}
GROUP_TITLES = {PhenotypeTask.group: "phenotypes"}


def build_tasks(names: Sequence[str], focal_gamma: float = 0.0) -> list[Task]:
    """The tasks of these names, in order, one per target; an unknown name is an error that tells the nearest.

    ``label:NAME`` and ``hours:NAME`` are the column ``target_NAME`` of the stays, 0 or 1, or hours.
    """
    tasks: list[Task] = []
    for name in names:
        of = next((prefix for prefix in LABELS if name.startswith(prefix) and name != prefix), None)
        if of is None and name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
            raise TrajlmError(
                f"finetuning.tasks: {name!r} is not known; the nearest is {nearest!r}, all are {', '.join(TASKS)}, "
                "label:NAME and hours:NAME"
            )
        tasks += TASKS[name](focal_gamma) if of is None else [LABELS[of](name.removeprefix(of), focal_gamma)]
    twice = [task.target for i, task in enumerate(tasks) if task.target in {t.target for t in tasks[:i]}]
    if twice:
        raise TrajlmError(f"finetuning.tasks: {twice[0]} is predicted twice")
    return tasks


def stay_losses(tasks: Sequence[Task], readouts: Tensor, targets: Tensor, weights: Tensor, hours: Tensor) -> Tensor:
    """Loss of every stay: per task the weighted mean over its read-outs, summed over tasks.

    Args:
        tasks: K tasks.
        readouts: float[B, S, K].
        targets: float[B, K], NaN where unknown.
        weights: float[B, S], not negative; zero for padding. Normalised here per stay, so long stays do not dominate.
        hours: float[B, S], hours since admission of each read-out.

    Returns:
        float[B].
    """
    share = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
    total = readouts.new_zeros(readouts.shape[0])
    for k, task in enumerate(tasks):
        per_readout = task.loss(readouts[..., k], task.at(targets[:, k, None].expand(-1, readouts.shape[1]), hours))
        total = total + task.share * (per_readout * share).sum(dim=1)
    return total
