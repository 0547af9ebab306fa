"""95 % intervals hold the true figure about 95 times in 100, on cohorts drawn again and again from a known source."""

from __future__ import annotations

import numpy as np
import pytest

from trajlm.arms import MACRO
from trajlm.gaps import drawn_gaps, gaps_interval
from trajlm.metrics import METRICS, bootstrap_interval, bootstrap_values, paired_difference_interval
from trajlm.scores import calibration_gaps

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


def believed(rng: np.random.Generator, people: int, prevalence: float, wrong: tuple[float, ...]):
    """Outcomes, and beliefs: too bold (a factor of their log odds), too high (a shift), too high in the top tenth."""
    boldness, shift, top = wrong
    offset = {0.01: -5.2, 0.14: -2.2, 0.5: 0.0}[prevalence]
    odds = 1.2 * rng.normal(size=people)
    y = (rng.random(people) < 1 / (1 + np.exp(-odds - offset))).astype(float)
    b = 1 / (1 + np.exp(-boldness * odds - offset - shift))
    return y, np.where(odds > 1.54, np.minimum(b + top, 1.0), b)


WRONG = [(1, 0, 0), (1.3, 0, 0), (2, 0, 0), (1, 0.3, 0), (1, 1, 0), (1, 0, 0.25)]


@pytest.mark.parametrize(("people", "prevalence"), [(150, 0.5), (250, 0.14), (600, 0.14), (600, 0.5)])
@pytest.mark.parametrize("wrong", WRONG)
def test_intervals_of_a_calibration_error_hold_its_true_value(people, prevalence, wrong):
    """Of perfect beliefs, whose true error is 0, and of others."""
    metric = METRICS["adaptive_calibration_error"][0]
    rng = np.random.default_rng(3)
    truth = metric(*believed(rng, 400_000, prevalence, wrong)) if wrong != WRONG[0] else 0.0
    held, top = [], []
    for i in range(100):
        low, high = bootstrap_interval(metric, *believed(rng, people, prevalence, wrong), np.arange(people), 100, i)
        if np.isfinite(high):  # enough deaths
            held.append(low <= truth <= high)
            top.append(high)
    assert len(held) > 90
    assert np.mean(held) >= LEAST
    assert np.mean(top) < truth + 2.2 / np.sqrt(people)


@pytest.mark.parametrize("wrong", WRONG)
def test_intervals_of_a_mean_calibration_error_of_five_splits_hold_its_true_value(wrong):
    """4,000 patients, 600 of them held out in each split."""
    rng = np.random.default_rng(5)
    every = np.ones((1, 400_000))
    truth = np.abs(calibration_gaps(*believed(rng, 400_000, 0.14, wrong), every)).sum() if wrong != WRONG[0] else 0.0
    held = []
    for _ in range(40):
        y, b = believed(rng, 4000, 0.14, wrong)
        drawn, parts = rng.multinomial(4000, np.full(4000, 1 / 4000), size=120).astype(float), []
        for _ in range(5):
            own = rng.permutation(4000)[:600]
            parts.append(drawn_gaps(y[own], b[own], [drawn[:, own]], 120) / 5)
        low, high = gaps_interval(np.concatenate(parts, axis=1), 4000)
        held.append(low <= truth <= high)
    assert np.mean(held) >= LEAST


def test_of_few_deaths_no_calibration_error_has_an_interval():
    """Perfect beliefs: with no death in most bins their gaps do not scatter, and would look like true ones."""
    rng = np.random.default_rng(6)
    metric = METRICS["adaptive_calibration_error"][0]
    for i in range(20):
        assert np.isnan(bootstrap_interval(metric, *believed(rng, 150, 0.01, WRONG[0]), np.arange(150), 50, i)).all()


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
    for i in range(REPEATS):
        y, b = sample(rng, 350)
        low, high = bootstrap_interval(metric, y, b, np.arange(350), 100, i)
        held.append(low <= truth <= high)
        ends = np.quantile(bootstrap_values(metric, y, b, np.arange(350), 100, i), [0.025, 0.975])
        plain.append(ends[0] <= truth <= ends[1])
    assert np.mean(plain) < 0.6
    assert LEAST - 0.04 <= np.mean(held) < 1
