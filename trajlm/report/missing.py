"""What if a modality goes missing: held-out metrics without each modality, beside those with everything."""

from __future__ import annotations

import plotly.graph_objects as go
import polars as pl

from trajlm.report.contents import NOTHING, Report, TargetInfo
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
    signed,
)

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
    """One target: a row per ablated modality, its main metrics and how far each is from nothing ablated."""
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
            row.append(NOT_DEFINED if here is None or ablated == NOTHING else signed(_change(own, here)))
        rows.append(row)
    unit = f" ({target.unit})" if target.unit else ""
    counts = ["stays", "positives"] if target.kind == "probability" else ["stays"]
    titles = [title for m in metrics for title in (metric_title(m), "difference")]
    return Table(f"{target.title}{unit}: value [95% interval]", ["Ablated", *counts, *titles], [Block("", "", rows)])


def _change(own: pl.DataFrame, row: dict[str, float]) -> float | None:
    whole = own.filter((pl.col("ablated") == NOTHING) & (pl.col("metric") == row["metric"]))["value"].item()
    return None if row["value"] is None or whole is None else row["value"] - whole


def ablation_figures(report: Report) -> list[Figure]:
    """A dot and its interval per ablated modality, for the first main metric of each target."""
    return [_dots(report, target) for target in report.targets if _shown(report, target)[1]]


def _dots(report: Report, target: TargetInfo) -> Figure:
    own, metrics = _shown(report, target)
    metric, styles = metrics[0], modality_styles(report.modalities)
    rows = own.filter((pl.col("metric") == metric) & pl.col("value").is_not_null() & pl.col("value").is_not_nan())
    whole = rows.filter(pl.col("ablated") == NOTHING)
    lower = metric_key(metric) in LOWER_IS_BETTER
    # The costliest loss stands first, so that the figure answers which modality the model can least do without.
    others = rows.filter(pl.col("ablated") != NOTHING).sort("value", descending=lower, maintain_order=True)
    order = [*whole.iter_rows(named=True), *others.iter_rows(named=True)]
    traces = []
    for place, row in enumerate(order):
        known = row["low"] is not None and row["high"] is not None
        name = WHOLE if row["ablated"] == NOTHING else f"without {name_label(row['ablated'])}"
        style = styles.get(row["ablated"], {"color": INK, "symbol": "circle"})
        traces.append(
            go.Scatter(
                x=[row["value"]],
                y=[place],
                mode="markers",
                name=plotly_text(name),
                showlegend=False,
                marker={"color": style["color"], "symbol": style["symbol"], "size": 10},
                error_x={
                    "array": [max(0.0, row["high"] - row["value"])] if known else [0.0],
                    "arrayminus": [max(0.0, row["value"] - row["low"])] if known else [0.0],
                    "symmetric": False,
                    "thickness": 1.6,
                    "width": 5,
                },
                hovertext=[
                    plotly_text(f"{interval(row['value'], row['low'], row['high'])}, {count(row['stays'])} stays")
                ],
                hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
            )
        )
    reference = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": row["value"], "x1": row["value"],
         "line": {"color": MUTED, "width": 1, "dash": "dot"}}
        for row in whole.iter_rows(named=True)
    ]  # fmt: skip
    labels = [WHOLE if row["ablated"] == NOTHING else name_label(row["ablated"]) for row in order]
    title = metric_title(metric)
    unit = f" ({target.unit})" if lower and target.unit else ""
    spec = figure_spec(
        traces,
        100 + 34 * len(order),
        shapes=reference,
        xaxis={"title": {"text": plotly_text(title + unit)}, "nticks": 6},
        yaxis={
            "range": [len(order) - 0.4, -0.6],
            "tickvals": list(range(len(order))),
            "ticktext": [plotly_text(label) for label in labels],
            "showgrid": False,
            "ticks": "",
        },
    )
    better = "Lower is better: to the right of" if lower else "Higher is better: to the left of"
    reading = f"{better} the dotted line, the model does worse without the modality. Bars are 95% intervals."
    return Figure(f"ablation_{target.name}", f"{target.title}: {title} without a modality", reading, spec)
