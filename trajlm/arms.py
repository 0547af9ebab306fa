"""The arms of a run side by side: where their beliefs lie, and what ``metrics.json`` says of them (method 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from trajlm.delong import delong_test
from trajlm.metrics import (
    LANDMARKS,
    METRICS,
    RESULT_COLUMNS,
    Kind,
    Metric,
    beliefs_at_landmark,
    bootstrap_interval,
    evaluate,
    macro_auprc,
    macro_auroc,
    paired_difference_interval,
)
from trajlm.schema import HELD_OUT, TUNING
from trajlm.tasks import GROUP_TITLES, Task

SEQUENCE = "sequence"
NETWORK = "network"  # what the sequence model would say without the regression and trees beside it
# By the name in finetuning.baselines, the arm's name in metrics.json and of its folder in the run.
# Severity is one arm for each score that the release has: severity_<name>.
SEVERITY = "severity"
BASELINE_ARMS = {"mlp": "static_mlp", "lstm": "static_lstm", "logistic": "logistic", "lightgbm": "lightgbm",
                 SEVERITY: SEVERITY}  # fmt: skip
ARM_TITLES = {
    SEQUENCE: "sequence model",
    NETWORK: "sequence model's network alone",
    "static_mlp": "static MLP (late fusion)",
    "static_lstm": "static LSTM (late fusion)",
    "logistic": "logistic regression (summary features)",
    "lightgbm": "LightGBM (summary features)",
}
# The sequence model averaged with a baseline of its run, under the names of both.
ENSEMBLES = {arm: f"{SEQUENCE}_and_{arm}" for arm in BASELINE_ARMS.values() if arm != SEVERITY}
ARM_TITLES |= {
    name: f"{ARM_TITLES[SEQUENCE]} and {ARM_TITLES[arm].partition(' (')[0]}, averaged"
    for arm, name in ENSEMBLES.items()
}


def arm_title(name: str) -> str:
    """An arm of metrics.json as a table names it."""
    if name.startswith(f"{SEVERITY}_"):
        score = name.removeprefix(f"{SEVERITY}_").replace("_", " ").upper()
        return f"severity score {score} (logistic regression)"
    return ARM_TITLES.get(name, name)


MACRO: dict[str, Metric] = {"macro_auroc": macro_auroc, "macro_auprc": macro_auprc}


def is_sequence(arm: str) -> bool:
    """Whether an arm is the sequence model, its network alone, or either averaged with a baseline."""
    return arm in (SEQUENCE, NETWORK) or arm in ENSEMBLES.values()


def beliefs_path(run: Path, arm: str) -> Path:
    """Where the beliefs of an arm lie in a run folder."""
    return run / "beliefs.parquet" if arm == SEQUENCE else run / arm / "beliefs.parquet"


def write_beliefs(path: Path, beliefs: pl.DataFrame) -> None:
    """Write a table so that it is either absent, old or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    beliefs.write_parquet(partial)
    partial.replace(path)


def landmarks_of(beliefs: pl.DataFrame) -> list[float | None]:
    """The landmarks an arm can be reported at: all, or those it was fitted for."""
    if "landmark" not in beliefs.columns:
        return list(LANDMARKS)
    own = set(beliefs["landmark"].unique().to_list())
    return [landmark for landmark in LANDMARKS if landmark in own]


