"""Draws the anchoring audit: the cohort's figures and tables, and the stays that diverge most (figures 4 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from trajlm.interpret.anchoring import AGAINST, RUN, AnchoringAudit, StayView
from trajlm.interpret.attention import StayAttention
from trajlm.report.anchoring_tables import (
    MEASURE_TITLES,
    difference_table,
    shown,
    summary_table,
    unit_of,
)
from trajlm.report.contents import AttentionMap, TargetInfo
from trajlm.report.figures import Figure
from trajlm.report.inline import render_page
from trajlm.report.stays import packed_attention
from trajlm.report.style import (
    ATTENTION_COLORS,
    MUTED,
    OKABE_ITO,
    SHAPES,
    base_layout,
    figure_spec,
    modality_styles,
    plotly_text,
)
from trajlm.report.tables import Block, Table, count, name_label, percent
from trajlm.schema import NOTHING

TITLE = "Demographic anchoring under ablation"
SCRIPTS = ("draw.js", "attention.js", "anchoring.js")
COLORS = {RUN: OKABE_ITO[0], AGAINST: OKABE_ITO[1]}
DRAWN = ("share_change", "absolute_drift", "drift", "flips")
MOST_RANKED = 10
LAST = "of the last layer that has any"
WORDS = [
    "One modality at a time is taken away (ablated) from every held-out stay that holds it. Dots are means over these "
    "stays, bars 95% intervals over patients.",
    "Attention on demographics is the share that falls on demographic events, in the layer named above, "
    "averaged over heads and read-outs. Once events are gone fewer positions compete for it, so some rise is to be "
    "expected of any model. A decision flips when the belief crosses the threshold that flags as many tuning stays as "
    "had the outcome.",
]


@dataclass(frozen=True)
class Map:
    """An attention map of the page: its key, and what it shows."""

    key: str
    title: str


@dataclass(frozen=True)
class StaySection:
    """A stay as the page draws it: its beliefs, and before and after side by side, its attention by run."""

    key: str
    link: str
    title: str
    belief: Figure
    maps: list[list[Map]]


def anchoring_page(
    audit: AnchoringAudit, names: dict[str, str], targets: Sequence[TargetInfo], layer: int | None = None
) -> str:
    """One HTML file that opens with no network.

    Args:
        audit: of one run or two.
        names: what a reader calls them, by RUN and AGAINST.
        targets: what the runs believe in.
        layer: whose attention was watched; None is the last that has any.
    """
    target = next(t for t in targets if t.name == audit.target)
    measures = [m for m in DRAWN if m in set(audit.summary["measure"])]
    figures = [measure_figure(audit, measure, names, target) for measure in measures]
    maps: dict[str, StayAttention] = {}
    stays = [_section(audit, view, names, target, maps) for view in audit.stays]
    drawn = [*figures, *(stay.belief for stay in stays)]
    modalities = sorted({name for found in maps.values() for name in found.positions["modality"].unique()})
    shared = {
        "layout": base_layout(),
        "figures": {figure.key: figure.spec for figure in drawn},
        "maps": {key: packed_attention(AttentionMap(m.weights, m.positions)) for key, m in maps.items()},
        "modalities": modality_styles(modalities),
        "attention_colors": ATTENTION_COLORS,
    }
    subtitle = " against ".join(names.values())
    return render_page(
        "anchoring.html", shared, SCRIPTS, title=TITLE, subtitle=subtitle,
        facts=[*_facts(audit, names, targets), ("Attention", LAST if layer is None else f"of layer {layer}")],
        words=WORDS, figures=figures, tables=_tables(audit, names, targets),
        ranked=[_ranked(audit, order, names, target) for order in ("ranked", "anchored")], stays=stays,
    )  # fmt: skip


def _facts(audit: AnchoringAudit, names: dict[str, str], targets: Sequence[TargetInfo]) -> list[tuple[str, str]]:
    title = {target.name: target.title for target in targets}
    most = audit.summary.select(pl.col("stays", "patients").max()).row(0)
    facts = [("Held-out stays", count(most[0])), ("Patients", count(most[1])), ("Ranked by", title[audit.target])]
    for run, limits in audit.thresholds.items():
        told = "; ".join(f"{title[name]} from {percent(value)} on" for name, value in limits.items())
        facts.append((f"Decisions of {names[run]}", told or "none"))
    return facts


def _tables(audit: AnchoringAudit, names: dict[str, str], targets: Sequence[TargetInfo]) -> list[tuple[str, Table]]:
    tables = [
        (name if len(names) > 1 else "", summary_table(audit.summary.filter(pl.col("run") == run), targets))
        for run, name in names.items()
    ]
    if AGAINST in names:
        tables.append((f"{names[RUN]} minus {names[AGAINST]}",
                       difference_table(audit.difference, targets, names[AGAINST])))  # fmt: skip
    return tables


def _ranked(audit: AnchoringAudit, order: str, names: dict[str, str], target: TargetInfo) -> Table:
    """The head of one of the two rankings."""
    measure, what = ("drift", "the drift of the belief") if order == "ranked" else ("share_change", "attention moved")
    frame = audit.ranked if order == "ranked" else audit.anchored
    title = (
        f"By {what}" if AGAINST not in names else f"By how much {what} differs between {' and '.join(names.values())}"
    )
    unit = unit_of(measure, target)
    rows = [
        [count(row["rank"]), count(row["stay_id"]).replace(",", ""), name_label(row["ablated"]),
         f"{shown(measure, target, row['divergence']):.1f}"]
        for row in frame.head(MOST_RANKED).iter_rows(named=True)
    ]  # fmt: skip
    return Table(title, ["Rank", "Stay", "Ablated", unit], [Block("", "", rows)], labels=3)


def measure_figure(audit: AnchoringAudit, measure: str, names: dict[str, str], target: TargetInfo) -> Figure:
    """One measure by ablation and run with its interval, of the target that ranks."""
    own = audit.summary.filter(pl.col("measure") == measure, pl.col("target") == audit.target)
    order = own["ablated"].unique(maintain_order=True).to_list()
    traces = []
    for place, (run, name) in enumerate(names.items()):
        rows = own.filter(pl.col("run") == run).rows(named=True)
        values = [shown(measure, target, r["value"]) for r in rows]
        ends = [
            [shown(measure, target, r["value"] if r[end] is None else r[end]) for r in rows] for end in ("low", "high")
        ]
        traces.append(
            go.Scatter(
                x=values,
                y=[order.index(r["ablated"]) + 0.22 * (place - (len(names) - 1) / 2) for r in rows],
                mode="markers",
                name=plotly_text(name),
                error_x={
                    "array": [max(0.0, h - v) for h, v in zip(ends[1], values, strict=True)],
                    "arrayminus": [max(0.0, v - low) for low, v in zip(ends[0], values, strict=True)],
                    "symmetric": False,
                    "thickness": 1.6,
                    "width": 5,
                },
                marker={"color": COLORS[run], "symbol": SHAPES[place], "size": 10},
                hovertemplate="%{x:.1f}<extra>%{fullData.name}</extra>",
            )
        )
    nothing = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 0, "x1": 0,
               "line": {"color": MUTED, "width": 1, "dash": "dot"}}  # fmt: skip
    title, unit = MEASURE_TITLES[measure].partition(" (")[0], unit_of(measure, target)
    title = "change of attention on demographics" if measure == "share_change" else title
    spec = figure_spec(
        traces,
        130 + 40 * len(order),
        shapes=[nothing],
        xaxis={"title": {"text": plotly_text(f"{title} ({unit})")}, "nticks": 6},
        yaxis={
            "range": [len(order) - 0.4, -0.6],
            "tickvals": list(range(len(order))),
            "ticktext": [plotly_text(f"without {name_label(name)}") for name in order],
            "showgrid": False,
            "ticks": "",
        },
        showlegend=len(names) > 1,
    )
    about = "" if measure == "share_change" else f"{target.title}: "
    return Figure(measure, f"{about}{title}" if about else title.capitalize(), "", spec)


def _section(
    audit: AnchoringAudit, view: StayView, names: dict[str, str], target: TargetInfo, maps: dict[str, StayAttention]
) -> StaySection:
    """A stay's section; its maps are added to ``maps``."""
    key = f"stay-{view.stay_id}-{view.ablated}".replace(" ", "_")
    pairs = []
    for run, name in names.items():
        pair = []
        for label in (NOTHING, view.ablated):
            if (run, label) in view.maps:
                pair.append(Map(f"{key}-{run}-{label}", f"{name}, {_without(label)}"))
                maps[pair[-1].key] = view.maps[run, label]
        pairs += [pair] if pair else []
    title = f"Stay {view.stay_id} without {name_label(view.ablated)}"
    return StaySection(key, f"Stay {view.stay_id}", title, belief_figure(audit, view, names, target, key), pairs)


