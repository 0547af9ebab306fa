"""ICU stays as sequences of events and of beliefs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trajlm.alignment import masked_global_alignment_loss
    from trajlm.dataset import load_prepared
    from trajlm.schema import Event, Timeline
    from trajlm.trajectory import TrajectoryModel

# Loaded on first use: `trajlm --help` should not wait for torch.
_HOMES = {
    "masked_global_alignment_loss": "trajlm.alignment",
    "load_prepared": "trajlm.dataset",
    "Event": "trajlm.schema",
    "Timeline": "trajlm.schema",
    "TrajectoryModel": "trajlm.trajectory",
}

__all__ = ["Event", "Timeline", "TrajectoryModel", "load_prepared", "masked_global_alignment_loss"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trajlm' has no attribute {name!r}")
