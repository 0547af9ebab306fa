"""Which stays fine-tuning learns from, tunes on and reports on (method 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trajlm.dataset import Prepared
from trajlm.errors import TrajlmError
from trajlm.schema import HELD_OUT, TRAIN, TUNING

UNSEEN_SHARE_TRAINED = 0.85  # of the patients of the unseen pool; the others tune


@dataclass(frozen=True)
class StaySplits:
    """Positions of the stays that fine-tuning learns from, tunes on and reports on; the words for a log."""

    train: np.ndarray
    tuning: np.ndarray
    held_out: np.ndarray
    description: str

    @property
    def all(self) -> np.ndarray:
        """int64[n], sorted."""
        return np.sort(np.concatenate([self.train, self.tuning, self.held_out]))

    def of(self, split: str) -> np.ndarray:
        """Positions of a split by name."""
        return {TRAIN: self.train, TUNING: self.tuning, HELD_OUT: self.held_out}[split]


def finetuning_splits(prepared: Prepared, stays: str, seed: int) -> StaySplits:
    """Which stays fine-tuning may use (method 4); stays without any event have no belief and are left out.

    Args:
        prepared: the records.
        stays: ``auto``, ``unseen`` or ``train`` (:class:`FinetuningConfig`).
        seed: divides the unseen patients.
    """
    if stays == "auto":
        stays = "train" if prepared.published_splits else "unseen"
    some_event = np.diff(prepared.bounds) > 0
    parts = {split: prepared.positions(split) for split in (TRAIN, TUNING, HELD_OUT)}
    if stays == "train":
        words = "learns from the training split"
    else:
        patients = prepared.stays["subject_id"].to_numpy()[parts[TUNING]]
        order = np.random.default_rng(seed).permutation(np.unique(patients))
        trained = np.isin(patients, order[: round(len(order) * UNSEEN_SHARE_TRAINED)])
        parts[TRAIN], parts[TUNING] = parts[TUNING][trained], parts[TUNING][~trained]
        words = "learns from stays that pretraining's training split never saw"
    kept = {split: positions[some_event[positions]] for split, positions in parts.items()}
    for split, positions in kept.items():
        if not len(positions):
            raise TrajlmError(f"{prepared.folder}: no {split} stay with an event is left for fine-tuning; prepare more")
    empty = sum(len(parts[s]) - len(kept[s]) for s in parts)
    sizes = ", ".join(f"{len(kept[s])} {s}" for s in kept)
    return StaySplits(
        kept[TRAIN],
        kept[TUNING],
        kept[HELD_OUT],
        f"fine-tuning {words}: {sizes} stays; {empty} stays without events left out",
    )
