"""Shapes the report's frames into the tables a reader sees, and writes every frame as CSV."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from trajlm.interpret.agreement import INTERVENTIONS, disagreement
from trajlm.report.contents import Report, StayPage, TargetInfo

NOT_DEFINED = "–"
MOVERS = 5  # events listed as having moved a belief most

METRIC_TITLES = {
    "auroc": "AUROC", "auprc": "AUPRC", "ace": "ACE", "adaptivecalibrationerror": "Adaptive calibration error",
    "brier": "Brier score", "brierskill": "Brier skill score", "brierskillscore": "Brier skill score", "mae": "MAE",
    "mse": "MSE", "pearson": "Pearson r", "spearman": "Spearman rho", "macroauroc": "macro AUROC",
    "macroauprc": "macro AUPRC",
}  # fmt: skip
MAIN_METRICS = {"probability": ("auroc", "auprc"), "hours": ("mae", "spearman")}  # the others are folded
METRIC_NOTES = {
    "auroc": "how often a stay with the outcome is ranked above one without; 0.5 is guessing, 1 is perfect",
    "auprc": "precision averaged over recall; guessing scores the prevalence",
    "ace": "mean gap between belief and observed share over bins of equal size; 0 is best",
    "adaptivecalibrationerror": "mean gap between belief and observed share over bins of equal size; 0 is best",
    "brier": "mean squared error of the probability; 0 is best",
    "brierskill": "share of the prevalence's squared error that is removed; 0 is no better than the prevalence",
    "brierskillscore": "share of the prevalence's squared error that is removed; 0 is no better than the prevalence",
    "mae": "mean absolute error; 0 is best",
    "mse": "mean squared error; 0 is best",
    "pearson": "linear correlation of belief and outcome; 1 is best",
    "spearman": "correlation of their ranks; 1 is best",
}


@dataclass(frozen=True)
class Block:
    """Rows of a table under one heading: ``rows`` hold one cell per column of the table."""

    title: str
    note: str
    rows: list[list[str]]


@dataclass(frozen=True)
class Table:
    """A table as the template draws it; the first ``labels`` columns are text, the others figures."""

    caption: str
    columns: list[str]
    blocks: list[Block]
    labels: int = 1
    folded: list[Block] = field(default_factory=list)  # shown on request
    note: str = ""  # a line under the table


def metric_key(metric: str) -> str:
    """Letters of a metric's name in lower case, so that "Brier skill" and "brier_skill" are one."""
    return "".join(c for c in metric.lower() if c.isalnum()).removesuffix("hours")


def number(value: float | None) -> str:
    """Three decimals, or one from 10 upwards; a dash for what is unknown or not defined."""
    if value is None or math.isnan(value):
        return NOT_DEFINED
    text = f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return text.replace("-", "−")


def count(value: float | None) -> str:
    """A whole number with thousands separated."""
    return NOT_DEFINED if value is None else f"{int(value):,}"


def percent(value: float | None) -> str:
    """A share in percent, with two decimals below 10 %."""
    if value is None or math.isnan(value):
        return NOT_DEFINED
    return f"{value:.1%}" if abs(value) >= 0.1 else f"{value:.2%}"


def name_label(name: str) -> str:
    """An identifier as a reader would write it."""
    return name.replace("_", " ")


def combination_label(combination: str) -> str:
    """Modalities joined by "+", with room for a line to break."""
    return " + ".join(name_label(part.strip()) for part in combination.split("+"))


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """``value [low, high]``, without the interval where it is unknown."""
    if number(value) == NOT_DEFINED or number(low) == NOT_DEFINED or number(high) == NOT_DEFINED:
        return number(value)
    return f"{number(value)} [{number(low)}, {number(high)}]"


def signed(value: float | None) -> str:
    """A difference, with its sign."""
    text = number(value)
    return text if text == NOT_DEFINED or text.startswith("−") else f"+{text}"


def signed_interval(value: float | None, low: float | None, high: float | None) -> str:
    """A difference ``[low, high]``, without the interval where it is unknown."""
    ends = [signed(end) for end in (low, high)]
    known = signed(value) != NOT_DEFINED and NOT_DEFINED not in ends
    return f"{signed(value)} [{', '.join(ends)}]" if known else signed(value)


def metric_title(metric: str) -> str:
    """A metric as a reader would write it."""
    return METRIC_TITLES.get(metric_key(metric), name_label(metric))


