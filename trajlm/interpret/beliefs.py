"""Belief trajectories: what was believed after each event, by how much it moved, and what the event said."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from trajlm.schema import Event, FittedFeature, Timeline
from trajlm.trajectory import TrajectoryModel

VALUE_COLUMNS: dict[str, pl.DataType] = {
    "event_index": pl.Int64(), "hours_since_admission": pl.Float64(), "modality": pl.String(), "feature": pl.String(),
    "value": pl.Float64(), "unit": pl.String(),
}  # fmt: skip
MOST_VALUES = 12  # a lab panel fits; an hour of everything is cut with a count


def belief_trajectory(model: TrajectoryModel, timeline: Timeline, notes: bool = False) -> pl.DataFrame:
    """The beliefs of a stay with their changes and the raw values behind each event.

    Args:
        model: fine-tuned.
        timeline: the stay, ablated or not.
        notes: show the text of notes; by default only their length.

    Returns:
        one row per event: stay_id, event_index, hours_since_admission, modality, summary, and for each target t
        ``belief_<t>`` and ``change_<t>`` against the belief before (null for the first).
    """
    beliefs = model.beliefs(timeline)
    names = {feature.feature_id: feature for feature in model.features}
    summaries = [summary(timeline.events[i], names, notes) for i in beliefs["event_index"]]
    return beliefs.with_columns(
        pl.Series("summary", summaries, dtype=pl.String),
        *(pl.col(f"belief_{target}").diff().alias(f"change_{target}") for target in model.targets),
    )


def raw_values(model: TrajectoryModel, timeline: Timeline) -> pl.DataFrame:
    """What every numeric event measured, as recorded.

    Returns:
        one row per measurement: event_index, hours_since_admission, modality, feature, value, unit; categories have the
        value 1 and no unit.
    """
    names = {feature.feature_id: feature for feature in model.features}
    rows = [
        (index, event.hours_since_admission, event.modality, names[feature].name, value, names[feature].unit)
        for index, event in enumerate(timeline.events)
        for feature, value in zip(event.feature_ids, event.values, strict=True)
    ]
    return pl.DataFrame(rows, schema=VALUE_COLUMNS, orient="row")


def summary(event: Event, features: dict[int, FittedFeature], notes: bool = False) -> str:
    """An event in words: values with units, a note's length (or text), a picture."""
    if event.text is not None:
        return event.text if notes else f"note, {len(event.text.split())} words"
    if event.image is not None:
        return "picture"
    parts = []
    for feature_id, value in list(zip(event.feature_ids, event.values, strict=True))[:MOST_VALUES]:
        feature = features[feature_id]
        name = feature.name.replace("_", " ")
        parts.append(name if feature.kind == "category" else f"{name} {value:g} {feature.unit}".rstrip())
    left = len(event.values) - len(parts)
    return ", ".join(parts) + (f" and {left} more" if left > 0 else "")


def most_moving_events(trajectory: pl.DataFrame, target: str, most: int = 5) -> pl.DataFrame:
    """The events after which a belief moved most, largest first."""
    change = pl.col(f"change_{target}")
    return trajectory.filter(change.is_not_null()).sort(change.abs(), descending=True, maintain_order=True).head(most)


def ablated_timelines(timeline: Timeline, modalities: Sequence[str]) -> dict[str, Timeline]:
    """The stay without each of these modalities; those it does not hold, or holds alone, are left out."""
    held = {event.modality for event in timeline.events}
    return {m: timeline.without(m) for m in modalities if m in held and len(held) > 1}
