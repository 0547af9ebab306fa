"""What if a modality goes missing: held-out metrics without each modality, beside those with everything."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import polars as pl

from trajlm.report.contents import Report, TargetInfo
from trajlm.report.figures import Figure
from trajlm.report.style import INK, MUTED, figure_spec, modality_styles, plotly_text
from trajlm.report.tables import (
    MAIN_METRICS,
    NOT_DEFINED,
    Block,
    Table,
    count,
    interval,
    main_first,
    metric_key,
    metric_title,
    name_label,
    signed_interval,
)
from trajlm.schema import NOTHING

WHOLE = "nothing (all events)"
LOWER_IS_BETTER = {"mae"}


def _shown(report: Report, target: TargetInfo) -> tuple[pl.DataFrame, list[str]]:
    """The target's rows, and its main metrics among them."""
    if report.ablation is None:
        return pl.DataFrame(), []
    own = report.ablation.filter(pl.col("target") == target.name)
    metrics = main_first(own["metric"].unique(maintain_order=True).to_list(), target.kind)
    return own, [m for m in metrics if metric_key(m) in MAIN_METRICS[target.kind]]


def ablation_table(report: Report, target: TargetInfo) -> Table | None:
    """One target: a row per ablated modality, its main metrics and how far each is from nothing ablated.

    The difference is paired on the stays that have a belief without the modality.
    """
    own, metrics = _shown(report, target)
    if not metrics:
        return None
    rows = []
    for ablated in own["ablated"].unique(maintain_order=True):
        by_metric = {r["metric"]: r for r in own.filter(pl.col("ablated") == ablated).iter_rows(named=True)}
        first = next(iter(by_metric.values()))
        row = [WHOLE if ablated == NOTHING else name_label(ablated), count(first["stays"])]
        if target.kind == "probability":
            row.append(count(first["positives"]))
        for metric in metrics:
            here = by_metric.get(metric)
            row.append(NOT_DEFINED if here is None else interval(here["value"], here["low"], here["high"]))
            row.append(NOT_DEFINED if here is None or ablated == NOTHING else _difference(here))
        rows.append(row)
    unit = f" ({target.unit})" if target.unit else ""
    counts = ["stays", "positives"] if target.kind == "probability" else ["stays"]
    titles = [title for m in metrics for title in (metric_title(m), "difference")]
    return Table(f"{target.title}{unit}: value [95% interval]", ["Ablated", *counts, *titles], [Block("", "", rows)])


def _difference(row: dict[str, Any]) -> str:
    return signed_interval(row["difference"], row["difference_low"], row["difference_high"])


def ablation_figures(report: Report) -> list[Figure]:
    """Per ablated modality how far the first main metric of each target moves, a dot and its interval."""
    return [_dots(report, target) for target in report.targets if _shown(report, target)[1]]


def _dots(report: Report, target: TargetInfo) -> Figure:
    own, metrics = _shown(report, target)
    metric, styles = metrics[0], modality_styles(report.modalities)
    known = pl.col("difference").is_not_null() & pl.col("difference").is_not_nan()
    lower = metric_key(metric) in LOWER_IS_BETTER
    # The costliest loss stands first, so that the figure answers which modality the model can least do without.
    rows = own.filter((pl.col("metric") == metric) & (pl.col("ablated") != NOTHING) & known)
    order = rows.sort("difference", descending=lower, maintain_order=True).to_dicts()
    traces = []
    for place, row in enumerate(order):
        at, low, high = row["difference"], row["difference_low"], row["difference_high"]
        told = low is not None and high is not None
        style = styles.get(row["ablated"], {"color": INK, "symbol": "circle"})
        traces.append(
            go.Scatter(
                x=[at],
                y=[place],
                mode="markers",
                name=plotly_text(f"without {name_label(row['ablated'])}"),
                showlegend=False,
                marker={"color": style["color"], "symbol": style["symbol"], "size": 10},
                error_x={
                    "array": [max(0.0, high - at)] if told else [0.0],
                    "arrayminus": [max(0.0, at - low)] if told else [0.0],
                    "symmetric": False,
                    "thickness": 1.6,
                    "width": 5,
                },
                hovertext=[plotly_text(f"{_difference(row)}, {count(row['stays'])} stays")],
                hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
            )
        )
    zero = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0,
            "line": {"color": MUTED, "width": 1, "dash": "dot"}}  # fmt: skip
    title = metric_title(metric)
    unit = f" ({target.unit})" if lower and target.unit else ""
    spec = figure_spec(
        traces,
        100 + 34 * len(order),
        shapes=[zero],
        xaxis={"title": {"text": plotly_text(f"{title} without the modality, minus that with all events{unit}")},
               "nticks": 6},
        yaxis={
            "range": [len(order) - 0.4, -0.6],
            "tickvals": list(range(len(order))),
            "ticktext": [plotly_text(name_label(row["ablated"])) for row in order],
            "showgrid": False,
            "ticks": "",
        },
    )  # fmt: skip
    worse = "right" if lower else "left"
    reading = (
        f"To the {worse} of the dotted line the model does worse without the modality, on the same stays. Bars are "
        "paired 95% intervals; one that holds the line does not tell the two apart."
    )
    return Figure(f"ablation_{target.name}", f"{target.title}: {title} without a modality", reading, spec)