def main_first(metrics: list[str], kind: str) -> list[str]:
    """The metrics of a kind of target in the order of interest, the main ones first."""
    main = MAIN_METRICS[kind]
    return sorted(metrics, key=lambda m: main.index(metric_key(m)) if metric_key(m) in main else len(main))


def _same_or_each(values: list[int | None]) -> str:
    distinct = list(dict.fromkeys(values))
    return " / ".join(count(v) for v in (distinct if len(distinct) == 1 else values))


def metrics_table(metrics: pl.DataFrame, target: TargetInfo, difference: pl.DataFrame | None = None) -> Table | None:
    """One target's metrics, arms side by side: a block per metric, a row per landmark; all but the main two folded.

    Under it, where given, the arms' paired difference.
    """
    own = metrics.filter(pl.col("target") == target.name)
    if own.is_empty():
        return None
    arms = own["arm"].unique(maintain_order=True).to_list()
    counts = ["stays", "positives"] if target.kind == "probability" else ["stays"]
    blocks = []
    for metric in main_first(own["metric"].unique(maintain_order=True).to_list(), target.kind):
        rows = []
        of_metric = own.filter(pl.col("metric") == metric)
        for landmark in of_metric["landmark"].unique(maintain_order=True):
            by_arm = {r["arm"]: r for r in of_metric.filter(pl.col("landmark") == landmark).iter_rows(named=True)}
            sizes = [_same_or_each([by_arm[a][c] for a in arms if a in by_arm]) for c in counts]
            cells = [interval(*(by_arm[a][c] for c in ("value", "low", "high"))) if a in by_arm else NOT_DEFINED
                     for a in arms]  # fmt: skip
            rows.append([landmark, *sizes, *cells])
        key = metric_key(metric)
        blocks.append(Block(metric_title(metric), METRIC_NOTES.get(key, ""), rows))
    unit = f" ({target.unit})" if target.unit else ""
    caption = f"{target.title}{unit}: value [95% interval]"
    columns = ["Seen up to", *counts, *arms]
    note = "" if difference is None else _difference_note(difference.filter(pl.col("target") == target.name), target)
    return Table(caption, columns, blocks[:2], labels=1, folded=blocks[2:], note=note)


def _difference_note(own: pl.DataFrame, target: TargetInfo) -> str:
    """The paired differences to the other arms in a few words each; empty where nothing is known of them."""
    arms = []
    for against in own["against"].unique(maintain_order=True):
        parts = _differences(own.filter(pl.col("against") == against), target)
        if parts:
            arms.append(f"{against}: {', '.join(parts)}")
    if not arms:
        return ""
    return (
        "Sequence model minus another arm at the end of the window, paired on the same stays. "
        f"{'; '.join(arms)}. An interval that holds 0 does not tell the two apart."
    )


def _differences(own: pl.DataFrame, target: TargetInfo) -> list[str]:
    """The main metrics' differences to one arm."""
    by_metric = {row["metric"]: row for row in own.iter_rows(named=True) if number(row["value"]) != NOT_DEFINED}
    parts = []
    for metric in main_first(list(by_metric), target.kind)[:2]:
        row = by_metric[metric]
        parts.append(f"{metric_title(metric)} {signed_interval(row['value'], row['low'], row['high'])}")
    return parts


def retrieval_table(retrieval: pl.DataFrame) -> Table:
    """Recall@K beside the recall of guessing, a row per ordered pair of modalities, their mean first."""
    ks = sorted(retrieval["k"].unique().to_list())
    pairs = retrieval.group_by("query", "gallery", maintain_order=True).agg(pl.col("stays").first())
    mean = ["mean over pairs", "", ""]
    for k in ks:
        at = retrieval.filter(pl.col("k") == k)
        mean.append(f"{percent(at['recall'].mean())} ({percent(at['random'].mean())})")  # type: ignore[arg-type]
    rows = []
    for pair in pairs.iter_rows(named=True):
        own = retrieval.filter((pl.col("query") == pair["query"]) & (pl.col("gallery") == pair["gallery"]))
        at_k = {r["k"]: f"{percent(r['recall'])} ({percent(r['random'])})" for r in own.iter_rows(named=True)}
        names = [name_label(pair[side]) for side in ("query", "gallery")]
        rows.append([*names, count(pair["stays"]), *(at_k.get(k, NOT_DEFINED) for k in ks)])
    columns = ["Query", "Gallery", "stays", *(f"Recall@{k}" for k in ks)]
    return Table("Recall@K, in brackets that of guessing", columns, [Block("", "", [mean, *rows])], labels=2)


