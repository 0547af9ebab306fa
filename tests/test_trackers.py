"""What the loop tells a tracker is what it logs, and none is started that was not asked for."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from conftest import RECIPE, command, last_line

from trajlm import trackers
from trajlm.checkpoint import read_log
from trajlm.engines import make_accelerator
from trajlm.errors import TrajlmError
from trajlm.trackers import EXTRAS, chosen_tracker, tracking
from trajlm.training import history


def test_auto_is_tensorboard_where_it_is_installed(monkeypatch):
    assert chosen_tracker("auto") == "tensorboard"
    assert chosen_tracker("none") is None
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    assert chosen_tracker("auto") is None
    for name, extra in EXTRAS.items():
        with pytest.raises(TrajlmError, match=rf"{name} is not installed; pip install 'trajlm\[{extra}\]'"):
            chosen_tracker(name)


def test_a_missing_tracker_stops_before_anything_is_written(prepared_folder, tmp_path):
    if trackers.find_spec("mlflow"):
        pytest.skip("mlflow is installed")
    done = command(
        "pretrain.py", *RECIPE, "--data", prepared_folder, "--out", tmp_path / "run", "--tracker", "mlflow", check=False
    )
    assert done.returncode == 2
    assert "pip install 'trajlm[mlflow]'" in last_line(done)
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_what_the_log_holds(encoders_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = history(read_log(encoders_run))
    events = EventAccumulator(str(encoders_run / "tensorboard")).Reload()
    for name in ("train_loss", "tuning_loss"):
        told = [scalar.value for scalar in events.Scalars(f"alignment/{name}")]
        assert told == pytest.approx([r[name] for r in log], rel=1e-6)
    assert events.Scalars("alignment/learning_rate")[0].value == pytest.approx(1e-3)
    steps = [scalar.step for scalar in events.Scalars("alignment/train_loss")]
    assert steps == [steps[0] * (i + 1) for i in range(len(log))]


def test_no_tracker_writes_nothing_and_a_block_ends_its_own(tmp_path):
    accelerator = make_accelerator()
    with tracking(accelerator, tmp_path, "none"):
        trackers.tell(accelerator, {"loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())
    with tracking(accelerator, tmp_path, "tensorboard"):
        trackers.tell(accelerator, {"loss": 1.0}, 1)
    assert accelerator.trackers == []
    assert {path.name for path in tmp_path.iterdir()} == {"tensorboard"}
    assert "wandb" not in sys.modules


def test_weights_and_biases_gets_arms_in_their_order():
    """It drops what comes at an earlier step than its last, and every arm of a run begins at 0."""
    told = []
    tracker = SimpleNamespace(name="wandb", log=lambda values, step=None: told.append((values, step)))
    for step in (5, 10, 2):
        trackers.tell(SimpleNamespace(trackers=[tracker]), {"loss": float(step)}, step)
    assert told == [({"loss": float(step), "step": step}, None) for step in (5, 10, 2)]
