"""Metrics against scikit-learn and scipy, intervals against plain resampling, landmarks against a plain loop."""

from __future__ import annotations

import functools
import math

import numpy as np
import polars as pl
import pytest
from calibration_example import plain_gaps, plain_gaps_interval
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from trajlm.errors import TrajlmError
from trajlm.gaps import LEAST_OUTCOMES
from trajlm.metrics import (
    METRICS,
    adaptive_calibration_error,
    auprc,
    auroc,
    beliefs_at_landmark,
    bootstrap_interval,
    bootstrap_values,
    brier_skill_score,
    estimate,
    evaluate,
    macro_auprc,
    macro_auroc,
    mae,
    mse,
    paired_difference_interval,
    pearson,
    reliability_curve,
    resample_weights,
    spearman,
)

Array = NDArray[np.float64]
close = functools.partial(pytest.approx, rel=1e-12, abs=1e-12, nan_ok=True)
PROBABILITY = [name for name, (_, kind) in METRICS.items() if kind == "probability"]


def scored(n: int = 300, seed: int = 0, decimals: int = 2) -> tuple[Array, Array]:
    """Labels and beliefs that tell them apart somewhat, rounded so that many tie."""
    rng = np.random.default_rng(seed)
    target = (rng.random(n) < 0.3).astype(float)
    belief = 1 / (1 + np.exp(1 - target - rng.normal(size=n)))
    return target, belief.round(decimals)


