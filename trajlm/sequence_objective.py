"""What fine-tuning makes small: the loss of every read-out of a stay, weighed, with a modality ablated now and then."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trajlm.config import FinetuningConfig
from trajlm.latents import TrajectoryBatch
from trajlm.mitigation import Penalties
from trajlm.sampling import importance
from trajlm.tasks import stay_losses
from trajlm.trajectory import TrajectoryModel

HOURS_BEFORE_RISE = 2.0  # a belief at admission still counts, a fifth of one at 48 hours


class SequenceObjective(nn.Module):
    """Mean loss of a batch of timelines over their read-outs (``loss_over``).

    In training all events of one random modality are ablated with some probability, as a user may lack it; where
    penalties are asked for, each batch is read a second time without another one (:mod:`trajlm.mitigation`).
    """

    def __init__(self, model: TrajectoryModel, config: FinetuningConfig) -> None:
        super().__init__()
        self.model = model
        self.penalties = Penalties(config.drift_penalty, config.anchoring_penalty)
        self.penalties.check(model)
        self.modality_dropout, self.loss_over = config.modality_dropout, config.loss_over
        self.packed = config.batching == "packed"
        self.balanced = config.sampling == "balanced"

    def forward(self, batch: TrajectoryBatch) -> Tensor:
        """float[]."""
        if self.training and self.modality_dropout > 0:
            batch = batch.keep(~random_modality(batch, self.modality_dropout))
        weights = readout_weights(self.model, batch, self.loss_over)
        tasks = self.model.fitted_tasks
        readouts = self.model(batch, packed=self.packed and self.training).readouts
        losses = stay_losses(tasks, readouts, batch.targets, weights, batch.hours)
        if self.training and self.balanced:
            losses = losses * importance(tasks, batch.targets)
        if self.training and self.penalties.any:
            gone = random_modality(batch, 1.0)
            return losses.mean() + self.penalties(self.model, batch, readouts, gone, weights)
        return losses.mean()


def readout_weights(model: TrajectoryModel, batch: TrajectoryBatch, loss_over: str) -> Tensor:
    """float[B, S]: what each read-out of a stay counts; zero at padding and where no belief counts."""
    weights = model.counted(batch).float()
    if loss_over == "rising":
        return weights * (batch.hours.to(weights.dtype) + HOURS_BEFORE_RISE).sqrt()
    if loss_over == "last":
        return torch.zeros_like(weights).scatter(1, batch.present.sum(1, keepdim=True) - 1, 1.0)
    return weights


def random_modality(batch: TrajectoryBatch, probability: float) -> Tensor:
    """bool[B, S]: with ``probability`` all events of one of the modalities that the stay holds, never all events."""
    b, _ = batch.modality.shape
    device = batch.modality.device
    count = int(batch.modality.max()) + 1
    held = torch.zeros(b, count, dtype=torch.bool, device=device)
    held.scatter_(1, batch.modality, True)
    # Padding points at modality 0: it counts only where a real event does.
    held[:, 0] = ((batch.modality == 0) & batch.present).any(dim=1)
    order = torch.rand(b, count, device=device).masked_fill(~held, -1.0)
    loses = (torch.rand(b, device=device) < probability) & (held.sum(dim=1) >= 2)
    return (batch.modality == order.argmax(dim=1, keepdim=True)) & loses[:, None] & batch.present
