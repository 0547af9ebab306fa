"""Exact attention maps at the cost of the layers asked for (paper, 3.6).

The backbone runs its fast attention; in the chosen layers the weights are computed beside it from the same queries,
keys and mask, so what is shown is what the model used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from trajlm.backbones import text_config
from trajlm.errors import TrajlmError
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel, TrajectoryOutput

RECORDING = "trajlm_recording"


class _Recorder:
    """Where the running forward pass puts the maps of the layers it was asked for."""

    def __init__(self) -> None:
        self.wanted: set[int] = set()
        self.maps: dict[int, Tensor] = {}


_recorder = _Recorder()


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Attention averaged over heads.

    Args:
        query: float[B, heads, T, d].
        key: float[B, key heads, T, d]; key heads divide heads.
        mask: bool (True may be seen) or additive float [B or 1, 1 or heads, T, T]; None is plain causal.
        scaling: factor of the dot products.

    Returns:
        float32[B, T, T].
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.matmul(query.float(), key.float().transpose(2, 3)) * scaling
    if mask is None:
        t = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=scores.device).triu(1), float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask.float()
    return scores.softmax(dim=-1).mean(dim=1)


def _recording_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if layer in _recorder.wanted:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        _recorder.maps[layer] = attention_weights(query, key, attention_mask, scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(RECORDING, _recording_forward)
AttentionMaskInterface.register(RECORDING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def _recording(backbone: nn.Module, layers: set[int]) -> Iterator[dict[int, Tensor]]:
    trunk: Any = backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
    before = trunk.config._attn_implementation
    try:
        trunk.set_attn_implementation(RECORDING)
    except (ValueError, AttributeError) as error:
        raise TrajlmError(
            f"this backbone has no attention that can be recorded: {str(error).splitlines()[0]}"
        ) from error
    _recorder.wanted, _recorder.maps = layers, {}
    try:
        yield _recorder.maps
    finally:
        _recorder.wanted = set()
        trunk.set_attn_implementation(before)


@torch.no_grad()
def read_with_attention(
    model: TrajectoryModel, batch: TrajectoryBatch, layers: Sequence[int] = (-1,)
) -> tuple[TrajectoryOutput, dict[int, Tensor]]:
    """One forward pass that also returns the attention of the chosen layers, averaged over heads.

    Only those layers' maps are ever held.

    Args:
        model: in evaluation mode.
        batch: B timelines of up to S events.
        layers: layer numbers, negative ones from the end.

    Returns:
        the model's output, and by the layer number asked for float32[B, 2S, 2S] over events and [PREDICT]s; rows of
        padding mean nothing.

    Raises:
        TrajlmError: a layer does not exist or has no attention (state-space layers).
    """
    depth = int(text_config(model.backbone).num_hidden_layers)
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong:
        raise TrajlmError(f"the backbone has layers 0 to {depth - 1} (or -1 to -{depth}), asked for {wrong}")
    with _recording(model.backbone, {layer % depth for layer in layers}) as maps:
        output = model(batch)
    silent = [layer for layer in layers if layer % depth not in maps]
    if silent:
        raise TrajlmError(f"layers {silent} of this backbone have no attention")
    return output, {layer: maps[layer % depth] for layer in layers}


@dataclass(frozen=True)
class StayAttention:
    """Attention of one stay.

    Attributes:
        weights: float32[T, T], rows the querying position; causal, rows sum to 1.
        positions: T rows: position, kind (event, predict), modality, hours_since_admission.
    """

    weights: np.ndarray
    positions: pl.DataFrame


def stay_attention(model: TrajectoryModel, batch: TrajectoryBatch, layer: int = -1) -> StayAttention:
    """The attention map of a batch of one timeline, its positions labelled by modality and hour."""
    if len(batch.stay_ids) != 1:
        raise ValueError(f"expected one timeline, came {len(batch.stay_ids)}")
    _, maps = read_with_attention(model, batch, [layer])
    weights = maps[layer][0].cpu().numpy()
    names = np.array(model.encoders.modalities)[batch.modality[0].cpu().numpy()]
    count = len(names)
    positions = pl.DataFrame(
        {
            "position": np.arange(2 * count),
            "kind": ["event", "predict"] * count,
            "modality": np.repeat(names, 2),
            "hours_since_admission": np.repeat(batch.hours[0].cpu().numpy(), 2),
        }
    )
    return StayAttention(weights, positions)


def static_share(model: TrajectoryModel, batch: TrajectoryBatch, weights: Tensor) -> Tensor:
    """float32[B]: share of attention ``weights`` float[B, 2S, 2S] that the read-outs put on static events.

    The mean over the [PREDICT] rows of a stay of the weight on its static events' positions; NaN for a stay whose
    timeline holds no static event.
    """
    static = torch.tensor([model.modalities[m].static for m in model.encoders.modalities], device=weights.device)
    is_static = static[batch.modality] & batch.present
    on_static = (weights[:, 1::2, 0::2] * is_static[:, None, :]).sum(dim=-1)
    mean = (on_static * batch.present).sum(dim=1) / batch.present.sum(dim=1)
    return torch.where(is_static.any(dim=1), mean, float("nan"))
