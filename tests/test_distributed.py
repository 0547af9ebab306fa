"""Two processes do what one does: the sequence model's loss, gradients, log, checkpoints and errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes_example import in_processes, join
from safetensors.torch import load_file, save_file
from trajectory_example import toy_batch, toy_model

from trajlm.checkpoint import RunFolder
from trajlm.config import FinetuningConfig, Recipe
from trajlm.distributed import whole
from trajlm.engines import make_accelerator
from trajlm.errors import SharedError
from trajlm.latents import TrajectoryBatch
from trajlm.sequence_objective import SequenceObjective
from trajlm.training import LoopSettings, Stage, Trainer, history
from trajlm.zero import SplitOptimiser

LENGTHS = [9, 2, 5, 1, 7, 3, 8, 4, 6]
# Nine training stays in batches of four: shares of two and two, and of one and none.
LOOP = LoopSettings(
    epochs=2, patience=9, batch_size=4, learning_rate=1e-3, weight_decay=0.01, seed=3, clip_norm=1.0,
    checkpoint_seconds=-1.0, averaging=0.9,
)  # fmt: skip
CUT = 4  # steps before the power goes
SICK = 6


class PowerCutError(Exception):
    """The machine went away."""


def collate(stays: np.ndarray, random: object = None) -> TrajectoryBatch:
    """Timelines of unlike length; one stay's death is unknown, another's length of stay."""
    whole = toy_batch(LENGTHS)
    batch = whole.select(torch.from_numpy(stays))
    batch.targets[batch.stay_ids == 2, 0] = float("nan")
    batch.targets[batch.stay_ids == 4, 1] = float("nan")
    return batch.keep(batch.present)


class Recorder:
    """Trains the toy sequence model; keeps every step's loss and the first step's gradients."""

    def __init__(self, path: Path, accelerator, loop: LoopSettings = LOOP, steps: int = 10**9, sick: bool = False):
        self.left, self.sick = steps, sick
        objective = SequenceObjective(toy_model(), FinetuningConfig(modality_dropout=0.0, loss_over="rising"))
        stage = Stage("toy", objective, np.arange(9), np.arange(9), self._collate)
        run = RunFolder(path, "pretraining", Recipe(), {}, accelerator.is_main_process)
        accelerator.wait_for_everyone()
        self.trainer = Trainer(stage, loop, run, accelerator)
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}
        if isinstance(self.trainer.optimiser, SplitOptimiser):
            self._record_unclipped(accelerator.deepspeed_engine_wrapped.engine)
        else:
            self.trainer.optimiser.register_step_pre_hook(self._record)
        tell = self.trainer._tell

        def told(*arguments):
            found = tell(*arguments)
            self.losses.append(found[0])
            return found

        self.trainer._tell = told  # type: ignore[method-assign]

    def _collate(self, stays: np.ndarray, random: object = None) -> TrajectoryBatch:
        if random is not None:
            if not self.left:
                raise PowerCutError
            self.left -= 1
        batch = collate(stays)
        if self.sick:
            batch.hours[batch.stay_ids == SICK] *= float("nan")
        return batch

    def _record(self, *_) -> None:
        if not self.gradients:
            named = self.trainer.module.named_parameters()
            self.gradients = {n: whole(p.grad).clone() for n, p in named if p.grad is not None}

    def _record_unclipped(self, engine) -> None:
        """DeepSpeed clips within its step; what it is handed is clipped here as torch does."""
        from deepspeed.utils import safe_get_full_grad

        step = engine.step

        def recorded() -> None:
            if not self.gradients:
                named = self.trainer.module.named_parameters()
                self.gradients = {n: safe_get_full_grad(p).clone() for n, p in named if p.requires_grad}
                norm = torch.nn.utils.get_total_norm(self.gradients.values())
                for gradient in self.gradients.values():
                    gradient *= min(1.0, LOOP.clip_norm / float(norm + 1e-6))
            step()

        engine.step = recorded

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in self.trainer.stage.module.named_parameters() if p.requires_grad}


ENGINES = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}


def worker(rank: int, port: int, place: str, engine: str) -> None:
    """All that two processes are asked, in one life: starting them costs more than the work."""
    join(rank, port, **ENGINES[engine])
    accelerator, out = make_accelerator(), Path(place)
    # Only the main process's clock says when a checkpoint is due.
    loop = LOOP if rank == 0 else replace(LOOP, checkpoint_seconds=1e9)
    whole = Recorder(out / "two", accelerator, loop)
    whole.trainer.fit()
    save_file({n: t.contiguous() for n, t in whole.weights().items()}, out / f"weights-{rank}.safetensors")
    save_file({n: t.contiguous() for n, t in whole.gradients.items()}, out / f"gradients-{rank}.safetensors")
    said = {"losses": whole.losses}
    cut = Recorder(out / "two-then-one", accelerator, loop, steps=CUT)
    try:
        cut.trainer.fit()
    except PowerCutError:
        said["cut"] = cut.losses
    rest = Recorder(out / "one-then-two", accelerator, loop)
    rest.trainer.fit()
    said["rest"] = rest.losses
    try:
        Recorder(out / "sick", accelerator, loop, sick=True).trainer.fit()
    except SharedError as error:
        said["error"] = str(error)
    (out / f"said-{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    whole = Recorder(tmp_path_factory.mktemp("alone") / "run", make_accelerator())
    whole.trainer.fit()
    return whole


@pytest.fixture(scope="module", params=list(ENGINES))
def together(tmp_path_factory, request):
    """What two processes left, one of whose runs one process began."""
    if request.param.startswith("zero"):
        pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("together")
    with pytest.raises(PowerCutError):
        Recorder(out / "one-then-two", make_accelerator(), steps=CUT).trainer.fit()
    in_processes(worker, str(out), request.param)
    return out, [json.loads((out / f"said-{rank}.json").read_text()) for rank in range(2)]


def test_the_loss_is_the_mean_over_the_stays_of_all_processes(alone, together):
    _, said = together
    assert len(alone.losses) == 6
    for mine in said:
        np.testing.assert_allclose(mine["losses"], alone.losses, rtol=1e-6, atol=1e-6)
    # By hand, stay by stay, of the first batch.
    objective = SequenceObjective(toy_model(), FinetuningConfig(modality_dropout=0.0, loss_over="rising")).train()
    batches = alone.trainer._batches(0)
    with torch.no_grad():
        each = [float(objective(collate(np.array([stay])))) for stay in batches[0]]
    assert math.isclose(alone.losses[0], float(np.mean(each)), rel_tol=1e-5)
    assert sorted(len(b) for b in batches) == [1, 4, 4]


def test_gradients_are_those_of_one_process(alone, together):
    out, _ = together
    assert len(alone.gradients) > 20
    for rank in range(2):
        found = load_file(out / f"gradients-{rank}.safetensors")
        assert set(found) == set(alone.gradients)
        for name, gradient in alone.gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_weights_and_log_are_those_of_one_process(alone, together):
    out, _ = together
    ranks = [load_file(out / f"weights-{rank}.safetensors") for rank in range(2)]
    for name, weight in alone.weights().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], weight, rtol=1e-4, atol=2e-5)
    logs = [history(recorder.read_log()) for recorder in (alone.trainer.run, run_at(out / "two"))]
    for theirs, mine in zip(*logs, strict=True):
        assert theirs["epoch"] == mine["epoch"]
        for name in ("train_loss", "tuning_loss"):
            assert math.isclose(theirs[name], mine[name], rel_tol=1e-5)
    assert math.isclose(logs[1][0]["train_loss"], float(np.mean(alone.losses[:3])), rel_tol=1e-6)


def run_at(path: Path) -> RunFolder:
    return RunFolder(path, "pretraining", Recipe(), {})


def test_a_run_goes_on_with_another_number_of_processes(alone, together):
    """Cut off in the middle of an epoch: from one process to two, and from two to one."""
    out, said = together
    rest = Recorder(out / "two-then-one", make_accelerator())
    rest.trainer.fit()
    for mine in said:
        # Steps of several processes round differently, and what they round grows with each step.
        np.testing.assert_allclose(mine["rest"], alone.losses[CUT:], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose([*mine["cut"], *rest.losses], alone.losses, rtol=1e-5, atol=1e-6)


def test_a_sick_stay_stops_every_process_and_is_named_by_all(together):
    out, said = together
    assert said[0]["error"] == said[1]["error"]
    assert "the loss is no finite number, on a batch with stays" in said[0]["error"]
    named = said[0]["error"].split("with stays ")[1].split(";")[0].split(", ")
    assert str(SICK) in named
    assert len(named) <= 2, "stays of the healthy process are named too"
    assert not list((out / "sick").rglob("best.safetensors"))


def test_an_exploding_loss_stops(tmp_path):
    """Finite, but a thousand times what it was: the weights before it are still there."""
    recorder = Recorder(tmp_path / "run", make_accelerator(), replace(LOOP, epochs=9))
    objective = recorder.trainer.stage.module
    original = recorder._collate

    def blown(stays: np.ndarray, random: object = None) -> TrajectoryBatch:
        batch = original(stays, random)
        if recorder.trainer.state["step"] == 12 and random is not None:
            batch.targets[:, 1] = 700.0
            with torch.no_grad():
                objective.model.heads["length_of_stay_hours"][-1].bias += 1e4
        return batch

    recorder.trainer.stage.collate = blown
    with pytest.raises(SharedError, match=r"step 13: the loss became .*, in the first 10 steps it was .* with stays"):
        recorder.trainer.fit()
    again = Recorder(tmp_path / "run", make_accelerator(), replace(LOOP, epochs=9))
    assert again.trainer.state["step"] == 12
    assert all(p.isfinite().all() for p in again.weights().values())
    assert float(again.trainer.stage.module.model.heads["length_of_stay_hours"][-1].bias.detach()) < 100
