"""Training throughput of alignment pretraining over that of its bare encoders, what loading costs, memory over epochs.

Bare: forward and backward of the encoders alone, the sum of the latents for a loss, on the very inputs that they had in
the step before, modality dropout included. Ours: the whole step, with modality dropout, the alignment loss, the missing
tokens' loss, clipping and Adam. Both take turns, step by step, so that other work on the machine hits both. A thread of
its own collates the next batch meanwhile; its processor seconds are told apart, and added in a column of their own.
Memory is that of the resident process after every epoch, of a process that runs the loop alone.

    python benchmarks/pretraining_speed.py --data NAME=PREPARED ...
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from measuring import machine

from trajlm.assemble import build_encoders
from trajlm.checkpoint import RunFolder
from trajlm.config import EncoderConfig, PretrainingConfig, Recipe
from trajlm.dataset import Prepared, StayBatch, load_prepared
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.engines import make_accelerator
from trajlm.pretraining import AlignmentObjective, loop_settings
from trajlm.schema import TRAIN, TUNING
from trajlm.training import Stage, Trainer
from trajlm.views import ViewMix


class Seen(Trainer):
    """The training loop; keeps the memory after every epoch, in MiB."""

    def __init__(self, prepared: Prepared, epochs: int, run: Path) -> None:
        recipe = Recipe(encoder=EncoderConfig(), pretraining=PretrainingConfig(epochs=epochs, patience=epochs))
        torch.manual_seed(0)
        self.objective = AlignmentObjective(build_encoders(prepared, recipe.encoder), recipe.pretraining)
        names = self.objective.encoders.modalities
        mix = ViewMix(recipe.pretraining.window_view_probability, recipe.pretraining.event_view_probability)

        def collate(stays: np.ndarray, random: np.random.Generator | None) -> StayBatch:
            return prepared.stay_batch(stays, names, mix, random)

        train, tuning = prepared.positions(TRAIN), prepared.positions(TUNING)
        stage = Stage("speed", self.objective, train, tuning, collate, global_loss=True)
        super().__init__(
            stage,
            replace(loop_settings(recipe), checkpoint_seconds=1e9),
            RunFolder(run, "pretraining", recipe, {}),
            make_accelerator(unused_parameters=True),
        )
        self.memory: list[float] = []

    def _epoch(self, *arguments) -> None:
        super()._epoch(*arguments)
        self.memory.append(psutil.Process().memory_info().rss / 2**20)


class InTurns(Seen):
    """Every step is followed by the bare encoders on its inputs; keeps the processor seconds of both, by epoch."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.ours, self.bare, self.collated = ([0.0] * self.settings.epochs for _ in range(3))
        self._inputs: StayBatch | None = None
        self.objective.encoders.register_forward_pre_hook(self._keep)

    def _keep(self, encoders: AlignedEncoders, inputs: tuple[StayBatch]) -> None:
        self._inputs = inputs[0]

    def _add(self, seconds: list[float], epoch: int, work: Callable):
        started = time.thread_time()
        done = work()
        seconds[epoch] += time.thread_time() - started
        return done

    def _load(self, *arguments):
        return self._add(self.collated, self.state["epoch"], lambda: super(InTurns, self)._load(*arguments))

    def _step(self, *arguments):
        epoch = self.state["epoch"]
        found = self._add(self.ours, epoch, lambda: super(InTurns, self)._step(*arguments))
        inputs = self._inputs

        def forward_and_backward() -> None:
            self.objective.encoders(inputs).sum().backward()

        self._add(self.bare, epoch, forward_and_backward)
        self.objective.zero_grad(set_to_none=True)
        return found


def measure(folder: str, epochs: int) -> dict[str, float]:
    """Ratios of one cohort at the settings of config.py; the first epoch warms up and is not counted."""
    torch.set_num_threads(1)
    prepared = load_prepared(folder)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = InTurns(prepared, epochs, Path(scratch) / "run")
        trainer.fit()
    counted = list(zip(trainer.bare, trainer.ours, trainer.collated, strict=True))[1:]
    return {
        "ratio": statistics.median(bare / ours for bare, ours, _ in counted),
        "ratio_collated": statistics.median(bare / (ours + collated) for bare, ours, collated in counted),
        "loading": statistics.median(collated / ours for _, ours, collated in counted),
        "stays_per_second": len(trainer.stage.train) / statistics.median(ours for _, ours, _ in counted),
    }


def memory_over_epochs(folder: str, epochs: int) -> list[float]:
    """MiB after every epoch of the loop alone."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Seen(load_prepared(folder), epochs, Path(scratch) / "run")
        trainer.fit()
    return trainer.memory


def alone(work: Callable, *arguments):
    """What a function finds in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PREPARED")
    parser.add_argument("--epochs", type=int, default=5, help="of which the first is not counted")
    parser.add_argument("--memory-epochs", type=int, default=12, help="of the loop whose memory is told")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    cohorts = dict(given.split("=", 1) for given in arguments.data)
    told = sorted({1, 2, 4, 8, arguments.memory_epochs} & set(range(1, arguments.memory_epochs + 1)))
    lines = [
        "# Speed of alignment pretraining",
        "",
        f"`python benchmarks/pretraining_speed.py --data {' '.join(f'{name!r}=PREPARED' for name in cohorts)} "
        f"--epochs {arguments.epochs} --memory-epochs {arguments.memory_epochs}`, one thread, {machine()} (2 cores of "
        "an Intel Xeon at 2.5 GHz, no GPU). The settings of `trajlm/config.py`: latents of 64, hidden layers of 128, "
        "batch 128. Processor seconds, not those of the clock.",
        "",
        "Bare is the forward and backward pass of the encoders alone, on the inputs that they had in the step before. "
        "A step is that and modality dropout, both losses, clipping and Adam. The next batch is collated meanwhile by "
        "a thread of its own; the third column adds its seconds, as where both share one core.",
        "",
        "| cohort | throughput over bare encoders | with collating on the same core | collating over a step "
        "| stays per second |",
        "|---|---:|---:|---:|---:|",
    ]
    memory = []
    for name, folder in cohorts.items():
        found = alone(measure, folder, arguments.epochs)
        lines.append(
            f"| {name} | {found['ratio']:.2f} | {found['ratio_collated']:.2f} | {found['loading']:.1%} "
            f"| {found['stays_per_second']:.0f} |"
        )
        resident = alone(memory_over_epochs, folder, arguments.memory_epochs)
        memory.append(f"| {name} | " + " | ".join(f"{resident[epoch - 1]:.0f}" for epoch in told) + " |")
        sys.stdout.write(f"{lines[-1]}\n{memory[-1]}\n")
    lines += [
        "",
        "Memory of the loop alone, resident MiB after an epoch:",
        "",
        "| cohort | " + " | ".join(f"epoch {epoch}" for epoch in told) + " |",
        "|---|" + "---:|" * len(told),
        *memory,
    ]
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
