"""Stage 1: encoders and missing tokens by Masked Global Alignment, prepared folder to run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from trajlm.alignment import (
    TEMPERATURE_BOUNDS,
    drop_modalities,
    global_representation,
    missing_token_loss,
)
from trajlm.assemble import build_encoders, learnable_modalities, save_encoders
from trajlm.cards import pretraining_card
from trajlm.checkpoint import RunFolder, data_fingerprint, write_text
from trajlm.config import PretrainingConfig, Recipe
from trajlm.dataset import Prepared, StayBatch, load_prepared
from trajlm.distributed import average_gradients, gather_stays
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.engines import make_accelerator
from trajlm.errors import TrajlmError
from trajlm.gradcache import cached_backward, refuse_batch_norm
from trajlm.locks import locked
from trajlm.objectives import OBJECTIVES
from trajlm.retrieval import alignment, recall_at_k, silhouette, uniformity
from trajlm.schema import HELD_OUT, TRAIN, TUNING
from trajlm.trackers import chosen_tracker, tracking
from trajlm.training import LoopSettings, Stage, Trainer
from trajlm.views import ViewMix

LOSS_BATCH = 256  # stays; in which the loss of a split is told


class AlignmentObjective(nn.Module):
    """The alignment loss over a batch of stays, all processes' stays together.

    In training with modality dropout and the missing tokens' own loss; in evaluation the alignment loss alone, which
    picks the checkpoint.
    """

    def __init__(self, encoders: AlignedEncoders, config: PretrainingConfig) -> None:
        super().__init__()
        self.encoders = encoders
        self.log_temperature = nn.Parameter(torch.tensor(config.temperature).log())
        self.modality_dropout = config.modality_dropout
        self.missing_token_loss_weight = config.missing_token_loss_weight
        self.chunk_size = config.chunk_size
        self.alignment_loss = OBJECTIVES[config.objective]
        if config.chunk_size is not None:
            refuse_batch_norm(encoders)

    @property
    def temperature(self) -> Tensor:
        """float[], within its bounds. The parameter itself is clamped: a clamped output would have no gradient back."""
        with torch.no_grad():
            self.log_temperature.clamp_(*(float(np.log(bound)) for bound in TEMPERATURE_BOUNDS))
        return self.log_temperature.exp()

    def forward(self, batch: StayBatch) -> Tensor:
        """float[] loss in nats."""
        if not self.training:
            return self.alignment_loss(self.encoders(batch), batch.present, self.temperature)
        batch = self._dropped(batch)
        return self._training_loss(self.encoders(batch), batch.present)

    def backward(self, batch: StayBatch) -> Tensor:
        """float[] loss in nats, its gradients left on the parameters, with the activations of one chunk at a time."""
        assert self.chunk_size is not None
        batch = self._dropped(batch)
        loss = cached_backward(
            self.encoders, lambda latents: self._training_loss(latents, batch.present), batch, self.chunk_size
        )
        average_gradients(self.parameters())
        return loss

    def _dropped(self, batch: StayBatch) -> StayBatch:
        return batch.masked(drop_modalities(batch.present, self.modality_dropout))

    def _training_loss(self, latents: Tensor, present: Tensor) -> Tensor:
        latents, present = gather_stays(latents, present)
        tokens = missing_token_loss(self.encoders.missing_tokens, latents, present)
        return self.alignment_loss(latents, present, self.temperature) + self.missing_token_loss_weight * tokens


def pretrain(recipe: Recipe) -> Path:
    """Run the stage; a finished run is left as it is, an interrupted one goes on. Returns the run folder."""
    if recipe.data is None or recipe.out is None:
        raise TrajlmError("pretraining needs --data PREPARED and --out RUN")
    chosen_tracker(recipe.tracker)
    prepared = load_prepared(recipe.data)
    accelerator = make_accelerator(unused_parameters=True)
    out = Path(recipe.out)
    with locked(out, accelerator.is_main_process):
        return _pretrain(recipe, out, prepared, accelerator)


def _pretrain(recipe: Recipe, out: Path, prepared: Prepared, accelerator: Any) -> Path:
    torch.manual_seed(recipe.seed)
    # Whatever the settings get wrong shows before the run folder is made.
    objective = AlignmentObjective(build_encoders(prepared, recipe.encoder), recipe.pretraining)
    inputs = {"data": data_fingerprint(prepared.folder)}
    run = RunFolder(out, "pretraining", recipe, inputs, accelerator.is_main_process)
    if run.finished:
        print(f"{run.path}: pretraining is finished already")
        return run.path
    left_out = {m.name for m in prepared.modalities} - {m.name for m in learnable_modalities(prepared)}
    if left_out and run.main:
        print(f"no training stay holds {', '.join(sorted(left_out))}: no encoder is trained for it")
    encoders = objective.encoders

    mix = ViewMix(recipe.pretraining.window_view_probability, recipe.pretraining.event_view_probability)

    def collate(stays: np.ndarray, random: np.random.Generator | None) -> StayBatch:
        return prepared.stay_batch(stays, encoders.modalities, mix, random)

    train = prepared.positions(TRAIN)
    _check_alignable(prepared.present(train, encoders.modalities), recipe)
    stage = Stage(
        name="alignment",
        module=objective,
        train=train,
        tuning=prepared.positions(TUNING),
        collate=collate,
        global_loss=True,
        backward=objective.backward if recipe.pretraining.chunk_size is not None else None,
    )
    with tracking(accelerator, run.path, recipe.tracker):
        Trainer(stage, loop_settings(recipe), run, accelerator).fit()
    if run.main:
        save_encoders(encoders, run.path)
        metrics = evaluate_alignment(prepared, objective)
        write_text(run.path / "README.md", pretraining_card(recipe, prepared, metrics))
        run.finish(metrics)
    accelerator.wait_for_everyone()
    return run.path


def _check_alignable(present: Tensor, recipe: Recipe) -> None:
    """Raise where no training stay (``present`` bool[N, M]) could ever be an anchor."""
    if not (present.sum(dim=1) >= 2).any():
        raise TrajlmError(f"{recipe.data}: no training stay holds two modalities, so there is nothing to align")
    if recipe.pretraining.objective == "one_versus_others" and not present.all(dim=1).any():
        raise TrajlmError(
            f"{recipe.data}: no training stay holds all {present.shape[1]} modalities, and one_versus_others aligns "
            "complete stays alone; choose pretraining.objective masked_global or pairwise"
        )


def loop_settings(recipe: Recipe) -> LoopSettings:
    """Adam, constant rate, patience on the tuning loss (method 3)."""
    p = recipe.pretraining
    return LoopSettings(
        p.epochs, p.patience, p.batch_size, p.learning_rate, p.weight_decay, recipe.seed, decoupled=False
    )


@torch.no_grad()
def encode_stays(prepared: Prepared, encoders: AlignedEncoders, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32[N, M, D] whole-stay latents with missing tokens, and bool[N, M] presence."""
    device = encoders.missing_tokens.device
    latents, present = [], []
    for start in range(0, len(stays), 256):
        batch = prepared.stay_batch(stays[start : start + 256], encoders.modalities)
        latents.append(encoders(batch.to(device)).cpu().numpy())
        present.append(batch.present.numpy())
    return np.concatenate(latents), np.concatenate(present)


