"""Temperature scaling against an independent optimiser; figures before and after against the metrics themselves."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from trajlm.calibration import calibration_rows, fit_temperature, scaled
from trajlm.metrics import adaptive_calibration_error, reliability_curve


def overconfident(n: int, seed: int, temperature: float = 2.5):
    """Outcomes drawn from honest odds, and beliefs that claim those odds times the temperature."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(-1, 1, n)
    target = (rng.random(n) < 1 / (1 + np.exp(-odds))).astype(float)
    return target, 1 / (1 + np.exp(-odds * temperature))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_minimises_the_cross_entropy(seed, temperature):
    target, belief = overconfident(400, seed, temperature)

    def loss(log_temperature):
        odds = np.log(belief / (1 - belief)) / np.exp(log_temperature)
        return log_loss(target, 1 / (1 + np.exp(-odds)))

    best = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-10})
    assert fit_temperature(target, belief) == pytest.approx(np.exp(best.x), rel=1e-4)
    assert loss(np.log(fit_temperature(target, belief))) <= best.fun + 1e-12


def test_the_true_temperature_is_found_and_undone():
    target, belief = overconfident(50_000, 0)
    assert fit_temperature(target, belief) == pytest.approx(2.5, rel=0.03)
    assert fit_temperature(target, scaled(belief, fit_temperature(target, belief))) == pytest.approx(1, rel=1e-6)


def test_scaling_keeps_the_order_and_the_middle():
    _, belief = overconfident(200, 0)
    moved = scaled(belief, 2.0)
    assert (np.argsort(moved) == np.argsort(belief)).all()
    assert (np.abs(moved - 0.5) <= np.abs(belief - 0.5)).all()
    assert scaled([0.5], 3.0)[0] == 0.5
    assert np.isfinite(scaled([0.0, 1.0], 0.1)).all()
    np.testing.assert_allclose(scaled(belief, 1.0), belief, rtol=1e-9)


def test_one_outcome_leaves_beliefs_alone():
    assert fit_temperature(np.zeros(5), np.full(5, 0.2)) == 1.0
    assert fit_temperature([], []) == 1.0


def frame(target, belief):
    return pl.DataFrame({"stay_id": range(len(target)), "subject_id": [str(i // 2) for i in range(len(target))],
                         "target_death": target, "belief_death": belief})  # fmt: skip


def test_figures_before_and_after_follow_from_the_beliefs():
    tuning, held_out = overconfident(500, 0), overconfident(600, 1)
    figures, points = calibration_rows(frame(*tuning), frame(*held_out), ["death"], 40, 0)
    target, belief = held_out
    temperature = fit_temperature(*tuning)
    reference = brier_score_loss(target, np.full(len(target), target.mean()))
    for scaling, moved in (("none", belief), ("temperature", scaled(belief, temperature))):
        own = {row["metric"]: row for row in figures.filter(pl.col("scaling") == scaling).iter_rows(named=True)}
        skill = 1 - brier_score_loss(target, moved) / reference
        assert own["brier_skill_score"]["value"] == pytest.approx(skill, abs=1e-12)
        gap = own["adaptive_calibration_error"]
        assert gap["value"] == pytest.approx(adaptive_calibration_error(target, moved), abs=1e-12)
        assert gap["low"] < gap["high"]
        curve = reliability_curve(target, moved)
        mine = points.filter(pl.col("scaling") == scaling)
        assert mine["observed"].to_list() == curve.observed.tolist()
        assert mine["stays"].sum() == len(target)
        assert gap["temperature"] == (1.0 if scaling == "none" else temperature)
        assert roc_auc_score(target, moved) == roc_auc_score(target, belief)
    before, after = (
        figures.filter((pl.col("metric") == "adaptive_calibration_error") & (pl.col("scaling") == s))["value"][0]
        for s in ("none", "temperature")
    )
    assert after < before / 2


def test_held_out_outcomes_do_not_move_the_temperature():
    tuning, (target, belief) = overconfident(300, 0), overconfident(300, 1)
    one, two = (
        calibration_rows(frame(*tuning), frame(y, belief), ["death"], 5, 0)[0]["temperature"]
        for y in (target, 1 - target)
    )
    assert one.equals(two)
