"""What a report says, as checked tables: the one thing the drawing code reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import polars as pl

from trajlm.errors import TrajlmError
from trajlm.interpret.audit import SUMMARY_COLUMNS
from trajlm.schema import NOTHING

EVENT, PREDICT = "event", "predict"
ROW_SUM_TOLERANCE = 0.02  # attention computed in bfloat16 sums to 1 within about 1 %

METRIC_COLUMNS = ("arm", "target", "landmark", "metric", "value", "low", "high", "stays", "positives")
CALIBRATION_COLUMNS = ("arm", "target", "bin", "belief_mean", "observed", "stays")
PRESENCE_COLUMNS = ("combination", "train", "tuning", "held_out")
RETRIEVAL_COLUMNS = ("query", "gallery", "k", "recall", "random", "stays")
TRAINING_COLUMNS = ("stage", "epoch", "train_loss", "tuning_loss")
STAGE_COLUMNS = ("stage", "seconds", "peak_memory_gb")
ACCOUNTING_COLUMNS = ("table", "read", "kept", "rejected")
ANCHORING_COLUMNS = (
    "stay_id", "ablated", "target", "share_before", "share_after", "belief_before", "belief_after",
)  # fmt: skip
DIFFERENCE_COLUMNS = ("against", "target", "metric", "value", "low", "high")
LISTED_COLUMNS = ("stay_id", "hours_since_admission")
ABLATION_COLUMNS = (
    "ablated", "target", "metric", "value", "low", "high", "difference", "difference_low", "difference_high", "stays",
    "positives",
)  # fmt: skip
POSITION_COLUMNS = ("position", "kind", "modality", "hours_since_admission")
TRAJECTORY_COLUMNS = ("event_index", "hours_since_admission", "modality", "summary")
VALUE_COLUMNS = ("event_index", "feature", "value", "unit")
IMPORTANCE_COLUMNS = ("event_index", "attention", "knock_out", "removal", "attribution")


def require_columns(frame: pl.DataFrame, columns: tuple[str, ...], what: str) -> None:
    """Raise TrajlmError unless the frame has every one of these columns."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise TrajlmError(f"{what}: expected the columns {list(columns)}, came {frame.columns}: missing {missing}")


@dataclass(frozen=True)
class TargetInfo:
    """A target as a reader meets it.

    Attributes:
        name: as in the columns ``belief_<name>``.
        title: in words, capitalised.
        unit: unit of a belief in hours; "" for a probability.
        kind: what a belief is.
    """

    name: str
    title: str
    unit: str
    kind: Literal["probability", "hours"]


@dataclass(frozen=True)
class AttentionMap:
    """Last-layer attention of one stay, averaged over heads (method 9).

    Attributes:
        weights: float32[T, T], rows the querying position, columns the attended one; causal, rows sum to 1.
        positions: T rows: position, kind ("event" or "predict"), modality (for "predict": of the event before it),
            hours_since_admission.

    Raises:
        TrajlmError: the two disagree in size, or the weights are not causal attention.
    """

    weights: np.ndarray[Any, Any]
    positions: pl.DataFrame

    def __post_init__(self) -> None:
        require_columns(self.positions, POSITION_COLUMNS, "attention positions")
        length = self.positions.height
        if self.weights.shape != (length, length):
            raise TrajlmError(f"attention: expected weights of {length} x {length}, came {self.weights.shape}")
        if length == 0:
            return
        kinds = set(self.positions["kind"].unique()) - {EVENT, PREDICT}
        if kinds:
            raise TrajlmError(f"attention positions: expected the kinds {EVENT} and {PREDICT}, came {sorted(kinds)}")
        if not np.isfinite(self.weights).all() or (self.weights < 0).any():
            raise TrajlmError("attention: expected finite weights of at least 0")
        if any(self.weights[row, row + 1 :].any() for row in range(length)):
            raise TrajlmError("attention: expected causal weights, came a row that attends to a later position")
        worst = float(np.abs(self.weights.sum(axis=1, dtype=np.float64) - 1).max())
        if worst > ROW_SUM_TOLERANCE:
            raise TrajlmError(f"attention: expected rows that sum to 1, came a row off by {worst:.3f}")


