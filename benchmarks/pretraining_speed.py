"""Training throughput of alignment pretraining over that of its bare encoders, what loading costs, memory over epochs.

Bare: forward and backward of the encoders on batches that lie in memory, the sum of the latents for a loss. Ours: the
whole loop on the same stays in the same batches, with loading, modality dropout, the alignment loss, clipping, Adam and
everything else of a step. Both run in turns in one process, so that other work on the machine hits both; seconds are
those of the processor. Memory is that of the resident process after every epoch.

    python benchmarks/pretraining_speed.py --data NAME=PREPARED ...
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from measuring import machine

from trajlm.assemble import build_encoders
from trajlm.checkpoint import RunFolder
from trajlm.config import EncoderConfig, PretrainingConfig, Recipe
from trajlm.dataset import Prepared, load_prepared
from trajlm.engines import make_accelerator
from trajlm.pretraining import AlignmentObjective, loop_settings
from trajlm.schema import TRAIN, TUNING
from trajlm.training import Stage, Trainer, epoch_batches
from trajlm.views import ViewMix


class Timed(Trainer):
    """The training loop; keeps the processor seconds of every step and the memory after every epoch."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def _step(self, module, stays, total):
        started = time.process_time()
        loss = super()._step(module, stays, total)
        self.seconds.append(time.process_time() - started)
        return loss

    def _epoch(self, *arguments):
        super()._epoch(*arguments)
        self.memory.append(psutil.Process().memory_info().rss / 2**20)


def bare_seconds(objective: AlignmentObjective, batches: list) -> float:
    """Processor seconds of the encoders' forward and backward on batches in memory."""
    started = time.process_time()
    for batch in batches:
        objective.encoders(batch).sum().backward()
        objective.zero_grad(set_to_none=True)
    return time.process_time() - started


def measure(prepared: Prepared, epochs: int, scratch: Path) -> dict[str, float]:
    """Ratios of one cohort at the settings of config.py."""
    recipe = Recipe(encoder=EncoderConfig(), pretraining=PretrainingConfig(epochs=epochs, patience=epochs))
    torch.manual_seed(0)
    objective = AlignmentObjective(build_encoders(prepared, recipe.encoder), recipe.pretraining)
    names, train = objective.encoders.modalities, prepared.positions(TRAIN)
    mix = ViewMix(recipe.pretraining.window_view_probability, recipe.pretraining.event_view_probability)
    loading: list[float] = []

    def collate(stays, random):
        started = time.process_time()
        batch = prepared.stay_batch(stays, names, mix, random)
        if random is not None:
            loading.append(time.process_time() - started)
        return batch

    stage = Stage("speed", objective, train, prepared.positions(TUNING)[:64], collate, global_loss=True)
    settings = replace(loop_settings(recipe), checkpoint_seconds=1e9)
    accelerator = make_accelerator(unused_parameters=True)
    bare = []

    class InTurns(Timed):
        def _epoch(self, *arguments):
            random = np.random.default_rng(0)
            chosen = epoch_batches(self.stage, self.settings, self.state["epoch"], 1)
            bare.append(bare_seconds(objective, [prepared.stay_batch(b, names, mix, random) for b in chosen]))
            super()._epoch(*arguments)

    trainer = InTurns(stage, settings, RunFolder(scratch, "pretraining", recipe, {}), accelerator)
    trainer.fit()
    per_epoch = len(trainer.seconds) // epochs
    ours = [sum(trainer.seconds[i * per_epoch : (i + 1) * per_epoch]) for i in range(epochs)]
    # The first epoch warms up: allocations, lazily opened stores.
    return {
        "ratio": statistics.median(b / o for b, o in zip(bare[1:], ours[1:], strict=True)),
        "loading": sum(loading[per_epoch:]) / sum(trainer.seconds[per_epoch:]),
        "stays_per_second": len(train) / statistics.median(ours[1:]),
        "memory_first": trainer.memory[1],
        "memory_last": trainer.memory[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=PREPARED")
    parser.add_argument("--epochs", type=int, default=5, help="of which the first is not counted")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cohorts = dict(given.split("=", 1) for given in arguments.data)
    lines = [
        "# Speed of alignment pretraining",
        "",
        f"`python benchmarks/pretraining_speed.py --data {' '.join(f'{name!r}=PREPARED' for name in cohorts)} "
        f"--epochs {arguments.epochs}`, one thread, {machine()} (2 cores of an Intel Xeon at 2.5 GHz, no GPU). The "
        "settings of `trajlm/config.py`: latents of 64, hidden layers of 128, batch 128. Processor seconds, not those "
        "of the clock.",
        "",
        "| cohort | our loop over bare encoders, throughput | share of a step spent loading | stays per second "
        "| memory after the 2nd and the last epoch, MiB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, folder in cohorts.items():
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(load_prepared(folder), arguments.epochs, Path(scratch) / "run")
        lines.append(
            f"| {name} | {found['ratio']:.2f} | {found['loading']:.1%} | {found['stays_per_second']:.0f} "
            f"| {found['memory_first']:.0f}, {found['memory_last']:.0f} |"
        )
        sys.stdout.write(lines[-1] + "\n")
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
