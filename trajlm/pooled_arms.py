"""The arms of a grid: which runs hold which, by what tells them apart, and what is averaged of several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.arms import ARM_TITLES, ENSEMBLES, NETWORK, SEQUENCE, SEVERITY, arm_title, beliefs_path, is_sequence
from trajlm.checkpoint import read_run
from trajlm.variants import read_by

# What a sequence arm may be: the whole model, that averaged with a baseline, its network alone, or any of these with
# the beliefs of all seeds of a split averaged.
KINDS = ("whole", "averaged", "network", "seeds")
# Which static arms a sequence arm of a kind is measured against: one model against one, a mean against means as well.
RIVALS = {"whole": {"whole"}, "network": {"whole"}, "averaged": {"whole", "averaged"},
          "seeds": {"whole", "averaged", "seeds"}}  # fmt: skip
AVERAGED = ", averaged"  # stands in the name of two models averaged
ALL_SEEDS = "seeds averaged"  # ends the name of an arm whose belief is the mean over the seeds of a split


@dataclass(frozen=True)
class GridRun:
    """One run of a grid: which split, which seed, the name of its arm, where it lies, the settings of its variant."""

    split: str
    seed: int
    arm: str
    path: Path
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


def pooled_title(run: GridRun, *names: str) -> str:
    """An arm of a run by what tells it from the others of its grid; arms of one title are the same arm.

    A fusion depends on its encoders and not on the backbone beside it, a model of summary features on neither; both on
    the settings of a variant that they read. Of two names: both averaged.
    """
    start = "scratch" if read_run(run.path)["recipe"]["encoders"] == "scratch" else "contrastive"
    if is_sequence(names[0]):
        return f"{arm_title(names[0])}, {run.arm}"
    words = arm_title(names[0])
    if len(names) > 1:
        words = " and ".join(arm_title(name).partition(" (")[0] for name in names) + AVERAGED
    own = {key: value for name in names for key, value in read_by(name, run.settings, start).items()}
    starts = [start] if any(name.startswith("static_") for name in names) else []
    return ", ".join([words, *starts, *(f"{key} {value}" for key, value in own.items())])


def is_sequence_title(arm: str) -> bool:
    """Whether the arm of this title is a sequence model."""
    return arm.startswith(ARM_TITLES[SEQUENCE])


def kind_of(arm: str) -> str:
    """Which of KINDS the arm of this title is; a static one is never a network."""
    if arm.endswith(ALL_SEEDS):
        return "seeds"
    if arm.startswith(ARM_TITLES[NETWORK]):
        return "network"
    return "averaged" if AVERAGED in arm else "whole"


Model = tuple[GridRun, str]  # a run, and what its metrics.json calls an arm


@dataclass(frozen=True)
class Holder:
    """The models that are an arm of a split: their beliefs are averaged on every side, then over the sides."""

    sides: tuple[tuple[Model, ...], ...]

    @property
    def models(self) -> list[Model]:
        """Of all sides."""
        return [model for side in self.sides for model in side]

    @property
    def runs(self) -> set[Path]:
        """Where they lie."""
        return {run.path for run, _ in self.models}


HolderKey = tuple[str, str, int | None]  # title, split, seed; None for all seeds together
Held = Mapping[str, Mapping[int, Model]]  # of one arm, by split and seed


def held_arms(runs: Sequence[GridRun], names: Mapping[Path, Sequence[str]]) -> dict[HolderKey, Holder]:
    """Every arm of a grid: those of its runs, static ones averaged in pairs, and of both those of all seeds averaged.

    Args:
        runs: of one grid.
        names: by a run's folder, its arms as ``metrics.json`` has them.
    """
    found: dict[str, dict[str, dict[int, Model]]] = {}
    for run in runs:
        for name in names[run.path]:
            # One run stands for all that hold the same arm of the same split and seed.
            found.setdefault(pooled_title(run, name), {}).setdefault(run.split, {}).setdefault(run.seed, (run, name))
    splits = list(dict.fromkeys(run.split for run in runs))
    held: dict[HolderKey, Holder] = {}
    for title, arms in ({arm: (arm,) for arm in found} | _pairs(runs, names, found)).items():
        sides = [found[arm] for arm in arms]
        held |= _seed_by_seed(title, sides)
        held |= _all_seeds(title, sides, splits)
    return held


def _pairs(
    runs: Sequence[GridRun], names: Mapping[Path, Sequence[str]], found: Mapping[str, Held]
) -> dict[str, tuple[str, ...]]:
    """By title, every baseline that the sequence model is averaged with and each other static arm of its variant.

    Two models are better than one: without these a sequence model would be given what no rival is.
    """
    known = {name for of in names.values() for name in of}
    partners = {arm for arm, ensemble in ENSEMBLES.items() if ensemble in known}
    static = sorted(name for name in known if not is_sequence(name) and not name.startswith(SEVERITY))
    both = [pair for pair in itertools.combinations(static, 2) if partners & set(pair)]
    pairs = {}
    for run in runs:
        for pair in both:
            arms = tuple(pooled_title(run, name) for name in pair)
            if all(arm in found for arm in arms):
                pairs[pooled_title(run, *pair)] = arms
    return pairs


def _seed_by_seed(title: str, sides: Sequence[Held]) -> dict[HolderKey, Holder]:
    """An arm of every split and seed that all its sides have."""
    return {
        (title, split, seed): Holder(tuple((side[split][seed],) for side in sides))
        for split, seeds in sides[0].items()
        for seed in seeds
        if all(seed in side.get(split, {}) for side in sides)
    }


def _all_seeds(title: str, sides: Sequence[Held], splits: Sequence[str]) -> dict[HolderKey, Holder]:
    """Beside an arm of which some side has several seeds in every split: that with the beliefs of all averaged.

    Only where all seeds learned from the same stays: one's tuning stays may have trained another.
    """
    if not all(split in side for side in sides for split in splits):
        return {}
    if not all(any(len(side[split]) > 1 for side in sides) for split in splits):
        return {}
    held = {split: Holder(tuple(tuple(side[split].values()) for side in sides)) for split in splits}
    if not all(_alike(holder.models) for holder in held.values()):
        return {}
    return {(f"{title}, {ALL_SEEDS}", split, None): holder for split, holder in held.items()}


def _alike(models: Sequence[Model]) -> bool:
    """Whether these are tuned on and believe in the same stays."""
    tables = [
        pl.read_parquet(beliefs_path(run.path, name), columns=["stay_id", "split"]).unique().sort("stay_id")
        for run, name in models
    ]
    return all(table.equals(tables[0]) for table in tables[1:])
