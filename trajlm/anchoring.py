"""How much the read-outs lean on static events (demographics), measured while the model runs (paper, 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from trajlm.interception import AttentionCall, Interception, intercepted, layer_numbers
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel, TrajectoryOutput

# Where what stands in the backbone's sequence: event, [PREDICT], event, [PREDICT], ...
EVENTS, READ_OUTS = slice(0, None, 2), slice(1, None, 2)


def is_static(model: TrajectoryModel, batch: TrajectoryBatch) -> Tensor:
    """bool[B, S]: the events of static modalities (demographics)."""
    static = [model.timelines.modalities[m].static for m in model.encoders.modalities]
    return torch.tensor(static, device=batch.modality.device)[batch.modality] & batch.present


def static_share(model: TrajectoryModel, batch: TrajectoryBatch, weights: Tensor) -> Tensor:
    """float32[B]: share of attention ``weights`` float[B, 2S, 2S] that the read-outs put on static events.

    The mean over the [PREDICT] rows of a stay of the weight on its static events' positions; NaN for a stay whose
    timeline holds no static event.
    """
    static = is_static(model, batch)
    return _share(static, batch.present, (weights[:, READ_OUTS, EVENTS] * static[:, None, :]).sum(dim=-1))


def _share(static: Tensor, present: Tensor, on_static: Tensor) -> Tensor:
    mean = (on_static * present).sum(dim=1) / present.sum(dim=1)
    return torch.where(static.any(dim=1), mean, float("nan"))


def read_with_static_share(
    model: TrajectoryModel, batch: TrajectoryBatch, layer: int = -1
) -> tuple[TrajectoryOutput, Tensor]:
    """One forward pass and what :func:`static_share` says of one of its layers, at half the price of a map.

    Only the read-outs' rows are computed. Gradients flow where they are asked for.

    Returns:
        the model's output and float32[B].

    Raises:
        TrajlmError: the layer does not exist or has no attention.
    """
    model.require_no_prompt("attention maps")
    (number,) = layer_numbers(model.backbone, [layer])
    static = is_static(model, batch)
    columns = torch.stack([static, torch.zeros_like(static)], dim=2).flatten(1)

    def keep(call: AttentionCall) -> Tensor:
        return _share(static, batch.present, call.mean_on(columns, READ_OUTS))

    with intercepted(model.backbone, Interception({number: keep})) as run:
        output = model(batch)
    return output, run.seen[number]
