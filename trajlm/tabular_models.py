"""Models of summary features: logistic or ridge regression, and gradient-boosted trees (method 7).

A candidate is one setting of a model. It is fitted on training stays and scored on tuning stays by the loss that the
sequence model is tuned by: cross-entropy of a probability, squared error of log(1 + hours).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trajlm.errors import TrajlmError
from trajlm.tree_readout import require_lightgbm

FloatArray = NDArray[np.float64]
Kind = Literal["probability", "hours"]
Predict = Callable[[FloatArray], FloatArray]

CLIP = 5.0  # deviations: a linear model must not hang on one mistyped value
STRENGTHS = (0.003, 0.001, 0.01, 0.03, 0.1, 0.3)  # inverse of the ridge penalty per stay, the likeliest first
# (leaves, stays per leaf at least, share of the features per tree), the likeliest first.
TREES = ((8, 20, 0.3), (4, 20, 0.3), (16, 20, 0.3), (8, 50, 0.1), (16, 50, 0.1), (31, 20, 0.6))
ROUNDS, STOP_AFTER, TREE_RATE = 1500, 60, 0.03


@dataclass(frozen=True)
class Examples:
    """Stays with a known target: ``features: float64[N, C]`` (NaN where missing), ``target: float64[N]``.

    The target is 0 or 1, or hours.
    """

    features: FloatArray
    target: FloatArray


@dataclass(frozen=True)
class Fitted:
    """A model as tuned: ``predict`` turns features float64[N, C] into beliefs float64[N]; ``trials`` tells the search.

    Attributes:
        trials: one dict per setting tried, with its ``tuning_loss`` (null without tuning stays).
        chosen: place in ``trials`` of the best.
    """

    predict: Predict
    trials: list[dict[str, Any]]
    chosen: int


def tuning_loss(kind: Kind, target: FloatArray, belief: FloatArray) -> float:
    """Mean cross-entropy in nats, or mean squared error of log(1 + hours); NaN without stays."""
    if not len(target):
        return float("nan")
    if kind == "hours":
        return float(np.mean((np.log1p(belief) - np.log1p(target)) ** 2))
    p = np.clip(belief, 1e-7, 1 - 1e-7)
    return float(-np.mean(target * np.log(p) + (1 - target) * np.log(1 - p)))


def fit_tuned(name: str, kind: Kind, train: Examples, tuning: Examples, trials: int, seed: int) -> Fitted:
    """The best of the first ``trials`` settings of a model by its loss on the tuning stays.

    With one outcome only, or fewer than two training stays, the belief is the training mean: nothing can be learned.

    Args:
        name: logistic or lightgbm.
        kind: what a belief is.
        train, tuning: the examples; without tuning stays the first setting stands.
        trials: how many settings to try, at least 1; each model has six.
        seed: of the trees.

    Raises:
        TrajlmError: lightgbm is not installed, or there is no training stay.
    """
    if not len(train.target):
        raise TrajlmError(f"{name}: no training stay with a known target; prepare more stays or drop the task")
    if len(np.unique(train.target)) < 2:
        return Fitted(_constant(train, kind), [{"constant": True, "tuning_loss": None}], 0)
    models: list[Predict] = []
    tried: list[dict[str, Any]] = []
    for fit, settings in _candidates(name, kind, seed)[:trials]:
        predict, learned = fit(train, tuning)
        loss = tuning_loss(kind, tuning.target, predict(tuning.features)) if len(tuning.target) else None
        models.append(predict)
        tried.append(settings | learned | {"tuning_loss": loss})
    chosen = min(range(len(tried)), key=lambda i: tried[i]["tuning_loss"] or 0.0)
    return Fitted(models[chosen], tried, chosen)


def _constant(train: Examples, kind: Kind) -> Predict:
    value = float(np.expm1(np.log1p(train.target).mean()) if kind == "hours" else train.target.mean())
    return lambda features: np.full(len(features), value)


def _candidates(name: str, kind: Kind, seed: int) -> list[tuple[Any, dict[str, Any]]]:
    if name == "logistic":
        return [(_linear(kind, strength), {"inverse_penalty": strength}) for strength in STRENGTHS]
    return [
        (_trees(kind, leaves, least, share, seed), {"leaves": leaves, "least_in_leaf": least, "feature_share": share})
        for leaves, least, share in TREES
    ]


class Standardised:
    """Features made fit for a linear model, by the training stays alone.

    Each is standardised, cut at CLIP deviations and filled with its mean where missing; an indicator says what was
    missing, one for all features that are missing together. Features that never vary are left out.
    """

    def __init__(self, features: FloatArray) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a feature that no training stay has
            self._mean, self._std = np.nanmean(features, axis=0), np.nanstd(features, axis=0)
        self._kept = np.isfinite(self._std) & (self._std > 0)
        missing = np.isnan(features)
        varies = missing.any(axis=0) & ~missing.all(axis=0)
        _, first = np.unique(missing[:, varies], axis=1, return_index=True)
        self._indicators = np.flatnonzero(varies)[np.sort(first)]

    def __call__(self, features: FloatArray) -> FloatArray:
        """float64[N, C'] of float64[N, C]; finite."""
        k = self._kept
        scaled = np.clip((features[:, k] - self._mean[k]) / self._std[k], -CLIP, CLIP)
        return np.concatenate([np.nan_to_num(scaled, nan=0.0), np.isnan(features[:, self._indicators])], axis=1)


def _linear(kind: Kind, strength: float) -> Callable[[Examples, Examples], tuple[Predict, dict[str, Any]]]:
    def fit(train: Examples, tuning: Examples) -> tuple[Predict, dict[str, Any]]:
        from sklearn.linear_model import LogisticRegression, Ridge

        inputs = Standardised(train.features)
        x = inputs(train.features)
        if not x.shape[1]:
            return _constant(train, kind), {}
        if kind == "probability":
            model = LogisticRegression(C=strength, max_iter=2000).fit(x, train.target)
            return lambda features: model.predict_proba(inputs(features))[:, 1], {}
        # Of the squared error, half of which the logistic loss resembles.
        ridge = Ridge(alpha=0.5 / strength).fit(x, np.log1p(train.target))
        return lambda features: np.expm1(np.maximum(ridge.predict(inputs(features)), 0.0)), {}

    return fit


def _trees(
    kind: Kind, leaves: int, least: int, share: float, seed: int
) -> Callable[[Examples, Examples], tuple[Predict, dict[str, Any]]]:
    def fit(train: Examples, tuning: Examples) -> tuple[Predict, dict[str, Any]]:
        lightgbm = require_lightgbm("the baseline lightgbm")
        settings = {
            "objective": "binary" if kind == "probability" else "regression",
            "num_leaves": leaves,
            "min_data_in_leaf": min(least, max(1, len(train.target) // 10)),
            "feature_fraction": share,
            "bagging_fraction": 0.8,
            "bagging_freq": 1,
            "lambda_l2": 1.0,
            "learning_rate": TREE_RATE,
            "deterministic": True,
            "force_row_wise": True,
            "seed": seed,
            "verbose": -1,
        }

        def data(examples: Examples, reference: Any = None) -> Any:
            label = np.log1p(examples.target) if kind == "hours" else examples.target
            return lightgbm.Dataset(examples.features, label, reference=reference)

        own = data(train)
        stop = [lightgbm.early_stopping(STOP_AFTER, verbose=False)] if len(tuning.target) else []
        watched = [data(tuning, own)] if stop else None
        rounds = ROUNDS if stop else 200
        model = lightgbm.train(settings, own, rounds, valid_sets=watched, callbacks=stop)
        learned = {"trees": model.best_iteration if stop else rounds}
        if kind == "probability":
            return model.predict, learned
        return lambda features: np.expm1(np.maximum(model.predict(features), 0.0)), learned

    return fit
