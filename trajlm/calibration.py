"""Temperature scaling: beliefs made as confident as the tuning stays allow, nothing else changed (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from trajlm.gaps import LEAST_OUTCOMES
from trajlm.metrics import METRICS, bootstrap_interval, reliability_curve

FloatArray = NDArray[np.float64]
EDGE = 1e-7  # beliefs nearer to 0 or 1 than this are taken as this near
LOG_TEMPERATURES = (-4.0, 4.0)  # searched between
STEPS = 120  # of the golden section: the bracket ends far below 1e-9

CALIBRATION_METRICS = ("adaptive_calibration_error", "brier_skill_score")
CALIBRATION_NOTE = (
    "Scaled: log odds divided by one temperature, fitted on the tuning stays of each run. Chance raises a calibration "
    "error; its interval allows for that, so the figure is often its upper end. With fewer than "
    f"{LEAST_OUTCOMES} stays of either outcome there is none."
)
CALIBRATION_COLUMNS: dict[str, pl.DataType] = {
    "target": pl.String(), "scaling": pl.String(), "temperature": pl.Float64(), "metric": pl.String(),
    "value": pl.Float64(), "low": pl.Float64(), "high": pl.Float64(), "stays": pl.Int64(),
}  # fmt: skip
RELIABILITY_COLUMNS: dict[str, pl.DataType] = {
    "target": pl.String(), "scaling": pl.String(), "bin": pl.Int64(), "belief_mean": pl.Float64(),
    "observed": pl.Float64(), "stays": pl.Int64(),
}  # fmt: skip


def scaled(belief: ArrayLike, temperature: float) -> FloatArray:
    """float[n] beliefs whose log odds are divided by the temperature; above 1 they move towards one half."""
    p = np.clip(np.asarray(belief, float), EDGE, 1 - EDGE)
    return 1 / (1 + np.exp(-np.log(p / (1 - p)) / temperature))


def fit_temperature(target: ArrayLike, belief: ArrayLike) -> float:
    """The temperature of least cross-entropy, between e^-4 and e^4; 1 where either outcome is missing.

    The cross-entropy is convex in 1 / temperature, so one golden section finds it.
    """
    y, p = np.asarray(target, float), np.clip(np.asarray(belief, float), EDGE, 1 - EDGE)
    if not 0 < y.sum() < len(y):
        return 1.0
    odds = np.where(y == 1, -1.0, 1.0) * np.log(p / (1 - p))

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, odds * np.exp(-log_temperature)).mean())

    low, high = LOG_TEMPERATURES
    share = (np.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = high - share * (high - low), low + share * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def calibration_rows(
    tuning: pl.DataFrame,
    held_out: pl.DataFrame,
    targets: Sequence[str],
    resamples: int,
    seed: int,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Calibration of held-out beliefs as they are, and after a temperature fitted on the tuning stays.

    Args:
        tuning, held_out: one belief per stay (:func:`beliefs_at_landmark`), held_out with ``subject_id``.
        targets: names of probabilities.
        resamples, seed: of the patient-level bootstrap; the temperature is held fixed in it.

    Returns:
        CALIBRATION_COLUMNS and RELIABILITY_COLUMNS; ``scaling`` is none or temperature.
    """
    figures: list[tuple[object, ...]] = []
    points: list[tuple[object, ...]] = []
    for target in targets:
        (y_t, b_t, _), (y, b, people) = _known(tuning, target), _known(held_out, target)
        temperature = fit_temperature(y_t, b_t)
        for scaling, degree, belief in (("none", 1.0, b), ("temperature", temperature, scaled(b, temperature))):
            for name in CALIBRATION_METRICS:
                metric = METRICS[name][0]
                interval = bootstrap_interval(metric, y, belief, people, resamples, seed)
                figures.append((target, scaling, degree, name, float(metric(y, belief)), *interval, len(y)))
            curve = reliability_curve(y, belief)
            triples = zip(curve.belief_mean, curve.observed, curve.count, strict=True)
            points += [(target, scaling, i, float(m), float(o), int(n)) for i, (m, o, n) in enumerate(triples)]
    table = pl.DataFrame(figures, schema=CALIBRATION_COLUMNS, orient="row")
    return (
        table.with_columns(pl.col("value", "low", "high").fill_nan(None)),
        pl.DataFrame(points, schema=RELIABILITY_COLUMNS, orient="row"),
    )


def _known(at: pl.DataFrame, target: str) -> tuple[FloatArray, FloatArray, NDArray[np.object_]]:
    known = at.filter(pl.col(f"target_{target}").is_not_null())
    y, b = (known[f"{what}_{target}"].cast(pl.Float64).to_numpy() for what in ("target", "belief"))
    people = known["subject_id"].to_numpy() if "subject_id" in known.columns else known["stay_id"].to_numpy()
    return y, b, people
