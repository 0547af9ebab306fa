"""What an arm reads of the settings of a grid's variant: runs of a split that read the same hold the same arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trajlm.arms import is_sequence

# Settings that no baseline reads: beside them a baseline is the same in every variant.
SEQUENCE_ALONE = {"finetuning." + name for name in (
    "epochs", "patience", "batch_size", "learning_rate", "backbone_learning_rate", "warmup_fraction",
    "weight_averaging", "modality_dropout", "loss_over", "event_context", "event_inputs", "readout", "dropout",
    "running_mean", "input_dropout", "time_encoding", "max_events", "event_latents", "keep", "linear_readout",
    "tree_readout",
)}  # fmt: skip


def read_by(arm: str, settings: Mapping[str, Any], start: str) -> dict[str, Any]:
    """The settings that an arm depends on.

    Args:
        arm: as ``metrics.json`` names it.
        settings: of a variant, by dotted key.
        start: of the encoders, scratch or contrastive.
    """
    unread: tuple[str, ...] = ("pretraining.",) if start == "scratch" else ()
    if is_sequence(arm):
        return {key: value for key, value in settings.items() if not key.startswith(unread)}
    unread += ("backbone.",) if arm.startswith("static_") else ("backbone.", "encoder.", "pretraining.")
    return {key: value for key, value in settings.items() if not key.startswith(unread) and key not in SEQUENCE_ALONE}
