"""What a reader wants to know first: the figures that decide, and the stays worth a look."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trajlm.arms import ARM_TITLES, ENSEMBLES, NETWORK
from trajlm.report.contents import Report, StayPage, TargetInfo
from trajlm.report.tables import (
    MAIN_METRICS,
    METRIC_TITLES,
    NOT_DEFINED,
    count,
    interval,
    metric_key,
    name_label,
    number,
    percent,
    signed_interval,
)
from trajlm.schema import NOTHING

LAST = "end of window"
MOST_DIVERGENT = 12
SPARK_WIDTH, SPARK_HEIGHT = 132.0, 26.0
OWN = {ARM_TITLES[arm] for arm in (NETWORK, *ENSEMBLES.values())}  # parts and means of the sequence model: no rivals


@dataclass(frozen=True)
class Card:
    """One figure at the top of the page: what it is, its value, its 95 % interval, and a line to judge it by."""

    label: str
    value: str
    interval: str
    note: str
    href: str


def cards(report: Report) -> list[Card]:
    """Discrimination, calibration, the modality that can least be spared and the stays behind the figures."""
    found = []
    for target in report.targets[:2]:
        wanted = (*MAIN_METRICS[target.kind][:2], "ace") if target.kind == "probability" else MAIN_METRICS["hours"][:1]
        found += [card for key in wanted if (card := _metric_card(report, target, key))]
    dearest = _dearest(report)
    return [*found, *([dearest] if dearest else [])]


def _same_metric(metric: str, key: str) -> bool:
    return metric_key(metric) in {key, "adaptivecalibrationerror" if key == "ace" else key}


def _metric_card(report: Report, target: TargetInfo, key: str) -> Card | None:
    own = report.metrics.filter((pl.col("target") == target.name) & (pl.col("landmark") == LAST))
    rows = [row for row in own.iter_rows(named=True) if _same_metric(row["metric"], key)]
    if not rows or number(rows[0]["value"]) == NOT_DEFINED:
        return None
    first = rows[0]
    rivals = [row for row in rows[1:] if row["arm"] not in OWN and number(row["value"]) != NOT_DEFINED]
    lower = key in ("mae", "ace")
    note = ""
    if rivals:
        best = (min if lower else max)(rivals, key=lambda row: row["value"])
        note = f"{best['arm']}: {number(best['value'])}"
    if key == "auprc" and first["stays"] and first["positives"] is not None:
        note = "; ".join(filter(None, [note, f"guessing: {number(first['positives'] / first['stays'])}"]))
    unit = f" {target.unit}" if key == "mae" and target.unit else ""
    ends = interval(first["value"], first["low"], first["high"]).partition(" ")[2]
    title = "Calibration error" if key == "ace" else METRIC_TITLES[key]
    section = "#calibration" if key == "ace" else "#performance"
    return Card(f"{target.title}, {title}", number(first["value"]) + unit, ends, note, section)


def _dearest(report: Report) -> Card | None:
    """The modality whose ablation costs the first target most."""
    if report.ablation is None or not report.targets:
        return None
    target = report.targets[0]
    key = MAIN_METRICS[target.kind][0]
    own = report.ablation.filter(
        (pl.col("target") == target.name)
        & pl.col("difference").is_not_nan()
        & pl.col("metric").map_elements(lambda m: metric_key(m) == key, return_dtype=pl.Boolean)
    )
    others = own.filter(pl.col("ablated") != NOTHING)
    if others.is_empty():
        return None
    row = others.sort("difference", descending=key == "mae").row(0, named=True)
    change = signed_interval(row["difference"], row["difference_low"], row["difference_high"])
    note = f"without it {METRIC_TITLES[key]} {change}"
    return Card("Least to be spared", name_label(row["ablated"]), "", note, "#ablation")


@dataclass(frozen=True)
class StayLine:
    """A stay in the list of the cohort page.

    Attributes:
        stay_id: in the prepared folder.
        linked: it has a page.
        outcome: what happened to the first target, in words; "" where that is not told.
        events: how many; "" for a stay without a page.
        spark: its belief over time as an SVG path of SPARK_WIDTH by SPARK_HEIGHT; "" where that is not told.
        ablated, before, after, change: the ablation that moved its last belief most; dashes where none was made.
    """

    stay_id: int
    linked: bool
    outcome: str
    events: str
    spark: str
    ablated: str
    before: str
    after: str
    change: str


def stay_lines(report: Report) -> list[StayLine]:
    """The stays whose last belief in the first target diverges most under ablation, and every stay with a page."""
    if not report.targets:
        return []
    target, pages = report.targets[0], {stay.stay_id: stay for stay in report.stays}
    moved = _moved_most(report.anchoring, target)
    order = [*moved][:MOST_DIVERGENT]
    order += [stay for stay in pages if stay not in order]
    beliefs = _with_outcomes(report.beliefs, f"target_{target.name}")
    return [_line(stay, pages.get(stay), _told(beliefs, stay), moved.get(stay), target) for stay in order]


def _told(beliefs: pl.DataFrame | None, stay_id: int) -> pl.DataFrame:
    return pl.DataFrame() if beliefs is None else beliefs.filter(pl.col("stay_id") == stay_id)


def _with_outcomes(beliefs: pl.DataFrame | None, column: str) -> pl.DataFrame | None:
    """The beliefs, their target null where it changes as a stay goes on: what is left of a stay is no outcome."""
    if beliefs is None or beliefs.is_empty():
        return beliefs
    changes = beliefs.group_by("stay_id").agg(pl.col(column).n_unique())[column].max() != 1
    return beliefs.with_columns(pl.lit(None, pl.Float64).alias(column)) if changes else beliefs


def _moved_most(anchoring: pl.DataFrame | None, target: TargetInfo) -> dict[int, dict]:
    """By stay, the ablation that moved its belief most; the largest move first."""
    if anchoring is None:
        return {}
    moved = (
        anchoring.filter(pl.col("target") == target.name)
        .with_columns(change=pl.col("belief_after") - pl.col("belief_before"))
        .filter(pl.col("change").is_finite())
        .sort([pl.col("change").abs(), "stay_id", "ablated"], descending=[True, False, False])
        .unique("stay_id", keep="first", maintain_order=True)
    )
    return {row["stay_id"]: row for row in moved.iter_rows(named=True)}


def _line(stay_id: int, page: StayPage | None, told: pl.DataFrame, moved: dict | None, target: TargetInfo) -> StayLine:
    def belief(value: float) -> str:
        return percent(value) if target.kind == "probability" else f"{value:.1f} {target.unit}"

    cells = [NOT_DEFINED] * 4
    if moved:
        change = moved["change"] * (100 if target.kind == "probability" else 1)
        sign = "−" if change < 0 else "+"
        cells = [name_label(moved["ablated"]), belief(moved["belief_before"]), belief(moved["belief_after"]),
                 f"{sign}{abs(change):.1f}"]  # fmt: skip
    if page is not None:
        shown = outcome(page, target), count(page.trajectory.height), spark(page.trajectory, target)
    elif not told.is_empty():
        shown = _in_words(told[f"target_{target.name}"][-1], target), "", spark(told, target)
    else:
        shown = "", "", ""
    return StayLine(stay_id, page is not None, *shown, *cells)


def outcome(stay: StayPage, target: TargetInfo) -> str:
    """What happened, in words."""
    return _in_words(stay.targets.get(target.name), target)


def _in_words(value: float | None, target: TargetInfo) -> str:
    if value is None or number(value) == NOT_DEFINED:
        return "unknown"
    if target.kind == "probability":
        return "yes" if value else "no"
    return f"{number(value)} {target.unit}".strip()


def spark(trajectory: pl.DataFrame, target: TargetInfo) -> str:
    """A belief over time as the path of a step line; probabilities on a scale from 0 to 1, hours from 0 to the most."""
    known = trajectory.filter(pl.col(f"belief_{target.name}").is_finite())
    if known.is_empty():
        return ""
    beliefs, hours = known[f"belief_{target.name}"].to_list(), known["hours_since_admission"].to_list()
    top = 1.0 if target.kind == "probability" else max(*beliefs, 1e-9)
    first, span = min(hours[0], 0.0), max(hours[-1] - min(hours[0], 0.0), 1.0)
    parts: list[str] = []
    for hour, value in zip(hours, beliefs, strict=True):
        x, y = (hour - first) / span * SPARK_WIDTH, SPARK_HEIGHT * (1 - min(1.0, max(0.0, value / top)))
        parts.append(f"H{x:.1f}V{y:.1f}" if parts else f"M{x:.1f} {y:.1f}")
    return "".join(parts) + f"H{SPARK_WIDTH:.1f}"
