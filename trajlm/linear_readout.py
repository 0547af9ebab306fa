"""A penalised regression beside the network: the two are fitted apart and their read-outs averaged (beyond the paper).

A few thousand stays teach a network less about single values than a regression under a strong penalty learns from them.
It reads the newest event of every modality as the backbone's projectors do, and nothing later. Fitting the network to
what the regression leaves does not work: on the stays both learn from, the regression leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from trajlm.latents import TrajectoryBatch
from trajlm.reading import counted_readouts, newest_position
from trajlm.tasks import Task, targets_at

# Read-outs that are fitted: the last one up to each of these hours, and the stay's last.
FITTED_AT = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 36.0, 48.0, 72.0, 96.0, 144.0, 192.0, 288.0, 384.0)
STRENGTHS = (10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05)  # of the penalty, tried from strong to weak
MOST_CELLS = 250_000_000  # inputs of all fitted read-outs together, 1 GB; stays are drawn at random beyond that
STEPS = 60  # of L-BFGS, for each strength
SETTLED = 48.0  # hours after which weights no longer change
STANDING = 3  # inputs that tell how a modality's newest event stands: its age, that there is one, that it is this one
LEAST_DEVIATION = 1e-2  # of an input, so that one that hardly varies is not blown up
AT_ONCE = 256  # stays


def clock(hours: Tensor) -> Tensor:
    """float[..., 2]: weights are a constant and a part that grows with the logarithm of time, from -1 to 1 at 48 h."""
    grown = 2 * torch.log1p(hours) / np.log1p(SETTLED) - 1
    return torch.stack([torch.ones_like(grown), grown.clamp(max=1.0)], dim=-1)


def standing(batch: TrajectoryBatch, index: int) -> tuple[Tensor, Tensor]:
    """int64[B, S] place of modality ``index``'s newest event, 0 before the first; float[B, S, 3] how it stands.

    That is log(1 + its age in hours), 1, and whether it is the event at hand; zeros before the first.
    """
    newest = newest_position(batch.modality, batch.present, index)
    at, seen = newest.clamp_min(0), (newest >= 0).to(batch.latents.dtype)
    age = torch.log1p((batch.hours - batch.hours.gather(1, at)).clamp_min(0.0)).to(seen.dtype)
    new = (newest == torch.arange(newest.shape[1], device=newest.device)).to(seen.dtype)
    return at, torch.stack([age, torch.ones_like(age), new], dim=-1) * seen[..., None]


class LinearReadout(nn.Module):
    """Read-outs that are linear in the newest event of every modality, and in nothing else.

    Args:
        widths: I of each of M modalities, what its projector reads of an event.
        tasks: K.

    Attributes:
        weight_0, weight_1, ...: float[I + 3, 2, K] of each modality, by :func:`clock`; buffers: no gradient moves them.
        bias: float[2, K].
    """

    bias: Tensor

    def __init__(self, widths: Sequence[int], tasks: int) -> None:
        super().__init__()
        self.widths = tuple(widths)
        for index, width in enumerate(self.widths):
            self.register_buffer(f"weight_{index}", torch.zeros(width + STANDING, 2, tasks))
        self.register_buffer("bias", torch.zeros(2, tasks))

    def forward(self, inputs: Sequence[Tensor], batch: TrajectoryBatch) -> Tensor:
        """float[B, S, K]; ``inputs`` float[N, I] of each modality, of its own N events in order of the batch."""
        total = self.bias.expand(*batch.present.shape, *self.bias.shape)
        for index, (width, own) in enumerate(zip(self.widths, inputs, strict=True)):
            weight = self.get_buffer(f"weight_{index}")
            said = weight.new_zeros(*batch.present.shape, weight[0].numel())
            said[(batch.modality == index) & batch.present] = own.to(weight.dtype) @ weight[:width].flatten(1)
            at, stands = standing(batch, index)
            held = said.gather(1, at[..., None].expand_as(said)) * stands[..., 1:2]
            held = held + stands.to(weight.dtype) @ weight[width:].flatten(1)
            total = total + held.unflatten(-1, self.bias.shape)
        return (total * clock(batch.hours.to(total.dtype))[..., None]).sum(dim=-2)

    def rows(self, inputs: Sequence[Tensor], batch: TrajectoryBatch, chosen: Tensor) -> Tensor:
        """float[R, sum of (I + 3)]: what the read-outs of ``chosen`` bool[B, S] are read from."""
        parts = []
        for index, own in enumerate(inputs):
            at, stands = (found[chosen] for found in standing(batch, index))
            stay = chosen.nonzero()[:, 0]
            mine = (batch.modality == index) & batch.present
            # Where in ``inputs`` an event stands. Before the first another's is taken, and counts as zeros.
            order = (mine.flatten().cumsum(0) - 1).view(mine.shape)[stay, at].clamp_min(0)
            held = own[order] if len(own) else own.new_zeros(len(order), own.shape[-1])
            parts += [held * stands[:, 1:2], stands]
        return torch.cat(parts, dim=-1)

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Take float[sum of (I + 3), 2, K] weights of :meth:`rows` and float[2, K]."""
        for index, part in enumerate(weight.split([width + STANDING for width in self.widths])):
            self.get_buffer(f"weight_{index}").copy_(part)
        self.bias.copy_(bias)


