"""Training speed of the sequence model beside its bare backbone, and how much of a batch is padding.

Ours is the trainer's whole step: batch from the latent cache, projectors, backbone, heads, loss, backward pass,
clipping, AdamW and running means of the weights. Bare is the same backbone's forward and backward pass alone, on
random inputs of as many positions as the batch's stays have events and [PREDICT]s, in rows of their mean length with no
padding. The two take turns, batch by batch, in one process; seconds are of the processor. A backbone that is pretrained
elsewhere has random weights of its shape here: the work is the same.

    python benchmarks/training_step.py --data PREPARED
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measuring import machine
from transformers import AutoModel

from trajlm.assemble import build_encoders, build_trajectory_model
from trajlm.backbones import build_backbone, shape_of
from trajlm.checkpoint import RunFolder
from trajlm.config import BackboneConfig, FinetuningConfig, Recipe
from trajlm.dataset import load_prepared
from trajlm.engines import make_accelerator
from trajlm.finetuning import target_table
from trajlm.latents import cache_latents
from trajlm.packing import arrange
from trajlm.presets import presets
from trajlm.selection import finetuning_splits
from trajlm.sequence_objective import SequenceObjective
from trajlm.static import fitted_tasks
from trajlm.training import LoopSettings, Stage, Trainer, epoch_batches

BATCHINGS = ("padded", "by_length", "packed")


def seconds_of(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Bench:
    """One prepared folder, its latents and the batches that are timed."""

    def __init__(self, data: Path, folder: Path, stays: int, batch_size: int) -> None:
        self.recipe = Recipe(data=str(data), out=str(folder), finetuning=FinetuningConfig(tasks=["mortality"]))
        self.recipe.finetuning.batch_size, self.recipe.finetuning.modality_dropout = batch_size, 0.0
        self.prepared = load_prepared(data)
        torch.manual_seed(0)
        self.encoders = build_encoders(self.prepared, self.recipe.encoder)
        self.splits = finetuning_splits(self.prepared, "train", 0)
        self.stays = np.sort(np.random.default_rng(0).permutation(self.splits.train)[:stays])
        reach = self.recipe.finetuning.event_latents
        self.latents = cache_latents(self.prepared, self.encoders, self.stays, folder / "latents", "benchmark", reach)
        self.targets = target_table(self.recipe, self.prepared)
        self.tasks = fitted_tasks(self.recipe, self.targets, self.splits)
        most = self.recipe.finetuning.max_events
        self.lengths = {int(stay): 2 * len(self.latents.rows(stay, most)) for stay in self.stays}
        self.folder = folder

    def backbone(self, name: str) -> BackboneConfig:
        """A preset; one of pretrained weights as a folder of random weights in its shape, with adapters."""
        if presets()[name].random:
            return BackboneConfig(name=name, lora_dropout=0.0)
        weights = self.folder / f"{name}-weights"
        if not weights.exists():
            torch.manual_seed(0)
            AutoModel.from_config(shape_of(name)).save_pretrained(weights)
        return BackboneConfig(name=str(weights), lora_dropout=0.0)

    def trainer(self, name: str, batching: str) -> Trainer:
        recipe = replace(
            self.recipe,
            backbone=self.backbone(name),
            finetuning=replace(self.recipe.finetuning, batching=batching),
        )
        most, targets = recipe.finetuning.max_events, self.targets
        torch.manual_seed(0)
        model = build_trajectory_model(recipe, self.prepared, self.encoders, self.tasks, torch.device("cpu"))
        stage = Stage(
            "sequence",
            SequenceObjective(model, recipe.finetuning),
            self.stays,
            self.stays[:1],
            lambda stays, _: self.latents.trajectories(stays, targets[torch.from_numpy(stays)], most),
            lengths=np.array(list(self.lengths.values())) if batching == "by_length" else None,
        )
        settings = LoopSettings(1, 1, recipe.finetuning.batch_size, 1e-4, 0.01, 0, cosine=True, averaging=0.99)
        run = RunFolder(self.folder / f"{name}-{batching}", "finetuning", recipe, {})
        return Trainer(stage, settings, run, make_accelerator())

    def padding(self, trainer: Trainer, batching: str, width: int) -> float:
        """Share of positions of an epoch's batches that hold no event and no [PREDICT]."""
        held = filled = 0
        for batch in epoch_batches(trainer.stage, trainer.settings, 0, 1):
            lengths = [self.lengths[int(stay)] for stay in batch]
            layout = arrange(lengths, width)
            filled += sum(lengths)
            held += layout.rows * layout.length if batching == "packed" else len(lengths) * max(lengths)
        return 1 - filled / held

    def row(self, name: str, batching: str, batches: int) -> str:
        trainer = self.trainer(name, batching)
        bare = build_backbone(self.backbone(name)).train()
        width = int(bare.config.hidden_size)
        bf16 = trainer.stage.module.model.bf16
        chosen = epoch_batches(trainer.stage, trainer.settings, 0, 1)[: batches + 1]
        ours, alone, positions = [], [], 0
        for number, stays in enumerate(chosen):
            filled = sum(self.lengths[int(stay)] for stay in stays)
            inputs = torch.randn(len(stays), round(filled / len(stays)), width, requires_grad=True)

            def forward_and_backward(inputs: torch.Tensor = inputs) -> None:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    states = bare(inputs_embeds=inputs, use_cache=False).last_hidden_state
                states.float().sum().backward()
                bare.zero_grad(set_to_none=True)

            def step(stays: np.ndarray = stays, number: int = number) -> None:
                trainer._step(trainer.stage.module, trainer._load(stays, number), len(chosen))
                trainer.state["step"] += 1

            taken = seconds_of(step), seconds_of(forward_and_backward)
            if number:  # the first batch warms up
                ours.append(taken[0])
                alone.append(taken[1])
                positions += filled
        speed, ratio = positions / sum(ours), sum(alone) / sum(ours)
        padding = self.padding(trainer, batching, width)
        return f"| {name} | {batching} | {100 * padding:.1f} % | {speed:,.0f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--backbones", nargs="+", default=["tiny", "small", "smollm2-135m"])
    parser.add_argument("--batchings", nargs="+", choices=BATCHINGS, default=list(BATCHINGS))
    parser.add_argument("--stays", type=int, default=1024, help="training stays to draw batches from")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=6, help="batches timed, after one that is not")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    lines = [
        "# A training step beside the bare backbone",
        "",
        f"`python benchmarks/training_step.py --data PREPARED --backbones {' '.join(arguments.backbones)} --batchings "
        f"{' '.join(arguments.batchings)} --batches {arguments.batches} --batch-size {arguments.batch_size}`, "
        f"{machine()}, {torch.get_num_threads()} used. "
        "PhysioNet 2012 set A, defaults of `FinetuningConfig`, no modality dropout. Padding is of an epoch; speed is "
        "of positions that hold an event or a [PREDICT], per second of the processor; the last column is it over the "
        "bare backbone's.",
        "",
        "| backbone | batching | padding | positions per second | of the bare backbone |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data, Path(folder), arguments.stays, arguments.batch_size)
        for name in arguments.backbones:
            for batching in arguments.batchings:
                lines.append(bench.row(name, batching, arguments.batches))
                print(lines[-1], flush=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