def timed(n: int = 300, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    hours = rng.gamma(2, 40, n).round()
    return hours, (hours * rng.lognormal(0, 0.6, n)).round()


def plain_calibration_error(target: Array, belief: Array, bins: int = 10) -> float:
    return sum(abs(gap) for gap in plain_gaps(target, belief, bins))


def plain_brier_skill(target: Array, belief: Array) -> float:
    reference = sk.brier_score_loss(target, np.full(len(target), target.mean()))
    return 1 - sk.brier_score_loss(target, belief) / reference


PLAIN = {
    "auroc": sk.roc_auc_score,
    "auprc": sk.average_precision_score,
    "adaptive_calibration_error": plain_calibration_error,
    "brier_skill_score": plain_brier_skill,
    "mse": sk.mean_squared_error,
    "mae": sk.mean_absolute_error,
    "pearson": lambda y, b: stats.pearsonr(y, b).statistic,
    "spearman": lambda y, b: stats.spearmanr(y, b).statistic,
}


def example(name: str, n: int = 300, seed: int = 0) -> tuple[Array, Array]:
    return scored(n, seed) if METRICS[name][1] == "probability" else timed(n, seed)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("seed", range(5))
def test_metric_equals_an_independent_computation(name: str, seed: int) -> None:
    target, belief = example(name, 40 + 97 * seed, seed)
    assert METRICS[name][0](target, belief) == close(PLAIN[name](target, belief))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_weighted_discrimination_equals_scikit_learn(rows: list[tuple[bool, int, int]]) -> None:
    target, belief, weights = np.array(rows, float).T
    both = len(set(target[weights > 0])) == 2
    for ours, theirs in ((auroc, sk.roc_auc_score), (auprc, sk.average_precision_score)):
        value = float(ours(target, belief, weights))
        assert value == close(theirs(target, belief, sample_weight=weights)) if both else math.isnan(value)


@pytest.mark.parametrize("name", METRICS)
def test_weights_count_stays_as_often_as_repeating_them(name: str) -> None:
    target, belief = example(name)
    weights = np.random.default_rng(1).integers(0, 4, size=(7, len(target)))
    values = METRICS[name][0](target, belief, weights.astype(float))
    assert values.shape == (7,)
    for value, counts in zip(values, weights, strict=True):
        assert value == close(PLAIN[name](np.repeat(target, counts), np.repeat(belief, counts)))


@pytest.mark.parametrize("name", ["auroc", "auprc", "mse", "mae"])
def test_fractional_weights_equal_scikit_learn(name: str) -> None:
    target, belief = example(name)
    weights = np.random.default_rng(2).random(len(target))
    assert float(METRICS[name][0](target, belief, weights)) == close(PLAIN[name](target, belief, sample_weight=weights))


@pytest.mark.parametrize("name", METRICS)
def test_order_of_stays_does_not_matter(name: str) -> None:
    target, belief = example(name)
    shuffled = np.random.default_rng(3).permutation(len(target))
    assert METRICS[name][0](target[shuffled], belief[shuffled]) == close(METRICS[name][0](target, belief))


@pytest.mark.parametrize(
    ("metric", "target", "belief"),
    [
        *[(m, y, [0.1, 0.7, 0.7]) for m in (auroc, auprc, brier_skill_score) for y in ([1, 1, 1], [0, 0, 0])],
        *[(m, [5.0, 9.0, 7.0], [3.3, 3.3, 3.3]) for m in (pearson, spearman)],
        *[(m, [3.3, 3.3, 3.3], [5.0, 9.0, 7.0]) for m in (pearson, spearman)],
        *[(m, [], []) for m, _ in METRICS.values()],
    ],
)
def test_undefined_is_nan(metric, target, belief) -> None:
    assert math.isnan(metric(target, belief))


def test_constant_in_one_resample_leaves_the_others_defined() -> None:
    target, belief = np.array([1.0, 1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])
    for metric in (pearson, spearman):
        values = metric(target, belief, np.array([[1.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
        assert math.isnan(values[0])
        assert values[1] == close(metric(target, belief))


@pytest.mark.parametrize(
    ("target", "belief", "weights"),
    [
        ([0, 1], [0.1], None),
        ([0, 1], [0.1, float("nan")], None),
        ([0, float("nan")], [0.1, 0.2], None),
        ([0, 2], [0.1, 0.2], None),
        ([0, 1], [0.1, 0.2], np.array([1.0, -1.0])),
        ([0, 1], [0.1, 0.2], np.ones(3)),
    ],
)
def test_malformed_input_is_refused(target, belief, weights) -> None:
    with pytest.raises(ValueError, match=r"expected one belief|must be"):
        auroc(target, belief, weights)


def test_macro_ignores_classes_without_both_labels() -> None:
    rng = np.random.default_rng(0)
    target = (rng.random((80, 4)) < 0.4).astype(float)
    belief = rng.random((80, 4)).round(1)
    target[:, 1] = 0
    target[:30, 2] = np.nan
    for macro, plain in ((macro_auroc, sk.roc_auc_score), (macro_auprc, sk.average_precision_score)):
        each = [plain(target[known, c], belief[known, c]) for c in (0, 2, 3) for known in [np.isfinite(target[:, c])]]
        assert macro(target, belief) == close(np.mean(each))
        assert math.isnan(macro(target[:, 1:2], belief[:, 1:2]))
        low, high = bootstrap_interval(macro, target, belief, np.arange(80), 100, 0)
        assert low < macro(target, belief) < high


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_reliability_curve_without_ties_is_the_split_into_equal_parts(bins: int) -> None:
    target, belief = scored(40, decimals=16)
    curve = reliability_curve(target, belief, bins)
    parts = np.array_split(np.argsort(belief), bins)
    assert curve.count.tolist() == [len(p) for p in parts]
    assert curve.belief_mean == close([belief[p].mean() for p in parts])
    assert curve.observed == close([target[p].mean() for p in parts])
    gap = np.abs(curve.belief_mean - curve.observed) @ curve.count / 40
    assert adaptive_calibration_error(target, belief, bins=bins) == close(gap)


def test_equal_beliefs_share_a_bin() -> None:
    curve = reliability_curve([0, 1, 0, 1, 1], [0.3, 0.3, 0.3, 0.3, 0.9])
    assert curve.count.tolist() == [4, 1]
    assert curve.observed.tolist() == [0.5, 1.0]
    assert reliability_curve([], []).count.tolist() == []


def test_calibrated_beliefs_have_less_error_than_distorted_ones() -> None:
    rng = np.random.default_rng(0)
    belief = rng.random(4000)
    target = (rng.random(4000) < belief).astype(float)
    good, bad = (adaptive_calibration_error(target, b) for b in (belief, belief**2))
    assert good < 0.03 < 0.1 < bad
    assert brier_skill_score(target, belief) > brier_skill_score(target, belief**2) > 0
    assert brier_skill_score(target, np.full(4000, target.mean())) == close(0)


@pytest.mark.parametrize("name", METRICS)
def test_interval_equals_resampling_patients_one_by_one(name: str) -> None:
    target, belief = example(name, 90)
    subjects = np.random.default_rng(4).integers(0, 35, 90)
    weights = np.concatenate(list(resample_weights(subjects, 40, 7))).astype(int)
    plain = [PLAIN[name](np.repeat(target, w), np.repeat(belief, w)) for w in weights]
    assert bootstrap_values(METRICS[name][0], target, belief, subjects, 40, 7) == close(np.array(plain))
    low, high = np.quantile(plain, [0.1, 0.9])
    if name == "adaptive_calibration_error":
        drawn = [plain_gaps(np.repeat(target, w), np.repeat(belief, w)) for w in weights]
        low, high = plain_gaps_interval(plain_gaps(target, belief), drawn, 0.1)
    assert bootstrap_interval(METRICS[name][0], target, belief, subjects, 40, 7, level=0.8) == close((low, high))


@pytest.mark.parametrize("resamples", [1, 2, 5])
def test_the_interval_of_a_calibration_error_holds_its_figure_however_few_resamples_there_are(resamples: int) -> None:
    for seed in range(20):
        target, belief = scored(110, seed)
        low, high = bootstrap_interval(adaptive_calibration_error, target, belief, np.arange(110), resamples, seed)
        assert 0 <= low <= adaptive_calibration_error(target, belief) <= high + 1e-12


def test_a_calibration_error_of_few_stays_with_an_outcome_has_no_interval() -> None:
    belief, people = np.random.default_rng(0).random(200), np.arange(200)
    for positives, told in ((0, False), (LEAST_OUTCOMES - 1, False), (LEAST_OUTCOMES, True),
                            (200 - LEAST_OUTCOMES, True), (201 - LEAST_OUTCOMES, False)):  # fmt: skip
        target = (people < positives).astype(float)
        ends = bootstrap_interval(adaptive_calibration_error, target, belief, people, 40, 0)
        assert np.isfinite(ends).all() == told
        ends = paired_difference_interval(adaptive_calibration_error, target, belief, belief**2, people, 40, 0)
        assert np.isfinite(ends).all() == told
    for metric in (auroc, adaptive_calibration_error):
        with pytest.raises(ValueError, match="between 0 and 1"):
            bootstrap_interval(metric, (people < 100).astype(float), belief, people, 40, 0, level=1.5)


def test_a_difference_of_calibration_errors_spans_what_the_intervals_of_both_leave_open() -> None:
    target, belief = scored(300)
    people = np.arange(300)
    (low, high), (least, most) = (
        bootstrap_interval(adaptive_calibration_error, target, b, people, 200, 3, level=0.975)
        for b in (belief, belief**5)
    )
    ends = paired_difference_interval(adaptive_calibration_error, target, belief, belief**5, people, 200, 3)
    assert ends == close((low - most, high - least))
    assert ends[1] < 0, "beliefs far too low are told from good ones"


def test_resamples_draw_as_many_patients_and_keep_their_stays_together() -> None:
    subjects = np.array(["b", "a", "b", "c", "a", "d"])
    weights = np.concatenate(list(resample_weights(subjects, 500, 0)))
    first = np.unique(subjects, return_index=True)[1]
    assert (weights[:, first].sum(axis=1) == 4).all()
    for name in "abcd":
        assert (weights[:, subjects == name] == weights[:, subjects == name][:, :1]).all()
    assert weights.mean(axis=0) == pytest.approx(1, abs=0.2)
    shuffled = np.random.default_rng(0).permutation(6)
    again = np.concatenate(list(resample_weights(subjects[shuffled], 500, 0)))
    assert (again == weights[:, shuffled]).all()


def test_resamples_do_not_depend_on_how_they_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects = np.arange(50)
    whole = np.concatenate(list(resample_weights(subjects, 30, 1)))
    monkeypatch.setattr("trajlm.metrics._BLOCK", 350)
    blocks = list(resample_weights(subjects, 30, 1))
    assert len(blocks) == 5
    assert (np.concatenate(blocks) == whole).all()


def test_copies_of_a_patients_stays_do_not_narrow_the_interval() -> None:
    target, belief = scored(100)
    once = bootstrap_interval(auroc, target, belief, np.arange(100), 200, 0)
    copied = [np.tile(x, 5) for x in (target, belief, np.arange(100))]
    assert bootstrap_interval(auroc, *copied, 200, 0) == close(once)
    low, high = bootstrap_interval(auroc, *copied[:2], np.arange(500), 200, 0)
    assert high - low < 0.6 * (once[1] - once[0])


def test_coverage_is_near_nominal_with_several_stays_per_patient() -> None:
    # Both stays of a patient share label and most of the score, so that stays are far from independent.
    replicates, shift, rng = 200, 1.0, np.random.default_rng(11)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    subjects = np.repeat(np.arange(120), 2)
    covered = {"patient": 0, "stay": 0}
    for i in range(replicates):
        target = np.repeat((rng.random(120) < 0.35).astype(float), 2)
        score = shift * target + np.repeat(rng.normal(scale=math.sqrt(0.9), size=120), 2)
        score += rng.normal(scale=math.sqrt(0.1), size=240)
        for unit, names in (("patient", subjects), ("stay", np.arange(240))):
            low, high = bootstrap_interval(auroc, target, score, names, 200, i)
            covered[unit] += low <= truth <= high
    error = math.sqrt(0.95 * 0.05 / replicates)
    assert abs(covered["patient"] / replicates - 0.95) < 4 * error
    assert covered["stay"] / replicates < 0.95 - 4 * error


def test_interval_is_nan_where_too_few_resamples_are_defined() -> None:
    target, belief = np.array([1.0] + [0.0] * 9), np.linspace(1, 0, 10)
    alone = np.array([1.0, 0.0])
    assert np.isnan(bootstrap_values(auroc, target, belief, np.arange(10), 300, 0)).mean() < 0.5
    assert np.isfinite(bootstrap_interval(auroc, target, belief, np.arange(10), 300, 0)).all()
    assert np.isnan(bootstrap_interval(auroc, alone, alone, np.arange(2), 299, 0)).all() == (
        np.isnan(bootstrap_values(auroc, alone, alone, np.arange(2), 299, 0)).sum() > 149
    )
    assert np.isnan(bootstrap_interval(auroc, np.ones(10), belief, np.arange(10), 50, 0)).all()
    assert np.isnan(bootstrap_interval(auroc, target, belief, np.zeros(10), 50, 0)).all(), "one patient has no spread"


def test_paired_difference() -> None:
    target, belief = scored(200)
    noise = np.random.default_rng(5).random(200)
    subjects = np.arange(200)
    for metric in (auroc, auprc, mse, mae):
        assert paired_difference_interval(metric, target, belief, belief, subjects, 50, 0) == (0.0, 0.0)
    forth = paired_difference_interval(auroc, target, belief, noise, subjects, 200, 0)
    back = paired_difference_interval(auroc, target, noise, belief, subjects, 200, 0)
    assert forth == close((-back[1], -back[0]))
    assert forth[0] > 0
    a, b = (bootstrap_interval(auroc, target, x, subjects, 200, 0) for x in (belief, belief * 0.9 + noise * 0.1))
    low, high = paired_difference_interval(auroc, target, belief, belief * 0.9 + noise * 0.1, subjects, 200, 0)
    assert high - low < min(a[1] - a[0], b[1] - b[0]), "pairing removes what both share"


def made_run(seed: int = 0, count: int = 60) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Beliefs of stays with 0 to 12 events (times tie), rows in no order; some lengths and targets are unknown."""
    rng = np.random.default_rng(seed)
    stays, rows = [], []
    for stay in range(count):
        known = None if stay % 11 == 0 else float(rng.integers(2, 70))
        stays.append((stay, f"p{stay // 2}", known))
        dies = None if stay % 13 == 0 else int(rng.random() < 0.4)
        hours = np.sort(rng.integers(0, 60, rng.integers(0, 13)))
        rows += [(stay, i, float(h), float(rng.random()), dies, float(h), known) for i, h in enumerate(hours)]
    columns = ["stay_id", "event_index", "hours_since_admission"]
    columns += ["belief_mortality", "target_mortality", "belief_length", "target_length"]
    beliefs = pl.DataFrame(rows, schema=columns, orient="row").sample(fraction=1, shuffle=True, seed=1)
    return beliefs, pl.DataFrame(stays, schema=["stay_id", "subject_id", "hours_in_unit"], orient="row")


@pytest.mark.parametrize("hours", [0.0, 6.0, 24.0, 48.0, None])
def test_landmark_equals_a_plain_loop(hours: float | None) -> None:
    beliefs, stays = made_run()
    expected = []
    for stay, _, length in stays.iter_rows():
        if hours is not None and length is not None and length < hours:
            continue
        seen = [r for r in beliefs.iter_rows() if r[0] == stay and (hours is None or r[2] <= hours)]
        if seen:
            expected.append(max(seen, key=lambda r: (r[2], r[1])))
    assert beliefs_at_landmark(beliefs, stays, hours).rows() == expected
    assert len(expected) > 3


def test_later_beliefs_never_change_an_earlier_landmark() -> None:
    beliefs, stays = made_run()
    late = pl.col("hours_since_admission") > 24
    changed = beliefs.with_columns(pl.when(late).then(0.99).otherwise("belief_mortality").alias("belief_mortality"))
    for other in (changed, beliefs.filter(~late)):
        assert beliefs_at_landmark(other, stays, 24.0).equals(beliefs_at_landmark(beliefs, stays, 24.0))
    targets, landmarks = [("mortality", "probability")], [6.0, 24.0, None]
    before, after = (evaluate(b, stays, targets, landmarks, 50, 0) for b in (beliefs, changed))
    early = pl.col("landmark").is_not_null()
    assert before.filter(early).equals(after.filter(early))
    assert not before.equals(after), "the end of the window does see them"


def test_evaluate_agrees_with_the_metrics_on_the_same_rows() -> None:
    beliefs, stays = made_run(count=260)
    targets = [("mortality", "probability"), ("length", "hours")]
    table = evaluate(beliefs, stays, targets, [6.0, 48.0, None], 60, 3)
    assert table.columns == ["target", "landmark", "metric", "value", "low", "high", "stays", "positives"]
    assert table.height == 2 * 3 * 4
    for target, landmark, name, value, low, high, count, positives in table.iter_rows():
        at = beliefs_at_landmark(beliefs, stays, landmark).filter(pl.col(f"target_{target}").is_not_null())
        y, b = at[f"target_{target}"].to_numpy(), at[f"belief_{target}"].to_numpy()
        assert value == close(PLAIN[name](y, b))
        people = [f"p{stay // 2}" for stay in at["stay_id"]]
        assert (low, high) == close(bootstrap_interval(METRICS[name][0], y, b, people, 60, 3))
        assert (count, positives) == (len(y), int(y.sum()) if target == "mortality" else None)


def test_undefined_figures_are_null_with_their_count() -> None:
    beliefs, stays = made_run()
    alive = beliefs.with_columns(pl.lit(0).alias("target_mortality"))
    table = evaluate(alive, stays, [("mortality", "probability")], [None], 20, 0)
    told = table.filter(pl.col("metric") == "adaptive_calibration_error")
    assert told.select("value", "low", "high").null_count().row(0) == (0, 1, 1)
    undefined = table.filter(pl.col("metric") != "adaptive_calibration_error")
    assert undefined.select("value", "low", "high").null_count().row(0) == (3, 3, 3)
    assert undefined["stays"].to_list() == [beliefs["stay_id"].n_unique()] * 3
    assert undefined["positives"].to_list() == [0, 0, 0]
    for none in (beliefs.clear(), beliefs.with_columns(pl.lit(None, pl.Int64).alias("target_mortality"))):
        empty = evaluate(none, stays, [("mortality", "probability")], [6.0, None], 20, 0)
        assert empty["stays"].to_list() == [0] * 8
        assert empty["value"].null_count() == 8
    assert evaluate(beliefs, stays, [], [None], 20, 0).height == 0
    assert np.isnan(bootstrap_interval(mae, [], [], [], 20, 0)).all()
    one = estimate("auroc", [1.0, 1.0], [0.2, 0.3], ["a", "b"], 20, 0)
    assert math.isnan(one.value)
    assert (one.stays, one.positives) == (2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.lit(1.2).alias("belief_mortality"), "is 1.2, expected a probability"),
        (pl.lit(None, pl.Float64).alias("belief_mortality"), "expected a probability"),
        (pl.lit(3).alias("target_mortality"), "must be 0 or 1"),
        (pl.lit(999).alias("stay_id"), "1 stays are not in the prepared folder, such as stay_id 999"),
        (pl.lit(float("nan")).alias("hours_since_admission"), "finite number"),
    ],
)
def test_impossible_rows_are_refused(change: pl.Expr, message: str) -> None:
    beliefs, stays = made_run()
    with pytest.raises(TrajlmError, match=message):
        evaluate(beliefs.with_columns(change), stays, [("mortality", "probability")], [None], 20, 0)


def test_missing_columns_and_kinds_are_named() -> None:
    beliefs, stays = made_run()
    with pytest.raises(TrajlmError, match="belief_sepsis"):
        evaluate(beliefs, stays, [("sepsis", "probability")], [None], 20, 0)
    with pytest.raises(TrajlmError, match="'days'"):
        evaluate(beliefs, stays, [("length", "days")], [None], 20, 0)  # type: ignore[list-item]
    with pytest.raises(TrajlmError, match="subject_id"):
        evaluate(beliefs, stays.drop("subject_id"), [("length", "hours")], [None], 20, 0)
    with pytest.raises(TrajlmError, match="one row per stay_id"):
        beliefs_at_landmark(beliefs, pl.concat([stays, stays]), 6.0)


def test_registry_covers_both_kinds() -> None:
    assert PROBABILITY == ["auroc", "auprc", "adaptive_calibration_error", "brier_skill_score"]
    assert {kind for _, kind in METRICS.values()} == {"probability", "hours"}
    assert mse([1.0, 3.0], [2.0, 5.0]) == 2.5
    assert mae([1.0, 3.0], [2.0, 5.0]) == 1.5
