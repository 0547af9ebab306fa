"""What is reported of a run: every metric at every landmark, with patient-level intervals (method, sections 5 and 8).

The metrics themselves are in :mod:`trajlm.scores`; this module says which belief of a stay counts at a landmark, and
how sure we may be of a figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike

from trajlm.errors import TrajlmError
from trajlm.gaps import drawn_gaps, gaps_difference_interval, gaps_interval
from trajlm.scores import (
    FloatArray,
    Metric,
    ReliabilityCurve,
    adaptive_calibration_error,
    auprc,
    auroc,
    brier_skill_score,
    macro_auprc,
    macro_auroc,
    mae,
    mse,
    pearson,
    reliability_curve,
    spearman,
)

__all__ = [
    "LANDMARKS",
    "METRICS",
    "RAISED_BY_CHANCE",
    "Estimate",
    "Metric",
    "ReliabilityCurve",
    "adaptive_calibration_error",
    "auprc",
    "auroc",
    "beliefs_at_landmark",
    "bootstrap_interval",
    "bootstrap_values",
    "brier_skill_score",
    "estimate",
    "evaluate",
    "interval_of",
    "macro_auprc",
    "macro_auroc",
    "mae",
    "mse",
    "paired_difference_interval",
    "pearson",
    "reliability_curve",
    "resample_weights",
    "spearman",
]

Kind = Literal["probability", "hours"]
# Hours since admission at which every run is reported; None is the end of the window.
LANDMARKS: tuple[float | None, ...] = (6.0, 12.0, 24.0, 48.0, None)
# Chance alone raises these, in a resample about as much again as in the sample: their intervals are reflected.
RAISED_BY_CHANCE: tuple[Metric, ...] = (macro_auprc,)
_BLOCK = 1 << 18  # weights held at once: resamples are worked through in blocks that stay in the cache

# What is reported of each kind of belief.
METRICS: dict[str, tuple[Metric, Kind]] = {
    "auroc": (auroc, "probability"),
    "auprc": (auprc, "probability"),
    "adaptive_calibration_error": (adaptive_calibration_error, "probability"),
    "brier_skill_score": (brier_skill_score, "probability"),
    "mse": (mse, "hours"),
    "mae": (mae, "hours"),
    "pearson": (pearson, "hours"),
    "spearman": (spearman, "hours"),
}


def resample_weights(subjects: ArrayLike, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Bootstrap resamples of patients, in blocks ``float[b, n]``: how often each stay is drawn, all of a patient alike.

    They depend on the set of subjects and ``seed`` alone: two models on the same stays get the same ones.
    """
    names, subject_of = np.unique(np.asarray(subjects), return_inverse=True)
    rng, people = np.random.default_rng(seed), len(names)
    block = max(1, _BLOCK // max(1, len(subject_of)))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(max(1, people), size=(rows, people)) + people * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * people).reshape(rows, people)
        yield counts.astype(float)[:, subject_of]


def bootstrap_values(
    metric: Metric, target: ArrayLike, belief: ArrayLike, subjects: ArrayLike, resamples: int, seed: int
) -> FloatArray:
    """The metric in each patient-level resample, ``float[resamples]``; NaN where it is undefined there."""
    blocks = [metric(target, belief, weights) for weights in resample_weights(subjects, resamples, seed)]
    return np.concatenate([np.empty(0), *blocks])


def bootstrap_gaps(target: ArrayLike, belief: ArrayLike, subjects: ArrayLike, resamples: int, seed: int) -> FloatArray:
    """:func:`drawn_gaps` of patient-level resamples."""
    weights = resample_weights(subjects, resamples, seed)
    return drawn_gaps(np.asarray(target, float), np.asarray(belief, float), weights, resamples)


def interval_of(
    values: FloatArray, people: int, level: float = 0.95, about: float | None = None
) -> tuple[float, float]:
    """Percentile interval of the defined ones of ``values: float[resamples]``, reflected if ``about`` is given.

    What chance raises lies higher in resamples than in the sample, and there higher than in truth: the interval from
    2 about - high to 2 about - low, cut to [0, 1], allows for it (the basic bootstrap interval of Davison and Hinkley
    1997). NaN where fewer than half are defined, or with fewer than two people to draw from.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, came {level}")
    defined = values[np.isfinite(values)]
    if people < 2 or not len(defined) or 2 * len(defined) < len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    if about is not None:
        low, high = np.clip([2 * about - high, 2 * about - low], 0, 1)
    return float(low), float(high)


def bootstrap_interval(
    metric: Metric,
    target: ArrayLike,
    belief: ArrayLike,
    subjects: ArrayLike,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a metric over resamples of patients, all stays of a patient moving together.

    Of ``RAISED_BY_CHANCE`` it is reflected about the figure (:func:`interval_of`), of a calibration error that of
    :func:`gaps_interval`.
    Resamples in which the metric is undefined are left out (:func:`bootstrap_values` shows which). Both ends are NaN
    where it is defined in fewer than half, and where there are fewer than two patients to draw from.
    """
    people = len(np.unique(np.asarray(subjects)))
    if metric is adaptive_calibration_error and people:
        return gaps_interval(bootstrap_gaps(target, belief, subjects, resamples, seed), people, level)
    values = bootstrap_values(metric, target, belief, subjects, resamples, seed)
    about = float(metric(target, belief)) if metric in RAISED_BY_CHANCE and people else None
    return interval_of(values, people, level, about)


def paired_difference_interval(
    metric: Metric,
    target: ArrayLike,
    belief_a: ArrayLike,
    belief_b: ArrayLike,
    subjects: ArrayLike,
    resamples: int,
    seed: int,
    level: float = 0.95,
) -> tuple[float, float]:
    """Interval of ``metric(belief_a) - metric(belief_b)``, both on the same stays in every resample.

    NaN as in :func:`bootstrap_interval`; of calibration errors that of :func:`gaps_difference_interval`.
    """
    people = len(np.unique(np.asarray(subjects)))
    if metric is adaptive_calibration_error and people:
        gaps, others = (bootstrap_gaps(target, belief, subjects, resamples, seed) for belief in (belief_a, belief_b))
        return gaps_difference_interval(gaps, others, people, level)
    first = bootstrap_values(metric, target, belief_a, subjects, resamples, seed)
    second = bootstrap_values(metric, target, belief_b, subjects, resamples, seed)
    return interval_of(first - second, people, level)


@dataclass(frozen=True)
class Estimate:
    """A figure, its interval and what it rests on.

    Attributes:
        value, low, high: in the metric's unit; NaN where undefined.
        stays: stays that count.
        positives: those of them whose target is 1; None for targets in hours.
    """

    value: float
    low: float
    high: float
    stays: int
    positives: int | None


def estimate(
    name: str, target: ArrayLike, belief: ArrayLike, subjects: ArrayLike, resamples: int, seed: int
) -> Estimate:
    """The metric ``METRICS[name]`` of ``target, belief: float[n]``, with its 95 % interval."""
    metric, kind = METRICS[name]
    y = np.asarray(target, float)
    value = metric(y, belief)
    low, high = float("nan"), float("nan")
    if np.isfinite(value):
        low, high = bootstrap_interval(metric, y, belief, subjects, resamples, seed)
    return Estimate(value, low, high, len(y), int(y.sum()) if kind == "probability" else None)


def beliefs_at_landmark(beliefs: pl.DataFrame, stays: pl.DataFrame, hours: float | None) -> pl.DataFrame:
    """What was believed of each stay at a landmark: its last belief up to then.

    Args:
        beliefs: ``stay_id, event_index, hours_since_admission`` and anything else, one row per belief. A model that is
            refitted for each landmark says in ``landmark`` which one a belief is for; no other counts there.
        stays: ``stay_id, hours_in_unit``, at least the stays of ``beliefs``.
        hours: the landmark in hours since admission; None is the end of the window, the last belief of every stay.

    Returns:
        The columns of ``beliefs``, at most one row per stay, sorted by ``stay_id``. Stays that had left the unit before
        the landmark are not in it (an unknown ``hours_in_unit`` stays), nor are stays without a belief by then.

    Raises:
        TrajlmError: a belief has no time, or is of a stay that ``stays`` does not hold once.
    """
    _check(beliefs, stays)
    if "landmark" in beliefs.columns:
        beliefs = beliefs.filter(pl.col("landmark").eq_missing(pl.lit(hours, pl.Float64)))
    if hours is not None:
        still = stays.filter(pl.col("hours_in_unit").is_null() | (pl.col("hours_in_unit") >= hours))
        beliefs = beliefs.filter(pl.col("hours_since_admission") <= hours).join(still, on="stay_id", how="semi")
    ordered = beliefs.sort("stay_id", "hours_since_admission", "event_index")
    return ordered.unique("stay_id", keep="last", maintain_order=True)


def _require_columns(frame: pl.DataFrame, what: str, needed: Sequence[str]) -> None:
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise TrajlmError(f"{what}: expected a column {missing[0]}, came {', '.join(frame.columns) or 'none'}")


def _check(beliefs: pl.DataFrame, stays: pl.DataFrame) -> None:
    _require_columns(beliefs, "beliefs", ("stay_id", "event_index", "hours_since_admission"))
    _require_columns(stays, "stays", ("stay_id", "hours_in_unit"))
    if stays["stay_id"].is_duplicated().any():
        raise TrajlmError("stays: expected one row per stay_id, came several")
    unknown = beliefs.join(stays, on="stay_id", how="anti")
    if len(unknown):
        count = unknown["stay_id"].n_unique()
        raise TrajlmError(
            f"beliefs: {count} stays are not in the prepared folder, such as stay_id {unknown['stay_id'][0]}; "
            "name the prepared folder that the run was made from"
        )
    times = beliefs["hours_since_admission"]
    if times.null_count() or not times.cast(pl.Float64).is_finite().all():
        raise TrajlmError("beliefs: hours_since_admission must be a finite number in every row")


def _known(at: pl.DataFrame, name: str, kind: Kind) -> pl.DataFrame:
    """``target, belief, subject_id`` of the stays whose target is known; every belief there is checked."""
    _require_columns(at, "beliefs", (f"belief_{name}", f"target_{name}"))
    known = at.select(
        pl.col(f"target_{name}").cast(pl.Float64).alias("target"),
        pl.col(f"belief_{name}").cast(pl.Float64).alias("belief"),
        "subject_id",
        "stay_id",
    ).filter(pl.col("target").is_not_null())
    finite = pl.col("belief").is_finite().fill_null(False)
    allowed = finite & pl.col("belief").is_between(0, 1) if kind == "probability" else finite
    wrong = known.filter(~allowed)
    if len(wrong):
        expected = "a probability" if kind == "probability" else "finite hours"
        raise TrajlmError(
            f"beliefs: belief_{name} of stay_id {wrong['stay_id'][0]} is {wrong['belief'][0]}, expected {expected}"
        )
    values = pl.col("target").is_in([0.0, 1.0]) if kind == "probability" else pl.col("target").is_finite()
    if not known.select(values.all()).item():
        raise TrajlmError(f"beliefs: target_{name} must be {'0 or 1' if kind == 'probability' else 'finite hours'}")
    return known


RESULT_COLUMNS: dict[str, pl.DataType] = {
    "target": pl.String(),
    "landmark": pl.Float64(),
    "metric": pl.String(),
    "value": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "stays": pl.Int64(),
    "positives": pl.Int64(),
}


def evaluate(
    beliefs: pl.DataFrame,
    stays: pl.DataFrame,
    targets: Sequence[tuple[str, Kind]],
    landmarks: Sequence[float | None],
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """Every metric of every target at every landmark.

    Args:
        beliefs: rows of a run's ``beliefs.parquet``, already narrowed to the split to report.
        stays: ``stay_id, subject_id, hours_in_unit`` of at least those stays.
        targets: (name, kind): the columns are ``belief_<name>`` and ``target_<name>``.
        landmarks: hours since admission; None is the end of the window.
        resamples, seed: of the patient-level bootstrap; the same for every model that is to be compared.

    Returns:
        RESULT_COLUMNS in the order target, landmark, metric. ``landmark`` is null for the end of the window;
        ``value, low, high`` are null where undefined (no stays, one class, a constant); ``stays`` counts the stays with
        a known target, still in the unit, that have a belief by the landmark; ``positives`` is null for hours.

    Raises:
        TrajlmError: a column is missing, or a belief or target is not of its kind.
    """
    rows: list[tuple[object, ...]] = []
    wrong = [kind for _, kind in targets if kind not in ("probability", "hours")]
    if wrong:
        raise TrajlmError(f"kind of target must be probability or hours, came {wrong[0]!r}")
    _require_columns(stays, "stays", ("stay_id", "subject_id"))
    if stays["subject_id"].null_count():
        raise TrajlmError("stays: expected a subject_id in every row, came null: intervals are drawn over patients")
    subjects = stays.select("stay_id", "subject_id")
    at = {hours: beliefs_at_landmark(beliefs, stays, hours).join(subjects, on="stay_id") for hours in landmarks}
    for target, kind in targets:
        for hours, frame in at.items():
            known = _known(frame, target, kind)
            y, b, people = (known[c].to_numpy() for c in ("target", "belief", "subject_id"))
            for name in (n for n, (_, of) in METRICS.items() if of == kind):
                e = estimate(name, y, b, people, resamples, seed)
                rows.append((target, hours, name, e.value, e.low, e.high, e.stays, e.positives))
    figures = pl.DataFrame(rows, schema=RESULT_COLUMNS, orient="row")
    return figures.with_columns(pl.col("value", "low", "high").fill_nan(None))
