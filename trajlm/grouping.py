"""Measurements to events, and what the training split alone says of every feature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import polars as pl

from trajlm.schema import EVENT_COLUMNS, FittedFeature, RawTimelines, conform

# Hours are minutes or seconds divided: without this a whole minute could fall a rounding error short of itself.
_ROUNDING = 1e-6
_EVENT = ["stay_id", "modality_index", "bin"]


def signed_log(value: pl.Expr) -> pl.Expr:
    """``sign(x) log(1 + |x|)`` (paper, App. B)."""
    return value.sign() * value.abs().log1p()


def group_measurements(raw: RawTimelines, bin_hours: float) -> pl.DataFrame:
    """Join the measurements of one stay, modality and time into events, in long form.

    The time is the minute where ``bin_hours`` is 0, else the bin ``[k * bin_hours, (k + 1) * bin_hours)``. Within an
    event the last value of a feature stands (of the same time: the later row), or the sum where the feature is an
    amount. An event is dated by its last row, the moment up to which it has seen data.

    Returns:
        ``stay_id, modality_index, bin, hours, feature_index, value``: one row per feature of an event, sorted by the
        first three and ``feature_index``, the position in ``raw.features``; values as stored, float32.
    """
    _check(raw)
    modality = {m.name: i for i, m in enumerate(raw.modalities)}
    lookup = pl.DataFrame(
        [(f.modality, f.name, i) for i, f in enumerate(raw.features)],
        schema={"modality": pl.String, "feature": pl.String, "feature_index": pl.Int32},
        orient="row",
    )
    per_hour = 60.0 if bin_hours == 0 else 1 / bin_hours
    rows = raw.measurements.join(lookup, on=["modality", "feature"], how="left", maintain_order="left").select(
        "stay_id",
        pl.col("modality").replace_strict(modality, default=None, return_dtype=pl.Int32).alias("modality_index"),
        (pl.col("hours_since_admission") * per_hour + _ROUNDING).floor().cast(pl.Int64).alias("bin"),
        pl.col("hours_since_admission").alias("hours"),
        "feature_index",
        pl.col("value").cast(pl.Float32),
    )
    if rows["feature_index"].null_count():
        strange = raw.measurements.filter(rows["feature_index"].is_null()).select("modality", "feature").row(0)
        raise ValueError(f"measurements: {strange} is not among the cohort's features")
    cell = [*_EVENT, "feature_index"]
    amount = pl.col("feature_index").is_in([i for i, f in enumerate(raw.features) if f.aggregate == "sum"])
    ordered = rows.sort(*cell, "hours", maintain_order=True)
    ordered = ordered.with_columns(pl.when(amount).then(pl.col("value").sum().over(cell)).otherwise("value"))
    last = ordered.unique(cell, keep="last", maintain_order=True)
    return last.with_columns(pl.col("hours").max().over(_EVENT))


def _check(raw: RawTimelines) -> None:
    """Faults of a cohort's reader, not of a user's files."""
    for name, frame in (("measurements", raw.measurements), ("documents", raw.documents), ("images", raw.images)):
        strangers = frame.join(raw.stays, on="stay_id", how="anti").height
        hours = frame["hours_since_admission"]
        if strangers or frame.null_count().sum_horizontal().sum() or not (hours.is_finite() & (hours >= 0)).all():
            raise ValueError(f"{name}: {strangers} rows of unknown stays; nulls or hours before admission, or infinite")
    if not raw.measurements["value"].cast(pl.Float32).is_finite().all():
        raise ValueError("measurements: values that are not finite")


def fit_features(raw: RawTimelines, cells: pl.DataFrame, train_ids: pl.Series) -> list[FittedFeature]:
    """Vocabulary, mean and standard deviation, from the training split alone.

    Features are numbered modality by modality. A category that the training split never shows is left out; a continuous
    feature that it never shows keeps mean 0 and deviation 1, as does the deviation of a feature that never varies.

    Args:
        cells: of ``group_measurements``.
        train_ids: stay ids of the training split.
    """
    x = signed_log(pl.col("value").cast(pl.Float64))
    seen = (
        cells.filter(pl.col("stay_id").is_in(train_ids.implode()))
        .group_by("feature_index")
        .agg(pl.len(), x.mean().alias("mean"), x.std(ddof=0).alias("std"), (x.min() == x.max()).alias("constant"))
    )
    statistics = {row[0]: row[1:] for row in seen.iter_rows()}
    order = {m.name: i for i, m in enumerate(raw.modalities)}
    fitted: list[FittedFeature] = []
    for index, feature in sorted(enumerate(raw.features), key=lambda item: (order[item[1].modality], item[0])):
        count, mean, std, constant = statistics.get(index, (0, 0.0, 1.0, True))
        if feature.kind == "category":
            if not count:
                continue
            mean, std = 0.0, 1.0
        elif constant:
            std = 1.0
        if not math.isfinite(mean) or std <= 0:
            raise ValueError(f"{feature.modality} {feature.name}: mean {mean}, deviation {std}")
        fitted.append(
            FittedFeature(**asdict(feature), feature_id=len(fitted), mean=mean, std=std, observed_in_training=count)
        )
    return fitted


def build_events(raw: RawTimelines, cells: pl.DataFrame, fitted: Sequence[FittedFeature]) -> tuple[pl.DataFrame, str]:
    """All events of the cohort in order of stay, time and modality, and a note on what the vocabulary left out.

    Measurements of features that are not in ``fitted`` are dropped, and with them events that hold nothing else.

    Returns:
        EVENT_COLUMNS, and the note, "" where nothing was left out.
    """
    ids = {(f.modality, f.name): f.feature_id for f in fitted}
    to_id = {i: ids[f.modality, f.name] for i, f in enumerate(raw.features) if (f.modality, f.name) in ids}
    id_of = pl.col("feature_index").replace_strict(to_id, default=None, return_dtype=pl.Int32)
    known = cells.with_columns(id_of.alias("feature_id")).filter(pl.col("feature_id").is_not_null())
    numeric = (
        known.sort(*_EVENT, "feature_id")
        .group_by(_EVENT, maintain_order=True)
        .agg(pl.col("hours").first(), pl.col("feature_id").alias("feature_ids"), pl.col("value").alias("values"))
        .select("stay_id", "modality_index", "hours", "feature_ids", "values")
    )
    order = {m.name: i for i, m in enumerate(raw.modalities)}
    index_of = pl.col("modality").replace_strict(order, default=None, return_dtype=pl.Int32).alias("modality_index")
    others = [
        frame.select("stay_id", index_of, pl.col("hours_since_admission").alias("hours"), payload)
        for frame, payload in ((raw.documents, "text"), (raw.images, "image"))
    ]
    events = pl.concat([numeric, *others], how="diagonal").sort(
        "stay_id", "hours", "modality_index", maintain_order=True
    )
    if events["modality_index"].null_count():
        raise ValueError("documents or images of a modality that the cohort does not list")
    name_of = pl.col("modality_index").replace_strict(dict(enumerate(order)), return_dtype=pl.String)
    events = events.select(
        "stay_id", pl.col("hours").alias("hours_since_admission"), name_of.alias("modality"), *list(EVENT_COLUMNS)[3:]
    )
    return conform(events, EVENT_COLUMNS, "events"), _left_out(raw, cells, known, numeric.height, to_id)


def _left_out(raw: RawTimelines, cells: pl.DataFrame, known: pl.DataFrame, events: int, to_id: dict[int, int]) -> str:
    names = [f"{f.modality} {f.name}" for i, f in enumerate(raw.features) if i not in to_id]
    if not names:
        return ""
    lost = cells.select(_EVENT).n_unique() - events
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return (
        f"{len(names)} categories that the training split never shows are left out ({shown}): "
        f"{cells.height - known.height} measurements dropped, {lost} events that held nothing else"
    )
