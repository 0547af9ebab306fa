"""How every figure of the report looks: colours, marker shapes, fonts, grid."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from trajlm.report.tables import name_label

# Okabe and Ito's colours, which stay apart for colour-blind readers; yellow last, being faint on white.
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A400")
# More shapes than colours and no common divisor: the pair stays unique far beyond either list.
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "star", "triangle-down", "hexagon", "x")
MPL_MARKERS = dict(zip(SHAPES, "osD^P*vHX", strict=True))  # the same shapes as matplotlib calls them
ATTENTION_COLORS = ((0.0, "#fbfaf6"), (0.2, "#dbe7f1"), (0.45, "#8fbbdc"), (0.7, "#2f7ab5"), (1.0, "#06284a"))
INK, MUTED, GRID = "#1d2329", "#59636e", "#e4e3de"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
SQUARE = {"constrain": "domain", "constraintoward": "left"}  # with the other axis' scaleanchor


def modality_styles(modalities: Sequence[str]) -> dict[str, dict[str, str]]:
    """One colour and one marker shape per modality, the same wherever the report draws it."""
    return {
        name: {"color": OKABE_ITO[i % len(OKABE_ITO)], "symbol": SHAPES[i % len(SHAPES)], "label": name_label(name)}
        for i, name in enumerate(modalities)
    }


def plotly_text(text: str) -> str:
    """Plotly reads a little HTML (links among it) in labels: escape, so that text from records stays text."""
    return html.escape(text, quote=False)


def base_layout() -> dict[str, Any]:
    """Fonts, colours and grid of every figure; the page's own drawing code starts from it too."""
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": "#b9b8b2",
        "showline": True,
        "ticks": "outside",
        "tickcolor": "#b9b8b2",
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    return {
        "font": {"family": FONT, "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "xaxis": axis,
        "yaxis": axis,
        "modebar": {"bgcolor": "rgba(255,255,255,0.9)", "color": "#77756e", "activecolor": INK},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 13}},
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": "#b9b8b2", "font": {"color": INK}, "align": "left"},
    }


def figure_spec(traces: list[Any], height: int, **layout: Any) -> dict[str, Any]:
    """``{"data": [...], "layout": {...}}`` of these traces, checked by Plotly; ``layout`` is laid over the base."""
    figure = go.Figure(traces)
    figure.update_layout(template="none", **base_layout())
    figure.update_layout(height=height, **layout)
    spec = json.loads(figure.to_json())
    return {"data": spec["data"], "layout": spec["layout"]}


def arm_style(arms: list[str], arm: str) -> dict[str, str]:
    """One colour and one marker shape per arm, by its place in the metrics."""
    at = arms.index(arm)
    return {"color": OKABE_ITO[at % len(OKABE_ITO)], "symbol": SHAPES[at % len(SHAPES)]}


def identity_line(low: float, high: float) -> go.Scatter:
    """The dotted line on which both axes agree."""
    return go.Scatter(
        x=[low, high],
        y=[low, high],
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        line={"color": MUTED, "width": 1, "dash": "dot"},
    )
