"""How good beliefs are: discrimination, error in hours, calibration (method, section 8).

A metric is a pure function of ``target: float[n]``, ``belief: float[n]`` and, optionally, ``weights: float[..., n]``,
how often each stay counts. Without weights it returns a float, with weights ``float[...]``: a bootstrap resample is one
row of multiplicities, so a thousand resamples cost one sort and a few passes over memory. Where a metric is undefined
(no stays, a single class, a constant) it is NaN, never a stand-in such as 0.5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


class Metric(Protocol):
    """``metric(target, belief) -> float``; ``metric(target, belief, weights[..., n]) -> float[...]``."""

    @overload
    def __call__(self, target: ArrayLike, belief: ArrayLike, weights: None = None, **options: int) -> float: ...
    @overload
    def __call__(self, target: ArrayLike, belief: ArrayLike, weights: FloatArray, **options: int) -> FloatArray: ...


def _metric(core: Callable[..., FloatArray]) -> Metric:
    """Give a function of (target[n, ...], belief[n, ...], weights[R, n]) -> [R] its checks and its plain call."""

    @functools.wraps(core)
    def call(target: ArrayLike, belief: ArrayLike, weights: FloatArray | None = None, **options: int) -> Any:
        y, b = np.asarray(target, float), np.asarray(belief, float)
        w = np.ones(len(y)) if weights is None else np.asarray(weights, float)
        if y.shape != b.shape or w.shape[-1:] != y.shape[:1]:
            raise ValueError(f"expected one belief and weight per target, came {y.shape}, {b.shape} and {w.shape}")
        if not (np.isfinite(b).all() and np.isfinite(w).all() and (w >= 0).all()):
            raise ValueError("beliefs and weights must be finite, weights not negative")
        if y.ndim == 1 and not np.isfinite(y).all():
            raise ValueError("targets must be finite: leave out the stays whose target is unknown")
        rows = w.reshape(math.prod(w.shape[:-1]), len(y))
        with np.errstate(invalid="ignore", divide="ignore"):
            values = core(y, b, rows, **options) if len(y) else np.full(len(rows), np.nan)
        return float(values[0]) if weights is None else values.reshape(w.shape[:-1])

    return call


def _ties(values: FloatArray) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Ascending order of ``values[n]``, and where in that order each group of equal values ends."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))


def _classes(target: FloatArray) -> FloatArray:
    if not np.isin(target, (0.0, 1.0)).all():
        raise ValueError("targets of a probability must be 0 or 1")
    return target


@_metric
def auroc(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
    """Area under the ROC curve; tied beliefs count half. NaN unless both classes occur."""
    order, ends = _ties(belief)
    ordered, positive = weights[:, order], _classes(target)[order]
    below = np.cumsum(ordered * (1 - positive), axis=1)[:, ends]
    found = np.cumsum(ordered * positive, axis=1)[:, ends]
    wins = np.diff(found, prepend=0) * (below - np.diff(below, prepend=0) / 2)
    return wins.sum(axis=1) / (found[:, -1] * below[:, -1])


@_metric
def auprc(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
    """Average precision: precision at each distinct belief, weighted by the recall it adds. NaN unless both classes."""
    order, ends = _ties(-belief)
    ordered, positive = weights[:, order], _classes(target)[order]
    called = np.cumsum(ordered, axis=1)[:, ends]
    found = np.cumsum(ordered * positive, axis=1)[:, ends]
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    area = (np.diff(found, prepend=0) * precision).sum(axis=1) / found[:, -1]
    return np.where(found[:, -1] < called[:, -1], area, np.nan)


def _macro(metric: Metric) -> Metric:
    @_metric
    def macro(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
        columns = [np.flatnonzero(np.isfinite(column)) for column in target.T]
        by_class = np.stack([metric(target[k, c], belief[k, c], weights[:, k]) for c, k in enumerate(columns)])
        defined = np.isfinite(by_class)
        return np.where(defined, by_class, 0).sum(axis=0) / defined.sum(axis=0)

    macro.__doc__ = (
        f"Mean of {getattr(metric, '__name__', 'metric')} over the classes of ``target, belief: float[n, C]``.\n\n"
        "Classes in which not both labels occur are ignored, in each resample anew; NaN targets (unknown) are left\n"
        "out of their class. NaN if no class is left."
    )
    return macro


macro_auroc = _macro(auroc)
macro_auprc = _macro(auprc)


@_metric
def mse(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean squared error, in squared hours for targets in hours."""
    return (weights * (belief - target) ** 2).sum(axis=1) / weights.sum(axis=1)


