"""Static baselines on the frozen latents: late fusion of whole-stay latents, missing tokens included (paper, 3.4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from trajlm.arms import BASELINE_ARMS
from trajlm.checkpoint import RunFolder, write_tensors
from trajlm.config import Recipe
from trajlm.fusions import FUSIONS
from trajlm.fusions.lstm import ModalityLSTM
from trajlm.fusions.mlp import ConcatenationMLP
from trajlm.latents import Latents, StaticBatch
from trajlm.schema import HELD_OUT, TUNING
from trajlm.selection import StaySplits
from trajlm.tasks import Task, build_tasks, stay_losses
from trajlm.training import LoopSettings, Stage, Trainer


class StaticBaseline(nn.Module):
    """Late fusion of whole-stay latents, one read-out per stay."""

    def __init__(self, fusion: ConcatenationMLP | ModalityLSTM, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.fusion, self.tasks = fusion, nn.ModuleList(tasks)
        self.heads = nn.Linear(fusion.width, len(tasks))

    def readouts(self, batch: StaticBatch) -> Tensor:
        """float[B, K]."""
        return self.heads(self.fusion(batch.latents, batch.present))

    def forward(self, batch: StaticBatch) -> Tensor:
        """float[] mean loss."""
        weights = torch.ones(len(batch.stay_ids), 1, device=batch.latents.device)
        return stay_losses(_tasks(self.tasks), self.readouts(batch)[:, None], batch.targets, weights).mean()


def _tasks(modules: nn.ModuleList) -> list[Task]:
    return [task for task in modules if isinstance(task, Task)]


def fitted_tasks(recipe: Recipe, targets: Tensor, splits: StaySplits) -> list[Task]:
    """Fresh tasks, fitted on the training stays' rows of ``targets`` float[N, K]."""
    tasks = build_tasks(recipe.finetuning.tasks, recipe.finetuning.focal_gamma)
    for k, task in enumerate(tasks):
        task.fit(targets[torch.from_numpy(splits.train), k])
    return tasks


def train_fusion(
    name: str,
    recipe: Recipe,
    latents: Latents,
    splits: StaySplits,
    targets: Tensor,
    run: RunFolder,
    accelerator: Any,
) -> pl.DataFrame:
    """Train a late fusion on whole-stay latents and return its beliefs: one row per stay, at the end of its window.

    Args:
        name: mlp or lstm, a key of FUSIONS.
        recipe: settings.
        latents: of every stay of ``splits``.
        splits: stays to learn from, to tune on and to believe in.
        targets: float[N, K] of every stay of the prepared folder, NaN where unknown.
        run: where weights and checkpoints go, under the name of the arm.
        accelerator: of the run.
    """
    config, arm = recipe.finetuning, BASELINE_ARMS[name]
    torch.manual_seed(recipe.seed)
    fusion = FUSIONS[name](len(latents.modalities), recipe.encoder.latent_width)
    model = StaticBaseline(fusion, fitted_tasks(recipe, targets, splits))

    def collate(stays: np.ndarray, random: object = None) -> StaticBatch:
        return latents.static(stays, targets[torch.from_numpy(stays)])

    stage = Stage(arm, model, splits.train, splits.tuning, collate)
    settings = LoopSettings(config.baseline_epochs, 20, 64, 1e-3, config.weight_decay, recipe.seed)
    Trainer(stage, settings, run, accelerator).fit()
    if run.main:
        (run.path / arm).mkdir(exist_ok=True)
        write_tensors(run.path / arm / "model.safetensors", model.state_dict())
    parts = {split: collate(splits.of(split)) for split in (TUNING, HELD_OUT)}
    last = {split: latents.last_events(splits.of(split)) for split in parts}
    frames = [_beliefs(model, split, batch, *last[split], accelerator.device) for split, batch in parts.items()]
    return pl.concat(frames)


@torch.no_grad()
def _beliefs(
    model: StaticBaseline, split: str, batch: StaticBatch, index: np.ndarray, hours: np.ndarray, device: torch.device
) -> pl.DataFrame:
    readouts = model.readouts(batch.to(device)).cpu()
    columns: dict[str, Any] = {
        "stay_id": batch.stay_ids.numpy(),
        "split": [split] * len(index),
        "landmark": pl.Series([None] * len(index), dtype=pl.Float64),
        "event_index": index,
        "hours_since_admission": hours,
        "modality": ["all"] * len(index),
    }
    for k, task in enumerate(_tasks(model.tasks)):
        columns[f"belief_{task.target}"] = task.cpu().belief(readouts[:, k]).double().numpy()
        columns[f"target_{task.target}"] = pl.Series(batch.targets[:, k].double().numpy()).fill_nan(None)
    return pl.DataFrame(columns)
