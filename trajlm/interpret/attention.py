"""Exact attention maps at the cost of the layers asked for (paper, 3.6).

The backbone runs its fast attention; in the chosen layers the weights are computed beside it from the same queries,
keys and mask, so what is shown is what the model used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from torch import Tensor

from trajlm.adapters import bare
from trajlm.anchoring import EVENTS, READ_OUTS, is_static
from trajlm.backbones import text_config
from trajlm.errors import TrajlmError
from trajlm.interception import (
    AttentionCall,
    Interception,
    attention_layers,
    intercepted,
    layer_numbers,
    no_attention,
)
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel, TrajectoryOutput


@torch.no_grad()
def read_with_attention(
    model: TrajectoryModel,
    batch: TrajectoryBatch,
    layers: Sequence[int] = (-1,),
    heads: Sequence[int] | None = None,
) -> tuple[TrajectoryOutput, dict[int, Tensor]]:
    """One forward pass that also returns the attention of the chosen layers, averaged over heads.

    Only those layers' maps are ever held.

    Args:
        model: in evaluation mode.
        batch: B timelines of up to S events.
        layers: layer numbers, negative ones from the end.
        heads: heads to average over; None is all of them, one is that head alone.

    Returns:
        the model's output, and by the layer number asked for float32[B, 2S, 2S] over events and [PREDICT]s; rows of
        padding mean nothing.

    Raises:
        TrajlmError: a layer or head does not exist, or the layer has no attention (state-space layers).
    """
    model.require_no_prompt("attention maps")
    numbers = layer_numbers(model.backbone, layers)
    check_heads(model, heads)

    def keep(call: AttentionCall) -> Tensor:
        return call.mean_weights(heads)

    with intercepted(model.backbone, Interception(dict.fromkeys(numbers, keep))) as maps:
        output = model(batch)
    return output, {asked: maps.seen[number] for asked, number in zip(layers, numbers, strict=True)}


def shown_layer(model: TrajectoryModel) -> int | None:
    """The last layer whose attention can be shown, counted from 0.

    None where there is none: backbones without attention, and models whose first position is a prompt's.
    """
    return None if len(model.prompt_ids) else max(attention_layers(model.backbone), default=None)


def check_heads(model: TrajectoryModel, heads: Sequence[int] | None) -> None:
    """Raise TrajlmError for a head that the backbone does not have."""
    count = getattr(text_config(model.backbone), "num_attention_heads", None)
    if heads is not None and count is None:
        raise TrajlmError(no_attention(bare(model.backbone), "heads cannot be chosen"))
    if heads is not None and (not heads or not all(0 <= head < int(count or 0) for head in heads)):
        raise TrajlmError(f"the backbone has heads 0 to {int(count or 0) - 1}, asked for {list(heads)}")


@dataclass(frozen=True)
class StayAttention:
    """Attention of one stay.

    Attributes:
        weights: float32[T, T], rows the querying position; causal, rows sum to 1.
        positions: T rows: position, kind (event, predict), event_index, modality, hours_since_admission, static.
    """

    weights: np.ndarray
    positions: pl.DataFrame


def stay_attention(
    model: TrajectoryModel, batch: TrajectoryBatch, layer: int = -1, head: int | None = None
) -> StayAttention:
    """The attention map of a batch of one timeline, its positions labelled by modality and hour.

    Args:
        model: in evaluation mode.
        batch: of one timeline.
        layer: which layer; negative ones count from the end.
        head: which head; None averages over all.
    """
    if len(batch.stay_ids) != 1:
        raise ValueError(f"expected one timeline, came {len(batch.stay_ids)}")
    _, maps = read_with_attention(model, batch, [layer], None if head is None else [head])
    weights = maps[layer][0].cpu().numpy()
    names = np.array(model.encoders.modalities)[batch.modality[0].cpu().numpy()]
    count = len(names)
    positions = pl.DataFrame(
        {
            "position": np.arange(2 * count),
            "kind": ["event", "predict"] * count,
            "event_index": np.repeat(batch.event_index[0].cpu().numpy(), 2),
            "modality": np.repeat(names, 2),
            "hours_since_admission": np.repeat(batch.hours[0].cpu().numpy(), 2),
            "static": np.repeat(is_static(model, batch)[0].cpu().numpy(), 2),
        }
    )
    return StayAttention(weights, positions)


def event_attention(attention: StayAttention) -> pl.DataFrame:
    """What every event gives and gets, read off a stay's map.

    Returns:
        one row per event: event_index, modality, hours_since_admission, and shares of attention in [0, 1]:
        ``from_last`` what the last read-out puts on the event, ``from_own`` what its own read-out does,
        ``from_later`` the mean over the read-outs after it (null for the last event), and ``on_static``, ``on_self``,
        ``on_earlier``, ``on_read_outs`` where its own read-out looks: at static events, at the event itself, at earlier
        events that are not static, at [PREDICT]s (its own among them). These last four add up to 1; a static event is
        ``on_static`` to its own read-out.
    """
    events = attention.positions.filter(pl.col("kind") == "event").drop("position", "kind", "static")
    return events.with_columns(**_given(attention.weights), **_looks(attention))


def _given(weights: np.ndarray) -> dict[str, pl.Series]:
    to_events = weights[READ_OUTS, EVENTS].astype(np.float64)  # [read-out, event]
    count = len(to_events)
    later = np.arange(count)[:, None] > np.arange(count)[None, :]
    totals, rows = (to_events * later).sum(axis=0), later.sum(axis=0)
    means = pl.Series(totals / np.maximum(rows, 1))
    return {
        "from_last": pl.Series(to_events[-1]),
        "from_own": pl.Series(np.diagonal(to_events).copy()),
        "from_later": pl.Series([None if n == 0 else m for m, n in zip(means, rows, strict=True)], dtype=pl.Float64),
    }


def _looks(attention: StayAttention) -> dict[str, pl.Series]:
    read_outs = attention.weights[READ_OUTS].astype(np.float64)
    to_events = read_outs[:, EVENTS]
    is_static = attention.positions["static"].to_numpy()[EVENTS]
    own = np.where(is_static, 0.0, np.diagonal(to_events))
    on_static = to_events[:, is_static].sum(axis=1)
    return {
        "on_static": pl.Series(on_static),
        "on_self": pl.Series(own),
        "on_earlier": pl.Series(to_events.sum(axis=1) - on_static - own),
        "on_read_outs": pl.Series(read_outs[:, READ_OUTS].sum(axis=1)),
    }


def attention_table(attention: StayAttention) -> pl.DataFrame:
    """A stay's map as a table.

    Returns:
        one row per pair of positions of which the first may see the second: ``query, query_kind, query_event_index,
        query_modality, query_hours, key, key_kind, key_event_index, key_modality, key_hours, weight``.
    """
    rows, columns = np.tril_indices(len(attention.weights))
    labels = attention.positions.drop("static")
    parts = []
    for side, chosen in (("query", rows), ("key", columns)):
        names = {name: f"{side}_{name}" for name in labels.columns}
        named = names | {"position": side, "hours_since_admission": f"{side}_hours"}
        parts.append(labels[chosen].rename(named))
    weights = pl.DataFrame({"weight": attention.weights[rows, columns]})
    return pl.concat([*parts, weights], how="horizontal")
