"""Draws a comparison of runs: figures by landmark with intervals, reliability before and after scaling."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.offline import get_plotlyjs

from trajlm.checkpoint import write_text
from trajlm.compared import Arm
from trajlm.report.style import FONT, arm_style, base_layout, identity_line, plotly_text
from trajlm.report.tables import metric_title

DRAWN = {"probability": ("auroc", "auprc"), "hours": ("mae",), "group": ("macro_auroc", "macro_auprc")}
BESIDE: dict[str, Any] = {
    "margin": {"t": 60}, "showlegend": True, "title_x": 0,
    "legend": {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"},
}  # fmt: skip
SCALINGS = {"none": "as believed", "temperature": "after temperature scaling"}


def write_plots(path: Path, arms: Sequence[Arm], targets: Sequence[dict[str, Any]], reliability: pl.DataFrame) -> None:
    """One HTML file that opens with no network: a figure per target and metric, and per reliability diagram.

    Args:
        path: file to write.
        arms: to draw, in order.
        targets: name, kind and title of each.
        reliability: points of the diagrams (:func:`trajlm.calibration.calibration_rows`) and ``arm``.
    """
    figures = [landmark_figure(arms, target, metric) for target in targets for metric in DRAWN[target["kind"]]]
    titles = {target["name"]: str(target["title"]) for target in targets}
    for name in reliability["target"].unique(maintain_order=True):
        own = reliability.filter(pl.col("target") == name)
        figures += [reliability_figure(own, titles[name], scaling) for scaling in SCALINGS]
    body = "\n".join(figure.to_html(full_html=False, include_plotlyjs=False) for figure in figures)
    title = escape("Comparison of runs on the same held-out stays")
    write_text(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>body{{font-family:{FONT};margin:2em}}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>{body}</body></html>",
    )


def landmark_figure(arms: Sequence[Arm], target: dict[str, Any], metric: str) -> go.Figure:
    """A metric against the hours an arm has seen, with 95 % intervals; the end of the window stands last."""
    names = [arm.title for arm in arms]
    own = [[r for r in arm.rows if (r["target"], r["metric"]) == (target["name"], metric)] for arm in arms]
    landmarks = list(dict.fromkeys(r["landmark"] for rows in own for r in rows))
    landmarks.sort(key=lambda at: float("inf") if at is None else at)
    traces = []
    for place, (name, rows) in enumerate(zip(names, own, strict=True)):
        shown = [r for r in rows if r["value"] is not None and r["low"] is not None]
        shift = 0.5 * (place - (len(names) - 1) / 2) / max(1, len(names))
        error = {
            "array": [max(0.0, r["high"] - r["value"]) for r in shown],
            "arrayminus": [max(0.0, r["value"] - r["low"]) for r in shown],
        }
        style = arm_style(names, name)
        traces.append(
            go.Scatter(
                x=[landmarks.index(r["landmark"]) + shift for r in shown],
                y=[r["value"] for r in shown],
                mode="markers",
                name=plotly_text(name),
                marker={**style, "size": 9},
                error_y={**error, "color": style["color"], "thickness": 1.5},
            )
        )
    ticks = ["end of window" if at is None else f"{at:g} h" for at in landmarks]
    figure = go.Figure(traces).update_layout(template="none", **base_layout())
    title = plotly_text(f"{str(target['title']).capitalize()}, {metric_title(metric)}")
    figure.update_layout(height=420, title=title, **BESIDE)
    return figure.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, title="seen up to")


def reliability_figure(points: pl.DataFrame, title: str, scaling: str) -> go.Figure:
    """Observed share against mean belief in bins of equal mass, a curve per arm; the dotted line is perfect."""
    names = points["arm"].unique(maintain_order=True).to_list()
    traces: list[Any] = [identity_line(0, 1)]
    for name in names:
        rows = points.filter((pl.col("arm") == name) & (pl.col("scaling") == scaling)).sort("belief_mean")
        traces.append(
            go.Scatter(
                x=rows["belief_mean"].to_list(),
                y=rows["observed"].to_list(),
                mode="lines+markers",
                name=plotly_text(name),
                marker={**arm_style(names, name), "size": 8},
                line={"color": arm_style(names, name)["color"]},
            )
        )
    figure = go.Figure(traces).update_layout(template="none", **base_layout())
    heading = plotly_text(f"{title.capitalize()}: reliability, {SCALINGS[scaling]}")
    figure.update_layout(height=460, title=heading, **BESIDE)
    return figure.update_xaxes(title="belief").update_yaxes(title="observed share")
