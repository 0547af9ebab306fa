"""Who the stays are, and how good beliefs are in each group of them (method 8).

Groups by sex, age band and ethnicity, by length of the sequence, by number of modalities present and by whether all
are, each with its gap to all other stays. What a release does not tell (PhysioNet 2012 has no ethnicity) has no groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from trajlm.dataset import Prepared
from trajlm.gaps import gaps_difference_interval
from trajlm.metrics import (
    METRICS,
    Kind,
    Metric,
    adaptive_calibration_error,
    bootstrap_gaps,
    bootstrap_interval,
    interval_of,
    resample_weights,
)
from trajlm.summaries import SummaryReader

STAYS = "stays.parquet"  # in a run folder: what stay_attributes gives
AGE_BANDS = ((0, "under 45 years"), (45, "45 to 64 years"), (65, "65 to 79 years"), (80, "80 years and over"))
CATEGORIES = {"sex": ("sex", "gender"), "ethnicity": ("ethnicity", "race")}
DIMENSIONS = ("sex", "age", "ethnicity", "events", "modalities", "complete")
SUBGROUP_COLUMNS: dict[str, pl.DataType] = {
    "dimension": pl.String(), "group": pl.String(), "target": pl.String(), "metric": pl.String(),
    "value": pl.Float64(), "low": pl.Float64(), "high": pl.Float64(), "stays": pl.Int64(), "positives": pl.Int64(),
    "gap": pl.Float64(), "gap_low": pl.Float64(), "gap_high": pl.Float64(),
}  # fmt: skip


def stay_attributes(prepared: Prepared, stays: NDArray[np.int64]) -> pl.DataFrame:
    """What figures are broken down by, one row per stay (positions), sorted by stay_id.

    Returns:
        stay_id, subject_id, split, hours_in_unit; ``sex, age, ethnicity`` as text, null where unknown; ``events`` and
        ``modalities``, how many the whole window holds; ``complete``, whether every modality of the cohort is present.
    """
    rows = prepared.stays[stays].select("stay_id", "subject_id", "split", "hours_in_unit")
    held = prepared.present(stays, list(prepared.stores)).numpy()
    told = _descriptors(prepared, stays)
    return rows.with_columns(
        *(pl.Series(name, told[name], dtype=pl.String) for name in ("sex", "age", "ethnicity")),
        pl.Series("events", np.diff(prepared.bounds)[stays], dtype=pl.Int64),
        pl.Series("modalities", held.sum(axis=1), dtype=pl.Int64),
        pl.Series("complete", held.all(axis=1), dtype=pl.Boolean),
    ).sort("stay_id")


def _descriptors(prepared: Prepared, stays: NDArray[np.int64]) -> dict[str, list[str | None]]:
    reader = SummaryReader(prepared)
    static = {m.name for m in prepared.modalities if m.static}
    summary = reader.summary(reader.measurements(stays), None)
    told: dict[str, list[str | None]] = {name: [None] * len(stays) for name in ("sex", "age", "ethnicity")}
    for column, title in enumerate(summary.names):
        modality, _, rest = title.partition(": ")
        name, _, statistic = rest.rpartition(", ")
        key, _, value = name.partition("=")
        if modality not in static:
            continue
        values = summary.values[:, column]
        if key.lower() == "age" and statistic == "last":
            told["age"] = [age_band(float(years)) for years in values]
        for dimension, names in CATEGORIES.items():
            if key.lower() in names and value and statistic == "count":
                for row in np.flatnonzero(values > 0):
                    told[dimension][int(row)] = broad(value) if dimension == "ethnicity" else value.lower()
    return told


def age_band(years: float) -> str | None:
    """The band of an age in years; None where unknown."""
    return None if np.isnan(years) else [name for least, name in AGE_BANDS if years >= least or least == 0][-1]


def broad(ethnicity: str) -> str:
    """The broad group of a release's finer one, in lower case: "WHITE - BRAZILIAN" is white."""
    return re.split(r" - |/", ethnicity)[0].strip().lower()


