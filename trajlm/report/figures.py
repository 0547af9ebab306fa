"""Draws the report's summary figures as Plotly specifications; the stays' figures are drawn in the page itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from trajlm.report.contents import Report, TargetInfo
from trajlm.report.style import MUTED, SQUARE, arm_style, figure_spec, identity_line, modality_styles, plotly_text
from trajlm.report.tables import combination_label, main_first, metric_key, metric_title, name_label

MOST_COMBINATIONS = 15
LOSS_READING = (
    "The tuning loss is over patients the weights never learned from; where it turns upwards, the model has begun to "
    "learn its patients by heart."
)
SPLIT_TITLES = {"train": "train", "tuning": "tuning", "held_out": "held out"}
SPLIT_COLORS = {"train": "#0072B2", "tuning": "#E69F00", "held_out": "#009E73"}


@dataclass(frozen=True)
class Figure:
    """A figure and the words that go with it.

    Attributes:
        key: id in the page, and file name when a reader saves it.
        title: what is drawn, short.
        reading: how to read it, one or two sentences.
        spec: ``{"data": [...], "layout": {...}}`` for Plotly.
    """

    key: str
    title: str
    reading: str
    spec: dict[str, Any]


def summary_figures(report: Report) -> dict[str, list[Figure]]:
    """Every summary figure the report has data for, by section."""
    calibration = [_calibration(report, t) for t in report.targets if t.name in set(report.calibration["target"])]
    performance = [_by_landmark(report, t) for t in report.targets if t.name in set(report.metrics["target"])]
    training = report.training
    stages = [] if training is None else training["stage"].unique(maintain_order=True).to_list()
    anchoring = report.anchoring
    watched = anchoring is not None and anchoring["share_before"].is_finite().any()
    return {
        "performance": performance,
        "calibration": calibration,
        "presence": [] if report.presence.is_empty() else [_presence(report.presence)],
        "pretraining": [_losses(training, stage, first=not i) for i, stage in enumerate(stages)]
        if training is not None
        else [],
        "anchoring": [_anchoring(report, anchoring)] if anchoring is not None and watched else [],
    }


def _by_landmark(report: Report, target: TargetInfo) -> Figure:
    own = report.metrics.filter(pl.col("target") == target.name)
    wanted = "auroc" if target.kind == "probability" else "mae"
    metric = main_first(own["metric"].unique(maintain_order=True).to_list(), target.kind)[0]
    title = metric_title(metric)
    own = own.filter(pl.col("metric") == metric)
    landmarks = own["landmark"].unique(maintain_order=True).to_list()
    arms = report.metrics["arm"].unique(maintain_order=True).to_list()
    present = own["arm"].unique(maintain_order=True).to_list()
    traces = []
    defined = own.filter(pl.col("value").is_not_nan() & pl.col("value").is_not_null())
    for arm in present:
        rows = defined.filter(pl.col("arm") == arm)
        values = rows["value"].to_list()
        up = [max(0.0, h - v) if h is not None else 0.0 for v, h in zip(values, rows["high"], strict=True)]
        down = [max(0.0, v - w) if w is not None else 0.0 for v, w in zip(values, rows["low"], strict=True)]
        custom = list(zip(rows["landmark"], rows["low"], rows["high"], rows["stays"], strict=True))
        traces.append(
            go.Scatter(
                x=[landmarks.index(name) + _shift(defined, name, arm) for name in rows["landmark"]],
                y=values,
                mode="markers",
                name=plotly_text(arm),
                customdata=custom,
                marker={**arm_style(arms, arm), "size": 10},
                error_y={"array": up, "arrayminus": down, "thickness": 1.6, "width": 5, "symmetric": False},
                hovertemplate="%{customdata[0]}: <b>%{y:.3f}</b> [%{customdata[1]:.3f}, %{customdata[2]:.3f}]"
                "<br>%{customdata[3]} stays<extra>%{fullData.name}</extra>",
            )
        )
    chance = (
        [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": 0.5,
                "y1": 0.5,
                "line": {"color": MUTED, "width": 1, "dash": "dot"},
            }
        ]
        if wanted == "auroc"
        else []
    )
    unit = f" ({target.unit})" if wanted == "mae" and target.unit else ""
    spec = figure_spec(
        traces,
        300 + 20 * len(traces),  # the legend has a line for every arm
        shapes=chance,
        xaxis={
            "tickvals": list(range(len(landmarks))),
            "ticktext": [plotly_text(n).replace("end of ", "end of<br>") for n in landmarks],  # fits a narrow screen
            "title": {"text": "seen up to"},
            "range": [-0.5, len(landmarks) - 0.5],
            "showgrid": False,
        },
        yaxis={
            "title": {"text": plotly_text(title + unit)},
            **({"range": _range_with_chance(own)} if wanted == "auroc" else {}),
        },
        showlegend=True,
    )
    better = {"auroc": "Higher is better; the dotted line is guessing.", "mae": "Lower is better."}
    reading = (
        "Bars are 95% intervals over patients: where those of two arms overlap widely, the data do not tell them "
        "apart. " + (better[wanted] if metric_key(metric) == wanted else "")
    )
    return Figure(f"landmarks_{target.name}", f"{target.title}: {title} by landmark", reading.strip(), spec)


def _shift(defined: pl.DataFrame, landmark: str, arm: str) -> float:
    """Arms stand side by side within a landmark, so that their intervals can be compared; one alone in its middle."""
    here = defined.filter(pl.col("landmark") == landmark)["arm"].unique(maintain_order=True).to_list()
    return (here.index(arm) - (len(here) - 1) / 2) * min(0.16, 0.6 / len(here))


def _range_with_chance(own: pl.DataFrame) -> list[float]:
    """From below guessing to above every interval."""
    seen = [v for c in ("value", "low", "high") for v in own[c].drop_nulls().drop_nans()]
    return [min([0.5, *seen]) - 0.03, max([0.6, *seen]) + 0.02]


def _calibration(report: Report, target: TargetInfo) -> Figure:
    own = report.calibration.filter(pl.col("target") == target.name)
    arms = report.calibration["arm"].unique(maintain_order=True).to_list()
    ends = [v for c in ("belief_mean", "observed") for v in own[c].drop_nulls().drop_nans()]
    low, high = min([0.0, *ends]), max([0.05, *ends]) * 1.06
    traces = [identity_line(low, high)]
    for arm in own["arm"].unique(maintain_order=True):
        rows = own.filter(pl.col("arm") == arm).sort("belief_mean")
        style = arm_style(arms, arm)
        traces.append(
            go.Scatter(
                x=rows["belief_mean"].to_list(),
                y=rows["observed"].to_list(),
                mode="lines+markers",
                name=plotly_text(arm),
                customdata=rows["stays"].to_list(),
                marker={**style, "size": 9},
                line={"color": style["color"], "width": 1.5},
                hovertemplate="believed %{x:.3f}, observed %{y:.3f}<br>%{customdata} stays"
                "<extra>%{fullData.name}</extra>",
            )
        )
    probability = target.kind == "probability"
    axis_range = [low - 0.02 * (high - low), high]
    unit = f" ({target.unit})" if target.unit else ""
    spec = figure_spec(
        traces,
        400,
        showlegend=True,
        xaxis={"title": {"text": f"mean belief{plotly_text(unit)}"}, "range": axis_range, **SQUARE},
        yaxis={
            "title": {"text": ("observed share" if probability else "observed mean") + plotly_text(unit)},
            "range": axis_range,
            "scaleanchor": "x",
            "constrain": "domain",
        },
    )
    what = "patients with the outcome" if probability else "hours"
    reading = (
        "Each marker is one bin of stays. On the dotted line beliefs match what was observed; below it the model "
        f"expects more {what} than there were, above it fewer."
    )
    return Figure(f"calibration_{target.name}", f"{target.title}: belief against outcome", reading, spec)


def _presence(presence: pl.DataFrame) -> Figure:
    splits = list(SPLIT_TITLES)
    ordered = presence.with_columns(total=pl.sum_horizontal(splits)).sort("total", descending=True, maintain_order=True)
    shown, pooled = ordered.head(MOST_COMBINATIONS), ordered.slice(MOST_COMBINATIONS)
    labels = [plotly_text(combination_label(name)) for name in shown["combination"]]
    if pooled.height:
        labels.append(f"{pooled.height} rarer combinations")
    traces = []
    for split in splits:
        counts = [*shown[split].fill_null(0).to_list(), *([pooled[split].sum()] if pooled.height else [])]
        total = max(1, sum(counts))
        traces.append(
            go.Bar(
                y=list(range(len(labels))),
                x=[c / total for c in counts],
                orientation="h",
                name=SPLIT_TITLES[split],
                customdata=counts,
                marker={"color": SPLIT_COLORS[split]},
                hovertext=labels,
                hovertemplate="%{hovertext}<br>%{customdata:,} stays, %{x:.1%} of the split"
                "<extra>%{fullData.name}</extra>",
            )
        )
    spec = figure_spec(
        traces,
        110 + 46 * len(labels),
        barmode="group",
        bargap=0.25,
        showlegend=True,
        xaxis={"title": {"text": "share of the split's stays"}, "tickformat": ".0%", "rangemode": "tozero"},
        yaxis={
            "autorange": "reversed",
            "tickvals": list(range(len(labels))),
            "ticktext": labels,
            "showgrid": False,
            "ticks": "",
        },
    )
    spec["layout"]["meta"] = {"wrapTicks": labels}
    reading = (
        "Each group of bars is one combination of modalities that stays hold. Bars of equal length mean that the "
        "splits were drawn alike."
    )
    return Figure("presence", "Combinations of modalities, by split", reading, spec)


def _losses(training: pl.DataFrame, stage: str, *, first: bool) -> Figure:
    own = training.filter(pl.col("stage") == stage).sort("epoch")
    traces = []
    for column, name, color, dash in (
        ("train_loss", "train", "#0072B2", "solid"),
        ("tuning_loss", "tuning", "#D55E00", "dash"),
    ):
        traces.append(
            go.Scatter(
                x=own["epoch"].to_list(),
                y=own[column].to_list(),
                name=name,
                mode="lines+markers" if own.height < 30 else "lines",
                line={"color": color, "dash": dash, "width": 2},
                marker={"size": 6},
                hovertemplate="epoch %{x}: %{y:.4f}<extra>%{fullData.name}</extra>",
            )
        )
    epochs = {"title": {"text": "epoch"}, **({"dtick": 1} if own.height <= 12 else {})}
    spec = figure_spec(traces, 300, xaxis=epochs, yaxis={"title": {"text": "loss"}}, showlegend=True)
    # Said once, it holds for all.
    return Figure(f"loss_{stage}", f"Loss by epoch, {name_label(stage)}", LOSS_READING if first else "", spec)


def _anchoring(report: Report, anchoring: pl.DataFrame) -> Figure:
    styles = modality_styles(report.modalities)
    shares = anchoring.unique(["stay_id", "ablated"], maintain_order=True)
    top = max(0.05, *(v for c in ("share_before", "share_after") for v in shares[c].drop_nulls().drop_nans())) * 1.06
    traces = [identity_line(0, top)]
    for ablated in sorted(shares["ablated"].unique().to_list()):
        own, style = shares.filter(pl.col("ablated") == ablated), styles[ablated]
        if (
            own.select((pl.col("share_before").is_finite() & pl.col("share_after").is_finite()).any()).item()
            is not True
        ):
            continue  # without demographics there is nothing left to look at
        traces.append(
            go.Scatter(
                x=own["share_before"].to_list(),
                y=own["share_after"].to_list(),
                mode="markers",
                name=plotly_text(f"without {style['label']}"),
                customdata=own["stay_id"].to_list(),
                marker={"color": style["color"], "symbol": style["symbol"], "size": 8, "opacity": 0.65},
                hovertemplate="stay %{customdata}: %{x:.1%} before, %{y:.1%} after<extra>%{fullData.name}</extra>",
            )
        )
    spec = figure_spec(
        traces,
        440,
        showlegend=True,
        xaxis={
            "title": {"text": "share before the ablation"},
            "tickformat": ".0%",
            "range": [-0.02 * top, top],
            **SQUARE,
        },
        yaxis={
            "title": {"text": "share after"},
            "tickformat": ".0%",
            "range": [-0.02 * top, top],
            "scaleanchor": "x",
            "constrain": "domain",
        },
    )
    reading = (
        "One marker per stay and ablation. Above the dotted line, the read-outs look more at demographics once the "
        "modality is gone. Fewer positions then compete for attention, so some rise is to be expected of any model."
    )
    return Figure("anchoring", "Share of the read-outs' attention on demographics", reading, spec)
