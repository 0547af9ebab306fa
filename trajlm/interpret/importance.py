"""What attention, cuts, removal and attribution each say of every event of a stay."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import polars as pl
import torch

from trajlm.errors import TrajlmError
from trajlm.interpret.agreement import INTERVENTIONS, LEAST, disagreement
from trajlm.interpret.attention import event_attention, shown_layer, stay_attention
from trajlm.interpret.attribution import IncompleteAttributionError, integrated_gradients
from trajlm.interpret.edits import How, ablate, stacked
from trajlm.interpret.interventions import TOGETHER, event_rows, knock_out_effects, last_beliefs
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel

MEANING = 2  # counted up when an intervention changes: what a report kept of the old ones is then found anew


@torch.no_grad()
def removal_effects(model: TrajectoryModel, batch: TrajectoryBatch, target: str) -> np.ndarray:
    """float64[S]: how far the last belief of one timeline moves when each event had never been recorded.

    Later states know older values instead (:func:`trajlm.interpret.edits.ablate`); without the last event the last
    belief is that before it, held on to the same hour (:meth:`trajlm.tasks.Task.held_on`). Events of a modality at the
    same hour go together, as the state cannot tell which measured what: each has their common effect. Where these are
    the whole stay they show their missing token.
    """
    whole, task = last_beliefs(model, model(batch), batch)[target], model.fitted_tasks[model.targets.index(target)]
    found = []
    together = (batch.modality[0, :, None] == batch.modality[0]) & (batch.hours[0, :, None] == batch.hours[0])
    for part in together.split(TOGETHER):
        hows: list[How] = ["missing_token" if chosen.all() else "removed" for chosen in part]
        versions = stacked([ablate(model, batch, gone[None], how) for gone, how in zip(part, hows, strict=True)])
        lag = batch.hours.amax() - versions.hours.amax(dim=1)
        found.append(task.held_on(last_beliefs(model, model(versions), versions)[target], lag) - whole)
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
        are null for models without attention to show, attributions where they do not add up.
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
    attribution: pl.Expr | pl.Series = nothing
    with suppress(IncompleteAttributionError):
        attribution = integrated_gradients(model, batch, target).events["attribution"]
    return rows.with_columns(attention=attention, knock_out=cut, removal=removal, attribution=attribution)


def disagreements(
    model: TrajectoryModel, batches: Sequence[TrajectoryBatch], target: str, least: float = LEAST
) -> pl.DataFrame:
    """Where attention and intervention disagree, stay by stay.

    Args:
        model: fine-tuned.
        batches: of one timeline each, without padding.
        target: whose last belief.
        least: as in :func:`trajlm.interpret.agreement.disagreement`.

    Returns:
        one row per stay: stay_id and what :func:`trajlm.interpret.agreement.disagreement` says of it.
    """
    rows = [{"stay_id": int(b.stay_ids[0]), **disagreement(event_importance(model, b, target), least)} for b in batches]
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(INTERVENTIONS, pl.Float64))