def evaluate_alignment(prepared: Prepared, objective: AlignmentObjective) -> dict[str, Any]:
    """What the tuning and held-out stays, whole, show of a latent space.

    Per split: the alignment loss in batches of one fixed size (a loss depends on the number of negatives), Recall@K
    beside chance, silhouette, alignment, uniformity, and how far the global representation moves when a modality is
    masked.
    """
    encoders = objective.encoders.eval()
    metrics: dict[str, Any] = {"temperature": float(objective.temperature.detach()), "splits": {}}
    for split in (TUNING, HELD_OUT):
        stays = prepared.positions(split)
        if not len(stays):
            continue
        latents, present = encode_stays(prepared, encoders, stays)
        pairs = recall_at_k(latents, present, encoders.modalities)
        mean = pairs.group_by("k").agg(pl.col("recall", "random").mean()).sort("k")
        metrics["splits"][split] = {
            "stays": len(stays),
            "loss": fixed_batch_loss(objective, latents, present),
            "loss_batch": LOSS_BATCH,
            "recall_mean_over_pairs": mean.to_dicts(),
            "recall_by_pair": pairs.to_dicts(),
            "silhouette": silhouette(latents, present, encoders.modalities),
            "alignment": alignment(latents, present, encoders.modalities),
            "uniformity": uniformity(latents, present, encoders.modalities),
            "movement_when_masked": movement_when_masked(latents, present, encoders.modalities),
        }
    return metrics


@torch.no_grad()
def fixed_batch_loss(objective: AlignmentObjective, latents: np.ndarray, present: np.ndarray) -> float:
    """Mean over stays of the alignment loss in batches of ``LOSS_BATCH``, whatever batch size it was trained with.

    Batches are of one size, or a stay smaller: a small last one would know fewer negatives.

    Args:
        objective: whose loss and temperature.
        latents: float[N, M, D].
        present: bool[N, M].
    """
    temperature = objective.temperature.cpu()
    batches = -(-len(latents) // LOSS_BATCH)
    total = 0.0
    for rows in np.array_split(np.arange(len(latents)), batches):
        part, held = torch.from_numpy(latents[rows]), torch.from_numpy(present[rows])
        total += float(objective.alignment_loss(part, held, temperature)) * len(rows)
    return total / len(latents)


def movement_when_masked(latents: np.ndarray, present: np.ndarray, modalities: tuple[str, ...]) -> dict[str, float]:
    """Mean 1 - cosine between a stay's global representation with and without a modality, where it holds another."""
    whole = torch.from_numpy(latents)
    held = torch.from_numpy(present)
    full = global_representation(whole, held)
    moved = {}
    for column, name in enumerate(modalities):
        both = held[:, column] & (held.sum(dim=1) >= 2)
        if both.any():
            masked = held[both].clone()
            masked[:, column] = False
            cosine = (global_representation(whole[both], masked) * full[both]).sum(dim=-1)
            moved[name] = float((1 - cosine).mean())
    return moved