@dataclass(frozen=True)
class AblatedStay:
    """A stay once more, without the events of one modality.

    Attributes:
        trajectory: as in StayPage, of the remaining events.
        attention: over the remaining positions; None for a backbone that has none.
    """

    trajectory: pl.DataFrame
    attention: AttentionMap | None


@dataclass(frozen=True)
class AgainstStay:
    """The same stay as another run reads it.

    Attributes:
        trajectory, attention, ablations: as in StayPage.
    """

    trajectory: pl.DataFrame
    attention: AttentionMap | None
    ablations: dict[str, AblatedStay] = field(default_factory=dict)


@dataclass(frozen=True)
class StayPage:
    """One stay: its beliefs after every event, and what they look at.

    Attributes:
        stay_id: as in the prepared folder.
        split: train, tuning or held_out.
        targets: what happened, by target; None where unknown.
        trajectory: one row per event: event_index, hours_since_admission, modality, summary, and for each target t
            belief_<t> and change_<t> (against the belief before the event; null for the first).
        attention: over events and read-outs; None for a backbone that has none.
        ablations: the same stay without one modality, by modality.
        values: VALUE_COLUMNS, every measurement behind every event; value is null for a category.
        against: the same of the run that this one is compared with.
        importance: IMPORTANCE_COLUMNS by target, where the interventions were measured
            (:func:`trajlm.interpret.importance.event_importance`).
        unread: events that the model leaves out, of a stay longer than its ``max_events``.
    """

    stay_id: int
    split: str
    targets: dict[str, float | None]
    trajectory: pl.DataFrame
    attention: AttentionMap | None
    ablations: dict[str, AblatedStay] = field(default_factory=dict)
    values: pl.DataFrame | None = None
    against: AgainstStay | None = None
    importance: dict[str, pl.DataFrame] = field(default_factory=dict)
    unread: int = 0

    @property
    def trajectories(self) -> dict[str, pl.DataFrame]:
        """Every trajectory of the page, by what a message would call it."""
        found = {"": self.trajectory} | {f" without {m}": a.trajectory for m, a in self.ablations.items()}
        if self.against is not None:
            found[" of the other run"] = self.against.trajectory
            found |= {f" of the other run without {m}": a.trajectory for m, a in self.against.ablations.items()}
        return found


