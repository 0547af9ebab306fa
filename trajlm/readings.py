"""What is fitted beside the network: chosen read-outs of many stays, and the newest events they are read from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trajlm.latents import TrajectoryBatch
from trajlm.reading import counted_readouts, newest_position
from trajlm.tasks import Task, targets_at

# Read-outs that are fitted: the last one up to each of these hours, and the stay's last.
FITTED_AT = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 36.0, 48.0, 72.0, 96.0, 144.0, 192.0, 288.0, 384.0)
MOST_CELLS = 250_000_000  # inputs of all fitted read-outs together, 1 GB; stays are drawn at random beyond that
AT_ONCE = 256  # stays


@dataclass(frozen=True)
class Readings:
    """R read-outs of N stays, to fit to or to choose by.

    Attributes:
        inputs: float32[R, I].
        hours: float32[R], since admission.
        targets: float32[R, K], NaN where unknown.
        share: float32[R], what each weighs; of one stay they sum to 1.
        stays: N.
    """

    inputs: Tensor
    hours: Tensor
    targets: Tensor
    share: Tensor
    stays: int

    def losses(self, tasks: Sequence[Task], readouts: Tensor) -> Tensor:
        """float[K]: mean loss of a stay by task, of float[R, K]."""
        each = [(task.loss(readouts[:, k], self.targets[:, k]) * self.share).sum() for k, task in enumerate(tasks)]
        return torch.stack(each) / self.stays


@torch.no_grad()
def readings(
    rows: Callable[[TrajectoryBatch, Tensor], Tensor],
    tasks: Sequence[Task],
    stays: np.ndarray,
    trajectories: Callable[[np.ndarray], TrajectoryBatch],
    weights: Callable[[TrajectoryBatch], Tensor],
) -> Readings:
    """What is fitted of these stays (positions).

    Args:
        rows: float[R, I], what the chosen read-outs bool[B, S] of a batch are read from.
        tasks: K fitted tasks.
        stays: positions.
        trajectories: their timelines, on the device to fit on.
        weights: float[B, S], what each read-out counts; zero at padding.
    """
    parts: list[tuple[Tensor, ...]] = []
    for start in tqdm(range(0, len(stays), AT_ONCE), desc="read-outs beside", unit="batch", mininterval=2.0):
        batch = trajectories(stays[start : start + AT_ONCE])
        counts = weights(batch) * counted_readouts(batch.hours, batch.present, "landmarks", FITTED_AT)
        share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1e-12)
        chosen = counts > 0
        hours = batch.hours[chosen].float()
        targets = targets_at(tasks, batch.targets[chosen.nonzero()[:, 0]], hours)
        parts.append((rows(batch, chosen), hours, targets, share[chosen].float()))
    inputs, hours, targets, shares = (torch.cat(column) for column in zip(*parts, strict=True))
    return Readings(inputs, hours, targets, shares, len(stays))


def best_shares(tasks: Sequence[Task], said: Readings, components: int) -> Tensor:
    """float[P, K]: the shares of P components, tenths that sum to 1, whose mean has the least loss of each task.

    None counts for less than a tenth: a few hundred stays do not tell that one is of no use. Classes are not
    balanced. A task without a known target gets NaN.

    Args:
        tasks: K fitted tasks.
        said: of tuning stays; its inputs float[R, P * K] are the components' read-outs.
        components: P.
    """
    plain, shift = [task.unbalanced() for task in tasks], torch.stack([task.shift for task in tasks])
    readouts = said.inputs.unflatten(1, (components, len(tasks))) - shift.to(said.inputs)
    tenths = [c for c in itertools.product(range(1, 11), repeat=components) if sum(c) == 10]
    tried = said.inputs.new_tensor(tenths) / 10
    losses = torch.stack([said.losses(plain, torch.einsum("rpk,p->rk", readouts, shares)) for shares in tried])
    known = torch.stack([task.usable(said.targets[:, k]).any() for k, task in enumerate(tasks)])
    return torch.where(known, tried[losses.argmin(dim=0)].T, float("nan"))


def most_stays(inputs: int, stays: np.ndarray, seed: int) -> np.ndarray:
    """As many of these stays as MOST_CELLS has room for with so many inputs, drawn at random where there are more."""
    room = max(1, MOST_CELLS // (len(FITTED_AT) * inputs))
    return stays if len(stays) <= room else np.sort(np.random.default_rng(seed).choice(stays, room, replace=False))


def newest(batch: TrajectoryBatch, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Modality ``index``'s newest event at each read-out.

    Returns:
        int64[B, S] its place, 0 before the first; bool[B, S] whether there is one; float64[B, S] its age in hours.
    """
    place = newest_position(batch.modality, batch.present, index)
    at = place.clamp_min(0)
    return at, place >= 0, (batch.hours - batch.hours.gather(1, at)).clamp_min(0.0)


def own_rows(batch: TrajectoryBatch, index: int, at: Tensor, chosen: Tensor) -> Tensor:
    """int64[R]: the order among modality ``index``'s own events of the places ``at`` int64[B, S] where ``chosen``.

    Meaningless where a stay has none of them yet.
    """
    mine = (batch.modality == index) & batch.present
    return (mine.flatten().cumsum(0) - 1).view(mine.shape)[chosen.nonzero()[:, 0], at[chosen]].clamp_min(0)
