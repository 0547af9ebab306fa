"""Findings of a run to the tables a report shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.arms import ARM_TITLES, arm_title, beliefs_path
from trajlm.checkpoint import read_run
from trajlm.dataset import Prepared
from trajlm.interpret.attention import StayAttention
from trajlm.metrics import beliefs_at_landmark, reliability_curve
from trajlm.report.contents import ABLATION_COLUMNS, DIFFERENCE_COLUMNS
from trajlm.report.page import AblatedStay, AgainstStay, AttentionMap, Report, StayPage, TargetInfo
from trajlm.report.values import event_values
from trajlm.schema import HELD_OUT, SPLITS, Timeline
from trajlm.trajectory import TrajectoryModel

SMALL_SAMPLE = 30  # positives under which an interval says little more than "unknown"
UNITS = {"probability": "", "hours": "h"}
STAGE_TITLES = ARM_TITLES | {"alignment": "pretraining (alignment)"}


@dataclass(frozen=True)
class RunFindings:
    """How one run reads a stay: beliefs and attention, and the same without each of some modalities."""

    trajectory: pl.DataFrame
    attention: StayAttention | None
    ablated: dict[str, tuple[pl.DataFrame, StayAttention | None]]


@dataclass(frozen=True)
class StayFindings:
    """What was found of one stay, by the run and by the run it is compared with; by target, its events' importance."""

    timeline: Timeline
    own: RunFindings
    against: RunFindings | None = None
    importance: dict[str, pl.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class OtherRun:
    """The run that a report compares with: its name, its metrics, what moved per stay and ablation, and its audit."""

    name: str
    run: Path
    metrics: dict[str, Any]
    changes: pl.DataFrame
    audit: pl.DataFrame
    difference: pl.DataFrame


def build_report(
    run: Path,
    prepared: Prepared,
    model: TrajectoryModel,
    metrics: dict[str, Any],
    ablation: pl.DataFrame,
    changes: pl.DataFrame,
    audit: pl.DataFrame,
    findings: Sequence[StayFindings],
    pretraining: dict[str, Any] | None,
    history: Sequence[dict[str, Any]],
    other: OtherRun | None = None,
) -> Report:
    """Everything the page shows, from what the run folder and the analyses hold."""
    environment = json.loads((run / "environment.json").read_text())
    held_out = (pretraining or {}).get("splits", {}).get(HELD_OUT)
    epochs = [*(pretraining or {}).get("history", []), *history]
    manifest = prepared.manifest
    return Report(
        title=f"Beliefs of a trajectory model on {manifest['release']}",
        subtitle=_sentence(metrics["description"]),
        targets=target_infos(metrics),
        facts=_facts(run, prepared, environment, metrics, pretraining),
        warnings=_warnings(prepared, metrics, read_run(run)["recipe"], model),
        metrics=_arm_metrics(metrics, other),
        calibration=_calibration(run, prepared, metrics, other),
        presence=_presence(manifest),
        retrieval=pl.DataFrame(held_out["recall_by_pair"]) if held_out else None,
        silhouette=held_out["silhouette"] if held_out else None,
        training=_training(epochs),
        stages=_stages(environment, pretraining),
        accounting=_accounting(manifest),
        anchoring=changes,
        difference=_difference(metrics),
        ablation=ablation.select(ABLATION_COLUMNS),
        beliefs=_beliefs_in(run, changes["stay_id"]),
        details=_details(environment),
        stays=[stay_page(found, [t["name"] for t in metrics["targets"]], model) for found in findings],
        against=None if other is None else other.name,
        anchoring_against=None if other is None else other.changes,
        audit=audit,
        audit_against=None if other is None else other.audit,
        audit_difference=None if other is None else other.difference,
    )


def target_infos(metrics: dict[str, Any]) -> list[TargetInfo]:
    """What a run believes in, from its ``metrics.json``, as a reader meets it."""
    return [TargetInfo(t["name"], t["title"].capitalize(), UNITS[t["kind"]], t["kind"]) for t in metrics["targets"]]


def _facts(
    run: Path, prepared: Prepared, environment: dict[str, Any], metrics: dict[str, Any], pretraining: dict | None
) -> list[tuple[str, str]]:
    import yaml

    recipe = yaml.safe_load((run / "config.yaml").read_text())["recipe"]
    stays = metrics["stays"]
    return [
        ("Cohort", f"{prepared.manifest['cohort']}: {prepared.manifest['release']}"),
        ("Stays", ", ".join(f"{stays[s]} {s.replace('_', ' ')}" for s in SPLITS)),
        ("Backbone", f"{recipe['backbone']['name']}, tuning {recipe['backbone']['tuning']}"),
        ("Encoders", _encoders(recipe["encoders"], pretraining is not None)),
        ("Seed", str(environment["seed"])),
        ("Commit", str(environment["git_commit"] or "unknown")[:12]),
    ]


def _encoders(of: str, found: bool) -> str:
    if of == "scratch":
        return "never pretrained"
    told = "pretrained with Masked Global Alignment, frozen"
    return told if found else f"{told}; their run is not at {of} any more, so nothing of it is shown"


def _details(environment: dict[str, Any]) -> list[tuple[str, str]]:
    hardware = environment["hardware"]
    return [
        ("Versions", ", ".join(f"{k} {v}" for k, v in environment["versions"].items())),
        ("Hardware", f"{hardware['device']}, {hardware['cpu_count']} CPU cores, {hardware['threads']} threads"),
    ]


def _sentence(text: str) -> str:
    words = text.replace("held_out", "held-out").removesuffix("; 0 stays without events left out")
    return words[:1].upper() + words[1:]


BESIDE = {"linear_readout": "a regression", "tree_readout": "trees"}
MOST_NAMED = 4  # targets in a sentence


def _network_counts(model: TrajectoryModel) -> str:
    """How much of a read-out passes the network, and what the rest is."""
    beside = " and ".join(BESIDE[name] for name in model.components[1:])
    counted = [f"{share:.0%}" for share in sorted(model.shares[0].tolist())]
    if counted[0] == counted[-1]:
        told = f"{counted[0]} of every read-out"
    elif len(counted) > MOST_NAMED:
        told = f"{counted[0]} to {counted[-1]} of a read-out (shares.json)"
    else:
        shares = zip(model.fitted_tasks, model.shares[0].tolist(), strict=True)
        told = " and ".join(f"{share:.0%} of the read-out of {task.title}" for task, share in shares)
    return (
        f"The network counts for {told}; the rest is {beside} of what is known at that moment. Attention and "
        "activations do not show it. Ablations do."
    )


def _warnings(prepared: Prepared, metrics: dict[str, Any], recipe: dict[str, Any], model: TrajectoryModel) -> list[str]:
    finetuning = recipe["finetuning"]
    warnings = ["Beliefs were learned from one cohort and were not validated elsewhere."]
    if prepared.manifest["invented"]:
        warnings.append("These patients are invented: the figures say that the pipeline works, nothing about medicine.")
    warnings += [f"Open leak: {leak}" for leak in prepared.manifest["open_leaks"]]
    rows = [r for r in metrics["arms"][HELD_OUT]["sequence"] if r["landmark"] is None and r["positives"] is not None]
    few = {r["target"]: r["positives"] for r in rows if r["positives"] < SMALL_SAMPLE}
    for target, positives in few.items():
        warnings.append(f"Only {positives} held-out stays are positive for {target}: read intervals, not values.")
    if finetuning["event_context"] == "newest":
        warnings.append(
            "Every event brings along the newest of every modality, demographics among them (event_context newest): "
            "attention on the demographics event understates their weight. Ablations do not."
        )
    past = {
        "event_latents": finetuning["event_latents"] != "own",
        "event_inputs": finetuning["event_inputs"] != "latent",
        "encoder.state": recipe["encoder"]["state"],
    }
    if any(past.values()):
        told = ", ".join(name for name, tells in past.items() if tells)
        warnings.append(
            f"An event also tells of its modality's past ({told}): attention on earlier events understates what they "
            "count for. Ablations do not."
        )
    if finetuning["readout"] == "predict_and_event":
        warnings.append(
            "A belief is also read from its event directly (readout predict_and_event): attention shows only what the "
            "history adds."
        )
    if len(model.components) > 1:
        warnings.append(_network_counts(model))
    return warnings


def _landmark(hours: float | None) -> str:
    return "end of window" if hours is None else f"{hours:g} h"


def _arms(metrics: dict[str, Any], other: OtherRun | None) -> dict[str, list[dict[str, Any]]]:
    """Held-out rows of every arm by its title; of the run compared with, the sequence model's."""
    arms = {arm_title(arm): rows for arm, rows in metrics["arms"][HELD_OUT].items()}
    if other is not None:
        arms[other_title(other)] = other.metrics["arms"][HELD_OUT]["sequence"]
    return arms


def other_title(other: OtherRun) -> str:
    """The arm under which the run compared with stands in tables and figures."""
    return f"{ARM_TITLES['sequence']} of {other.name}"


def _arm_metrics(metrics: dict[str, Any], other: OtherRun | None) -> pl.DataFrame:
    frames = []
    for arm, rows in _arms(metrics, other).items():
        named = [row | {"arm": arm, "landmark": _landmark(row["landmark"])} for row in rows]
        frames.append(_metric_rows(named))
    return pl.concat(frames)


def _difference(metrics: dict[str, Any]) -> pl.DataFrame:
    schema = {name: pl.Float64() if name in ("value", "low", "high") else pl.String() for name in DIFFERENCE_COLUMNS}
    last = [row for row in metrics["difference"] if row["landmark"] is None]
    named = [row | {"against": arm_title(row["against"])} for row in last]
    return pl.DataFrame([{name: row[name] for name in schema} for row in named], schema=schema)


def _metric_rows(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    schema = {
        "arm": pl.String, "target": pl.String, "landmark": pl.String, "metric": pl.String, "value": pl.Float64,
        "low": pl.Float64, "high": pl.Float64, "stays": pl.Int64, "positives": pl.Int64,
    }  # fmt: skip
    return pl.DataFrame([{name: row[name] for name in schema} for row in rows], schema=schema)


def _beliefs_in(run: Path, stays: pl.Series) -> pl.DataFrame:
    """The beliefs of a run in these stays, in order of time."""
    beliefs = pl.read_parquet(run / "beliefs.parquet")
    return beliefs.filter(pl.col("stay_id").is_in(stays.unique().implode())).sort("stay_id", "event_index")


def _calibration(run: Path, prepared: Prepared, metrics: dict[str, Any], other: OtherRun | None) -> pl.DataFrame:
    """Reliability of every arm's last held-out beliefs, probabilities only."""
    rows = []
    files = {arm_title(arm): beliefs_path(run, arm) for arm in metrics["arms"][HELD_OUT]}
    if other is not None:
        files[other_title(other)] = beliefs_path(other.run, "sequence")
    for arm, path in files.items():
        beliefs = pl.read_parquet(path).filter(pl.col("split") == HELD_OUT)
        last = beliefs_at_landmark(beliefs, prepared.stays, None)
        for target in (t["name"] for t in metrics["targets"] if t["kind"] == "probability"):
            known = last.filter(pl.col(f"target_{target}").is_not_null())
            curve = reliability_curve(known[f"target_{target}"].to_numpy(), known[f"belief_{target}"].to_numpy())
            for i, (mean, observed, count) in enumerate(
                zip(curve.belief_mean, curve.observed, curve.count, strict=True)
            ):
                rows.append((arm, target, i, float(mean), float(observed), int(count)))
    columns = ["arm", "target", "bin", "belief_mean", "observed", "stays"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def _presence(manifest: dict[str, Any]) -> pl.DataFrame:
    combinations = manifest["combinations"]
    names = dict.fromkeys(name for split in SPLITS for name in combinations.get(split, {}))
    rows = [(name, *(combinations.get(split, {}).get(name, 0) for split in SPLITS)) for name in names]
    return pl.DataFrame(rows, schema=["combination", *SPLITS], orient="row")


def _training(epochs: Sequence[dict[str, Any]]) -> pl.DataFrame:
    # A static arm is fitted many times: its trials are in tuning.json and log.jsonl.
    shown = [e for e in epochs if "/" not in e["arm"]]
    rows = [(STAGE_TITLES.get(e["arm"], e["arm"]), e["epoch"], e["train_loss"], e["tuning_loss"]) for e in shown]
    return pl.DataFrame(rows, schema=["stage", "epoch", "train_loss", "tuning_loss"], orient="row")


def _stages(environment: dict[str, Any], pretraining: dict[str, Any] | None) -> pl.DataFrame:
    stages = {"pretraining": (pretraining or {}).get("environment"), "fine-tuning": environment}
    rows = [(name, e["seconds"], e["peak_memory_gb"]) for name, e in stages.items() if e]
    return pl.DataFrame(rows, schema=["stage", "seconds", "peak_memory_gb"], orient="row")


def _accounting(manifest: dict[str, Any]) -> pl.DataFrame:
    rows = [(name, t["read"], t["kept"], t["rejected"]) for name, t in manifest["tables"].items()]
    return pl.DataFrame(rows, schema=["table", "read", "kept", "rejected"], orient="row")


def stay_page(found: StayFindings, names: Sequence[str], model: TrajectoryModel) -> StayPage:
    """What the page of a stay shows of its beliefs about the targets ``names``."""
    columns = ["event_index", "hours_since_admission", "modality", "summary"]
    columns += [f"{prefix}_{name}" for name in names for prefix in ("belief", "change")]

    def seen(frame: pl.DataFrame, attention: StayAttention | None) -> AblatedStay:
        map_ = None if attention is None else AttentionMap(attention.weights, attention.positions)
        return AblatedStay(frame.select(columns), map_)

    def without(run: RunFindings) -> dict[str, AblatedStay]:
        return {name: seen(*one) for name, one in run.ablated.items()}

    own, other = seen(found.own.trajectory, found.own.attention), None
    if found.against is not None:
        whole = seen(found.against.trajectory, found.against.attention)
        other = AgainstStay(whole.trajectory, whole.attention, without(found.against))
    return StayPage(
        stay_id=found.timeline.stay_id,
        split=found.timeline.split,
        targets={name: found.timeline.targets.get(name) for name in names},
        trajectory=own.trajectory,
        attention=own.attention,
        ablations=without(found.own),
        values=event_values(model, found.timeline),
        against=other,
        importance=found.importance,
        unread=len(found.timeline.events) - own.trajectory.height,
    )
