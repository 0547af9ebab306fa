"""DeLong's test against its definition written out over every pair of stays, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from trajlm.delong import delong_test
from trajlm.metrics import auroc, paired_difference_interval


def written_out(target, first, second):
    """Areas, difference and its variance from the structural components of every positive and negative."""
    positive, negative = np.flatnonzero(target == 1), np.flatnonzero(target == 0)
    components = []
    for belief in (first, second):
        wins = np.array([[(belief[i] > belief[j]) + (belief[i] == belief[j]) / 2 for j in negative] for i in positive])
        components.append((wins.mean(axis=1), wins.mean(axis=0), wins.mean()))
    (a10, a01, a), (b10, b01, b) = components

    def spread(x, y):
        return ((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1)

    variance = sum(
        sign * (spread(x10, y10) / len(positive) + spread(x01, y01) / len(negative))
        for sign, (x10, x01), (y10, y01) in (
            (1, (a10, a01), (a10, a01)), (1, (b10, b01), (b10, b01)), (-2, (a10, a01), (b10, b01)),
        )
    )  # fmt: skip
    return a, b, variance


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 6)), min_size=6, max_size=40))
@settings(max_examples=150, deadline=None)
def test_equals_the_definition(rows):
    target, first, second = np.array(rows, float).T
    found = delong_test(target, first, second)
    if min(target.sum(), (1 - target).sum()) < 2:
        assert math.isnan(found.p_value)
        return
    a, b, variance = written_out(target, first, second)
    assert (found.first, found.second, found.difference) == pytest.approx((a, b, a - b), abs=1e-12)
    assert found.first == pytest.approx(roc_auc_score(target, first), abs=1e-12)
    assert found.variance == pytest.approx(variance, abs=1e-12)
    if variance > 1e-9:
        assert found.p_value == pytest.approx(2 * stats.norm.sf(abs(a - b) / math.sqrt(variance)), rel=1e-9)
        assert (found.high - found.low) / 2 == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(variance), rel=1e-9)


def simulated(rng, n, first, second):
    """Outcomes and two beliefs that share most of their noise; the numbers say how well each separates."""
    target = (rng.random(n) < 0.3).astype(float)
    shared = rng.normal(size=n)
    return target, *(gap * target + shared + 0.7 * rng.normal(size=n) for gap in (first, second))


def test_equal_beliefs_differ_by_chance_as_often_as_they_should():
    """1,000 draws in which both are equally good: 5 % are called different, give or take three standard errors."""
    rng = np.random.default_rng(0)
    found = [delong_test(*simulated(rng, 250, 1.2, 1.2)) for _ in range(1000)]
    assert np.mean([f.p_value < 0.05 for f in found]) == pytest.approx(0.05, abs=0.021)
    assert np.mean([f.low <= 0 <= f.high for f in found]) == pytest.approx(0.95, abs=0.021)


def test_intervals_cover_a_true_difference():
    gap = [stats.norm.cdf(separation / math.sqrt(2 * 1.49)) for separation in (1.6, 1.0)]
    rng = np.random.default_rng(1)
    found = [delong_test(*simulated(rng, 250, 1.6, 1.0)) for _ in range(600)]
    assert np.mean([f.low <= gap[0] - gap[1] <= f.high for f in found]) == pytest.approx(0.95, abs=0.03)
    assert np.mean([f.p_value < 0.05 for f in found]) > 0.6


def test_agrees_with_the_paired_bootstrap():
    target, first, second = simulated(np.random.default_rng(2), 800, 1.4, 1.1)
    found = delong_test(target, first, second)
    low, high = paired_difference_interval(auroc, target, first, second, np.arange(800), 2000, 0)
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.004)


def test_beliefs_that_order_alike_are_not_told_apart():
    target, first, _ = simulated(np.random.default_rng(3), 60, 1.0, 1.0)
    assert delong_test(target, first, 3 * first + 1).p_value == 1.0
    assert delong_test(target, first, first).variance == 0.0
    assert math.isnan(delong_test(np.zeros(60), first, first).p_value)
    with pytest.raises(ValueError, match="of one length"):
        delong_test(target[:-1], first, first)
