"""95 % intervals hold the true figure about 95 times in 100, on cohorts drawn again and again from a known source."""

from __future__ import annotations

import numpy as np
import pytest

from trajlm.arms import MACRO
from trajlm.metrics import METRICS, bootstrap_interval, bootstrap_values, paired_difference_interval

REPEATS, PEOPLE, RESAMPLES = 150, 120, 200
# With the true rate 0.95, fewer than 0.88 or all of 150 would be seen about once in a thousand repeats of this test;
# percentile intervals of so few patients are known to be a little narrow.
LEAST = 0.88


def drawn(rng: np.random.Generator, people: int, skill: float) -> tuple[np.ndarray, ...]:
    """Patients with one to three stays that resemble each other: outcome, two risks, hours, two guesses, patient."""
    times = rng.integers(1, 4, people)
    who = np.repeat(np.arange(people), times)
    frailty = rng.normal(0, 1, people)[who]
    died = (rng.random(len(who)) < 1 / (1 + np.exp(1 - frailty))).astype(float)
    risks = [1 / (1 + np.exp(1 - s * frailty - rng.normal(0, 1, len(who)))) for s in (skill, 0.4)]
    hours = np.exp(4 + 0.4 * frailty + rng.normal(0, 0.5, len(who)))
    guesses = [np.exp(4 + s * 0.4 * frailty + rng.normal(0, 0.2, len(who))) for s in (skill, 0.4)]
    return died, *risks, hours, *guesses, who


def columns(name: str, cohort: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    died, risk, other_risk, hours, guess, other_guess, _ = cohort
    return (died, risk, other_risk) if METRICS[name][1] == "probability" else (hours, guess, other_guess)


@pytest.fixture(scope="module")
def cohorts():
    rng = np.random.default_rng(7)
    return [drawn(rng, PEOPLE, 1.0) for _ in range(REPEATS)], drawn(rng, 300_000, 1.0)


@pytest.mark.parametrize("name", ["auroc", "auprc", "brier_skill_score", "mae", "spearman"])
def test_intervals_of_a_figure_hold_its_true_value(cohorts, name):
    samples, source = cohorts
    metric = METRICS[name][0]
    truth = metric(*columns(name, source)[:2])
    ends = [bootstrap_interval(metric, *columns(name, c)[:2], c[-1], RESAMPLES, i) for i, c in enumerate(samples)]
    held = np.mean([low <= truth <= high for low, high in ends])
    assert LEAST <= held < 1
    # Nor are they so wide that they would hold anything.
    assert np.mean([low <= truth + (high - low) <= high for low, high in ends]) < 0.2


@pytest.mark.parametrize("name", ["auroc", "auprc", "mae"])
def test_intervals_of_a_difference_hold_its_true_value(cohorts, name):
    samples, source = cohorts
    metric = METRICS[name][0]
    y, first, second = columns(name, source)
    truth = metric(y, first) - metric(y, second)
    assert abs(truth) > 0.01
    ends = [paired_difference_interval(metric, *columns(name, c), c[-1], RESAMPLES, i) for i, c in enumerate(samples)]
    assert LEAST <= np.mean([low <= truth <= high for low, high in ends]) < 1


def test_intervals_of_a_macro_mean_hold_its_true_value_where_classes_are_rare():
    """Three classes, one so rare that some cohorts hold no positive of it."""
    rates, shifts = np.array([0.4, 0.15, 0.02]), np.array([1.0, 0.8, 1.2])

    def sample(rng: np.random.Generator, people: int) -> tuple[np.ndarray, np.ndarray]:
        y = (rng.random((people, 3)) < rates).astype(float)
        return y, shifts * y + rng.normal(0, 1, (people, 3))

    rng = np.random.default_rng(11)
    metric = MACRO["macro_auroc"]
    truth = metric(*sample(rng, 400_000))
    held, without = [], 0
    for i in range(REPEATS):
        y, b = sample(rng, 150)
        without += int((y.sum(axis=0) == 0).any())
        low, high = bootstrap_interval(metric, y, b, np.arange(150), RESAMPLES, i)
        held.append(low <= truth <= high)
    assert without > 2
    assert LEAST - 0.04 <= np.mean(held) < 1


@pytest.mark.parametrize("people", [150, 600])
@pytest.mark.parametrize("prevalence", [0.14, 0.5])
@pytest.mark.parametrize(("boldness", "shift"), [(1, 0), (1.3, 0), (2, 0), (1, 0.3), (1, 1)])
def test_intervals_of_a_calibration_error_hold_its_true_value(people, prevalence, boldness, shift):
    """Perfect beliefs, whose true error is 0, and beliefs that are too bold or too high."""
    offset = {0.14: -2.2, 0.5: 0.0}[prevalence]
    metric = METRICS["adaptive_calibration_error"][0]

    def sample(rng: np.random.Generator, people: int) -> tuple[np.ndarray, np.ndarray]:
        odds = 1.2 * rng.normal(size=people)
        y = (rng.random(people) < 1 / (1 + np.exp(-odds - offset))).astype(float)
        return y, 1 / (1 + np.exp(-boldness * odds - offset - shift))

    rng = np.random.default_rng(3)
    truth = metric(*sample(rng, 400_000)) if boldness != 1 or shift else 0.0
    held, top = [], []
    for i in range(100):
        cohort = sample(rng, people)
        low, high = bootstrap_interval(metric, *cohort, np.arange(people), 100, i)
        held.append(low <= truth <= high)
        top.append(high)
    # A great error is held less often than the nominal 0.95.
    assert np.mean(held) >= (LEAST if truth < 0.06 else 0.8)
    assert np.mean(top) < truth + 2.2 / np.sqrt(people)


def test_reflected_intervals_hold_a_macro_auprc_of_rare_classes_far_more_often_than_percentiles():
    """Ten classes, half of them rare."""
    offsets = np.array([-4.5] * 5 + [-2.2] * 5)
    metric = MACRO["macro_auprc"]

    def sample(rng: np.random.Generator, people: int) -> tuple[np.ndarray, np.ndarray]:
        odds = 1.2 * rng.normal(size=(people, len(offsets)))
        y = (rng.random(odds.shape) < 1 / (1 + np.exp(-odds - offsets))).astype(float)
        return y, 1 / (1 + np.exp(-odds - offsets))

    rng = np.random.default_rng(3)
    truth = float(metric(*sample(rng, 400_000)))
    held, plain = [], []
    for i in range(80):
        y, b = sample(rng, 350)
        low, high = bootstrap_interval(metric, y, b, np.arange(350), 100, i)
        held.append(low <= truth <= high)
        ends = np.quantile(bootstrap_values(metric, y, b, np.arange(350), 100, i), [0.025, 0.975])
        plain.append(ends[0] <= truth <= ends[1])
    assert np.mean(plain) < 0.6
    assert np.mean(held) > 0.75
