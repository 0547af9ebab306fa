"""Experiment trackers through accelerate: TensorBoard, Weights & Biases, MLflow, by name.

All of them write below the run folder. Nothing leaves the machine unless the user's own environment says so
(``WANDB_MODE=online``, ``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from trajlm.errors import TrajlmError

# tracker -> the extra that installs it
EXTRAS = {"tensorboard": "track", "wandb": "wandb", "mlflow": "mlflow"}


def chosen_tracker(name: str) -> str | None:
    """The tracker to use: "auto" is TensorBoard where it is installed, and like "none" no tracker elsewhere.

    Raises:
        TrajlmError: a tracker was named that is not installed.
    """
    if name == "auto":
        return "tensorboard" if find_spec("tensorboard") else None
    if name == "none":
        return None
    if not find_spec(name):
        raise TrajlmError(f"tracker: {name} is not installed; pip install 'trajlm[{EXTRAS[name]}]', or tracker: none")
    return name


@contextmanager
def tracking(accelerator: Accelerator, run: Path, name: str) -> Iterator[None]:
    """What the training loop logs inside the block goes to the tracker ``name`` as well as to ``log.jsonl``."""
    tracker = chosen_tracker(name)
    if tracker is None:
        yield
        return
    accelerator.project_configuration.logging_dir = str(run)
    accelerator.log_with = filter_trackers(tracker, str(run))
    accelerator.init_trackers("tensorboard" if tracker == "tensorboard" else "trajlm", init_kwargs=_home(tracker, run))
    try:
        yield
    finally:
        for started in accelerator.trackers:
            started.finish()
        accelerator.trackers = []


def tell(accelerator: Accelerator, values: dict[str, float], step: int) -> None:
    """Log values at a step to whatever trackers run; nothing where there are none.

    Weights & Biases drops what comes at an earlier step than its last, and every arm of a run begins at 0: there the
    values go in their order, the step beside them.
    """
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log(values | {"step": step})
        else:
            tracker.log(values, step=step)


def _home(tracker: str, run: Path) -> dict[str, dict[str, Any]]:
    """Arguments and environment that keep a tracker inside the run folder."""
    if tracker == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
        return {"wandb": {"dir": str(run), "name": run.name}}
    if tracker == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{run.resolve()}/mlflow.db")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        return {"mlflow": {"logging_dir": (run / "mlflow").resolve().as_uri(), "run_name": run.name}}
    return {}
