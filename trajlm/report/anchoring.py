"""`trajlm anchoring`: the audit's tables and one page that draws them, the paper's figures 4 and 5 among it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import polars as pl
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from trajlm.checkpoint import write_text
from trajlm.errors import TrajlmError
from trajlm.interpret.ablation import NOTHING
from trajlm.interpret.anchoring import AGAINST, RUN, AnchoringAudit, StayView, audit_anchoring
from trajlm.interpret.runs import open_run
from trajlm.report.style import FONT, OKABE_ITO, SHAPES, base_layout, plotly_text
from trajlm.report.tables import name_label

COLORS = {RUN: OKABE_ITO[0], AGAINST: OKABE_ITO[1]}
MEASURE_TITLES = {
    "share_before": "attention on demographics before",
    "share_after": "attention on demographics after",
    "share_change": "change of that share",
    "drift": "drift of the belief",
    "absolute_drift": "size of the drift",
    "flips": "decisions flipped",
}
PAGE_TITLE = "Demographic anchoring under ablation"


@dataclass
class AnchoringConfig:
    """The audit as a command.

    Args:
        run: run folder of finetune.py.
        out: folder for the tables and the page.
        against: a second run on the same records (contrastive against scratch).
        data: prepared folder, if it moved since.
        ablate: modalities to ablate; none is each in turn.
        target: whose drift ranks the stays; the first unless told.
        stays: held-out stays to ablate; 0 is all.
        shown: stays to draw of either ranking.
        resamples: of the patient-level bootstrap.
    """

    run: str
    out: str
    against: str | None = None
    data: str | None = None
    ablate: list[str] = field(default_factory=list)
    target: str | None = None
    stays: int = 0
    shown: int = 2
    resamples: int = 1000


def anchoring_command(config: AnchoringConfig) -> Path:
    """Write the tables (CSV; the long ones as Parquet too) and ``anchoring.html``; returns the page."""
    run = open_run(config.run, config.data)
    against = open_run(config.against, config.data) if config.against else None
    if against and against.prepared.folder.resolve() != run.prepared.folder.resolve():
        raise TrajlmError(f"{config.against} was made from {against.prepared.folder}, {config.run} from "
                          f"{run.prepared.folder}; compare runs on the same prepared folder")  # fmt: skip
    audit = audit_anchoring(run, against, config.ablate, config.target, config.stays, config.shown, config.resamples)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, table in audit.tables().items():
        table.write_csv(out / f"{name}.csv")
    audit.changes.write_parquet(out / "changes.parquet")
    names = {RUN: run.folder.name} | ({AGAINST: against.folder.name} if against else {})
    page = out / "anchoring.html"
    write_text(page, anchoring_page(audit, names))
    print(summary_lines(audit, names))
    print(f"anchoring: {page}")
    return page


def summary_lines(audit: AnchoringAudit, names: dict[str, str]) -> str:
    """The audit in words, one line per run and ablation, on the target that ranks."""
    lines = []
    of_target = audit.summary.filter(pl.col("target") == audit.target)
    for row in of_target.filter(pl.col("measure") == "absolute_drift").rows(named=True):
        own = of_target.filter(pl.col("run") == row["run"], pl.col("ablated") == row["ablated"])
        figures = {r["measure"]: r for r in own.iter_rows(named=True)}
        shares = [figures[m]["value"] for m in ("share_before", "share_after") if m in figures]
        told = f"attention on demographics {shares[0]:.1%} to {shares[1]:.1%}, " if len(shares) == 2 else ""
        flips = f", flips {figures['flips']['value']:.1%}" if "flips" in figures else ""
        low, high = (row[end] if row[end] is not None else float("nan") for end in ("low", "high"))
        lines.append(
            f"{names[row['run']]} without {row['ablated']} ({row['stays']} stays): {told}"
            f"|drift| {row['value']:.3f} [{low:.3f}, {high:.3f}]{flips}"
        )
    return "\n".join(lines)


def anchoring_page(audit: AnchoringAudit, names: dict[str, str]) -> str:
    """One HTML file that opens with no network."""
    parts = [_words(audit, names)]
    measures = [m for m in MEASURE_TITLES if m in set(audit.summary["measure"])]
    parts += [_html(summary_figure(audit, measure, names)) for measure in measures]
    for view in audit.stays:
        parts.append(_html(belief_figure(audit, view, names)))
        if view.maps:
            parts.append(_html(attention_figure(view, names)))
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{PAGE_TITLE}</title>'
        f"<style>body{{font-family:{FONT};margin:2em;max-width:70em}}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{PAGE_TITLE}</h1>{body}</body></html>"
    )


def _words(audit: AnchoringAudit, names: dict[str, str]) -> str:
    limits = [
        f"{names[run]}: {target} flagged from {value:.3f} on"
        for run, of in audit.thresholds.items()
        for target, value in of.items()
    ]
    lines = [
        "Means over the held-out stays that held what was ablated, with 95 % patient-level intervals. The share is "
        "that of the last layer's attention, averaged over heads and read-outs, which falls on demographic events. "
        "Once events are gone fewer positions compete for attention, so some rise is to be expected of any model.",
        f"Decisions: {'; '.join(limits) or 'none'} (as many tuning stays are flagged as had the outcome).",
    ]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _html(figure: go.Figure) -> str:
    return str(figure.to_html(full_html=False, include_plotlyjs=False))


def _styled(figure: go.Figure, title: str, **layout: Any) -> go.Figure:
    figure.update_layout(template="none", **base_layout())
    figure.update_layout(title={"text": plotly_text(title), "x": 0}, margin={"t": 90}, **layout)
    return figure


def summary_figure(audit: AnchoringAudit, measure: str, names: dict[str, str]) -> go.Figure:
    """One measure by ablation and run with its interval, of the target that ranks."""
    own = audit.summary.filter(pl.col("measure") == measure, pl.col("target") == audit.target)
    figure = go.Figure()
    for place, run in enumerate(names):
        rows = own.filter(pl.col("run") == run).rows(named=True)
        error = {
            "array": [max(0.0, (r["high"] if r["high"] is not None else r["value"]) - r["value"]) for r in rows],
            "arrayminus": [max(0.0, r["value"] - (r["low"] if r["low"] is not None else r["value"])) for r in rows],
        }
        figure.add_scatter(
            x=[r["value"] for r in rows], y=[name_label(r["ablated"]) for r in rows], mode="markers",
            name=plotly_text(names[run]), error_x=error,
            marker={"color": COLORS[run], "symbol": SHAPES[place], "size": 10},
        )  # fmt: skip
    return _styled(figure, f"{MEASURE_TITLES[measure]}, {audit.target}", height=160 + 40 * own["ablated"].n_unique())


def belief_figure(audit: AnchoringAudit, view: StayView, names: dict[str, str]) -> go.Figure:
    """A stay's beliefs with nothing and with the modality ablated, by run (figure 4)."""
    figure = go.Figure()
    own = audit.trajectories.filter(pl.col("stay_id") == view.stay_id)
    for run, name in names.items():
        for label, dash in ((NOTHING, "solid"), (view.ablated, "dot")):
            line = own.filter(pl.col("run") == run, pl.col("ablated") == label)
            figure.add_scatter(
                x=line["hours_since_admission"].to_list(), y=line[f"belief_{audit.target}"].to_list(),
                mode="lines+markers", line={"color": COLORS[run], "dash": dash, "shape": "hv"},
                marker={"size": 5, "symbol": "circle" if label == NOTHING else "circle-open"},
                name=plotly_text(f"{name}, {_without(label)}"),
            )  # fmt: skip
    axes = {"xaxis": {"title": {"text": "hours since admission"}}, "yaxis": {"title": {"text": audit.target}}}
    title = f"Stay {view.stay_id}: belief with and without {name_label(view.ablated)}"
    return _styled(figure, title, height=380, **axes)