def plain_table(frame: pl.DataFrame, caption: str, titles: dict[str, str], labels: int = 1) -> Table:
    """The columns named in ``titles``, as they stand; the first ``labels`` are text."""
    rows = []
    for row in frame.select(list(titles)).iter_rows():
        figures = [count(v) if v is None or isinstance(v, int) else number(v) for v in row[labels:]]
        rows.append([*(str(v) for v in row[:labels]), *figures])
    return Table(caption, list(titles.values()), [Block("", "", rows)], labels=labels)


def movers(trajectory: pl.DataFrame, target: str, most: int = MOVERS) -> pl.DataFrame:
    """The events after which a belief moved most, largest first: event_index, belief_before, belief, change.

    The first event has no belief before it and is never listed; nor is an event that changed nothing.
    """
    belief, change = pl.col(f"belief_{target}"), pl.col(f"change_{target}")
    return (
        trajectory.select(
            "event_index", belief.alias("belief"), change.alias("change"), (belief - change).alias("belief_before")
        )
        .filter(pl.col("change").is_not_null() & pl.col("change").is_not_nan() & (pl.col("change") != 0))
        .sort(pl.col("change").abs(), descending=True, maintain_order=True)
        .head(most)
    )


def _trajectories(stays: list[StayPage]) -> pl.DataFrame | None:
    parts = []
    for stay in stays:
        runs = [("", stay.trajectory), *((m, a.trajectory) for m, a in stay.ablations.items())]
        for ablated, frame in runs:
            labels = [pl.lit(stay.stay_id).alias("stay_id"), pl.lit(stay.split).alias("split")]
            parts.append(frame.select(*labels, pl.lit(ablated).alias("ablated"), pl.all()))
    return pl.concat(parts, how="diagonal_relaxed") if parts else None


def _moved_most(report: Report) -> pl.DataFrame | None:
    parts = []
    for stay in report.stays:
        events = stay.trajectory.select("event_index", "hours_since_admission", "modality", "summary")
        for target in report.targets:
            found = movers(stay.trajectory, target.name).join(events, on="event_index", maintain_order="left")
            labels = [pl.lit(stay.stay_id).alias("stay_id"), pl.lit(target.name).alias("target")]
            parts.append(found.select(*labels, pl.all()))
    return pl.concat(parts, how="diagonal_relaxed") if parts else None


def _importance(stays: list[StayPage]) -> tuple[pl.DataFrame | None, pl.DataFrame | None]:
    """Every event's importance, and per stay and target whether attention and interventions agree on it."""
    parts, said = [], []
    for stay in stays:
        for target, frame in stay.importance.items():
            labels = {"stay_id": stay.stay_id, "target": target}
            parts.append(frame.select(*(pl.lit(value).alias(name) for name, value in labels.items()), pl.all()))
            said.append(labels | disagreement(frame))
    floats = dict.fromkeys(INTERVENTIONS, pl.Float64)
    return (pl.concat(parts), pl.DataFrame(said, schema_overrides=floats)) if parts else (None, None)


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Write each of the report's frames as ``<name>.csv`` into ``folder``, and return the files."""
    silhouette = report.silhouette
    importance, agreement = _importance(report.stays)
    frames = {
        "metrics": report.metrics,
        "calibration": report.calibration,
        "presence": report.presence,
        "retrieval": report.retrieval,
        "silhouette": silhouette and pl.DataFrame({"of": list(silhouette), "silhouette": list(silhouette.values())}),
        "training": report.training,
        "stages": report.stages,
        "accounting": report.accounting,
        "anchoring": report.anchoring,
        "difference": report.difference,
        "ablation": report.ablation,
        "trajectories": _trajectories(report.stays),
        "moved_most": _moved_most(report),
        "audit": report.audit,
        "audit_against": report.audit_against,
        "audit_difference": report.audit_difference,
        "importance": importance,
        "agreement": agreement,
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, frame in frames.items():
        if frame is None or isinstance(frame, dict):
            continue
        path = folder / f"{name}.csv"
        frame.write_csv(path)
        written.append(path)
    return written
