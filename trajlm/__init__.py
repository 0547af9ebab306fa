"""ICU stays as sequences of events and of beliefs."""

from __future__ import annotations

import importlib
import logging
import sys
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


# Where the package `kernels` is installed, bitsandbytes (imported) and some models of transformers (built) fetch native
# code from a hub and run it. None in its place makes them take their own, as where it is not installed.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # advises to install it, at each start


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'trajlm' has no attribute {name!r}")
