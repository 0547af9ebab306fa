"""Tables of figures as Markdown and LaTeX."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LABELS = 3  # columns of words before the figures, unless a table has others
TEX_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$",
    "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}", "[": "{[}", "]": "{]}", "|": r"\textbar{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Texts of a table, ``labels`` columns of words first; ``best`` holds the (row, column) of cells to print bold."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)
    note: str = ""
    labels: int = LABELS


def markdown(table: Table) -> str:
    """A title in bold, the table, a note."""

    def cell(text: str, label: bool = True) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", text) if label else text

    lines = [f"**{cell(table.title)}**", "", "| " + " | ".join(map(cell, table.columns)) + " |"]
    lines.append("|" + "---|" * table.labels + "---:|" * (len(table.columns) - table.labels))
    for i, row in enumerate(table.rows):
        bold = ["**" if (i, j) in table.best else "" for j in range(len(row))]
        marked = enumerate(zip(row, bold, strict=True))
        shown = [f"{mark}{cell(text, j < table.labels)}{mark}" for j, (text, mark) in marked]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", cell(table.note), ""])


def latex(table: Table) -> str:
    """A table that needs no package."""

    def cell(text: str) -> str:
        return "".join(TEX_SPECIAL.get(character, character) for character in text)

    caption = cell(f"{table.title}. {table.note}".strip())
    lines = [r"\begin{table}[ht]", r"\centering", rf"\caption{{{caption}}}"]
    lines += [rf"\begin{{tabular}}{{{'l' * table.labels}{'r' * (len(table.columns) - table.labels)}}}", r"\hline"]
    lines += [" & ".join(map(cell, table.columns)) + r" \\", r"\hline"]
    for i, row in enumerate(table.rows):
        shown = [rf"\textbf{{{cell(text)}}}" if (i, j) in table.best else cell(text) for j, text in enumerate(row)]
        lines.append(" & ".join(shown) + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", r"\end{table}", ""])