def attention_figure(view: StayView, names: dict[str, str]) -> go.Figure:
    """A stay's attention maps before and after the ablation, one row per run (figure 5)."""
    runs: Sequence[str] = [run for run in names if (run, NOTHING) in view.maps]
    labels = (NOTHING, view.ablated)
    titles = [plotly_text(f"{names[run]}, {_without(label)}") for run in runs for label in labels]
    figure = make_subplots(rows=len(runs), cols=2, subplot_titles=titles)
    top = max(float(found.weights.max()) for found in view.maps.values())
    for row, run in enumerate(runs, start=1):
        for column, label in enumerate(labels, start=1):
            found = view.maps[run, label]
            texts = [
                plotly_text(f"{p['kind']} {p['modality']} {p['hours_since_admission']:.1f} h")
                for p in found.positions.rows(named=True)
            ]
            heat = go.Heatmap(z=found.weights, zmin=0, zmax=top, colorscale="Cividis", showscale=row == column == 1,
                              customdata=[[[q, k] for k in texts] for q in texts] if len(texts) <= 120 else None,
                              hovertemplate="%{customdata[0]} looks at %{customdata[1]}: %{z:.3f}<extra></extra>"
                              if len(texts) <= 120 else "%{y} looks at %{x}: %{z:.3f}<extra></extra>")  # fmt: skip
            figure.add_trace(heat, row=row, col=column)
            figure.update_yaxes(autorange="reversed", row=row, col=column)
    return _styled(figure, f"Stay {view.stay_id}: attention, last layer, mean over heads", height=440 * len(runs))


def _without(label: str) -> str:
    return "whole" if label == NOTHING else f"without {name_label(label)}"