def belief_figure(audit: AnchoringAudit, view: StayView, names: dict[str, str], target: TargetInfo, key: str) -> Figure:
    """A stay's beliefs with nothing and with the modality ablated, by run (figure 4)."""
    own = audit.trajectories.filter(pl.col("stay_id") == view.stay_id)
    until = own["hours_since_admission"].max()
    scale = 100 if target.kind == "probability" else 1
    traces: list[Any] = []
    for run, name in names.items():
        for label, dash, mark in ((NOTHING, "solid", "circle"), (view.ablated, "dot", "circle-open")):
            line = own.filter(pl.col("run") == run, pl.col("ablated") == label)
            beliefs = (scale * line[f"belief_{audit.target}"]).to_list()
            # A belief holds until the next event, the last one to the end of the timeline.
            traces.append(
                go.Scatter(
                    x=[*line["hours_since_admission"], until], y=[*beliefs, *beliefs[-1:]],
                    mode="lines+markers", line={"color": COLORS[run], "dash": dash, "shape": "hv", "width": 1.8},
                    marker={"size": [5] * len(beliefs) + [0], "symbol": mark},
                    name=plotly_text(f"{name}, {_without(label)}"),
                )
            )  # fmt: skip
    unit = "%" if target.kind == "probability" else f" {target.unit}"
    spec = figure_spec(
        traces, 380, showlegend=True, xaxis={"title": {"text": "hours since admission"}},
        yaxis={"title": {"text": plotly_text(target.title)}, "ticksuffix": unit, "rangemode": "tozero"},
    )  # fmt: skip
    reading = "The solid line is the belief from all events, the dotted one that without the modality."
    return Figure(f"belief-{key}", f"{target.title}: belief with and without {name_label(view.ablated)}", reading, spec)


def _without(label: str) -> str:
    return "all events" if label == NOTHING else f"without {name_label(label)}"
