"""Stage 3: a run folder to a report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.torch import load_file
from tqdm import tqdm

from trajlm.arms import SEQUENCE
from trajlm.assemble import ENCODER_WEIGHTS, load_trajectory_model
from trajlm.checkpoint import fingerprint, read_log
from trajlm.dataset import Prepared
from trajlm.errors import TrajlmError
from trajlm.interpret import ablation
from trajlm.interpret.ablation import (
    NOTHING,
    ablated_cohort,
    anchoring,
    cohort_ablation,
    cohort_batches,
    most_divergent_stays,
)
from trajlm.interpret.attention import StayAttention, shown_layer, stay_attention
from trajlm.interpret.attribution import require_captum
from trajlm.interpret.audit import contrast, contrast_summary, decision_thresholds, summarise, with_decisions
from trajlm.interpret.beliefs import ablated_timelines, belief_trajectory
from trajlm.interpret.importance import MEANING, event_importance
from trajlm.interpret.removal import removal_rows
from trajlm.interpret.runs import drawn, finished_run
from trajlm.latents import Latents
from trajlm.report.build import OtherRun, RunFindings, StayFindings, build_report
from trajlm.report.page import write_report
from trajlm.schema import HELD_OUT, Timeline
from trajlm.training import history
from trajlm.trajectory import TrajectoryModel


@dataclass
class InterpretConfig:
    """Explain a fine-tuned run.

    Args:
        run: run folder of finetune.py.
        out: folder of the report.
        data: prepared folder, if it moved since.
        stay: stays to show; none shows the held-out stays whose belief diverges most under ablation.
        ablate: modalities to ablate; none ablates every one in turn.
        stays_shown: how many stays to show when none is named.
        audit_stays: how many held-out stays to ablate for the cohort's tables, drawn by the run's seed; 0 is all.
        against: run folder of a second run on the same prepared folder, shown beside the first.
        figures: kinds of file to write every figure as, beside the page: png, svg.
        show_notes: show the text of notes. By default a report carries no note text.
        interventions: targets for which every event of the stays shown is removed, cut off and attributed; an empty
            list is the first target, None is none: it costs two readings per event and more.
    """

    run: str
    out: str
    data: str | None = None
    stay: list[int] = field(default_factory=list)
    ablate: list[str] = field(default_factory=list)
    stays_shown: int = 6
    audit_stays: int = 256
    against: str | None = None
    figures: list[str] = field(default_factory=lambda: ["png", "svg"])
    show_notes: bool = False
    interventions: list[str] | None = None


@dataclass(frozen=True)
class OpenedRun:
    """A finished run of finetune.py, as it lies on disk and as a model."""

    folder: Path
    about: dict[str, Any]
    metrics: dict[str, Any]
    model: TrajectoryModel


def open_run(folder: Path, data: str | None) -> tuple[OpenedRun, Prepared]:
    """A run and the prepared folder it was made from; ``data`` says where that lies now, if it moved.

    Raises:
        TrajlmError: fine-tuning has not finished there, or the prepared folder is another.
    """
    about, prepared = finished_run(folder, data)
    metrics = json.loads((folder / "metrics.json").read_text())
    return OpenedRun(folder, about, metrics, load_trajectory_model(folder)), prepared


def interpret(config: InterpretConfig) -> Path:
    """Write the report of a run and return its page."""
    opened, prepared = open_run(Path(config.run), config.data)
    other = None if config.against is None else _other_run(Path(config.against), opened, prepared)
    model, about = opened.model, opened.about
    modalities = config.ablate or list(model.encoders.modalities)
    unknown = sorted(set(modalities) - set(model.encoders.modalities))
    if unknown:
        raise TrajlmError(f"--ablate {unknown[0]}: the model reads {', '.join(model.encoders.modalities)}")
    for stay in config.stay:
        prepared.position(stay)
    explained = _explained(config.interventions, model)
    recipe_seed, beliefs = about["recipe"]["seed"], pl.read_parquet(opened.folder / "beliefs.parquet")
    held_out = beliefs.filter(pl.col("split") == HELD_OUT)["stay_id"].unique().sort()
    held_out = drawn(held_out, config.audit_stays, recipe_seed)
    ablations = _ablations(opened, prepared, held_out, modalities, Path(config.out))
    changes = _changes(opened, ablations, prepared)

    def averaged(table: pl.DataFrame, average: Callable[..., pl.DataFrame] = summarise) -> pl.DataFrame:
        return average(table, prepared.stays, about["recipe"]["finetuning"]["bootstrap_resamples"], recipe_seed)

    beside = None
    if other is not None:
        found = _ablations(other, prepared, held_out, _known(other, modalities), Path(config.out))
        moved = _changes(other, found, prepared)
        name = _other_name(other.folder, opened.folder)
        difference = averaged(contrast(changes, moved), contrast_summary)
        beside = OtherRun(name, other.folder, other.metrics, moved, averaged(moved), difference)
    shown = config.stay or most_divergent_stays(changes, model.targets[0], config.stays_shown)
    findings = []
    for stay in tqdm(shown, desc="stays", unit="stay"):
        read = stay_findings(model, prepared, stay, modalities, config.show_notes, other.model if other else None)
        importance = {target: _importance(opened, read.timeline, target, Path(config.out)) for target in explained}
        findings.append(replace(read, importance=importance))
    figures = ablation_metrics(ablations, modalities, prepared, opened.metrics["targets"], about["recipe"])
    report = build_report(
        opened.folder, prepared, model, opened.metrics, figures, changes, averaged(changes), findings,
        _pretraining(about), _history(opened.folder), beside,
    )  # fmt: skip
    page = write_report(report, Path(config.out), config.figures)
    print(f"report: {page}")
    return page


def _explained(wanted: Sequence[str] | None, model: TrajectoryModel) -> list[str]:
    """The targets of ``--interventions``, checked before anything long is begun."""
    if wanted is None:
        return []
    unknown = sorted(set(wanted) - set(model.targets))
    if unknown:
        raise TrajlmError(f"--interventions {unknown[0]}: the run believes in {', '.join(model.targets)}")
    require_captum()
    return list(wanted) or model.targets[:1]


def _importance(opened: OpenedRun, timeline: Timeline, target: str, out: Path) -> pl.DataFrame:
    """What each event does to the last belief of a stay; kept in ``out``, as :func:`_ablations` are."""
    folder = out / "work" / fingerprint(opened.folder / "metrics.json", MEANING)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    kept, batch = folder / f"importance_{timeline.stay_id}_{target}.parquet", opened.model.encode_timeline(timeline)
    return _kept(kept, event_importance, opened.model, batch, target)


def _kept(path: Path, analysis: Callable[..., pl.DataFrame], *arguments: Any) -> pl.DataFrame:
    """What lies there, or else what the analysis finds now, so that an interrupted report goes on."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        analysis(*arguments).write_parquet(partial)
        partial.replace(path)
    return pl.read_parquet(path)


