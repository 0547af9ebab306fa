"""What an arm reads of the settings of a grid's variant: runs of a split that read the same hold the same arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trajlm.arms import is_sequence

# Settings that baselines read: beside any other they are the same in every variant. A section ends with a dot.
SUMMARY_MODELS_READ = ("finetuning.tasks", "finetuning.stays", "finetuning.focal_gamma", "finetuning.baseline_trials")
FUSIONS_READ = (
    *SUMMARY_MODELS_READ, "finetuning.sampling", "finetuning.baseline_epochs", "finetuning.weight_decay", "encoder.",
    "pretraining.",
)  # fmt: skip


def read_by(arm: str, settings: Mapping[str, Any], start: str) -> dict[str, Any]:
    """The settings that an arm depends on.

    Args:
        arm: as ``metrics.json`` names it.
        settings: of a variant, by dotted key.
        start: of the encoders, scratch or contrastive.
    """
    unread = ("pretraining.",) if start == "scratch" else ()
    if is_sequence(arm):
        return {key: value for key, value in settings.items() if not key.startswith(unread)}
    read = FUSIONS_READ if arm.startswith("static_") else SUMMARY_MODELS_READ
    return {key: value for key, value in settings.items() if key.startswith(read) and not key.startswith(unread)}