@dataclass(frozen=True)
class Readings:
    """R read-outs of N stays, to fit to or to choose by.

    Attributes:
        inputs: float32[R, I].
        clock: float32[R, 2].
        targets: float32[R, K], NaN where unknown.
        share: float32[R], what each weighs; of one stay they sum to 1.
        stays: N.
    """

    inputs: Tensor
    clock: Tensor
    targets: Tensor
    share: Tensor
    stays: int

    def losses(self, tasks: Sequence[Task], readouts: Tensor) -> Tensor:
        """float[K]: mean loss of a stay by task, of float[R, K]."""
        each = [(task.loss(readouts[:, k], self.targets[:, k]) * self.share).sum() for k, task in enumerate(tasks)]
        return torch.stack(each) / self.stays

    def readouts(self, weight: Tensor, bias: Tensor) -> Tensor:
        """float[R, K] of float[I, 2, K] and float[2, K]."""
        said = (self.inputs @ weight.flatten(1)).unflatten(-1, bias.shape) + bias
        return (said * self.clock[..., None]).sum(dim=1)


@torch.no_grad()
def readings(
    linear: LinearReadout,
    tasks: Sequence[Task],
    stays: np.ndarray,
    trajectories: Callable[[np.ndarray], TrajectoryBatch],
    inputs: Callable[[TrajectoryBatch], list[Tensor]],
    weights: Callable[[TrajectoryBatch], Tensor],
) -> Readings:
    """What is fitted of these stays (positions).

    Args:
        linear: to be fitted.
        tasks: K fitted tasks.
        stays: positions.
        trajectories: their timelines, on the device to fit on.
        inputs: what each modality's projector reads of its events.
        weights: float[B, S], what each read-out counts; zero at padding.
    """
    parts: list[tuple[Tensor, ...]] = []
    for start in tqdm(range(0, len(stays), AT_ONCE), desc="linear read-out", unit="batch", mininterval=2.0):
        batch = trajectories(stays[start : start + AT_ONCE])
        counts = weights(batch) * counted_readouts(batch.hours, batch.present, "landmarks", FITTED_AT)
        share = counts / counts.sum(dim=1, keepdim=True).clamp_min(1e-12)
        chosen = counts > 0
        stay = chosen.nonzero()[:, 0]
        hours = batch.hours[chosen].float()
        targets = targets_at(tasks, batch.targets[stay], hours)
        parts.append((linear.rows(inputs(batch), batch, chosen), clock(hours), targets, share[chosen].float()))
    rows, clocks, targets, shares = (torch.cat(column) for column in zip(*parts, strict=True))
    return Readings(rows, clocks, targets, shares, len(stays))


def most_stays(linear: LinearReadout, stays: np.ndarray, seed: int) -> np.ndarray:
    """As many of these stays as MOST_CELLS has room for, drawn at random where there are more."""
    room = max(1, MOST_CELLS // (len(FITTED_AT) * sum(width + STANDING for width in linear.widths)))
    return stays if len(stays) <= room else np.sort(np.random.default_rng(seed).choice(stays, room, replace=False))


def fit_linear(linear: LinearReadout, tasks: Sequence[Task], train: Readings, tuning: Readings) -> dict[str, object]:
    """Fit by the tasks' own losses under a squared penalty whose strength has the least loss on the tuning stays.

    Inputs are standardised on the training read-outs first, so one strength suits all; each task has its own. Classes
    are not balanced: rare deaths weigh as much as they are frequent, and the read-out is then moved to where the tasks
    expect it.

    Args:
        linear: gets the weights.
        tasks: K fitted tasks.
        train: read-outs to fit to; standardised in place.
        tuning: read-outs to choose the strength by; likewise.

    Returns:
        what was tried: strengths, and by target the tuning losses and the strength chosen.
    """
    plain = [task.unbalanced() for task in tasks]
    deviation, mean = torch.std_mean(train.inputs, dim=0)
    scale = torch.where(deviation > 1e-6, 1 / deviation.clamp_min(LEAST_DEVIATION), 0.0)
    for part in (train, tuning):
        part.inputs.sub_(mean).mul_(scale)
    weight = train.inputs.new_zeros(train.inputs.shape[1], 2, len(tasks), requires_grad=True)
    bias = train.inputs.new_zeros(2, len(tasks), requires_grad=True)
    tried, losses = [], []
    for strength in STRENGTHS:
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=STEPS, tolerance_grad=1e-5, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def penalised(optimiser: torch.optim.LBFGS = optimiser, strength: float = strength) -> Tensor:
            optimiser.zero_grad()
            loss = train.losses(plain, train.readouts(weight, bias)).sum() + strength / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimiser.step(penalised)
        with torch.no_grad():
            tried.append((weight.clone(), bias.clone()))
            losses.append(tuning.losses(plain, tuning.readouts(weight, bias)))
        if len(losses) > 2 and bool((losses[-1] > losses[-2]).all() and (losses[-2] > losses[-3]).all()):
            break  # weaker penalties have begun to lose for every task
    table = torch.stack(losses)
    chosen = table.argmin(dim=0)
    best = [torch.stack([tried[int(i)][part][..., k] for k, i in enumerate(chosen)], dim=-1) for part in (0, 1)]
    raw = best[0] * scale[:, None, None]
    moved = torch.stack([task.shift for task in tasks]).to(raw) * torch.tensor([[1.0], [0.0]], device=raw.device)
    linear.set(raw, best[1] - torch.einsum("i,icd->cd", mean, raw) + moved)
    return {
        "read_outs": len(train.share),
        "stays": train.stays,
        "strengths": list(STRENGTHS[: len(losses)]),
        "targets": {
            task.target: {"tuning_losses": table[:, k].tolist(), "strength": STRENGTHS[int(chosen[k])]}
            for k, task in enumerate(tasks)
        },
    }