def report_metrics(
    sizes: Mapping[str, int],
    description: str,
    stays: pl.DataFrame,
    tasks: Sequence[Task],
    arms: Mapping[str, pl.DataFrame],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """``metrics.json``: every metric with its interval, by split, arm, target and landmark; the arms' differences.

    Args:
        sizes: stays of each split.
        description: the splits in words.
        stays: ``stay_id, subject_id, hours_in_unit`` of at least those stays.
        tasks: what was predicted; a group of them also gets its macro means, under the group's name.
        arms: beliefs by arm.
        resamples, seed: of the patient-level bootstrap.
    """
    kinds = [(task.target, task.kind) for task in tasks]
    groups = {task.group: [t.target for t in tasks if t.group == task.group] for task in tasks if task.group}
    metrics: dict[str, Any] = {
        "stays": dict(sizes),
        "description": description,
        "targets": [{"name": t.target, "kind": t.kind, "title": t.title, "group": t.group} for t in tasks],
        "groups": [{"name": g, "title": GROUP_TITLES[g], "targets": members} for g, members in groups.items()],
        "arms": {},
    }
    for split in (TUNING, HELD_OUT):
        metrics["arms"][split] = {}
        for arm, beliefs in arms.items():
            own, at = beliefs.filter(pl.col("split") == split), landmarks_of(beliefs)
            rows = evaluate(own, stays, kinds, at, resamples, seed)
            macro = [macro_rows(own, stays, g, members, at, resamples, seed) for g, members in groups.items()]
            metrics["arms"][split][arm] = pl.concat([rows, *macro]).to_dicts()
    held_out = {arm: beliefs.filter(pl.col("split") == HELD_OUT) for arm, beliefs in arms.items()}
    metrics["difference"] = [
        {"against": arm} | row
        for arm in held_out
        if arm != SEQUENCE and SEQUENCE in held_out
        for row in paired_rows(held_out[SEQUENCE], held_out[arm], stays, kinds, resamples, seed)
    ]
    return metrics


def macro_rows(
    beliefs: pl.DataFrame,
    stays: pl.DataFrame,
    group: str,
    members: Sequence[str],
    landmarks: Sequence[float | None],
    resamples: int,
    seed: int,
) -> pl.DataFrame:
    """Macro means over a group of targets, as RESULT_COLUMNS; a class without both outcomes is left out of the mean."""
    rows: list[tuple[object, ...]] = []
    for landmark in landmarks:
        at = beliefs_at_landmark(beliefs, stays, landmark).join(stays.select("stay_id", "subject_id"), on="stay_id")
        target, belief = (
            at.select(pl.col(f"{what}_{name}").cast(pl.Float64) for name in members).to_numpy()
            for what in ("target", "belief")
        )
        known = np.isfinite(target).any(axis=1) if len(at) else np.zeros(0, dtype=bool)
        people = at["subject_id"].to_numpy()[known]
        for name, metric in MACRO.items():
            y, b = target[known], belief[known]
            value = float(metric(y, b)) if len(y) else float("nan")
            low, high = bootstrap_interval(metric, y, b, people, resamples, seed)
            rows.append((group, landmark, name, value, low, high, len(y), int(np.nansum(y))))
    figures = pl.DataFrame(rows, schema=RESULT_COLUMNS, orient="row")
    return figures.with_columns(pl.col("value", "low", "high").fill_nan(None))


def paired_rows(
    first: pl.DataFrame,
    second: pl.DataFrame,
    stays: pl.DataFrame,
    targets: Sequence[tuple[str, Kind]],
    resamples: int,
    seed: int,
    landmarks: Sequence[float | None] | None = None,
) -> list[dict[str, Any]]:
    """First minus second arm on the same stays, at every landmark that both can be reported at.

    Args:
        first, second: beliefs of one split.
        stays: ``stay_id, subject_id, hours_in_unit``.
        targets: (name, kind).
        resamples, seed: of the bootstrap, whose resamples both arms share.
        landmarks: those to look at; None all.

    Returns:
        dicts of target, landmark, metric, value, low, high, stays, and for the AUROC ``p_value`` of DeLong's test;
        null where undefined.
    """
    both = [at for at in landmarks_of(first) if at in landmarks_of(second) and (landmarks is None or at in landmarks)]
    rows = []
    for landmark in both:
        a, b = (beliefs_at_landmark(beliefs, stays, landmark) for beliefs in (first, second))
        joined = a.join(b, on="stay_id", suffix="_second").join(stays.select("stay_id", "subject_id"), on="stay_id")
        for target, kind in targets:
            known = joined.filter(pl.col(f"target_{target}").is_not_null())
            if known.height:
                columns = (f"target_{target}", f"belief_{target}", f"belief_{target}_second")
                y, p, q = (known[c].cast(pl.Float64).to_numpy() for c in columns)
                found = paired_metrics(kind, y, p, q, known["subject_id"].to_numpy(), resamples, seed)
                rows += [{"target": target, "landmark": landmark} | row for row in found]
    return rows


def paired_metrics(
    kind: str, target: np.ndarray, first: np.ndarray, second: np.ndarray, people: np.ndarray, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of :func:`paired_rows` for one target at one landmark."""
    rows = []
    for name, (metric, of) in METRICS.items():
        if of == kind:
            low, high = paired_difference_interval(metric, target, first, second, people, resamples, seed)
            row = {"metric": name, "value": float(metric(target, first)) - float(metric(target, second))}
            row |= {"low": low, "high": high}
            row["p_value"] = delong_test(target, first, second).p_value if name == "auroc" else float("nan")
            rows.append({k: None if isinstance(v, float) and np.isnan(v) else v for k, v in row.items()})
    return [row | {"stays": len(target)} for row in rows]


def print_headline(metrics: dict[str, Any]) -> None:
    """The held-out figures of every arm at the end of the window, with their intervals."""
    alone = {target["name"] for target in metrics["targets"] if target["group"] is None}
    shown = {*alone, *(group["name"] for group in metrics["groups"])}
    for arm, rows in metrics["arms"][HELD_OUT].items():
        for row in rows:
            wanted = row["metric"] in ("auroc", "auprc", "mae", "macro_auroc", "macro_auprc")
            if row["landmark"] is None and wanted and row["target"] in shown:
                value = "undefined" if row["value"] is None else f"{row['value']:.3f} {_interval(row)}"
                print(f"held-out {row['target']} {row['metric']} of {arm}: {value}, {row['stays']} stays")


def _interval(row: dict[str, Any]) -> str:
    return "[no interval]" if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