@_metric
def mae(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
    """Mean absolute error, in hours for targets in hours."""
    return (weights * np.abs(belief - target)).sum(axis=1) / weights.sum(axis=1)


def _correlation(x: FloatArray, y: FloatArray, weights: FloatArray) -> FloatArray:
    """Weighted Pearson correlation of ``x, y: float[R or 1, n]``; NaN where either is constant among counted stays."""
    counted = weights > 0

    def centred(values: FloatArray) -> FloatArray:
        mean = (weights * values).sum(axis=1) / weights.sum(axis=1)
        constant = np.where(counted, values, -np.inf).max(axis=1) == np.where(counted, values, np.inf).min(axis=1)
        return values - np.where(constant, np.nan, mean)[:, None]

    x, y = centred(x), centred(y)
    covariance = (weights * x * y).sum(axis=1)
    spread = np.sqrt((weights * x * x).sum(axis=1)) * np.sqrt((weights * y * y).sum(axis=1))
    return np.clip(covariance / spread, -1, 1)


@_metric
def pearson(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
    """Pearson correlation; NaN where target or belief is constant."""
    return _correlation(target[None], belief[None], weights)


@_metric
def spearman(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
    """Spearman rank correlation, mean ranks for ties; NaN where target or belief is constant."""

    def ranks(values: FloatArray) -> FloatArray:
        order, ends = _ties(values)
        upto = np.cumsum(weights[:, order], axis=1)[:, ends]
        middle = upto - np.diff(upto, prepend=0) / 2
        group = np.empty(len(values), np.intp)
        group[order] = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))
        return middle[:, group]

    return _correlation(ranks(target), ranks(belief), weights)


def _bin_sums(target: FloatArray, belief: FloatArray, weights: FloatArray, bins: int) -> FloatArray:
    """Weight, weighted belief and weighted target in each equal-mass bin: ``float[3, R, bins]``.

    Equal beliefs share the bin that holds their middle: the outcome cannot depend on the order of the stays.
    """
    order, ends = _ties(belief)
    starts = np.append(0, ends[:-1] + 1)
    ordered = weights[:, order]
    sums = [np.add.reduceat(ordered * v, starts, axis=1) for v in (1.0, belief[order], _classes(target)[order])]
    upto = np.cumsum(sums[0], axis=1)
    middle = (upto - sums[0] / 2) / np.maximum(upto[:, -1:], np.finfo(float).tiny)
    bin_of = np.minimum((middle * bins).astype(np.intp), bins - 1)
    cell = (bin_of + bins * np.arange(len(weights))[:, None]).ravel()
    totals = [np.bincount(cell, v.ravel(), bins * len(weights)).reshape(-1, bins) for v in sums]
    return np.stack(totals)


def calibration_gaps(target: FloatArray, belief: FloatArray, weights: FloatArray, bins: int = 10) -> FloatArray:
    """float[R, bins]: mean belief less observed share in each equal-mass bin, times the share of all that it holds.

    Args:
        target, belief: float[n].
        weights: float[R, n], how often each stay counts; NaN comes where none does.
    """
    mass, believed, observed = _bin_sums(target, belief, weights, bins)
    with np.errstate(invalid="ignore"):
        return (believed - observed) / mass.sum(axis=1, keepdims=True)


@_metric
def adaptive_calibration_error(
    target: FloatArray, belief: FloatArray, weights: FloatArray, *, bins: int = 10
) -> FloatArray:
    """Mean gap between belief and observed share over equal-mass bins, each weighing what it holds; 0 is best.

    Even perfect beliefs score above 0 on finitely many stays, and the more so in resamples. Equal beliefs are never
    divided between bins: they go where their middle lies.
    """
    return np.abs(calibration_gaps(target, belief, weights, bins)).sum(axis=1)


@_metric
def brier_skill_score(target: FloatArray, belief: FloatArray, weights: FloatArray) -> FloatArray:
    """1 - Brier score / Brier score of believing the prevalence of the same stays; 1 is best, 0 is no skill."""
    total = weights.sum(axis=1)
    prevalence = (weights * _classes(target)).sum(axis=1) / total
    reference = np.where((prevalence > 0) & (prevalence < 1), prevalence * (1 - prevalence), np.nan)
    return 1 - (weights * (belief - target) ** 2).sum(axis=1) / total / reference


@dataclass(frozen=True)
class ReliabilityCurve:
    """One entry per bin that holds a stay, by rising belief.

    Attributes:
        belief_mean: float[k], mean belief of the bin.
        observed: float[k], share of its stays whose target is 1.
        count: int[k], its stays.
    """

    belief_mean: FloatArray
    observed: FloatArray
    count: NDArray[np.int64]


def reliability_curve(target: ArrayLike, belief: ArrayLike, bins: int = 10) -> ReliabilityCurve:
    """Points of the reliability diagram over the same equal-mass bins as :func:`adaptive_calibration_error`."""
    y, b = np.asarray(target, float), np.asarray(belief, float)
    if not len(y):
        return ReliabilityCurve(np.empty(0), np.empty(0), np.empty(0, np.int64))
    mass, believed, observed = _bin_sums(y, b, np.ones((1, len(y))), bins)[:, 0]
    held = mass > 0
    return ReliabilityCurve(believed[held] / mass[held], observed[held] / mass[held], mass[held].astype(np.int64))
