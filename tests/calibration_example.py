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
    """The multiples of the sample's gaps that would now and then give a figure as low and as high as the one seen."""
    seen = sum(map(abs, sample))

    def shares(multiple: float) -> tuple[float, float]:
        figures = [sum(abs(multiple * s + d - s) for s, d in zip(sample, one, strict=True)) for one in drawn]
        return sum(f >= seen for f in figures) / len(drawn), sum(f <= seen for f in figures) / len(drawn)

    without = shares(0.0)[1]
    held = [1.0]
    for multiple in [k / 20 for k in range(41)] + [2 + k / 4 for k in range(1, 17)]:
        great, small = shares(multiple)
        if great >= rarest and small >= rarest * without:
            held.append(multiple)
    return min(held) * seen, max(held) * seen
