"""Does the model lean on demographics once something is missing? A cohort-wide audit (paper, 4.3, figures 4 and 5).

The paper looked at two stays. Here every held-out stay is read with nothing and with each modality ablated; what
changes is told with patient-level intervals, the stays that diverge most are ranked, and two runs (contrastive against
scratch) are compared on the same stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from trajlm.errors import TrajlmError
from trajlm.metrics import beliefs_at_landmark, bootstrap_interval
from trajlm.schema import TUNING

PAIR = ("stay_id", "ablated", "target")

SUMMARY_COLUMNS: dict[str, pl.DataType] = {
    "ablated": pl.String(), "target": pl.String(), "measure": pl.String(), "value": pl.Float64(), "low": pl.Float64(),
    "high": pl.Float64(), "stays": pl.Int64(), "patients": pl.Int64(),
}  # fmt: skip

# What is averaged over stays, each from the columns of ``changes``.
MEASURES: dict[str, pl.Expr] = {
    "share_before": pl.col("share_before"),
    "share_after": pl.col("share_after"),
    "share_change": pl.col("share_after") - pl.col("share_before"),
    "drift": pl.col("drift"),
    "absolute_drift": pl.col("drift").abs(),
    "flips": pl.col("flipped").cast(pl.Float64),
}


def decision_thresholds(
    beliefs: pl.DataFrame, stays: pl.DataFrame, targets: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """The belief from which on a stay counts as flagged, by target; learned from tuning stays alone.

    As many tuning stays are flagged at the end of the window as had the outcome. Hours have no decision.

    Args:
        beliefs: a run's ``beliefs.parquet``.
        stays: ``stay_id, hours_in_unit``.
        targets: (name, kind).
    """
    last = beliefs_at_landmark(beliefs.filter(pl.col("split") == TUNING), stays, None)
    found = {}
    for name, kind in targets:
        known = last.filter(pl.col(f"target_{name}").is_not_null())
        if kind == "probability" and known.height:
            share = float(np.mean(known[f"target_{name}"].to_numpy()))
            found[name] = float(np.quantile(known[f"belief_{name}"].to_numpy(), 1 - share))
    return found


def with_decisions(changes: pl.DataFrame, thresholds: dict[str, float]) -> pl.DataFrame:
    """The columns of :func:`trajlm.interpret.ablation.anchoring`, with what an audit asks of them.

    Returns:
        and ``drift`` (belief after minus before, in the belief's unit) and ``flipped`` (whether the ablation moved the
        belief across the target's threshold; null where it has none).
    """
    limits = pl.DataFrame(
        {"target": list(thresholds), "threshold": list(thresholds.values())},
        schema={"target": pl.String, "threshold": pl.Float64},
    )
    flagged = [pl.col(f"belief_{side}") >= pl.col("threshold") for side in ("before", "after")]
    return (
        changes.join(limits, on="target", how="left", maintain_order="left")
        .with_columns(
            (pl.col("belief_after") - pl.col("belief_before")).alias("drift"),
            (flagged[0] != flagged[1]).alias("flipped"),
        )
        .drop("threshold")
    )


def _mean(_: np.ndarray, values: np.ndarray, weights: np.ndarray | None = None) -> float | np.ndarray:
    """Mean of values float[n], or one for each row of weights float[b, n]."""
    if weights is None:
        return float(values.mean())
    return weights @ values / weights.sum(axis=1)


def summarise(
    changes: pl.DataFrame,
    stays: pl.DataFrame,
    resamples: int,
    seed: int,
    measures: dict[str, pl.Expr] | None = None,
) -> pl.DataFrame:
    """The cohort's mean of every measure by ablation and target, with its patient-level 95 % interval.

    Args:
        changes: of :func:`with_decisions`, or any table with the columns that ``measures`` read.
        stays: ``stay_id, subject_id``.
        resamples, seed: of the bootstrap.
        measures: what to average; ``MEASURES`` unless told.

    Returns:
        SUMMARY_COLUMNS. ``share_...`` are shares of attention in [0, 1], ``drift`` is in the belief's unit, ``flips``
        the share of stays whose decision flipped. The mean runs over the stays that held what was ablated and for which
        the measure is known; a measure known of nobody has no row.
    """
    rows: list[tuple[object, ...]] = []
    joined = changes.join(stays.select("stay_id", "subject_id"), on="stay_id", maintain_order="left")
    for (ablated, target), group in joined.group_by("ablated", "target", maintain_order=True):
        for name, measure in (measures or MEASURES).items():
            known = group.with_columns(measure.alias("value")).filter(pl.col("value").is_not_null())
            if known.height:
                values, people = known["value"].cast(pl.Float64).to_numpy(), known["subject_id"].to_numpy()
                ends = bootstrap_interval(_mean, values, values, people, resamples, seed)  # type: ignore[arg-type]
                rows.append((ablated, target, name, float(values.mean()), *ends, known.height, len(set(people))))
    return pl.DataFrame(rows, schema=SUMMARY_COLUMNS, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))


def contrast(changes: pl.DataFrame, against: pl.DataFrame) -> pl.DataFrame:
    """Two runs on the same stays, ablation for ablation.

    Returns:
        stay_id, ablated, target, and of the share before and after, the drift, its size and whether the decision
        flipped: ``<measure>`` (this run), ``<measure>_against`` (the other), ``<measure>_difference``.

    Raises:
        TrajlmError: the two share no stay and ablation.
    """
    names = list(MEASURES)
    measured = [expression.cast(pl.Float64).alias(name) for name, expression in MEASURES.items()]
    both = changes.select(*PAIR, *measured).join(
        against.select(*PAIR, *measured), on=list(PAIR), suffix="_against", maintain_order="left"
    )
    if not both.height:
        raise TrajlmError("the two runs have no stay and ablation in common; compare runs on the same prepared folder")
    return both.with_columns((pl.col(name) - pl.col(f"{name}_against")).alias(f"{name}_difference") for name in names)


def contrast_summary(pairs: pl.DataFrame, stays: pl.DataFrame, resamples: int, seed: int) -> pl.DataFrame:
    """SUMMARY_COLUMNS of the paired differences of :func:`contrast`: this run minus the other."""
    differences = {name: pl.col(f"{name}_difference") for name in MEASURES}
    return summarise(pairs, stays, resamples, seed, differences)


def ranked(changes: pl.DataFrame, target: str, by: pl.Expr | None = None) -> pl.DataFrame:
    """Stays and ablations in the order in which the belief diverged, largest first.

    Args:
        changes: of :func:`with_decisions`, or with ``by`` any table of one row per stay, ablation and target.
        target: whose beliefs.
        by: what to rank by; unless told the size of the drift.

    Returns:
        the rows of the target with ``rank`` (from 1) before them and ``divergence`` after; ties in order of stay_id.

    Raises:
        TrajlmError: the table has no such target.
    """
    measure = pl.col("drift").abs() if by is None else by
    own = changes.filter(pl.col("target") == target).with_columns(measure.alias("divergence"))
    if not own.height:
        known = ", ".join(changes["target"].unique(maintain_order=True))
        raise TrajlmError(f"expected a target that was audited ({known}), came {target!r}")
    own = own.filter(pl.col("divergence").is_not_null())
    own = own.sort("divergence", "stay_id", "ablated", descending=[True, False, False])
    return own.with_row_index("rank", offset=1).with_columns(pl.col("rank").cast(pl.Int64))
