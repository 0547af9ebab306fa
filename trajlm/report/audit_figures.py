"""Draws an audit: what each rule cost, who has what, since when, and how the splits compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import polars as pl

from trajlm.audit.build import Audit
from trajlm.audit.folder import ALL
from trajlm.report.audit_words import modality_titles, target_title
from trajlm.report.figures import SPLIT_COLORS, SPLIT_TITLES, Figure
from trajlm.report.style import GRID, OKABE_ITO, base_layout, figure_spec, modality_styles, plotly_text
from trajlm.report.tables import count, percent

MOST_COMBINATIONS = 20
_SPLIT_SYMBOLS = {"train": "circle", "tuning": "square", "held_out": "diamond"}
_BOX = {"q1": "q25", "median": "median", "q3": "q75", "lowerfence": "q05", "upperfence": "q95"}
BOX_READING = "The box spans the middle half, its line is the median, the whiskers reach from 5% to 95%."
_PER_ROW = 34  # pixels
_LEGEND = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}


def audit_figures(audit: Audit) -> dict[str, list[Figure]]:
    """Every figure the audit has data for, by section."""
    return {
        "attrition": [] if audit.attrition is None else [_attrition(audit.attrition)],
        "outcomes": [*([_prevalence(audit.prevalence)] if audit.prevalence.height else []), _hours(audit.hours)],
        "presence": [_combinations(audit), _shares(audit), *_timing(audit)],
        "rows": [_rows(audit.tables)],
    }


def _named_rows(labels: Sequence[str]) -> dict[str, Any]:
    """A y axis with one label per row, the first on top; the page breaks long labels."""
    ticks = {"tickvals": list(range(len(labels))), "ticktext": [plotly_text(label) for label in labels]}
    return {"autorange": "reversed", "showgrid": False, "ticks": "", **ticks}


def _wrapped(spec: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    spec["layout"]["meta"] = {"wrapTicks": [plotly_text(label) for label in labels]}
    return spec


def _attrition(steps: pl.DataFrame) -> Figure:
    lost = steps["stays_lost"].to_list()
    said = [
        count(n) if not gone else f"{count(n)} (−{count(gone)})" for n, gone in zip(steps["stays"], lost, strict=True)
    ]
    bar = go.Bar(
        y=list(range(steps.height)),
        x=steps["stays"].to_list(),
        orientation="h",
        marker={"color": [OKABE_ITO[1] if gone else OKABE_ITO[0] for gone in lost]},
        text=said,
        textposition="auto",
        hovertext=[plotly_text(rule) for rule in steps["rule"]],
        hovertemplate="%{hovertext}<br>%{text} stays<extra></extra>",
    )
    axis = {"title": {"text": "stays left"}, "rangemode": "tozero"}
    spec = figure_spec(
        [bar], 136 + 46 * steps.height, xaxis=axis, yaxis=_named_rows(steps["rule"].to_list()), bargap=0.35,
        margin={"l": 56, "r": 16, "t": 38, "b": 48},  # the topmost bar reaches to where the figure's buttons stand
    )  # fmt: skip
    reading = "Rules apply from top to bottom. A rule that removed stays is drawn in orange, with how many in brackets."
    return Figure("attrition", "Stays left after each rule", reading, _wrapped(spec, steps["rule"].to_list()))


def _combinations(audit: Audit) -> Figure:
    """Rows are combinations: dots say which modalities, bars how many stays of each split."""
    shown, pooled = audit.combinations.head(MOST_COMBINATIONS), audit.combinations.slice(MOST_COMBINATIONS)
    names, titles = audit.folder.modalities, modality_titles(audit.folder)
    styles, rows = modality_styles(names), range(shown.height)
    held = [set(combination.split("+")) for combination in shown["combination"]]
    absent = [(x, y) for y in rows for x, name in enumerate(names) if name not in held[y]]
    traces: list[Any] = [
        go.Scatter(
            x=[x for x, _ in absent], y=[y for _, y in absent], mode="markers", hoverinfo="skip", showlegend=False,
            marker={"color": GRID, "size": 7},
        )
    ]  # fmt: skip
    for x, name in enumerate(names):
        on = [y for y in rows if name in held[y]]
        marker = {"color": styles[name]["color"], "symbol": styles[name]["symbol"], "size": 11}
        label = plotly_text(titles[name])
        traces.append(
            go.Scatter(x=[x] * len(on), y=on, mode="markers", marker=marker, name=label, showlegend=False,
                       hovertemplate="%{fullData.name}<extra></extra>")
        )  # fmt: skip
    labels = [plotly_text(" + ".join(titles.get(part, part) for part in c.split("+"))) for c in shown["combination"]]
    totals = {split: max(1, audit.combinations[split].sum()) for split in SPLIT_TITLES}
    for split, title in SPLIT_TITLES.items():
        counts = [*shown[split].to_list(), *([pooled[split].sum()] if pooled.height else [])]
        traces.append(
            go.Bar(
                y=list(range(len(counts))), x=[n / totals[split] for n in counts], orientation="h", name=title,
                xaxis="x2", customdata=counts, marker={"color": SPLIT_COLORS[split]},
                hovertext=[*labels, f"{pooled.height} rarer combinations"][: len(counts)],
                hovertemplate="%{hovertext}<br>%{customdata:,} stays, %{x:.1%} of the split"
                "<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    spec = figure_spec(
        traces,
        _head(audit) + 48 + _PER_ROW * (shown.height + bool(pooled.height)),
        **_matrix_layout(audit, pooled.height),
    )
    reading = (
        "Each row is one combination of modalities that stays hold: dots on the left say which, bars how many stays of "
        "each split hold exactly these. Bars of equal length mean that the splits were drawn alike."
    )
    return Figure("combinations", "Combinations of modalities, by split", reading, spec)


def _head(audit: Audit) -> int:
    """Pixels above the matrix, for its turned titles."""
    return 44 + 7 * max(5, *(len(title) for title in modality_titles(audit.folder).values()))


def _matrix_layout(audit: Audit, pooled: int) -> dict[str, Any]:
    titles = [plotly_text(title) for title in modality_titles(audit.folder).values()]
    axis, head = base_layout()["xaxis"], _head(audit)
    rows = min(audit.combinations.height, MOST_COMBINATIONS) + bool(pooled)
    rest = [
        {"x": 0.3, "y": rows - 1, "xref": "paper", "text": f"{pooled} rarer", "showarrow": False, "xanchor": "right"}
    ]
    return {
        "barmode": "group",
        "bargap": 0.3,
        "showlegend": True,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 0, "yanchor": "top"},
        # Measured here: left to Plotly, the turned titles and the legend push each other in turn.
        "margin": {"t": head, "l": 8, "r": 16, "b": 48},
        "annotations": rest if pooled else [],
        "xaxis": {"domain": [0, 0.32], "side": "top", "tickangle": -90, "tickvals": list(range(len(titles))),
                  "ticktext": titles, "showgrid": False, "showline": False, "ticks": "",
                  "automargin": False, "range": [-0.6, len(titles) - 0.4]},
        "xaxis2": {**axis, "domain": [0.36, 1], "anchor": "y", "side": "top", "tickformat": ".0%",
                   "rangemode": "tozero", "nticks": 6, "automargin": False,
                   "title": {"text": "share of the split's stays", "font": {"size": 13}}},
        "yaxis": {"range": [rows - 0.4, -0.6], "showticklabels": False, "showgrid": False, "showline": False,
                  "ticks": "", "automargin": False},
    }  # fmt: skip


def _shares(audit: Audit) -> Figure:
    titles = modality_titles(audit.folder)
    labels = list(titles.values())
    traces = []
    for split, title in SPLIT_TITLES.items():
        own = audit.modalities.filter(pl.col("split") == split)
        traces.append(
            go.Bar(
                y=list(range(own.height)), x=own["share"].to_list(), orientation="h", name=title,
                marker={"color": SPLIT_COLORS[split]}, customdata=own["present"].to_list(),
                hovertext=[plotly_text(label) for label in labels],
                hovertemplate="%{hovertext}<br>%{customdata:,} stays, %{x:.1%} of the split"
                "<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    spec = figure_spec(
        traces, 110 + 46 * len(labels), barmode="group", bargap=0.3, showlegend=True, yaxis=_named_rows(labels),
        xaxis={"title": {"text": "share of the split's stays"}, "tickformat": ".0%", "range": [0, 1.02]},
    )  # fmt: skip
    reading = "A stay holds a modality if it has at least one event of it within the window."
    return Figure("shares", "Stays that hold each modality, by split", reading, _wrapped(spec, labels))


def _timing(audit: Audit) -> list[Figure]:
    whole = audit.modalities.filter((pl.col("split") == ALL) & (pl.col("present") > 0))
    if whole.is_empty():
        return []
    titles, styles = modality_titles(audit.folder), modality_styles(audit.folder.modalities)
    labels = [titles[name] for name in whole["modality"]]
    colors = [styles[name]["color"] for name in whole["modality"]]
    reading = "Of the stays that hold the modality, drawn as the length of stay above."
    return [
        Figure("events", "Events per stay", reading, _boxes(whole, "events_", labels, colors, "events", log=True)),
        Figure(
            "first",
            "Hour of the first event",
            "",
            _boxes(whole, "first_hour_", labels, colors, "hours since admission"),
        ),
    ]


def _boxes(
    rows: pl.DataFrame, prefix: str, labels: Sequence[str], colors: Sequence[str], unit: str, log: bool = False
) -> dict[str, Any]:
    """One box per row, from its quantiles alone."""
    traces = []
    for place, (row, label, color) in enumerate(zip(rows.iter_rows(named=True), labels, colors, strict=True)):
        at = {name: [row[prefix + quantile]] for name, quantile in _BOX.items()}
        traces.append(
            go.Box(y=[place], orientation="h", name=plotly_text(label), showlegend=False, marker={"color": color},
                   line={"color": color, "width": 2}, fillcolor="rgba(255,255,255,0.6)", width=0.5,
                   hoverlabel={"namelength": -1}, **at)
        )  # fmt: skip
    axis = {
        "title": {"text": unit},
        "nticks": 8,
        **({"type": "log", "dtick": "D2"} if log else {"rangemode": "tozero"}),
    }
    return _wrapped(figure_spec(traces, 110 + 46 * len(labels), xaxis=axis, yaxis=_named_rows(labels)), labels)


def _prevalence(prevalence: pl.DataFrame) -> Figure:
    whole = prevalence.filter(pl.col("split") == ALL).sort(
        "prevalence", descending=True, nulls_last=True, maintain_order=True
    )
    targets = whole["target"].to_list()
    traces = []
    for place, (split, title) in enumerate(SPLIT_TITLES.items()):
        own = {
            row["target"]: row
            for row in prevalence.filter(pl.col("split") == split).iter_rows(named=True)
            if row["known"]
        }
        rows = [(y, own[target]) for y, target in enumerate(targets) if target in own]
        shares = [row["prevalence"] for _, row in rows]
        traces.append(
            go.Scatter(
                x=shares, y=[y + 0.24 * (place - 1) for y, _ in rows], mode="markers", name=title,
                marker={"color": SPLIT_COLORS[split], "symbol": _SPLIT_SYMBOLS[split], "size": 8},
                error_x={"array": [row["high"] - row["prevalence"] for _, row in rows], "symmetric": False,
                         "arrayminus": [row["prevalence"] - row["low"] for _, row in rows], "thickness": 1.4,
                         "width": 3},
                cliponaxis=False,
                hovertext=[f"{plotly_text(target_title(row['target']))}<br>{_share(row)}" for _, row in rows],
                hovertemplate="%{hovertext}<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    labels = [target_title(target) for target in targets]
    axis = {"title": {"text": "share of those known"}, "tickformat": ".0%", "rangemode": "tozero"}
    rows_axis = {**_named_rows(labels), "autorange": False, "range": [len(labels) - 0.4, -0.6]}
    spec = figure_spec(traces, 110 + 46 * len(labels), showlegend=True, legend=_LEGEND, xaxis=axis, yaxis=rows_axis)
    reading = (
        "Bars are 95% intervals (Wilson). Splits drawn at random differ by chance only: the intervals of a target "
        "should overlap."
    )
    return Figure("prevalence", "How often each target is positive, by split", reading, _wrapped(spec, labels))


def _share(row: dict[str, Any]) -> str:
    interval = f"{percent(row['prevalence'])} [{percent(row['low'])}, {percent(row['high'])}]"
    return f"{interval}, {count(row['positive'])} of {count(row['known'])} stays"


def _hours(hours: pl.DataFrame) -> Figure:
    known = hours.filter((pl.col("split") != ALL) & (pl.col("known") > 0))
    labels = [f"{target_title(q)}, {SPLIT_TITLES[s]}" for q, s in known.select("quantity", "split").iter_rows()]
    spec = _boxes(known, "", labels, [SPLIT_COLORS[split] for split in known["split"]], "hours")
    return Figure("hours", "Length of stay, by split", BOX_READING, spec)


def _rows(tables: pl.DataFrame) -> Figure:
    traces = []
    for part, color in (("kept", OKABE_ITO[0]), ("rejected", OKABE_ITO[4])):
        share = [n / read if read else 0 for n, read in tables.select(part, "read").iter_rows()]
        traces.append(
            go.Bar(
                y=list(range(tables.height)), x=share, orientation="h", name=part, marker={"color": color},
                customdata=tables[part].to_list(), hovertext=[plotly_text(name) for name in tables["table"]],
                hovertemplate="%{hovertext}<br>%{customdata:,} rows, %{x:.1%}<extra>%{fullData.name}</extra>",
            )
        )  # fmt: skip
    labels = tables["table"].to_list()
    spec = figure_spec(
        traces, 110 + 46 * len(labels), barmode="stack", bargap=0.35, showlegend=True, yaxis=_named_rows(labels),
        legend={"traceorder": "normal"},
        xaxis={"title": {"text": "share of the rows read"}, "tickformat": ".0%", "range": [0, 1.005]},
    )  # fmt: skip
    return Figure("rows", "Rows kept and rejected, by raw table", "", _wrapped(spec, labels))
