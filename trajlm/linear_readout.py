"""A penalised regression beside the network: the two are fitted apart and their read-outs averaged (beyond the paper).

A few thousand stays teach a network less about single values than a regression under a strong penalty learns from them.
It reads the newest event of every modality as the backbone's projectors do, and nothing later. Fitting the network to
what the regression leaves does not work: on the stays both learn from, the regression leaves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trajlm.latents import TrajectoryBatch
from trajlm.readings import Readings, newest, own_rows
from trajlm.tasks import Task

STRENGTHS = (10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05)  # of the penalty, tried from strong to weak
STEPS = 60  # of L-BFGS, for each strength
SETTLED = 48.0  # hours after which weights no longer change
STANDING = 3  # inputs that tell how a modality's newest event stands: its age, that there is one, that it is this one
LEAST_DEVIATION = 1e-2  # of an input, so that one that hardly varies is not blown up


def clock(hours: Tensor) -> Tensor:
    """float[..., 2]: weights are a constant and a part that grows with the logarithm of time, from -1 to 1 at 48 h."""
    grown = 2 * torch.log1p(hours) / np.log1p(SETTLED) - 1
    return torch.stack([torch.ones_like(grown), grown.clamp(max=1.0)], dim=-1)


def standing(batch: TrajectoryBatch, index: int) -> tuple[Tensor, Tensor]:
    """int64[B, S] place of modality ``index``'s newest event, 0 before the first; float[B, S, 3] how it stands.

    That is log(1 + its age in hours), 1, and whether it is the event at hand; zeros before the first.
    """
    at, seen, hours = newest(batch, index)
    dtype = batch.latents.dtype
    new = at == torch.arange(at.shape[1], device=at.device)
    age = torch.log1p(hours).to(dtype)
    return at, torch.stack([age, torch.ones_like(age), new.to(dtype)], dim=-1) * seen[..., None]


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

    @property
    def width(self) -> int:
        """What a read-out is read from, all modalities together."""
        return sum(width + STANDING for width in self.widths)

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
            at, stands = standing(batch, index)
            stands = stands[chosen]
            # Before the first event another's is taken, and counts as zeros.
            order = own_rows(batch, index, at, chosen)
            held = own[order] if len(own) else own.new_zeros(len(order), own.shape[-1])
            parts += [held * stands[:, 1:2], stands]
        return torch.cat(parts, dim=-1)

    def set(self, weight: Tensor, bias: Tensor) -> None:
        """Take float[sum of (I + 3), 2, K] weights of :meth:`rows` and float[2, K]."""
        for index, part in enumerate(weight.split([width + STANDING for width in self.widths])):
            self.get_buffer(f"weight_{index}").copy_(part)
        self.bias.copy_(bias)


def _said(clocks: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """float[R, K] of float[R, 2], float[R, I], float[I, 2, K] and float[2, K]."""
    said = (inputs @ weight.flatten(1)).unflatten(-1, bias.shape) + bias
    return (said * clocks[..., None]).sum(dim=1)


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
    clocks = clock(train.hours)
    tried, losses = [], []
    for strength in STRENGTHS:
        optimiser = torch.optim.LBFGS(
            [weight, bias], max_iter=STEPS, tolerance_grad=1e-5, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def penalised(optimiser: torch.optim.LBFGS = optimiser, strength: float = strength) -> Tensor:
            optimiser.zero_grad()
            loss = (
                train.losses(plain, _said(clocks, train.inputs, weight, bias)).sum()
                + strength / 2 * weight.square().sum()
            )
            loss.backward()
            return loss

        optimiser.step(penalised)
        with torch.no_grad():
            tried.append((weight.clone(), bias.clone()))
            losses.append(tuning.losses(plain, _said(clock(tuning.hours), tuning.inputs, weight, bias)))
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
