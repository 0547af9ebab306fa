"""Calibration gaps and the interval of their absolute sum, by plain loops."""

from __future__ import annotations

import math

import numpy as np


def plain_gaps(target: np.ndarray, belief: np.ndarray, bins: int = 10) -> list[float]:
    held: dict[int, list[int]] = {k: [] for k in range(bins)}
    for i, b in enumerate(belief):
        middle = (belief < b).sum() + (belief == b).sum() / 2
        held[min(bins - 1, math.floor(bins * middle / len(belief)))].append(i)
    return [sum(belief[k] - target[k] for k in i) / len(belief) for i in held.values()]


def plain_gaps_interval(sample: list[float], drawn: list[list[float]], rarest: float) -> tuple[float, float]:
    """The errors that would now and then give a figure as low and as high as the one seen.

    They are multiples of the sample's gaps, or of those of them that stand out, and next to such multiples.
    """
    seen = sum(map(abs, sample))
    scatter = [[d - s for s, d in zip(sample, one, strict=True)] for one in drawn]
    multiples = [k / 50 for k in range(101)] + [2 + k / 10 for k in range(1, 41)]
    held = [seen]

    def shares(gaps: list[float]) -> tuple[float, float]:
        figures = [sum(abs(g + d) for g, d in zip(gaps, one, strict=True)) for one in scatter]
        return sum(f >= seen for f in figures) / len(drawn), sum(f <= seen for f in figures) / len(drawn)

    without = shares([0.0] * len(sample))[1]
    standing = []
    for k, gap in enumerate(sample):
        mean = sum(one[k] for one in scatter) / len(drawn)
        deviation = math.sqrt(sum((one[k] - mean) ** 2 for one in scatter) / len(drawn))
        standing.append(gap if abs(gap) > 2 * deviation else 0.0)
    for true in (sample, standing):
        great = [shares([multiple * gap for gap in true]) for multiple in multiples]
        likely = [g >= rarest and s >= rarest * without for g, s in great]
        for k, multiple in enumerate(multiples):
            if any(likely[max(0, k - 1) : k + 2]):
                held.append(multiple * sum(map(abs, true)))
    return min(held), max(held)
