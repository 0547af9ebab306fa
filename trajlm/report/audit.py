"""`trajlm audit`: a prepared folder's leaks, exclusions and composition, as text, tables and one page."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from trajlm.audit.build import Audit, audit_folder
from trajlm.errors import TrajlmError
from trajlm.report.audit_figures import audit_figures
from trajlm.report.audit_words import Section, facts, headline, sections, settings, warnings
from trajlm.report.inline import render_page
from trajlm.report.style import base_layout, modality_styles
from trajlm.report.tables import Table

PAGE, TEXT = "audit.html", "audit.md"
_PRINTED_ROWS = 40  # of a table, in the terminal


def audit(prepared: Path, out: Path | None = None) -> str:
    """Audit a prepared folder, from its own files alone.

    Writes ``audit.md``, ``audit.html`` and, as CSV, ``attrition`` (where the folder records it), ``rejected``,
    ``combinations``, ``modalities``, ``prevalence`` and ``length_of_stay``; the page last, so that while it is there
    the others are whole and of the same audit.

    Args:
        out: folder to write; None is ``prepared/audit``.

    Returns:
        What to print: the Markdown with long tables cut.

    Raises:
        TrajlmError: ``prepared`` is no prepared folder, is damaged, or ``out`` cannot be written.
    """
    prepared = Path(prepared)
    out = prepared / "audit" if out is None else Path(out)
    found = audit_folder(prepared)
    page, text = render_audit(found), markdown(found)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PAGE).unlink(missing_ok=True)
        for name, frame in frames(found).items():
            if frame is None:
                (out / f"{name}.csv").unlink(missing_ok=True)
            else:
                frame.write_csv(out / f"{name}.csv")
        (out / TEXT).write_text(text, encoding="utf-8")
        partial = out / f"{PAGE}.partial"
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, out / PAGE)
    except OSError as error:
        raise TrajlmError(f"cannot write the audit to {out}: {error.strerror or error}") from error
    return f"{markdown(found, most_rows=_PRINTED_ROWS)}\n{out / PAGE}: written, with its tables beside it"


def frames(found: Audit) -> dict[str, pl.DataFrame | None]:
    """The tables to save, by file name; None where the folder does not tell."""
    return {
        "attrition": found.attrition,
        "rejected": found.rejected,
        "combinations": found.combinations,
        "modalities": found.modalities,
        "prevalence": found.prevalence,
        "length_of_stay": found.hours,
    }


def render_audit(found: Audit) -> str:
    """The audit as one HTML page that loads nothing; everything but our own script and style is escaped."""
    figures = audit_figures(found)
    shared = {
        "layout": base_layout(),
        "figures": {figure.key: figure.spec for section in figures.values() for figure in section},
        "modalities": modality_styles(found.folder.modalities),
        "targets": [],
    }
    return render_page(
        "audit.html",
        shared,
        ("draw.js",),
        headline=headline(found),
        warnings=warnings(found),
        facts=facts(found),
        settings=settings(found),
        sections=sections(found),
        figures=figures,
    )


def markdown(found: Audit, most_rows: int | None = None) -> str:
    """The audit as Markdown, its tables padded so that they read well as plain text.

    Args:
        most_rows: most rows to show of a table; None shows all.
    """
    lines = [f"# {_line(headline(found))}", ""]
    for said in warnings(found):
        lines += [f"**{_line(said)}**", ""]
    lines += [*(f"- {name}: {_line(value)}" for name, value in facts(found)), ""]
    for section in sections(found):
        lines += _section(section, most_rows)
    return "\n".join(lines)


def _section(section: Section, most_rows: int | None) -> list[str]:
    lines = [f"## {section.title}", ""]
    for text in section.text:
        lines += [_line(text), ""]
    if section.items:
        lines += [*(f"- {_line(item)}" for item in section.items), ""]
    for table in section.tables:
        lines += [*_table(table, most_rows), ""]
    return lines


def _table(table: Table, most_rows: int | None) -> list[str]:
    rows: list[list[str]] = []
    for block in table.blocks:
        if block.title:
            rows.append([block.title, *[""] * (len(table.columns) - 1)])
        rows += block.rows
    shown = [[_cell(cell) for cell in row] for row in (rows if most_rows is None else rows[:most_rows])]
    columns = [_cell(column) for column in table.columns]
    widths = [max(len(row[i]) for row in [columns, *shown]) for i in range(len(columns))]
    labels = table.labels

    def line(cells: list[str]) -> str:
        padded = (c.ljust(w) if i < labels else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < labels else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    hidden = len(rows) - len(shown)
    rest = ["", f"... and {hidden} more {'row' if hidden == 1 else 'rows'}, in {TEXT}"] if hidden else []
    return [table.caption, "", line(columns), f"| {' | '.join(rule)} |", *(line(row) for row in shown), *rest]


def _line(text: str) -> str:
    """Text from records on one line: it can open no heading, table or control sequence of a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")
