"""Measurements to events, and what the training split alone says of every feature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import polars as pl

from trajlm.schema import EVENT_COLUMNS, MEASURED, Feature, FittedFeature, Modality, conform

# Hours are minutes or seconds divided: without this a whole minute could fall a rounding error short of itself.
_ROUNDING = 1e-6
_EVENT = ["stay_id", "modality_index", "bin"]


@dataclass(frozen=True)
class Catalogue:
    """What a cohort may hold: its modalities in the order that breaks ties, and every feature they may show."""

    modalities: tuple[Modality, ...]
    features: tuple[Feature, ...]


def signed_log(value: pl.Expr) -> pl.Expr:
    """``sign(x) log(1 + |x|)`` (paper, App. B)."""
    return value.sign() * value.abs().log1p()


def group_measurements(catalogue: Catalogue, measurements: pl.DataFrame, bin_hours: float) -> tuple[pl.DataFrame, int]:
    """Join the measurements of one stay, modality and time into events, in long form.

    The time is that of knowing: the minute where ``bin_hours`` is 0, else the bin ``[k * bin_hours, (k + 1) *
    bin_hours)``. Within an event the value measured last stands (of the same time: the one known later, then the later
    row), or the sum where the feature is an amount. A value that was measured before one known in an earlier event, as
    a specimen whose result came late, is left out: the newer one stays the state of the patient. An event is dated by
    its last row, the moment up to which it has seen data.

    Args:
        catalogue: what the cohort may hold.
        measurements: SPOOLED_COLUMNS.
        bin_hours: width of a bin, or 0.

    Returns:
        ``stay_id, modality_index, bin, hours, feature_index, value``: one row per feature of an event, sorted by the
        first three and ``feature_index``, the position in ``catalogue.features``; values as stored, float32. And how
        many measurements a newer one superseded.
    """
    modality = {m.name: i for i, m in enumerate(catalogue.modalities)}
    lookup = pl.DataFrame(
        [(f.modality, f.name, i) for i, f in enumerate(catalogue.features)],
        schema={"modality": pl.String, "feature": pl.String, "feature_index": pl.Int32},
        orient="row",
    )
    per_hour = 60.0 if bin_hours == 0 else 1 / bin_hours
    rows = measurements.join(lookup, on=["modality", "feature"], how="left", maintain_order="left").select(
        "stay_id",
        pl.col("modality").replace_strict(modality, default=None, return_dtype=pl.Int32).alias("modality_index"),
        (pl.col("hours_since_admission") * per_hour + _ROUNDING).floor().cast(pl.Int64).alias("bin"),
        pl.col("hours_since_admission").alias("hours"),
        "feature_index",
        pl.col("value").cast(pl.Float32),
        MEASURED,
    )
    if rows["feature_index"].null_count():
        strange = measurements.filter(rows["feature_index"].is_null()).select("modality", "feature").row(0)
        raise ValueError(f"measurements: {strange} is not among the cohort's features")
    cell = [*_EVENT, "feature_index"]
    amount = pl.col("feature_index").is_in([i for i, f in enumerate(catalogue.features) if f.aggregate == "sum"])
    ordered = rows.sort(*cell, MEASURED, "hours", maintain_order=True).with_columns(
        pl.when(amount).then(pl.col("value").sum().over(cell)).otherwise("value"),
        pl.when(amount).then(pl.col("hours").max().over(cell)).otherwise("hours"),
    )
    last = ordered.unique(cell, keep="last", maintain_order=True)
    newest_before = pl.col(MEASURED).cum_max().shift(1).over("stay_id", "feature_index")
    stale = ~amount & (pl.col(MEASURED) < newest_before - _ROUNDING).fill_null(False)
    stands = last.filter(~stale).with_columns(pl.col("hours").max().over(_EVENT)).drop(MEASURED)
    return stands, rows.filter(~amount).height - stands.filter(~amount).height


def check_rows(name: str, frame: pl.DataFrame, stay_ids: pl.Series) -> None:
    """Raise ValueError for faults of a cohort's reader, not of a user's files, in rows of one kind."""
    strangers = frame.filter(~pl.col("stay_id").is_in(stay_ids.implode())).height
    hours = frame["hours_since_admission"]
    if strangers or frame.null_count().sum_horizontal().sum() or not (hours.is_finite() & (hours >= 0)).all():
        raise ValueError(f"{name}: {strangers} rows of unknown stays; nulls or hours before admission, or infinite")
    if "value" in frame.columns and not frame["value"].cast(pl.Float32).is_finite().all():
        raise ValueError(f"{name}: values that are not finite")


def feature_statistics(cells: pl.DataFrame, train_ids: pl.Series) -> pl.DataFrame:
    """What the training stays of these cells say of each feature; parts of disjoint stays can be merged.

    Returns:
        ``feature_index, count, mean, squares`` (sum of squared deviations from the mean), ``least, most`` of
        ``signed_log(value)``, and ``stays``, how many hold the feature; sorted by feature.
    """
    x = pl.col("x")
    mine = cells.filter(pl.col("stay_id").is_in(train_ids.implode()))
    return (
        mine.with_columns(signed_log(pl.col("value").cast(pl.Float64)).alias("x"))
        .group_by("feature_index")
        .agg(
            count=pl.len().cast(pl.Int64),
            mean=x.mean(),
            squares=((x - x.mean()) ** 2).sum(),
            least=x.min(),
            most=x.max(),
            stays=pl.col("stay_id").n_unique().cast(pl.Int64),
        )
        .sort("feature_index")
    )


def merge_statistics(parts: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Statistics of disjoint stays to those of all of them (Chan's parallel variance)."""
    rows = pl.concat(parts)
    count = pl.col("count").sum()
    mean = (pl.col("mean") * pl.col("count")).sum() / count
    return (
        rows.group_by("feature_index", maintain_order=True)
        .agg(
            count=count,
            mean=mean,
            squares=(pl.col("squares") + pl.col("count") * (pl.col("mean") - mean) ** 2).sum(),
            least=pl.col("least").min(),
            most=pl.col("most").max(),
            stays=pl.col("stays").sum(),
        )
        .sort("feature_index")
    )


