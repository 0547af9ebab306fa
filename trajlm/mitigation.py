"""Anchoring that is trained away: penalties on what beliefs owe to a missing modality, and to demographics.

Beyond the paper, which measures anchoring on two stays. Modality dropout (``finetuning.modality_dropout``) asks that
beliefs be right without a modality; these ask for more, and cost a second reading of each batch:

- drift: beliefs should change little when a modality that says nothing new goes missing.
- anchoring: once a modality is gone, the read-outs should not turn to demographics instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trajlm.adapters import bare
from trajlm.anchoring import read_with_static_share
from trajlm.errors import TrajlmError
from trajlm.interception import attention_layers, depth, no_attention
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel


def drift_penalty(whole: Tensor, ablated: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
    """float[]: mean squared change of a read-out after the same event, once a modality is gone.

    The whole stay's read-outs are the goal and get no gradient: agreement is not to be bought by knowing less.

    Args:
        whole: float[B, S, K], read-outs of the whole stays, before they become beliefs.
        ablated: float[B, R, K], of the same stays without some events, moved together (:meth:`TrajectoryBatch.keep`).
        kept: bool[B, S], the events that are left.
        weights: float[B, S], not negative: what each read-out of the whole stay counts; zero at padding.
    """
    places = kept.nonzero(as_tuple=True)
    within = (kept.cumsum(dim=1) - 1)[kept]
    changes = (ablated[places[0], within] - whole[places].detach()).square().mean(dim=-1)
    share = weights * kept
    share = share / share.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return (changes * share[places]).sum() / len(whole)


def anchoring_penalty(model: TrajectoryModel, ablated: TrajectoryBatch) -> tuple[Tensor, Tensor]:
    """Read ablated stays; float[B, R, K] read-outs and float[], the share of attention they put on demographics.

    The share is that of the last layer, averaged over heads, read-outs and stays that hold demographics; zero where
    none does.
    """
    output, share = read_with_static_share(model, ablated)
    held = ~share.isnan()
    return output.readouts, share[held].mean() if held.any() else output.readouts.new_zeros(())


@dataclass(frozen=True)
class Penalties:
    """What a fine-tuning adds to its loss.

    Attributes:
        drift: weight of :func:`drift_penalty`.
        anchoring: weight of :func:`anchoring_penalty`.
    """

    drift: float = 0.0
    anchoring: float = 0.0

    @property
    def any(self) -> bool:
        """Whether there is anything to add."""
        return self.drift > 0 or self.anchoring > 0

    def check(self, model: TrajectoryModel) -> None:
        """Raise TrajlmError for a model whose attention cannot be penalised."""
        if self.anchoring <= 0:
            return
        if any(getattr(module, "gradient_checkpointing", False) for module in model.backbone.modules()):
            raise TrajlmError(
                "finetuning.anchoring_penalty needs the attention that backbone.gradient_checkpointing throws away; "
                "turn one of them off"
            )
        if depth(model.backbone) - 1 not in attention_layers(model.backbone):
            raise TrajlmError(
                no_attention(bare(model.backbone), "finetuning.anchoring_penalty needs attention in the last layer")
            )

    def __call__(
        self, model: TrajectoryModel, batch: TrajectoryBatch, whole: Tensor, gone: Tensor, weights: Tensor
    ) -> Tensor:
        """float[]: the weighted penalties of a batch, from a second reading of the stays that lose something.

        Args:
            model: in training.
            batch: the whole stays.
            whole: float[B, S, K], their read-outs.
            gone: bool[B, S], events to ablate; a stay that would keep none, or loses none, counts for nothing.
            weights: float[B, S], of each read-out of the whole stay.
        """
        touched = (gone & batch.present).any(dim=1) & (batch.present & ~gone).any(dim=1)
        if not touched.any():
            return whole.sum() * 0.0
        kept = (batch.present & ~gone)[touched]
        ablated = batch.select(touched).keep(kept)
        nothing = whole.new_zeros(())
        if self.anchoring > 0:
            readouts, share = anchoring_penalty(model, ablated)
        else:
            readouts, share = model(ablated).readouts, nothing
        drift = drift_penalty(whole[touched], readouts, kept, weights[touched]) if self.drift > 0 else nothing
        # Some stays of the batch were touched: the penalty counts as much as they do.
        return (self.drift * drift + self.anchoring * share) * touched.float().mean()
