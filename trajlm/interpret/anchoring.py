"""The anchoring audit of one run, or of two against each other, as tables (``trajlm anchoring``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl
from tqdm import tqdm

from trajlm.errors import TrajlmError
from trajlm.interpret.ablation import (
    NOTHING,
    ablation_trajectories,
    anchoring,
    cohort_ablation,
    cohort_batches,
)
from trajlm.interpret.attention import StayAttention, event_attention, shown_layer, stay_attention
from trajlm.interpret.audit import (
    MEASURES,
    contrast,
    contrast_summary,
    decision_thresholds,
    ranked,
    summarise,
    with_decisions,
)
from trajlm.interpret.edits import Ablation
from trajlm.interpret.runs import OpenRun, drawn

RUN, AGAINST = "run", "against"


@dataclass(frozen=True)
class StayView:
    """One stay and ablation as the paper's figures show it.

    Attributes:
        stay_id, ablated: which.
        maps: by run and by "nothing" or ``ablated``, the layer's attention averaged over heads; empty for
            backbones without attention.
    """

    stay_id: int
    ablated: str
    maps: dict[tuple[str, str], StayAttention]


@dataclass(frozen=True)
class AnchoringAudit:
    """What the audit found; the first column of each table is ``run`` ("run" or "against"), save for differences.

    Attributes:
        target: whose drift ranks the stays.
        thresholds: by run and target, the belief from which on a stay is flagged.
        changes: every stay, ablation and target: the columns of
            :func:`trajlm.interpret.audit.with_decisions`.
        summary: SUMMARY_COLUMNS.
        difference: SUMMARY_COLUMNS of run minus against, paired by stay; empty for one run.
        ranked: stays by how far their belief moved; with two runs by how much further it moved in one of them.
        anchored: stays by how much attention moved to static events; likewise.
        trajectories: of the stays shown, the belief after every event: the columns of
            :func:`trajlm.interpret.ablation.ablation_trajectories` (figure 4).
        attention: of the stays shown, where every read-out looks: stay_id, ablated and the columns of
            :func:`trajlm.interpret.attention.event_attention` (figure 5).
        stays: the stays shown.
    """

    target: str
    thresholds: dict[str, dict[str, float]]
    changes: pl.DataFrame
    summary: pl.DataFrame
    difference: pl.DataFrame
    ranked: pl.DataFrame
    anchored: pl.DataFrame
    trajectories: pl.DataFrame
    attention: pl.DataFrame
    stays: list[StayView] = field(default_factory=list)

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables by name."""
        names = ("changes", "summary", "difference", "ranked", "anchored", "trajectories", "attention")
        return {name: getattr(self, name) for name in names}


