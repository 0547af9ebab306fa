"""Gradient-boosted trees beside the network, for every moment of a stay (beyond the paper).

Trees find thresholds and pairs of values that a network needs more stays to learn. These read what is known at a
read-out: of every feature its last value, how long ago that was and its mean so far, and the time. LightGBM grows
them; here they are plain tensors, so a saved model needs no LightGBM and runs where the network runs.

What decides late in a stay is not what decides early: forests may be grown on later read-outs alone and join there.

All splits of all trees are looked at together and every one that sends a read-out to the right strikes out the leaves
on its left; the leftmost leaf that stays is the one reached (QuickScorer, Lucchese et al. 2015).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trajlm.errors import TrajlmError
from trajlm.latents import TrajectoryBatch
from trajlm.readings import Readings, newest, own_rows
from trajlm.tasks import Task
from trajlm.views import STATE_PARTS

LEAVES = 15  # of a tree, at most
LEAST_STAYS = 20  # in a leaf, in terms of their mean number of read-outs
ROUNDS, STOP_AFTER, RATE = 800, 60, 0.03
DRAWS = 4  # forests whose mean is read: a few hundred trees of a few thousand stays are a matter of chance
ROUNDS_UNTUNED = 300  # where no tuning stay has a known target
FEATURE_SHARE, ROW_SHARE, PENALTY = 0.2, 0.5, 1.0
CELLS_AT_ONCE = 500_000  # trees times read-outs, about what a cache holds

Weighed = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, labels, weights


def require_lightgbm(asked_by: str) -> Any:
    """The module; a TrajlmError that names what asked for it where it cannot be loaded."""
    try:
        return importlib.import_module("lightgbm")
    except (ImportError, OSError) as error:
        raise TrajlmError(
            f"{asked_by} needs LightGBM, which cannot be loaded here ({error}): pip install lightgbm (on macOS also "
            f"libomp), or turn {asked_by} off"
        ) from error


class TreeReadout(nn.Module):
    """Sums of trees over the newest event of every modality and the time.

    Args:
        features: F of each of M modalities; of one with none its latent is read.
        latent_width: W.
        tasks: K.

    Attributes:
        feature, threshold, missing_left, remaining: [T, LEAVES - 1] of the splits of T trees: which input, up to what
            value to the left, whether a missing one goes there, and as bits the leaves that remain otherwise.
        value: float64[T, LEAVES] of the leaves, in order from the left.
        task, group: int64[T], whose tree it is, and of which group of forests.
        starts: float32[K, G], hours since admission after which a group of a task speaks, the mean of all that do;
            infinite where the task has no such group.
        base: float64[K], what trees are added to.
    """

    feature: Tensor
    threshold: Tensor
    missing_left: Tensor
    remaining: Tensor
    value: Tensor
    task: Tensor
    group: Tensor
    starts: Tensor
    base: Tensor

    def __init__(self, features: Sequence[int], latent_width: int, tasks: int) -> None:
        super().__init__()
        self.features, self.latent_width = tuple(features), latent_width
        for name, empty in as_tensors([], []).items():
            self.register_buffer(name, empty)
        self.register_buffer("starts", torch.full((tasks, 1), -torch.inf))
        self.register_buffer("base", torch.zeros(tasks, dtype=torch.float64))

    @property
    def width(self) -> int:
        """I: inputs of a read-out."""
        return 1 + sum(1 + (3 * f if f else self.latent_width) for f in self.features)

    def rows(self, batch: TrajectoryBatch, chosen: Tensor) -> Tensor:
        """float32[R, I]: what the read-outs of ``chosen`` bool[B, S] are read from; NaN where unknown.

        The hours since admission, then of each modality the age of its newest event and of every feature last value,
        mean so far and log(1 + hours since it was measured), or the event's latent.
        """
        parts = [batch.hours[chosen, None].float()]
        for index, width in enumerate(self.features):
            at, seen, age = newest(batch, index)
            order, old = own_rows(batch, index, at, chosen), age[chosen, None].float()
            mine = (batch.modality == index) & batch.present
            own = (batch.state[..., : STATE_PARTS * width] if width else batch.latents)[mine].float()
            held = own[order] if len(own) else own.new_zeros(len(order), own.shape[-1])
            if width:
                value, ever, since, mean = held.chunk(STATE_PARTS, dim=-1)
                known = torch.cat([value, mean, torch.log1p(torch.expm1(since) + old)], dim=-1)
                held = torch.where(ever.repeat(1, 3) > 0, known, float("nan"))
            parts.append(torch.where(seen[chosen, None], torch.cat([old, held], dim=-1), float("nan")))
        return torch.cat(parts, dim=-1)

    def forward(self, batch: TrajectoryBatch) -> Tensor:
        """float[B, S, K]; zero at padding."""
        found = batch.latents.new_zeros(*batch.present.shape, len(self.base))
        found[batch.present] = self.readouts(self.rows(batch, batch.present)).to(found.dtype)
        return found

    def readouts(self, rows: Tensor) -> Tensor:
        """float64[R, K] of float32[R, I]."""
        if not len(rows):
            return self.base.expand(0, -1)
        size = max(1, CELLS_AT_ONCE // max(1, len(self.task)))
        column = self.feature + torch.where(self.missing_left, 0, rows.shape[1])
        splits = [of.T[..., None].contiguous() for of in (column, self.threshold, self.remaining.short())]
        return torch.cat([self._readouts(some, *splits) for some in rows.detach().split(size)])

    def _readouts(self, rows: Tensor, column: Tensor, threshold: Tensor, remaining: Tensor) -> Tensor:
        """Of a block; splits are [LEAVES - 1, T, 1]. The loop takes the time: its buffers are written over."""
        below, above = rows.T.nan_to_num(-torch.inf, torch.inf, -torch.inf), rows.T.nan_to_num(torch.inf)
        both = torch.cat([below, above])  # where missing ones go left, and where they go right
        shape, device = (len(self.task), len(rows)), rows.device
        value, left = torch.empty(shape, device=device), torch.empty(shape, dtype=torch.bool, device=device)
        bits = torch.full(shape, -1, dtype=remaining.dtype, device=device)
        kept = torch.empty_like(bits)
        for split in range(LEAVES - 1):
            torch.index_select(both, 0, column[split, :, 0], out=value)
            torch.le(value, threshold[split], out=left)
            bits &= kept.copy_(left).neg_().bitwise_or_(remaining[split])  # all leaves, where it goes left
        leaf = (torch.frexp((bits & -bits).float()).exponent - 1).long()  # the lowest bit that stands
        said = self.value.gather(1, leaf)
        if self.starts.shape[1] > 1:
            speaks = rows[:, 0] > self.starts[..., None]  # bool[K, G, R]
            share = speaks.double() / speaks.sum(dim=1, keepdim=True).clamp_min(1)
            said = said * share[self.task, self.group]
        return self.base.expand(len(rows), -1).T.index_add(0, self.task, said).T

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """How many trees there are is only known from what is loaded."""
        for name in ("feature", "threshold", "missing_left", "remaining", "value", "task", "group", "starts"):
            if prefix + name in state_dict:
                self.set(name, state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def set(self, name: str, tensor: Tensor) -> None:
        """Take a buffer of another number of trees."""
        setattr(self, name, torch.empty_like(tensor, device=self.base.device).copy_(tensor))


def fit_trees(
    trees: TreeReadout,
    tasks: Sequence[Task],
    train: Readings,
    tuning: Readings,
    seed: int,
    hours: Sequence[float] = (),
) -> dict[str, Any]:
    """Grow trees for each task: cross-entropy, or squared error of standardised log(1 + hours).

    A group of forests is DRAWS of them, each of as many trees as have the least loss on the tuning stays, and their
    mean. Classes are not balanced, as in the regression's fit (:func:`trajlm.linear_readout.fit_linear`). A
    probability with one outcome alone is believed as often as it was seen, counting one stay of each outcome more.

    Args:
        trees: gets them.
        tasks: K fitted tasks.
        train, tuning: read-outs to grow by, and to stop by.
        seed: of the shares of features and rows that a tree sees.
        hours: since admission; each asks for a group more, grown on the read-outs after it, which speaks after it. A
            task that has one outcome alone there, or no tuning stay to stop by, goes without.

    Returns:
        by target the number of trees and the mean of the forests' tuning losses: of the group of all moments, and
        ``after`` each of the hours.
    """
    groups = [-float("inf"), *sorted(hours)]
    grown, owners, places = list[dict[str, Any]](), list[int](), list[int]()
    told: dict[str, Any] = {"read_outs": len(train.share), "stays": train.stays, "targets": {}}
    starts = torch.full((len(tasks), len(groups)), torch.inf)
    for k, task in enumerate(tasks):
        trees.base[k] = task.shift
        by_group = []
        for group, start in enumerate(groups):
            own, watched = _examples(train, task, k, start), _examples(tuning, task, k, start)
            found, loss = list[dict[str, Any]](), None
            if len(np.unique(own[1])) > 1 and (group == 0 or len(watched[1])):
                found, loss = _grow_group(task, own, watched, len(own[1]) / train.stays, seed)
                starts[k, group] = start
            elif group == 0 and task.kind == "probability":
                chance = (float(own[1] @ own[2]) + 1) / (float(own[2].sum()) + 2)
                trees.base[k] += float(np.log(chance / (1 - chance)))
            grown += found
            owners += [k] * len(found)
            places += [group] * len(found)
            by_group.append({"trees": len(found), "tuning_loss": loss})
        told["targets"][task.target] = by_group[0]
        if hours:
            later = {f"{start:g}": of for start, of in zip(groups[1:], by_group[1:], strict=True)}
            told["targets"][task.target]["after"] = later
    for name, tensor in as_tensors(grown, owners, places).items():
        trees.set(name, tensor)
    trees.set("starts", starts)
    trees.value.div_(DRAWS)
    return told


def _examples(of: Readings, task: Task, k: int, start: float) -> Weighed:
    """Inputs, labels and weights of the read-outs after ``start`` with a usable target of task ``k``."""
    usable = task.usable(of.targets[:, k]) & (of.hours > start)
    labels = task.label(of.targets[usable, k]).double()
    return of.inputs[usable].cpu().numpy(), labels.cpu().numpy(), of.share[usable].double().cpu().numpy()


def _grow_group(
    task: Task, train: Weighed, tuning: Weighed, readouts: float, seed: int
) -> tuple[list[dict[str, Any]], float | None]:
    """The trees of DRAWS forests, and the mean of their losses on the tuning stays."""
    forests = [_grow(task, train, tuning, readouts, DRAWS * seed + draw) for draw in range(DRAWS)]
    losses = [loss for _, loss in forests if loss is not None]
    return [tree for forest, _ in forests for tree in forest], float(np.mean(losses)) if losses else None


def _grow(
    task: Task,
    train: Weighed,
    tuning: Weighed,
    readouts: float,
    seed: int,
) -> tuple[list[dict[str, Any]], float | None]:
    """Trees as LightGBM tells them, and the loss on the tuning stays."""
    lightgbm = require_lightgbm("finetuning.tree_readout")
    settings = {
        "objective": "binary" if task.kind == "probability" else "regression",
        "num_leaves": LEAVES,
        "min_data_in_leaf": max(1, min(round(LEAST_STAYS * readouts), len(train[1]) // 10)),
        "feature_fraction": FEATURE_SHARE,
        "bagging_fraction": ROW_SHARE,
        "bagging_freq": 1,
        "lambda_l2": PENALTY,
        "learning_rate": RATE,
        "num_threads": torch.get_num_threads(),
        "deterministic": True,
        "force_row_wise": True,
        "seed": seed,
        "verbose": -1,
    }
    own = lightgbm.Dataset(train[0], train[1], weight=train[2])
    if not len(tuning[1]):
        return _told(lightgbm.train(settings, own, ROUNDS_UNTUNED)), None
    model = lightgbm.train(
        settings,
        own,
        ROUNDS,
        valid_sets=[lightgbm.Dataset(tuning[0], tuning[1], weight=tuning[2], reference=own)],
        callbacks=[lightgbm.early_stopping(STOP_AFTER, verbose=False)],
    )
    return _told(model), float(next(iter(model.best_score["valid_0"].values())))


def _told(model: Any) -> list[dict[str, Any]]:
    return [tree["tree_structure"] for tree in model.dump_model()["tree_info"]]


def as_tensors(
    trees: Sequence[dict[str, Any]], owners: Sequence[int], groups: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Buffers of a :class:`TreeReadout` of trees as LightGBM tells them, their tasks and groups (all the first)."""
    shape = len(trees), LEAVES - 1
    feature, remaining = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    threshold, missing_left = np.full(shape, np.inf, np.float32), np.ones(shape, bool)
    value = np.zeros((len(trees), LEAVES), np.float64)
    for row, tree in enumerate(trees):
        splits = leaves = 0

        def walk(node: dict[str, Any], row: int = row) -> int:
            """Number what lies under a node from the left; returns the bits of its leaves."""
            nonlocal splits, leaves
            if "leaf_value" in node:
                value[row, leaves] = node["leaf_value"]
                leaves += 1
                return 1 << (leaves - 1)
            split = splits
            splits += 1
            feature[row, split], threshold[row, split] = node["split_feature"], _at_most(node["threshold"])
            # Where no training read-out missed it, LightGBM takes a missing value for 0.
            told = node["default_left"] if node["missing_type"] == "NaN" else node["threshold"] >= 0
            missing_left[row, split] = told
            left = walk(node["left_child"])
            remaining[row, split] = ~left
            return left | walk(node["right_child"])

        walk(tree)
    own = np.asarray(owners, np.int64), np.asarray([0] * len(owners) if groups is None else groups, np.int64)
    arrays = (feature, threshold, missing_left, remaining, value, *own)
    names = ("feature", "threshold", "missing_left", "remaining", "value", "task", "group")
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def _at_most(threshold: float) -> np.float32:
    """The greatest float32 up to a threshold: no float32 lies between them, so every comparison stays as it was."""
    with np.errstate(over="ignore"):  # LightGBM writes 1e300 for: wherever it is known
        near = np.float32(threshold)
    return near if float(near) <= threshold else np.nextafter(near, np.float32(-np.inf))
