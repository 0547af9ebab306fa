"""Static baselines on the frozen latents: late fusion of whole-stay latents, missing tokens included (paper, 3.4.1).

As the models of summary features, a fusion is tuned on the tuning stays and refitted for each landmark, on the latents
of what was known by then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trajlm.arms import BASELINE_ARMS
from trajlm.baselines import known_events, still_there
from trajlm.belief_tables import at_landmark, belief_table
from trajlm.checkpoint import RunFolder, write_tensors, write_text
from trajlm.config import Recipe
from trajlm.dataset import Prepared
from trajlm.fusions import FUSIONS
from trajlm.fusions.lstm import ModalityLSTM
from trajlm.fusions.mlp import ConcatenationMLP
from trajlm.latents import KnownLatents, Latents, StaticBatch
from trajlm.metrics import LANDMARKS
from trajlm.sampling import chances, importance
from trajlm.schema import HELD_OUT, TRAIN, TUNING
from trajlm.selection import StaySplits
from trajlm.tasks import Task, beliefs_at, build_tasks, stay_losses, targets_at
from trajlm.training import LoopSettings, Stage, Trainer

WEIGHTS, TRIALS = "model.safetensors", "tuning.json"
BATCH_SIZE, PATIENCE = 128, 12


@dataclass(frozen=True)
class FusionSettings:
    """What is tried of a fusion: Adam's learning rate, dropout, width of the fused vector."""

    learning_rate: float = 1e-3
    dropout: float = 0.3
    width: int = 128


# The likeliest first; as many as `baseline_trials` says are tried.
SETTINGS = (
    FusionSettings(),
    FusionSettings(dropout=0.5),
    FusionSettings(learning_rate=3e-3, dropout=0.5),
    FusionSettings(learning_rate=3e-4),
    FusionSettings(width=256, dropout=0.5),
    FusionSettings(width=32),
)


class StaticBaseline(nn.Module):
    """Late fusion of whole-stay latents, one read-out per stay."""

    def __init__(self, fusion: ConcatenationMLP | ModalityLSTM, tasks: Sequence[Task], balanced: bool = False) -> None:
        super().__init__()
        self.balanced = balanced  # drawn so in training
        self.fusion, self.tasks = fusion, nn.ModuleList(tasks)
        self.heads = nn.Linear(fusion.width, len(tasks))

    def readouts(self, batch: StaticBatch) -> Tensor:
        """float[B, K]."""
        return self.heads(self.fusion(batch.latents, batch.present))

    def forward(self, batch: StaticBatch) -> Tensor:
        """float[] mean loss."""
        weights = torch.ones(len(batch.stay_ids), 1, device=batch.latents.device)
        tasks = _tasks(self.tasks)
        losses = stay_losses(tasks, self.readouts(batch)[:, None], batch.targets, weights, batch.hours[:, None])
        if self.training and self.balanced:
            losses = losses * importance(tasks, batch.targets)
        return losses.mean()


def _tasks(modules: nn.ModuleList) -> list[Task]:
    return [task for task in modules if isinstance(task, Task)]


def fitted_tasks(recipe: Recipe, targets: Tensor, splits: StaySplits) -> list[Task]:
    """Fresh tasks, fitted on the training stays' rows of ``targets`` float[N, K]."""
    tasks = build_tasks(recipe.finetuning.tasks, recipe.finetuning.focal_gamma)
    for k, task in enumerate(tasks):
        task.fit(targets[torch.from_numpy(splits.train), k])
    return tasks


@dataclass(frozen=True)
class _View:
    """Stays as known at a landmark: their latents, which of them count by split, and their last event by then."""

    landmark: float | None
    latents: np.ndarray  # float32[N, M, D] of every stay of the prepared folder
    present: np.ndarray  # bool[N, M]
    stays: dict[str, np.ndarray]
    events: dict[str, np.ndarray]

    def same(self, other: _View) -> bool:
        """Whether the same events of the same stays are known: a 48-hour window ends at the landmark of 48 hours."""
        return all(np.array_equal(getattr(self, name)[split], getattr(other, name)[split])
                   for name in ("stays", "events") for split in self.stays)  # fmt: skip


