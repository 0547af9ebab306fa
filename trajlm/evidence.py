"""What a comparison adds to the figures of single runs: paired differences, calibration, subgroups (method 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from trajlm.arms import landmarks_of, paired_rows
from trajlm.calibration import CALIBRATION_COLUMNS, RELIABILITY_COLUMNS, calibration_rows
from trajlm.compared import Arm, Run
from trajlm.metrics import Kind, beliefs_at_landmark
from trajlm.schema import HELD_OUT, TUNING
from trajlm.subgroups import SUBGROUP_COLUMNS, subgroup_rows

CHOSEN_BY: dict[Kind, tuple[str, float]] = {"probability": ("auroc", 1.0), "hours": ("mae", -1.0)}
PAIRED_COLUMNS: dict[str, pl.DataType] = {
    "run": pl.String(), "arm": pl.String(), "against": pl.String(), "target": pl.String(), "landmark": pl.Float64(),
    "metric": pl.String(),
    "value": pl.Float64(), "low": pl.Float64(), "high": pl.Float64(), "p_value": pl.Float64(), "stays": pl.Int64(),
}  # fmt: skip


@dataclass(frozen=True)
class Evidence:
    """Tables of a comparison.

    Attributes:
        paired: PAIRED_COLUMNS; every sequence model minus the best static arm.
        calibration: CALIBRATION_COLUMNS and ``arm`` (its title); at the end of the window.
        reliability: RELIABILITY_COLUMNS and ``arm``.
        subgroups: SUBGROUP_COLUMNS and ``arm``; sequence models and the best static arm at the end of the window.
    """

    paired: pl.DataFrame
    calibration: pl.DataFrame
    reliability: pl.DataFrame
    subgroups: pl.DataFrame


def best_static(statics: Sequence[Arm], target: str, kind: Kind, landmark: float | None) -> Arm | None:
    """The static arm that was best on the tuning stays, by AUROC or mean absolute error; None where there is none.

    Held-out figures take no part in the choice: the best of many there would be flattered by chance.
    """
    metric, sign = CHOSEN_BY[kind]
    told = [(arm, arm.at(target, metric, landmark, tuning=True)) for arm in statics]
    known = [(sign * row["value"], arm) for arm, row in told if row is not None and row["value"] is not None]
    return max(known, key=lambda pair: pair[0])[1] if known else None


def gather(runs: Sequence[Run], sequences: Sequence[Arm], statics: Sequence[Arm]) -> Evidence:
    """Everything the beliefs of these runs can tell beyond their own metrics."""
    calibrated = [_calibration(arm) for arm in [*statics, *sequences]]
    schemas = (CALIBRATION_COLUMNS, RELIABILITY_COLUMNS)
    calibration, reliability = (_joined([pair[i] for pair in calibrated], schemas[i]) for i in (0, 1))
    return Evidence(paired(sequences, statics), calibration, reliability, _subgroups(runs, sequences, statics))


def paired(sequences: Sequence[Arm], statics: Sequence[Arm]) -> pl.DataFrame:
    """PAIRED_COLUMNS: each sequence model minus the static arm that was best on the tuning stays, by landmark."""
    rows: list[dict[str, Any]] = []
    for arm in sequences:
        beliefs = arm.run.beliefs(arm.name, HELD_OUT)
        for target, kind in arm.run.targets:
            for landmark in landmarks_of(beliefs):
                best = best_static(statics, target, kind, landmark)
                if best is not None:
                    other = best.run.beliefs(best.name, HELD_OUT)
                    found = paired_rows(
                        beliefs, other, arm.run.stays, [(target, kind)], arm.run.resamples, 0, [landmark]
                    )
                    rows += [{"run": arm.run.name, "arm": arm.name, "against": best.title} | row for row in found]
    return pl.DataFrame(rows, schema=PAIRED_COLUMNS)


def _last(arm: Arm, split: str) -> pl.DataFrame:
    at = beliefs_at_landmark(arm.run.beliefs(arm.name, split), arm.run.stays, None)
    return at.join(arm.run.stays.select("stay_id", "subject_id"), on="stay_id")


def _calibration(arm: Arm) -> tuple[pl.DataFrame, pl.DataFrame]:
    names = [target for target, kind in arm.run.targets if kind == "probability"]
    frames = calibration_rows(_last(arm, TUNING), _last(arm, HELD_OUT), names, arm.run.resamples, 0)
    return frames[0].with_columns(arm=pl.lit(arm.title)), frames[1].with_columns(arm=pl.lit(arm.title))


def _subgroups(runs: Sequence[Run], sequences: Sequence[Arm], statics: Sequence[Arm]) -> pl.DataFrame:
    frames = []
    for target, kind in runs[0].targets:
        best = best_static(statics, target, kind, None)
        for arm in [*sequences, *([best] if best is not None else [])]:
            at = _last(arm, HELD_OUT).drop("subject_id")
            rows = subgroup_rows(at, arm.run.stays, [(target, kind)], arm.run.resamples, 0)
            frames.append(rows.with_columns(arm=pl.lit(arm.title)))
    return _joined(frames, SUBGROUP_COLUMNS)


def _joined(frames: Sequence[pl.DataFrame], schema: dict[str, pl.DataType]) -> pl.DataFrame:
    """All of them, of this schema and ``arm``; there are none where every target is one of a group."""
    return pl.concat([pl.DataFrame(schema=schema | {"arm": pl.String()}), *frames])
