"""Assembles the report: one HTML file that loads nothing from anywhere, and its tables as CSV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.errors import TrajlmError
from trajlm.report.anchoring_tables import difference_table, summary_table
from trajlm.report.contents import AblatedStay, AgainstStay, AttentionMap, Report, StayPage, TargetInfo
from trajlm.report.figures import Figure, summary_figures
from trajlm.report.glance import SPARK_HEIGHT, SPARK_WIDTH, cards, outcome, stay_lines
from trajlm.report.inline import inline_json, render_page
from trajlm.report.missing import ablation_figures, ablation_table
from trajlm.report.static import KINDS, write_figures
from trajlm.report.stays import stay_data
from trajlm.report.style import ATTENTION_COLORS, base_layout, modality_styles
from trajlm.report.tables import (
    Table,
    combination_label,
    metrics_table,
    name_label,
    plain_table,
    retrieval_table,
    write_tables,
)

__all__ = ["AblatedStay", "AgainstStay", "AttentionMap", "Report", "StayPage", "TargetInfo", "write_report"]


SCRIPTS = ("draw.js", "timeline.js", "attention.js", "stay.js", "importance.js", "report.js")


def write_report(report: Report, out: Path, figures: Sequence[str] = KINDS) -> Path:
    """Write ``out/tables/*.csv``, ``out/figures/*.png`` and ``.svg``, and then ``out/index.html``; return the latter.

    The page is one file: styles, scripts (Plotly once) and data are inside, and its content policy forbids the browser
    to load anything else. While ``index.html`` is there, it, the tables and the figures are whole and of one report.

    Args:
        report: what to show.
        out: folder to write.
        figures: kinds of file to write every figure as: png, svg.

    Raises:
        TrajlmError: ``out`` cannot be written.
    """
    drawn = _figures(report)
    text = render(report, drawn)
    page = out / "index.html"
    partial = out / "index.html.partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.unlink(missing_ok=True)
        write_tables(report, out / "tables")
        if figures:
            write_figures(report, [f for section in drawn.values() for f in section], out / "figures", figures)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, page)
    except OSError as error:
        raise TrajlmError(f"cannot write the report to {out}: {error.strerror or error}") from error
    return page


def _figures(report: Report) -> dict[str, list[Figure]]:
    return summary_figures(report) | {"ablation": ablation_figures(report)}


def render(report: Report, figures: dict[str, list[Figure]] | None = None) -> str:
    """The page as HTML. Everything but our own script and style is escaped."""
    figures = _figures(report) if figures is None else figures
    shared = {
        "layout": base_layout(),
        "figures": {f.key: f.spec for section in figures.values() for f in section},
        "modalities": modality_styles(report.modalities),
        "targets": [{"name": t.name, "title": t.title, "unit": t.unit, "kind": t.kind} for t in report.targets],
        "against": report.against,
        "attention_colors": ATTENTION_COLORS,
    }
    return render_page(
        "report.html",
        shared,
        SCRIPTS,
        report=report,
        figures=figures,
        tables=_tables(report),
        cards=cards(report),
        lines=stay_lines(report),
        spark={"width": SPARK_WIDTH, "height": SPARK_HEIGHT},
        stays=[inline_json(stay_data(stay, report.targets)) for stay in report.stays],
        explained=any(stay.importance for stay in report.stays),
        ablatable=sorted({name for stay in report.stays for name in stay.ablations}),
        label=name_label,
        outcomes=[
            "; ".join(f"{target.title}: {outcome(stay, target)}" for target in report.targets[:2])
            for stay in report.stays
        ],
    )


def _tables(report: Report) -> dict[str, Any]:
    tables: dict[str, Any] = {
        "performance": [
            t for t in (metrics_table(report.metrics, target, report.difference) for target in report.targets) if t
        ],
        "ablation": [t for t in (ablation_table(report, target) for target in report.targets) if t],
        "presence": plain_table(
            report.presence.with_columns(pl.col("combination").map_elements(combination_label, return_dtype=pl.String)),
            "Stays by combination of modalities",
            {"combination": "Combination", "train": "train", "tuning": "tuning", "held_out": "held out"},
        ),
        "retrieval": None if report.retrieval is None else retrieval_table(report.retrieval),
        "silhouette": None,
        "anchoring": None,
        "anchoring_against": None,
        "accounting": None,
        "stages": None,
    }
    if report.silhouette is not None:
        rows = [(name_label(name), score) for name, score in report.silhouette.items()]
        scores = pl.DataFrame(rows, schema={"of": pl.String, "score": pl.Float64}, orient="row")
        tables["silhouette"] = plain_table(scores, "Silhouette score", {"of": "Latents of", "score": "score"})
    if report.audit is not None and not report.audit.is_empty():
        tables["anchoring"] = summary_table(report.audit, report.targets)
    if report.against is not None and report.audit_against is not None and report.audit_difference is not None:
        tables["anchoring_against"] = [
            difference_table(report.audit_difference, report.targets, report.against),
            summary_table(report.audit_against, report.targets),
        ]
    if report.accounting is not None:
        titles = {"table": "Table", "read": "rows read", "kept": "kept", "rejected": "rejected"}
        tables["accounting"] = plain_table(report.accounting, "Rows of the raw tables", titles)
    if report.stages is not None:
        tables["stages"] = _stages_table(report.stages)
    return tables


def _stages_table(stages: pl.DataFrame) -> Table:
    timed = stages.with_columns(time=pl.col("seconds").map_elements(_duration, return_dtype=pl.String))
    shown = timed.select("stage", pl.col("time").fill_null("–"), "peak_memory_gb")
    titles = {"stage": "Stage", "time": "time", "peak_memory_gb": "peak memory (GB)"}
    return plain_table(shown, "Time and memory by stage", titles, labels=2)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