@dataclass(frozen=True)
class Report:
    """Everything a report page shows. Optional tables are None where the run did not make them.

    Attributes:
        title, subtitle: plain text.
        targets: in the order in which they are shown.
        facts: label and value: backbone, encoders, cohort, number of stays, seed.
        warnings: what a reader must know before believing a figure: open leaks, small samples.
        metrics: METRIC_COLUMNS; low and high bound the 95 % interval; positives is null for hours.
        calibration: CALIBRATION_COLUMNS; belief_mean and observed are means of the bin, in the target's unit.
        presence: PRESENCE_COLUMNS; stays per split that hold exactly this combination of modalities.
        retrieval: RETRIEVAL_COLUMNS; recall and random are shares.
        silhouette: overall and by modality.
        training: TRAINING_COLUMNS. stages: STAGE_COLUMNS. accounting: ACCOUNTING_COLUMNS, in rows of the raw tables.
        anchoring: ANCHORING_COLUMNS; share of the read-outs' attention that lies on demographics.
        difference: DIFFERENCE_COLUMNS; sequence model minus another arm (``against``, its title) at the end of the
            window, paired on the same stays.
        ablation: ABLATION_COLUMNS; metrics at the end of the window with a modality ablated from every held-out stay
            that holds it; one row per target and metric has ``ablated`` NOTHING. ``difference`` and its ends: minus the
            figure with nothing ablated, paired on the stays that have a belief without the modality.
        beliefs: LISTED_COLUMNS and, of the first target, ``belief_`` and ``target_``: how the belief in listed stays
            without a page went, and what happened to them.
        details: label and value of what few readers need: versions, hardware.
        stays: the stays with a page of their own.
        against: name of the run that this one is compared with; its rows of ``metrics`` and ``calibration`` are one
            more arm.
        anchoring_against: as ``anchoring``, of that run.
        audit: SUMMARY_COLUMNS of :mod:`trajlm.interpret.audit`, means of ``anchoring`` with intervals;
            ``audit_against`` that of the run compared with, ``audit_difference`` this run minus the other.

    Raises:
        TrajlmError: a table lacks a column, a stay lacks a target's belief, or an ablation has nothing to be compared
            with.
    """

    title: str
    subtitle: str
    targets: list[TargetInfo]
    facts: list[tuple[str, str]]
    warnings: list[str]
    metrics: pl.DataFrame
    calibration: pl.DataFrame
    presence: pl.DataFrame
    retrieval: pl.DataFrame | None = None
    silhouette: dict[str, float] | None = None
    training: pl.DataFrame | None = None
    stages: pl.DataFrame | None = None
    accounting: pl.DataFrame | None = None
    anchoring: pl.DataFrame | None = None
    difference: pl.DataFrame | None = None
    ablation: pl.DataFrame | None = None
    beliefs: pl.DataFrame | None = None
    details: list[tuple[str, str]] = field(default_factory=list)
    stays: list[StayPage] = field(default_factory=list)
    against: str | None = None
    anchoring_against: pl.DataFrame | None = None
    audit: pl.DataFrame | None = None
    audit_against: pl.DataFrame | None = None
    audit_difference: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        tables = (
            ("metrics", self.metrics, METRIC_COLUMNS),
            ("calibration", self.calibration, CALIBRATION_COLUMNS),
            ("presence", self.presence, PRESENCE_COLUMNS),
            ("retrieval", self.retrieval, RETRIEVAL_COLUMNS),
            ("training", self.training, TRAINING_COLUMNS),
            ("stages", self.stages, STAGE_COLUMNS),
            ("accounting", self.accounting, ACCOUNTING_COLUMNS),
            ("anchoring", self.anchoring, ANCHORING_COLUMNS),
            ("anchoring of the other run", self.anchoring_against, ANCHORING_COLUMNS),
            ("audit", self.audit, tuple(SUMMARY_COLUMNS)),
            ("audit of the other run", self.audit_against, tuple(SUMMARY_COLUMNS)),
            ("difference of the audits", self.audit_difference, tuple(SUMMARY_COLUMNS)),
            ("difference", self.difference, DIFFERENCE_COLUMNS),
            ("ablation", self.ablation, ABLATION_COLUMNS),
            ("beliefs", self.beliefs, LISTED_COLUMNS),
        )
        for name, frame, columns in tables:
            if frame is not None:
                require_columns(frame, columns, name)
        if self.ablation is not None:
            of = self.ablation.select("target", "metric").unique(maintain_order=True)
            whole = self.ablation.filter(pl.col("ablated") == NOTHING)
            for target, metric in of.join(
                whole, on=["target", "metric"], how="anti", maintain_order="left"
            ).iter_rows():
                raise TrajlmError(f"ablation: no row says what {metric} of {target} is with {NOTHING} ablated")
        beliefs = tuple(f"{prefix}_{t.name}" for t in self.targets for prefix in ("belief", "change"))
        for stay in self.stays:
            for which, frame in stay.trajectories.items():
                require_columns(frame, TRAJECTORY_COLUMNS + beliefs, f"stay {stay.stay_id}{which}, trajectory")
            if stay.values is not None:
                require_columns(stay.values, VALUE_COLUMNS, f"stay {stay.stay_id}, values")
            for target, frame in stay.importance.items():
                require_columns(frame, IMPORTANCE_COLUMNS, f"stay {stay.stay_id}, importance for {target}")

    @property
    def modalities(self) -> list[str]:
        """Every modality that a stay's page shows or ablates, in alphabetical order."""
        names: set[str] = set()
        for stay in self.stays:
            names |= {name for frame in stay.trajectories.values() for name in frame["modality"].unique()}
            names |= set(stay.ablations)
        if self.anchoring is not None:
            names |= set(self.anchoring["ablated"].unique())
        if self.ablation is not None:
            names |= set(self.ablation["ablated"].unique()) - {NOTHING}
        return sorted(names)