class FusionArm:
    """Fits one late fusion of a run.

    Args:
        name: mlp or lstm, a key of FUSIONS.
        recipe: settings.
        prepared: the records.
        latents: of every stay of ``splits``.
        splits: stays to learn from, to tune on and to believe in.
        targets: float[N, K] of every stay of the prepared folder, NaN where unknown.
        run: where weights, trials and checkpoints go, under the name of the arm.
        accelerator: of the run.
        known: latents as of each landmark; the fusions of a run share them.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        prepared: Prepared,
        latents: Latents,
        splits: StaySplits,
        targets: Tensor,
        run: RunFolder,
        accelerator: Any,
        known: KnownLatents,
    ) -> None:
        self.known = known
        self.name, self.arm, self.recipe, self.prepared = name, BASELINE_ARMS[name], recipe, prepared
        self.latents, self.splits, self.targets = latents, splits, targets
        self.run, self.accelerator = run, accelerator

    def beliefs(self) -> pl.DataFrame:
        """One row per stay and landmark at which it counts; ``landmark`` is null for the end of the window.

        Settings are tried at the end of the window; the best by its loss on the tuning stays is refitted for each
        landmark at which less is known and for which there are stays to learn from and to tune on.
        """
        end = self._view(None)
        fitted, trials = [], []
        for i, settings in enumerate(SETTINGS[: self.recipe.finetuning.baseline_trials]):
            model, loss = self._fit(settings, end, f"{self.arm}/trial-{i}")
            fitted.append(model)
            trials.append(asdict(settings) | {"tuning_loss": loss})
        chosen = min(range(len(trials)), key=lambda i: trials[i]["tuning_loss"])
        frames = []
        for landmark in LANDMARKS:
            view = self._view(landmark)
            model = fitted[chosen]
            if not view.same(end):
                if not len(view.stays[TRAIN]) or not len(view.stays[TUNING]):
                    continue
                model, _ = self._fit(SETTINGS[chosen], view, f"{self.arm}/at-{landmark}")
            frames += [self._beliefs(model, view, split) for split in (TUNING, HELD_OUT)]
        if self.run.main:
            self._save(fitted[chosen], trials, chosen)
        return pl.concat(frames)

    def _view(self, landmark: float | None) -> _View:
        stays = {}
        for split in (TRAIN, TUNING, HELD_OUT):
            mine = self.splits.of(split)
            stays[split] = mine[still_there(self.prepared, mine, landmark)]
        events = {split: known_events(self.prepared, mine, landmark) for split, mine in stays.items()}
        if all(np.array_equal(events[split], known_events(self.prepared, stays[split], None)) for split in stays):
            return _View(landmark, *self._whole, stays, events)
        return _View(landmark, *self.known.at(float(landmark or 0.0)), stays, events)

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        """float32[N, M, D] and bool[N, M] of everything known, by position in the prepared folder."""
        places = self.latents.places(self.splits.all)
        latents = np.full((len(self.prepared.stays), *self.latents.stays.shape[1:]), np.nan, np.float32)
        present = np.zeros(latents.shape[:2], dtype=bool)
        latents[self.splits.all], present[self.splits.all] = self.latents.stays[places], self.latents.present[places]
        return latents, present

    def _batch(self, view: _View, stays: np.ndarray) -> StaticBatch:
        ids = torch.from_numpy(self.prepared.stays["stay_id"].to_numpy()[stays])
        latents, present = torch.from_numpy(view.latents[stays]), torch.from_numpy(view.present[stays])
        last = self.prepared.bounds[stays] + known_events(self.prepared, stays, view.landmark) - 1
        hours = torch.from_numpy(self.prepared.hours[last])
        return StaticBatch(ids, latents, present, self.targets[torch.from_numpy(stays)], hours)

    def _fit(self, settings: FusionSettings, view: _View, name: str) -> tuple[StaticBaseline, float]:
        """A model with these settings and its least loss on the tuning stays."""
        config, recipe = self.recipe.finetuning, self.recipe
        torch.manual_seed(recipe.seed)
        tasks = fitted_tasks(recipe, self.targets, self.splits)
        model = _model(self.name, settings, view.latents.shape, tasks, config.sampling == "balanced")
        drawn = chances(tasks, self.targets[torch.from_numpy(view.stays[TRAIN])], config.sampling)

        def collate(stays: np.ndarray, random: object = None) -> StaticBatch:
            return self._batch(view, stays)

        stage = Stage(name, model, view.stays[TRAIN], view.stays[TUNING], collate, chances=drawn)
        loop = LoopSettings(config.baseline_epochs, PATIENCE, BATCH_SIZE, settings.learning_rate, config.weight_decay,
                            recipe.seed)  # fmt: skip
        trainer = Trainer(stage, loop, self.run, self.accelerator)
        trainer.fit()
        return model, float(trainer.state["best"])

    @torch.no_grad()
    def _beliefs(self, model: StaticBaseline, view: _View, split: str) -> pl.DataFrame:
        stays, events = view.stays[split], view.events[split]
        batch = self._batch(view, stays)
        readouts = model.readouts(batch.to(self.accelerator.device)).cpu()
        tasks = [task.cpu() for task in _tasks(model.tasks)]
        table = belief_table(
            batch.stay_ids.numpy(),
            split,
            events - 1,
            batch.hours.numpy(),
            "all",
            tasks,
            beliefs_at(tasks, readouts).double().numpy(),
            targets_at(tasks, batch.targets, batch.hours).double().numpy(),
        )
        return at_landmark(table, view.landmark)

    def _save(self, model: StaticBaseline, trials: list[dict[str, Any]], chosen: int) -> None:
        folder = self.run.path / self.arm
        folder.mkdir(exist_ok=True)
        write_tensors(folder / WEIGHTS, model.state_dict())
        write_text(folder / TRIALS, json.dumps({"trials": trials, "chosen": chosen}, indent=1))


def _model(
    name: str, settings: FusionSettings, shape: tuple[int, ...], tasks: Sequence[Task], balanced: bool = False
) -> StaticBaseline:
    """A fusion of latents float[N, M, D] of this shape."""
    fusion = FUSIONS[name](shape[1], shape[2], width=settings.width, dropout=settings.dropout)
    return StaticBaseline(fusion, tasks, balanced)


def load_fusion(run: Path, name: str, latents: Latents, tasks: Sequence[Task]) -> StaticBaseline | None:
    """The fusion of a run as fitted at the end of the window; None where the run has none of that name."""
    folder = run / BASELINE_ARMS[name]
    if not (folder / WEIGHTS).exists():
        return None
    told = json.loads((folder / TRIALS).read_text())
    model = _model(name, SETTINGS[told["chosen"]], latents.stays.shape, tasks)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()
