"""Where attention and intervention disagree: per stay, event by event."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from scipy.stats import spearmanr

from trajlm.errors import TrajlmError
from trajlm.interpret.attention import event_attention, shown_layer, stay_attention
from trajlm.interpret.attribution import integrated_gradients
from trajlm.interpret.edits import ablate, stacked
from trajlm.interpret.interventions import TOGETHER, event_rows, knock_out_effects, last_beliefs
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel

INTERVENTIONS = ("knock_out", "removal", "attribution")


@torch.no_grad()
def removal_effects(model: TrajectoryModel, batch: TrajectoryBatch, target: str) -> np.ndarray:
    """float64[S]: how far the last belief of one timeline moves when each event shows its missing token instead.

    What the event measured is forgotten by later states too (:func:`trajlm.interpret.edits.ablate`).
    """
    count = batch.present.shape[1]
    whole = last_beliefs(model, model(batch), batch)[target]
    found = []
    for part in torch.eye(count, dtype=torch.bool, device=batch.present.device).split(TOGETHER):
        versions = stacked([ablate(model, batch, chosen[None], "missing_token") for chosen in part])
        found.append(last_beliefs(model, model(versions), versions)[target] - whole)
    return torch.cat(found).cpu().double().numpy()


def event_importance(model: TrajectoryModel, batch: TrajectoryBatch, target: str) -> pl.DataFrame:
    """What attention, cuts, removal and attribution each say of every event of a stay.

    Args:
        model: fine-tuned.
        batch: of one timeline without padding.
        target: whose last belief.

    Returns:
        one row per event: event_index, modality, hours_since_admission, ``attention`` (what the last read-out puts on
        the event, in the last layer that has attention), ``knock_out`` (last belief with the event cut off from all
        that follows, minus that without), ``removal`` (:func:`removal_effects`) and ``attribution``
        (:func:`trajlm.interpret.attribution.integrated_gradients`), each in the belief's unit. Attention and knock-out
        are null for backbones without attention.
    """
    layer = shown_layer(model)
    rows = event_rows(model, batch)
    nothing = pl.lit(None, pl.Float64)
    attention: pl.Expr | pl.Series = nothing
    cut: pl.Expr | pl.Series = nothing
    if layer is not None:
        attention = event_attention(stay_attention(model, batch, layer))["from_last"]
    try:
        cut = knock_out_effects(model, batch)[f"effect_{target}"] if layer is not None else nothing
    except TrajlmError:  # a family whose attention can be watched and not changed
        cut = nothing
    removal = pl.Series(removal_effects(model, batch, target))
    attribution = integrated_gradients(model, batch, target).events["attribution"]
    return rows.with_columns(attention=attention, knock_out=cut, removal=removal, attribution=attribution)


def agreement(importance: pl.DataFrame) -> dict[str, float | None]:
    """Spearman's rank correlation over events of attention with the size of each intervention's effect.

    Returns:
        ``knock_out``, ``removal``, ``attribution``: in [-1, 1]; None where undefined (fewer than three events, a
        constant, or unknown).
    """
    found: dict[str, float | None] = {}
    for name in INTERVENTIONS:
        known = importance.drop_nulls(["attention", name])
        x, y = known["attention"].to_numpy(), known[name].abs().to_numpy()
        usable = known.height >= 3 and len(set(x)) > 1 and len(set(y)) > 1
        found[name] = float(spearmanr(x, y).statistic) if usable else None
    return found


def disagreements(
    model: TrajectoryModel, batches: Sequence[TrajectoryBatch], target: str, least: float = 0.3
) -> pl.DataFrame:
    """Where attention and intervention disagree, stay by stay.

    Args:
        model: fine-tuned.
        batches: of one timeline each, without padding.
        target: whose last belief.
        least: rank correlation below which they are said to disagree.

    Returns:
        one row per stay: stay_id, events, the three correlations of :func:`agreement`, ``most_attended`` and
        ``most_moving`` (event_index of the event that the last read-out attends to most, and of the one whose removal
        moves the belief most), ``same_event``, and ``disagree``: attention's ranking correlates less than ``least``
        with the removals'. Null where the backbone has no attention.
    """
    rows = []
    for batch in batches:
        found = event_importance(model, batch, target)
        ranks = agreement(found)
        attended = found.sort("attention", descending=True, nulls_last=True)["event_index"][0]
        moving = found.sort(pl.col("removal").abs(), descending=True)["event_index"][0]
        seen = found["attention"].null_count() == 0
        removal = ranks["removal"]
        rows.append(
            {
                "stay_id": int(batch.stay_ids[0]),
                "events": found.height,
                **ranks,
                "most_attended": attended if seen else None,
                "most_moving": moving,
                "same_event": attended == moving if seen else None,
                "disagree": None if removal is None else removal < least,
            }
        )
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(INTERVENTIONS, pl.Float64))