def grouped(attributes: pl.DataFrame) -> pl.DataFrame:
    """``stay_id`` and one column of group names per dimension; sequence lengths are cut at their quartiles."""
    edges = np.unique(np.quantile(attributes["events"].to_numpy(), [0, 0.25, 0.5, 0.75, 1]).astype(int))
    lengths = attributes["events"].to_numpy()
    place = np.clip(np.searchsorted(edges, lengths, side="left"), 1, max(1, len(edges) - 1))
    ends = edges if len(edges) > 1 else np.repeat(edges, 2)
    names = [f"{ends[i - 1] + (i > 1)} to {ends[i]} events" for i in place]
    return attributes.select(
        "stay_id",
        "sex",
        "age",
        "ethnicity",
        pl.Series("events", names, dtype=pl.String),
        pl.format("{} modalities", "modalities").alias("modalities"),
        pl.when("complete").then(pl.lit("every modality")).otherwise(pl.lit("some missing")).alias("complete"),
    )


def gap_interval(
    metric: Metric,
    target: ArrayLike,
    belief: ArrayLike,
    inside: NDArray[np.bool_],
    subjects: ArrayLike,
    resamples: int,
    seed: int,
) -> tuple[float, float]:
    """95 % interval of the metric inside a group minus outside, over resamples of all patients; NaN where undefined."""
    y, b = np.asarray(target, float), np.asarray(belief, float)
    patients = np.asarray(subjects)
    people = len(np.unique(patients))
    if metric is adaptive_calibration_error:
        own, others = (bootstrap_gaps(y[side], b[side], patients[side], resamples, seed) for side in (inside, ~inside))
        return gaps_difference_interval(own, others, people)
    gaps = [
        metric(y[inside], b[inside], weights[:, inside]) - metric(y[~inside], b[~inside], weights[:, ~inside])
        for weights in resample_weights(subjects, resamples, seed)
    ]
    return interval_of(np.concatenate([np.empty(0), *gaps]), people)


def subgroup_rows(
    at: pl.DataFrame, attributes: pl.DataFrame, targets: Sequence[tuple[str, Kind]], resamples: int, seed: int
) -> pl.DataFrame:
    """Every metric of every target in every group, and its gap to all other stays.

    Args:
        at: one belief per stay (:func:`beliefs_at_landmark`).
        attributes: of those stays (:func:`stay_attributes`).
        targets: (name, kind).
        resamples, seed: of the patient-level bootstrap.

    Returns:
        SUBGROUP_COLUMNS; null where undefined. ``gap`` is the metric in the group minus that in all other stays whose
        group is known, null where there is no other group.
    """
    people = attributes.select("stay_id", "subject_id")
    own = attributes.join(at, on="stay_id", how="semi")
    joined = at.join(people, on="stay_id").join(grouped(own), on="stay_id", suffix="_group") if len(own) else at
    rows: list[tuple[object, ...]] = []
    for dimension in DIMENSIONS if len(own) else ():
        for target, kind in targets:
            known = joined.filter(pl.col(f"target_{target}").is_not_null() & pl.col(dimension).is_not_null())
            if known.height:
                rows += [
                    (dimension, group, target, *figures)
                    for group, figures in _groups(known, dimension, target, kind, resamples, seed)
                ]
    frame = pl.DataFrame(rows, schema=SUBGROUP_COLUMNS, orient="row")
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))


def _groups(
    known: pl.DataFrame, dimension: str, target: str, kind: Kind, resamples: int, seed: int
) -> list[tuple[str, tuple[object, ...]]]:
    y, b = (known[f"{what}_{target}"].cast(pl.Float64).to_numpy() for what in ("target", "belief"))
    people, names = known["subject_id"].to_numpy(), known[dimension].to_numpy()
    found: list[tuple[str, tuple[object, ...]]] = []
    for group in sorted(set(names), key=_numbers_first):
        inside = names == group
        positives = int(y[inside].sum()) if kind == "probability" else None
        for name, (metric, of) in METRICS.items():
            if of == kind:
                value = float(metric(y[inside], b[inside]))
                interval = bootstrap_interval(metric, y[inside], b[inside], people[inside], resamples, seed)
                gap, ends = float("nan"), (float("nan"), float("nan"))
                if not inside.all():
                    gap = value - float(metric(y[~inside], b[~inside]))
                    ends = gap_interval(metric, y, b, inside, people, resamples, seed)
                found.append((group, (name, value, *interval, int(inside.sum()), positives, gap, *ends)))
    return found


def _numbers_first(name: str) -> tuple[int, str]:
    digits = re.match(r"\d+", name)
    return (int(digits[0]) if digits else -1, name)