def _other_run(folder: Path, opened: OpenedRun, prepared: Prepared) -> OpenedRun:
    """The run of ``--against``, checked to be comparable."""
    other, _ = open_run(folder, str(prepared.folder))
    if other.model.targets != opened.model.targets:
        raise TrajlmError(
            f"--against {folder}: expected the targets {', '.join(opened.model.targets)}, it believes in "
            f"{', '.join(other.model.targets)}"
        )
    return other


def _other_name(folder: Path, beside: Path) -> str:
    """What a reader calls the other run: its folder, with the folder above where both are named alike."""
    own = folder.resolve()
    return own.name if own.name != beside.resolve().name else f"{own.parent.name}/{own.name}"


def _known(opened: OpenedRun, modalities: Sequence[str]) -> list[str]:
    return [name for name in modalities if name in opened.model.encoders.modalities]


def stay_findings(
    model: TrajectoryModel,
    prepared: Prepared,
    stay_id: int,
    modalities: Sequence[str],
    notes: bool = False,
    other: TrajectoryModel | None = None,
) -> StayFindings:
    """Beliefs and attention of one stay, with nothing and with each modality ablated; and as ``other`` reads it.

    Of a stay longer than a model reads the events that it reads are ablated: none that came later moves up.
    """
    timeline = prepared.timeline(stay_id)

    def read(one: TrajectoryModel) -> RunFindings:
        layer = shown_layer(one)

        def look(part: Timeline) -> tuple[pl.DataFrame, StayAttention | None]:
            seen = None if layer is None else stay_attention(one, one.encode_timeline(part), layer)
            return belief_trajectory(one, part, notes), seen

        fits = one.encode_timeline(timeline).event_index[0].tolist()
        whole = replace(timeline, events=tuple(timeline.events[i] for i in fits))
        ablated = {m: look(part) for m, part in ablated_timelines(whole, modalities).items()}
        # Events keep the numbers they have in the whole stay.
        kept = {m: [i for i in fits if timeline.events[i].modality != m] for m in ablated}
        numbered = {m: (_numbered(frame, kept[m]), seen) for m, (frame, seen) in ablated.items()}
        return RunFindings(*look(timeline), numbered)

    return StayFindings(timeline, read(model), None if other is None else read(other))


