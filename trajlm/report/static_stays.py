"""One stay as a figure for print: its beliefs over its timeline, and its attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure as Canvas

from trajlm.report.contents import PREDICT, AttentionMap, StayPage, TargetInfo
from trajlm.report.stays import importance_adds, shown_attention
from trajlm.report.style import ATTENTION_COLORS, INK, MPL_MARKERS, MUTED, modality_styles

LOWEST_SHARE = 1e-3
MOST_LABELS = 32
IMPORTANCE_TITLES = {
    "attention": "looked at: share of the last read-out's attention",
    "removal": "removed: what the event adds to the last belief",
    "knock_out": "cut off from all that follows: likewise",
    "attribution": "integrated gradients: likewise",
}


def belief_canvas(stay: StayPage, target: TargetInfo, modalities: list[str]) -> Canvas:
    """The belief over time above one lane of events per modality, with each ablation and the run compared with."""
    styles = modality_styles(modalities)
    held = set(stay.trajectory["modality"].unique())
    lanes = [name for name in modalities if name in held]
    canvas = Canvas(figsize=(7.2, 3.2 + 0.24 * len(lanes)), layout="constrained")
    upper, lower = canvas.subplots(2, 1, sharex=True, height_ratios=[10, 1 + len(lanes)])
    until = max(hour for frame in stay.trajectories.values() for hour in [0.0, *frame["hours_since_admission"]])
    _steps(upper, stay.trajectory, target, until, color=INK, linewidth=1.5, label="all events")
    for name, ablated in stay.ablations.items():
        label = f"without {styles[name]['label']}"
        style: dict[str, Any] = {"color": styles[name]["color"], "linewidth": 1.1, "linestyle": "--", "label": label}
        _steps(upper, ablated.trajectory, target, until, **style)
    if stay.against is not None:
        _steps(upper, stay.against.trajectory, target, until, color="#D55E00", linewidth=1.3, label="the other run")
    unit = "" if target.kind == "probability" else f" ({target.unit})"
    upper.set_ylabel(target.title + unit)
    upper.set_ylim(bottom=0)
    upper.set_title(f"Stay {stay.stay_id}: {target.title}")
    if stay.ablations or stay.against is not None:
        upper.legend(fontsize=8, ncols=3)
    for lane, name in enumerate(lanes):
        own = stay.trajectory.filter(pl.col("modality") == name)["hours_since_admission"].to_numpy()
        mark = styles[name]
        lower.plot(own, np.full(len(own), lane), linestyle="none", color=mark["color"], markersize=4.5,
                   marker=MPL_MARKERS[mark["symbol"]])  # fmt: skip
    lower.set_yticks(range(len(lanes)), [styles[name]["label"] for name in lanes])
    lower.set_ylim(len(lanes) - 0.4, -0.6)
    lower.set_xlabel("hours since admission")
    return canvas


def _steps(axes: Axes, trajectory: pl.DataFrame, target: TargetInfo, until: float, **style: Any) -> None:
    """A belief holds from its event to the next, and the last one to the end of the stay's timeline."""
    beliefs = trajectory[f"belief_{target.name}"].cast(pl.Float64).fill_null(float("nan")).to_list()
    hours = trajectory["hours_since_admission"].to_list()
    axes.step([*hours, until], [*beliefs, *beliefs[-1:]], where="post", **style)


def attention_canvas(stay: StayPage) -> Canvas:
    """The attention map, pooled as on the page, on a logarithmic scale."""
    weights, positions = shown_attention(_attention(stay))
    shares = weights / positions["pooled"].to_numpy()
    shown = np.where(np.tri(len(shares), dtype=bool), np.maximum(shares, LOWEST_SHARE), np.nan)
    canvas = Canvas(figsize=(7.2, 6.2), layout="constrained")
    axes = canvas.add_subplot()
    colors = LinearSegmentedColormap.from_list("attention", ATTENTION_COLORS)
    image = axes.imshow(shown, cmap=colors, norm=LogNorm(LOWEST_SHARE, 1), interpolation="nearest")
    axes.grid(False)
    places = np.arange(0, len(shares), max(1, -(-len(shares) // MOST_LABELS)))
    labels = [_position(positions.row(int(i), named=True)) for i in places]
    axes.set_xticks(places, labels, rotation=60, ha="right", fontsize=6.5)
    axes.set_yticks(places, labels, fontsize=6.5)
    axes.set(xlabel="attended position", ylabel="position that looks")
    axes.set_title(f"Stay {stay.stay_id}: attention, last layer, mean over heads")
    bar = canvas.colorbar(image, shrink=0.6, pad=0.02, label="share of the row's attention, per position")
    bar.outline.set_edgecolor(MUTED)
    return canvas


def importance_canvas(stay: StayPage, target: TargetInfo, modalities: list[str]) -> Canvas:
    """What each event does to the last belief, one measure under another; those that are unknown are left out."""
    styles, adds = modality_styles(modalities), importance_adds(stay.importance[target.name])
    place = {event: i for i, event in enumerate(stay.trajectory["event_index"])}
    hours, modality = stay.trajectory["hours_since_admission"], stay.trajectory["modality"]
    shown = [name for name in IMPORTANCE_TITLES if adds[name].is_not_null().any()]
    canvas = Canvas(figsize=(7.2, 0.8 + 1.25 * len(shown)), layout="constrained")
    rows = canvas.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, shown, strict=True):
        for event, value in adds.select("event_index", name).drop_nulls().iter_rows():
            mark, hour = styles[modality[place[event]]], hours[place[event]]
            axes.plot([hour, hour], [0, value], color="#b9b8b2", linewidth=0.8)
            axes.plot(hour, value, color=mark["color"], marker=MPL_MARKERS[mark["symbol"]], markersize=4)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set_title(IMPORTANCE_TITLES[name], fontsize=8.5, fontweight="normal")
    rows[-1].set_xlabel("hours since admission")
    canvas.suptitle(f"Stay {stay.stay_id}: what the last belief in {target.title.lower()} rests on", fontsize=11)
    return canvas


def _attention(stay: StayPage) -> AttentionMap:
    if stay.attention is None:
        raise ValueError(f"stay {stay.stay_id} has no attention to draw")
    return stay.attention


def _position(row: dict[str, Any]) -> str:
    names = row["modality"].split(", ")
    what = "PREDICT" if row["kind"] == PREDICT else names[0] if len(names) == 1 else f"{len(names)} modalities"
    return f"{what.replace('_', ' ')} {row['first_hour']:.1f} h"
