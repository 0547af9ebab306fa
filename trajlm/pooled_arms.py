"""The arms of a grid: which runs hold which, by what tells them apart, and what is averaged of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.arms import ARM_TITLES, ENSEMBLES, NETWORK, SEQUENCE, SEVERITY, arm_title, is_sequence
from trajlm.checkpoint import read_run
from trajlm.subgroups import STAYS
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


def pooled_title(run: GridRun, name: str) -> str:
    """An arm of a run by what tells it from the others of its grid; arms of one title are the same arm.

    A fusion depends on its encoders and not on the backbone beside it, a model of summary features on neither; both on
    the settings of a variant that they read.
    """
    start = "scratch" if read_run(run.path)["recipe"]["encoders"] == "scratch" else "contrastive"
    if is_sequence(name):
        return f"{arm_title(name)}, {run.arm}"
    own = [f"{key} {value}" for key, value in read_by(name, run.settings, start).items()]
    return ", ".join([arm_title(name), *([start] if name.startswith("static_") else []), *own])


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


@dataclass(frozen=True)
class Holder:
    """The models that are an arm of a split: each a run and its name there. Of several the beliefs are averaged."""

    parts: tuple[tuple[GridRun, str], ...]

    @property
    def runs(self) -> set[Path]:
        """Where they lie."""
        return {run.path for run, _ in self.parts}


HolderKey = tuple[str, str, int | None]  # title, split, seed; None for all seeds together


def held_arms(runs: Sequence[GridRun], names: Mapping[Path, Sequence[str]]) -> dict[HolderKey, Holder]:
    """Every arm of a grid: those of its runs, static ones averaged in pairs, and those of all seeds averaged.

    Args:
        runs: of one grid.
        names: by a run's folder, its arms as ``metrics.json`` has them.
    """
    held: dict[HolderKey, Holder] = {}
    for run in runs:
        for name in names[run.path]:
            # One run stands for all that hold the same arm of the same split and seed.
            held.setdefault((pooled_title(run, name), run.split, run.seed), Holder(((run, name),)))
    held |= _pairs(held)
    return held | _all_seeds(held)


def _pairs(held: Mapping[HolderKey, Holder]) -> dict[HolderKey, Holder]:
    """Every baseline that the sequence model is averaged with, averaged with each other static arm as well.

    Two models are better than one: without these a sequence model would be given what no rival is.
    """
    partners = {arm for arm, ensemble in ENSEMBLES.items() if any(h.parts[0][1] == ensemble for h in held.values())}
    static = [
        (key, holder.parts[0])
        for key, holder in held.items()
        if not is_sequence(holder.parts[0][1]) and not holder.parts[0][1].startswith(SEVERITY)
    ]
    found = {}
    for (arm, *place), one in static:
        for (other, split, seed), two in static:
            twice = two[1] in partners and arm > other
            if one[1] in partners and place == [split, seed] and arm != other and not twice:
                (first, _, of_first), (second, _, of_second) = arm.partition(", "), other.partition(", ")
                title = f"{first.partition(' (')[0]} and {second.partition(' (')[0]}{AVERAGED}"
                found[", ".join(filter(None, [title, of_first, of_second])), split, seed] = Holder((one, two))
    return found


def _all_seeds(held: Mapping[HolderKey, Holder]) -> dict[HolderKey, Holder]:
    """Beside every arm that has several seeds in every split: that with their beliefs averaged.

    Only where all seeds learned from the same stays: one's tuning stays may have trained another.
    """
    splits = {split for _, split, _ in held}
    several: dict[str, dict[str, list[Holder]]] = {}
    for (arm, split, _), holder in held.items():
        several.setdefault(arm, {}).setdefault(split, []).append(holder)
    return {
        (f"{arm}, {ALL_SEEDS}", split, None): Holder(tuple(part for holder in holders for part in holder.parts))
        for arm, by_split in several.items()
        if set(by_split) == splits and all(map(_alike, by_split.values()))
        for split, holders in by_split.items()
    }


def _alike(holders: Sequence[Holder]) -> bool:
    """Whether these are several seeds on the same split of stays."""
    paths = {path for holder in holders for path in holder.runs}
    tables = [pl.read_parquet(path / STAYS).select("stay_id", "split").sort("stay_id") for path in paths]
    return len(holders) > 1 and all(table.equals(tables[0]) for table in tables[1:])