def fit_features(catalogue: Catalogue, statistics: pl.DataFrame, train_stays: int) -> list[FittedFeature]:
    """Vocabulary, mean and standard deviation, from the training split alone.

    Features are numbered modality by modality. A category that the training split never shows is left out, and so is a
    feature held by less than its ``least_share`` of the training stays; another continuous feature that it never shows
    keeps mean 0 and deviation 1, as does the deviation of a feature that never varies.

    Args:
        statistics: of ``feature_statistics``, over all training stays.
        train_stays: how many stays the training split has.
    """
    found = {row["feature_index"]: row for row in statistics.iter_rows(named=True)}
    order = {m.name: i for i, m in enumerate(catalogue.modalities)}
    fitted: list[FittedFeature] = []
    for index, feature in sorted(enumerate(catalogue.features), key=lambda item: (order[item[1].modality], item[0])):
        said = found.get(index)
        held = said["stays"] if said else 0
        if (feature.kind == "category" and not held) or held < feature.least_share * train_stays:
            continue
        mean, std = 0.0, 1.0
        if said and feature.kind == "continuous":
            mean = said["mean"]
            std = 1.0 if said["least"] == said["most"] else math.sqrt(said["squares"] / said["count"])
        if not math.isfinite(mean) or not std > 0:
            raise ValueError(f"{feature.modality} {feature.name}: mean {mean}, deviation {std}")
        seen = said["count"] if said else 0
        fitted.append(
            FittedFeature(**asdict(feature), feature_id=len(fitted), mean=mean, std=std, observed_in_training=seen)
        )
    return fitted


@dataclass(frozen=True)
class LeftOut:
    """What the vocabulary cost: measurements of features outside it, and events that held nothing else."""

    measurements: int
    events: int


def build_events(
    catalogue: Catalogue,
    cells: pl.DataFrame,
    documents: pl.DataFrame,
    images: pl.DataFrame,
    fitted: Sequence[FittedFeature],
) -> tuple[pl.DataFrame, LeftOut]:
    """Events of some stays in order of stay, time and modality, and what the vocabulary left out.

    Measurements of features that are not in ``fitted`` are dropped, and with them events that hold nothing else.

    Returns:
        EVENT_COLUMNS, and the counts.
    """
    ids = {(f.modality, f.name): f.feature_id for f in fitted}
    to_id = {i: ids[f.modality, f.name] for i, f in enumerate(catalogue.features) if (f.modality, f.name) in ids}
    id_of = pl.col("feature_index").replace_strict(to_id, default=None, return_dtype=pl.Int32)
    known = cells.with_columns(id_of.alias("feature_id")).filter(pl.col("feature_id").is_not_null())
    numeric = (
        known.sort(*_EVENT, "feature_id")
        .group_by(_EVENT, maintain_order=True)
        .agg(pl.col("hours").first(), pl.col("feature_id").alias("feature_ids"), pl.col("value").alias("values"))
        .select("stay_id", "modality_index", "hours", "feature_ids", "values")
    )
    order = {m.name: i for i, m in enumerate(catalogue.modalities)}
    index_of = pl.col("modality").replace_strict(order, default=None, return_dtype=pl.Int32).alias("modality_index")
    others = [
        frame.select("stay_id", index_of, pl.col("hours_since_admission").alias("hours"), payload)
        for frame, payload in ((documents, "text"), (images, "image"))
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
    lost = LeftOut(cells.height - known.height, cells.select(_EVENT).n_unique() - numeric.height)
    return conform(events, EVENT_COLUMNS, "events"), lost


def left_out_note(catalogue: Catalogue, fitted: Sequence[FittedFeature], lost: LeftOut) -> list[str]:
    """In words, what the vocabulary left out; nothing where it holds every feature."""
    kept = {(f.modality, f.name) for f in fitted}
    names = [f"{f.modality} {f.name}" for f in catalogue.features if (f.modality, f.name) not in kept]
    if not names:
        return []
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [
        f"{len(names)} features that the training split shows never or too seldom are left out ({shown}): "
        f"{lost.measurements} measurements dropped, {lost.events} events that held nothing else"
    ]
