"""DeLong's test: are two areas under the ROC curve on the same stays different?

After DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988) 837-845, from mid-ranks in n log n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Z_95 = 1.959963984540054  # of the standard normal distribution, two-sided 95 %


@dataclass(frozen=True)
class DeLong:
    """What the test found; every figure is NaN where one outcome is missing.

    Attributes:
        first, second: the areas.
        difference: first - second.
        variance: of the difference, stays taken as independent.
        low, high: 95 % interval of the difference.
        p_value: two-sided; 1 where both order the stays alike.
    """

    first: float
    second: float
    difference: float
    variance: float
    low: float
    high: float
    p_value: float


def delong_test(target: ArrayLike, first: ArrayLike, second: ArrayLike) -> DeLong:
    """Compare two beliefs float[n] on the same stays, ``target: float[n]`` 0 or 1; ties count half.

    Stays are taken as independent. Where patients have several, the patient-level bootstrap is the safer interval.

    Raises:
        ValueError: lengths differ, a belief is not finite, or a target is not 0 or 1.
    """
    y, beliefs = np.asarray(target, float), np.stack([np.asarray(first, float), np.asarray(second, float)])
    if beliefs.shape[1:] != y.shape or not np.isfinite(beliefs).all() or not np.isin(y, (0.0, 1.0)).all():
        raise ValueError("expected finite beliefs and targets of 0 or 1, of one length")
    if min((y == 1).sum(), (y == 0).sum()) < 2:
        nan = float("nan")
        return DeLong(nan, nan, nan, nan, nan, nan, nan)
    placements = [_placements(y, belief) for belief in beliefs]
    areas = [float(positive.mean()) for positive, _ in placements]
    of_positives, of_negatives = (np.stack([p[side] for p in placements]) for side in (0, 1))
    covariance = np.cov(of_positives) / of_positives.shape[1] + np.cov(of_negatives) / of_negatives.shape[1]
    contrast = np.array([1.0, -1.0])
    variance = max(0.0, float(contrast @ covariance @ contrast))
    difference, error = areas[0] - areas[1], math.sqrt(variance)
    alike = error < 1e-12
    p_value = float(abs(difference) < 1e-12) if alike else math.erfc(abs(difference) / error / math.sqrt(2))
    return DeLong(
        areas[0], areas[1], difference, variance, difference - Z_95 * error, difference + Z_95 * error, p_value
    )


def _placements(target: FloatArray, belief: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Share of the negatives below each positive, float[positives], and of the positives above each negative."""
    positive, negative = belief[target == 1], belief[target == 0]
    m, n = len(positive), len(negative)
    together = _mid_ranks(np.concatenate([positive, negative]))
    return (together[:m] - _mid_ranks(positive)) / n, 1 - (together[m:] - _mid_ranks(negative)) / m


def _mid_ranks(values: FloatArray) -> FloatArray:
    """Ranks from 1, the mean of theirs for equal values."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    upto = np.cumsum(counts)
    return (upto - (counts - 1) / 2)[group]
