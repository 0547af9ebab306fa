"""How sure a calibration error is, and a difference of two: intervals from its gaps in resamples of patients.

A calibration error is the sum of absolute gaps between belief and observed share, bin by bin
(:func:`trajlm.scores.calibration_gaps`). Beliefs without any true gap show some in a finite sample, and in its
resamples about as many again, so neither percentiles of the resamples nor their reflection hold a true error near 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from trajlm.scores import FloatArray, calibration_gaps

# Fewer stays of either outcome leave bins without one: their gaps do not scatter in resamples, and no interval is told.
LEAST_OUTCOMES = 20
STANDS_OUT = 2.0  # deviations of its resamples from 0: a gap beyond is no matter of chance alone
# Multiples of a sample's gaps that are looked at; 0, no gaps, comes first.
_MULTIPLES = np.concatenate([np.linspace(0, 2, 101), np.linspace(2.1, 6, 40)])


def drawn_gaps(target: FloatArray, belief: FloatArray, weights: Iterable[FloatArray], resamples: int) -> FloatArray:
    """float[1 + resamples, bins]: gaps of the sample, then those of its resamples.

    Args:
        target, belief: float[n].
        weights: blocks float[b, n] of how often each stay is drawn, ``resamples`` rows together.
        resamples: how many.

    Returns:
        NaN in the resamples where fewer than ``LEAST_OUTCOMES`` stays have one of the outcomes.
    """
    sample = calibration_gaps(target, belief, np.ones((1, len(target))))
    positives = float(target.sum())
    if min(positives, len(target) - positives) < LEAST_OUTCOMES:
        return np.concatenate([sample, np.full((resamples, sample.shape[1]), np.nan)])
    return np.concatenate([sample, *(calibration_gaps(target, belief, some) for some in weights)])


def gaps_interval(gaps: FloatArray, people: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a calibration error; it holds the figure of the sample, which chance raises, often as its upper end.

    The gaps of the sample are taken times 0, 0.02, ... 6, the scatter of the resamples about the sample is added, and
    those multiples are held to which a figure like the one seen is not among the rarest at either end (inversion of a
    test). How rare a figure so low is counts against how rare it is where there are no gaps (CLs; Read 2002): else a
    figure that is low by luck would rule out every multiple. The same is done with the gaps that stand out from their
    scatter alone, since where most bins have no true gap, what chance put there would count as true. The interval spans
    what either way holds.

    Args:
        gaps: float[1 + resamples, m], those of the sample first; of a mean over models all theirs side by side, each
            over the number of models.
        people: to draw from.
        level: of the interval.

    Returns:
        its ends; NaN where fewer than half of the resamples are defined, or with fewer than two people.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, came {level}")
    sample, drawn = gaps[0], gaps[1:][np.isfinite(gaps[1:]).all(axis=1)]
    if people < 2 or not len(drawn) or 2 * len(drawn) < len(gaps) - 1 or not np.isfinite(sample).all():
        return float("nan"), float("nan")
    seen, scatter = float(np.abs(sample).sum()), drawn - sample
    standing = np.where(np.abs(sample) > STANDS_OUT * scatter.std(axis=0), sample, 0.0)
    held = [_held(true, scatter, seen, (1 - level) / 2) for true in (sample, standing)]
    spanned = np.concatenate([[seen], *held])  # of few resamples perhaps none is held
    return float(spanned.min()), float(spanned.max())


def _held(true: FloatArray, scatter: FloatArray, seen: float, rarest: float) -> FloatArray:
    """Errors of those multiples of ``true`` float[m] that ``seen`` is not too rare for, and of the next ones."""
    figures = np.stack([np.abs(multiple * true + scatter).sum(axis=1) for multiple in _MULTIPLES])
    as_great, as_small = (figures >= seen).mean(axis=1), (figures <= seen).mean(axis=1)
    likely = (as_great >= rarest) & (as_small >= rarest * as_small[0])
    padded = np.pad(likely, 1)
    return np.abs(true).sum() * _MULTIPLES[padded[:-2] | likely | padded[2:]]


def gaps_difference_interval(
    first: FloatArray, second: FloatArray, people: int, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the first calibration error minus the second.

    Chance raises the error of fewer stays, or of more bins, the more: resamples of the difference would tell two models
    apart whose true errors are both 0. So it spans what the intervals of both leave open, each at a level that makes
    both hold together at ``level`` (Bonferroni): wide, and wider than it would have to be on the same stays.

    Args:
        first, second: as of :func:`gaps_interval`.
        people: to draw from.
        level: of the interval.
    """
    (low, high), (least, most) = (gaps_interval(gaps, people, (1 + level) / 2) for gaps in (first, second))
    return low - most, high - least