def audit_run(
    run: OpenRun, modalities: Sequence[str], stays: pl.Series, layer: int | None = None
) -> tuple[pl.DataFrame, dict[str, float]]:
    """These stays of a run before and after each ablation, and the thresholds of decision."""
    positions = run.positions(stays)
    batches = cohort_batches(run.model, run.prepared, run.latents, positions)
    size = -(-len(positions) // 16)
    shown = tqdm(batches, total=size, desc=f"ablations of {run.folder.name}", unit="batch", mininterval=2.0)
    ablations = cohort_ablation(run.model, shown, modalities, layer)
    thresholds = decision_thresholds(run.beliefs, run.prepared.stays, run.targets)
    return with_decisions(anchoring(ablations, run.model.targets), thresholds), thresholds


def audit_anchoring(
    run: OpenRun,
    against: OpenRun | None = None,
    modalities: Sequence[str] = (),
    target: str | None = None,
    most_stays: int = 0,
    shown: int = 2,
    resamples: int = 1000,
    layer: int | None = None,
) -> AnchoringAudit:
    """The audit.

    Args:
        run: whose beliefs.
        against: a run on the same records to compare with (contrastive against scratch), on the stays that both hold
            out.
        modalities: to ablate; none is each in turn.
        target: whose drift ranks the stays; None is the first.
        most_stays: held-out stays to ablate, drawn by the run's seed, the same of both runs; 0 is all.
        shown: stays to show of either ranking.
        resamples: of the patient-level bootstrap.
        layer: whose attention; None is the last that has any.

    Raises:
        TrajlmError: a modality or target is not known, or the two runs share no stay.
    """
    modalities = list(modalities) or list(run.model.encoders.modalities)
    unknown = sorted(set(modalities) - set(run.model.encoders.modalities))
    if unknown:
        raise TrajlmError(
            f"{unknown[0]!r} cannot be ablated; the model reads {', '.join(run.model.encoders.modalities)}"
        )
    target, stays = target or run.model.targets[0], run.prepared.stays
    runs = {RUN: run} | ({AGAINST: against} if against else {})
    seed, held_out = run.recipe["seed"], run.held_out
    if against:
        held_out = held_out.filter(held_out.is_in(against.held_out.implode()))
        if held_out.is_empty():
            raise TrajlmError(f"{against.folder} holds out no stay that {run.folder} does; compare runs of one split")
    audited = drawn(held_out, most_stays, seed)
    found = {name: audit_run(one, modalities, audited, layer) for name, one in runs.items()}
    changes = {name: rows for name, (rows, _) in found.items()}
    summary = _by_run({name: summarise(rows, stays, resamples, seed) for name, rows in changes.items()})
    if against:
        pairs = contrast(changes[RUN], changes[AGAINST])
        difference = contrast_summary(pairs, stays, resamples, seed)
        drifted, anchored = (ranked(pairs, target, pl.col(f"{n}_difference").abs()) for n in ("drift", "share_change"))
    else:
        difference = summary.drop("run").clear()
        drifted, anchored = ranked(changes[RUN], target), ranked(changes[RUN], target, MEASURES["share_change"])
    chosen = [row for order in (drifted, anchored) for row in order.select("stay_id", "ablated").head(shown).rows()]
    views, trajectories, attention = _views(runs, list(dict.fromkeys(chosen)), layer)
    return AnchoringAudit(
        target,
        {name: thresholds for name, (_, thresholds) in found.items()},
        _by_run(changes),
        summary,
        difference,
        drifted,
        anchored,
        trajectories,
        attention,
        views,
    )


def _by_run(tables: dict[str, pl.DataFrame]) -> pl.DataFrame:
    return pl.concat([table.select(pl.lit(name).alias("run"), pl.all()) for name, table in tables.items()])


def _views(
    runs: dict[str, OpenRun], chosen: Sequence[tuple[int, str]], layer: int | None
) -> tuple[list[StayView], pl.DataFrame, pl.DataFrame]:
    """The stays shown, their beliefs after every event and where every read-out looks."""
    views, trajectories, attention = [], [], []
    for stay, ablated in chosen:
        maps = {}
        for name, run in runs.items():
            batch = run.model.encode_timeline(run.prepared.timeline(stay))
            watched = shown_layer(run.model) if layer is None else layer
            ablation = Ablation(ablated, modalities=(ablated,))
            frame = ablation_trajectories(run.model, batch, [ablation])
            trajectories.append(frame.select(pl.lit(name).alias("run"), pl.all()))
            for label, one in ((NOTHING, batch), (ablated, ablation.apply(run.model, batch))):
                if watched is None:
                    continue
                maps[name, label] = stay_attention(run.model, one, watched)
                looks = event_attention(maps[name, label])
                keys = [pl.lit(v).alias(c) for c, v in (("run", name), ("stay_id", stay), ("ablated", label))]
                attention.append(looks.select(*keys, pl.all()))
        views.append(StayView(stay, ablated, maps))
    empty = pl.DataFrame(schema={"run": pl.String, "stay_id": pl.Int64, "ablated": pl.String})
    told = pl.concat(trajectories).unique(maintain_order=True)
    return views, told, pl.concat(attention).unique(maintain_order=True) if attention else empty
