"""The report's figures as PNG and SVG files, drawn by matplotlib from what the page draws with Plotly.

Plotly's own export needs a browser of its own on the machine; matplotlib needs nothing, and its files are the same each
time. Summary figures are read from their Plotly specification, so each is described once.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter

from trajlm.report.contents import Report
from trajlm.report.figures import Figure
from trajlm.report.static_stays import attention_canvas, belief_canvas, importance_canvas
from trajlm.report.style import GRID, INK, MPL_MARKERS, MUTED

PIXELS_PER_INCH = 100  # a Plotly pixel is a hundredth of an inch here
DPI = 150
MOST_TARGETS = 4  # beliefs of a stay are drawn to files for the first few targets
LOOK: Any = {
    "font.size": 9.5, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#b9b8b2", "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "none",
    "svg.hashsalt": "trajlm", "text.parse_math": False,
    "figure.facecolor": "white", "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}  # fmt: skip
KINDS = ("png", "svg")
_NO_METADATA: dict[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
_DASHES = {"solid": "-", "dash": "--", "dot": ":"}


def write_figures(
    report: Report, summaries: Sequence[Figure], folder: Path, kinds: Sequence[str] = KINDS
) -> list[Path]:
    """Write every figure of the page as ``<key>.<kind>`` into ``folder``, and return the files.

    Beliefs of a stay are drawn for the first MOST_TARGETS targets; the page has them all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(LOOK):
        for figure in summaries:
            written += _save(summary_canvas(figure), folder, figure.key, kinds)
        for stay in report.stays:
            for target in report.targets[:MOST_TARGETS]:
                canvas = belief_canvas(stay, target, report.modalities)
                written += _save(canvas, folder, f"stay_{stay.stay_id}_{target.name}", kinds)
            for target in report.targets:
                if target.name in stay.importance:
                    canvas = importance_canvas(stay, target, report.modalities)
                    written += _save(canvas, folder, f"stay_{stay.stay_id}_{target.name}_importance", kinds)
            if stay.attention is not None:
                written += _save(attention_canvas(stay), folder, f"stay_{stay.stay_id}_attention", kinds)
    return written


def _save(canvas: Canvas, folder: Path, key: str, kinds: Sequence[str]) -> list[Path]:
    FigureCanvasAgg(canvas)
    name = re.sub(r"[^\w.-]+", "_", key)
    files = [folder / f"{name}.{kind}" for kind in kinds]
    for kind, file in zip(kinds, files, strict=True):
        # No date and no version: the same report gives the same bytes.
        canvas.savefig(file, dpi=DPI, metadata=_NO_METADATA[kind])
        canvas.set_layout_engine("none")  # laid out once for all files
    return files


def plain(text: str) -> str:
    """A Plotly label as plain text."""
    return html.unescape(re.sub(r"</?b>", "", re.sub(r"<br\s*/?>", "\n", text)))


def summary_canvas(figure: Figure) -> Canvas:
    """A summary figure, with its title and what to know for reading it left to the caption."""
    layout = figure.spec["layout"]
    square = "scaleanchor" in layout["yaxis"]
    size = (5.2, 5.4) if square else (7.2, max(2.6, layout["height"] / PIXELS_PER_INCH))
    canvas = Canvas(figsize=size, layout="constrained")
    axes = canvas.add_subplot()
    for trace in figure.spec["data"]:
        _bars(axes, figure.spec["data"], trace) if trace["type"] == "bar" else _scatter(axes, trace)
    for shape in layout.get("shapes", []):
        _line(axes, shape)
    for axis, side in ((axes.xaxis, layout["xaxis"]), (axes.yaxis, layout["yaxis"])):
        _dress(axis, side)
    if square:
        axes.set_aspect("equal")
    axes.set_title(plain(figure.title))
    handles, labels = axes.get_legend_handles_labels()
    if layout.get("showlegend") and len(labels) > 1:
        canvas.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=8.5)
    return canvas


def _dress(axis: Any, side: dict[str, Any]) -> None:
    limits = axis.axes.set_xlim if axis.axis_name == "x" else axis.axes.set_ylim
    axis.set_label_text(plain(side.get("title", {}).get("text", "")))
    if "tickvals" in side:
        axis.set_ticks(side["tickvals"], [plain(text) for text in side["ticktext"]])
    if "range" in side:
        limits(*side["range"])
    if side.get("autorange") == "reversed":
        axis.set_inverted(True)
    if side.get("tickformat") == ".0%":
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    if side.get("showgrid") is False:
        axis.grid(False)


def _scatter(axes: Axes, trace: dict[str, Any]) -> None:
    x, y = (_floats(trace[name]) for name in ("x", "y"))
    marker, line = trace.get("marker", {}), trace.get("line", {})
    color = marker.get("color") or line.get("color") or MUTED
    mode = trace.get("mode", "lines")
    style: dict[str, Any] = {"color": color, "linestyle": "none", "alpha": marker.get("opacity", 1.0)}
    if "lines" in mode:
        style |= {"linestyle": _DASHES.get(line.get("dash", "solid"), "--"), "linewidth": line.get("width", 1.5) * 0.8}
    if "markers" in mode:
        style |= {"marker": MPL_MARKERS[marker.get("symbol", "circle")], "markersize": marker.get("size", 8) * 0.65}
    label = None if trace.get("showlegend") is False else plain(trace.get("name", ""))
    errors: dict[str, Any] = {side: _errors(trace.get(f"error_{side[0]}")) for side in ("xerr", "yerr")}
    if errors["xerr"] is None and errors["yerr"] is None:
        axes.plot(x, y, label=label, **style)
    else:
        axes.errorbar(x, y, **errors, label=label, elinewidth=1.2, capsize=2.5, **style)


def _errors(error: dict[str, Any] | None) -> np.ndarray[Any, Any] | None:
    return None if not error else np.stack([_floats(error["arrayminus"]), _floats(error["array"])])


def _floats(values: Sequence[float | None]) -> np.ndarray[Any, Any]:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _bars(axes: Axes, traces: Sequence[dict[str, Any]], trace: dict[str, Any]) -> None:
    bars = [other for other in traces if other["type"] == "bar"]
    height = 0.75 / len(bars)
    shift = (bars.index(trace) - (len(bars) - 1) / 2) * height
    places = _floats(trace["y"]) + shift
    axes.barh(places, _floats(trace["x"]), height, color=trace["marker"]["color"], label=plain(trace["name"]))


def _line(axes: Axes, shape: dict[str, Any]) -> None:
    look = {"color": shape["line"]["color"], "linewidth": 1, "linestyle": _DASHES[shape["line"]["dash"]]}
    if shape.get("yref") == "paper":
        axes.axvline(shape["x0"], **look)
    else:
        axes.axhline(shape["y0"], **look)