def _numbered(frame: pl.DataFrame, numbers: Sequence[int]) -> pl.DataFrame:
    return frame.with_columns(pl.Series("event_index", [numbers[i] for i in frame["event_index"]], dtype=pl.Int64))


def _ablations(
    opened: OpenedRun, prepared: Prepared, stays: pl.Series, modalities: Sequence[str], out: Path
) -> pl.DataFrame:
    """The cohort's ablations; kept in ``out`` chunk by chunk."""
    run, model = opened.folder, opened.model
    latents = Latents(run / "latents", prepared, model.encoders.modalities)
    positions = np.array([prepared.position(s) for s in stays])
    positions = positions[np.argsort(np.diff(prepared.bounds)[positions], kind="stable")]
    key = fingerprint(run / "metrics.json", ablation.MEANING, list(modalities), stays.to_list())[:16]
    folder = out / "work" / key
    folder.mkdir(parents=True, exist_ok=True)
    frames = []
    for start in tqdm(range(0, len(positions), 32), desc="ablations", unit="batch"):
        batches = cohort_batches(model, prepared, latents, positions[start : start + 32])
        frames.append(_kept(folder / f"{start:09d}.parquet", cohort_ablation, model, batches, modalities))
    return pl.concat(frames, how="diagonal")


def _changes(opened: OpenedRun, ablations: pl.DataFrame, prepared: Prepared) -> pl.DataFrame:
    """Every stay before and after each ablation, with the decisions that flip."""
    beliefs = pl.read_parquet(opened.folder / "beliefs.parquet")
    targets = [(t["name"], t["kind"]) for t in opened.metrics["targets"]]
    thresholds = decision_thresholds(beliefs, prepared.stays, targets)
    return with_decisions(anchoring(ablations, opened.model.targets), thresholds)


def ablation_metrics(
    ablations: pl.DataFrame,
    modalities: Sequence[str],
    prepared: Prepared,
    targets: Sequence[dict[str, str]],
    recipe: dict[str, Any],
) -> pl.DataFrame:
    """Held-out metrics at the end of the window, with nothing and with each modality ablated in every stay.

    Returns:
        REMOVAL_COLUMNS, with ``ablated`` for ``removed``, and ``positives`` (null for hours). The difference is to the
        figure with nothing ablated of the same stays: one that holds nothing but what is ablated has no belief without.
    """
    whole = ablations.filter(pl.col("ablated") == NOTHING)
    cohorts = {NOTHING: whole} | {name: ablated_cohort(ablations, name) for name in modalities}
    beliefs = pl.concat(
        frame.with_columns(removed=pl.lit(name), changed=pl.col("ablated") != NOTHING)
        for name, frame in cohorts.items()
    )
    named = [(t["name"], t["kind"]) for t in targets]
    drawing = recipe["finetuning"]["bootstrap_resamples"], recipe["seed"]
    rows = removal_rows(beliefs, prepared.stays, named, SEQUENCE, *drawing)  # type: ignore[arg-type]
    positives = pl.concat(
        beliefs.group_by("removed").agg(target=pl.lit(name), positives=_positives(name, kind)) for name, kind in named
    )
    rows = rows.join(positives, on=["removed", "target"], how="left", maintain_order="left")
    return rows.rename({"removed": "ablated"})


def _positives(target: str, kind: str) -> pl.Expr:
    counted = pl.col(f"target_{target}").sum().cast(pl.Int64)
    return counted if kind == "probability" else pl.lit(None, pl.Int64)


def _pretraining(about: dict[str, Any]) -> dict[str, Any] | None:
    """Metrics and history of the encoders' run, if it still lies where fine-tuning found it."""
    run = Path(about["recipe"]["encoders"])
    weights = run / ENCODER_WEIGHTS
    if about["recipe"]["encoders"] == "scratch" or not (run / "metrics.json").exists():
        return None
    if fingerprint(*[tensor for _, tensor in sorted(load_file(weights).items())]) != about["inputs"]["encoders"]:
        return None  # another run lies there by now
    environment = json.loads((run / "environment.json").read_text())
    return json.loads((run / "metrics.json").read_text()) | {"history": _history(run), "environment": environment}


def _history(run: Path) -> list[dict[str, Any]]:
    return history(read_log(run))
