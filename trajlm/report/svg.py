"""Still pictures as SVG: points in a plane and curves, in the report's colours, shapes and font."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from trajlm.report.style import FONT, GRID, INK, MUTED, OKABE_ITO

WIDTH, HEIGHT = 760, 520
# Paths around (0, 0), about as large as each other.
MARKS = (
    "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",  # circle
    "M-2.7,-2.7h5.4v5.4h-5.4z",  # square
    "M0,-3.8L3.8,0L0,3.8L-3.8,0z",  # diamond
    "M0,-3.6L3.4,2.6H-3.4z",  # triangle
    "M-3.4,-1.1h2.3v-2.3h2.2v2.3h2.3v2.2h-2.3v2.3h-2.2v-2.3h-2.3z",  # cross
    "M0,3.6L3.4,-2.6H-3.4z",  # triangle, down
)


def scatter(points: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """Points float[N, 2] in the colour and shape of their label int[N], with a legend of ``names``.

    The axes of such a picture mean nothing, so none are drawn.
    """
    low, high = points.min(axis=0), points.max(axis=0)
    margin, top = 16, 16 + 22 * len(_legend_rows(names))
    room = np.array([WIDTH - 2 * margin, HEIGHT - top - margin])
    # One scale for both directions: distances are what the picture shows.
    scale = float((room / np.maximum(high - low, 1e-9)).min())
    placed = (points - (low + high) / 2) * scale + np.array([WIDTH / 2, top + room[1] / 2])
    marks = [f'<use href="#mark{int(m)}" x="{x:.1f}" y="{y:.1f}"/>' for (x, y), m in zip(placed, labels, strict=True)]
    shown = np.unique(labels)
    shapes = [
        f'<path id="mark{m}" d="{MARKS[m % len(MARKS)]}" fill="{OKABE_ITO[m % len(OKABE_ITO)]}" fill-opacity="0.6"/>'
        for m in shown.tolist()
    ]
    title = f"{len(points)} latents in two dimensions, by modality: {', '.join(names)}"
    return _svg(title, [f"<defs>{''.join(shapes)}</defs>", *_legend(names, shown.tolist()), *marks])


def _legend_rows(names: Sequence[str]) -> list[list[int]]:
    """Places of names, row after row, so that none runs out of the picture."""
    rows: list[list[int]] = [[]]
    used = 0
    for place, name in enumerate(names):
        need = 34 + 8 * len(name)
        if used + need > WIDTH - 32 and rows[-1]:
            rows.append([])
            used = 0
        rows[-1].append(place)
        used += need
    return rows


def _legend(names: Sequence[str], shown: Sequence[int]) -> list[str]:
    parts = []
    for row, places in enumerate(_legend_rows(names)):
        x = 20
        for place in places:
            if place in shown:
                parts.append(f'<use href="#mark{place}" x="{x}" y="{18 + 22 * row}"/>')
                parts.append(_text(x + 10, 22 + 22 * row, names[place]))
                x += 34 + 8 * len(names[place])
    return parts


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Lines through points (x, y), one per name; the first solid, the others dashed."""
    points = [point for line in series.values() for point in line if np.isfinite(point[1])]
    xs, ys = ([p[i] for p in points] or [0.0, 1.0] for i in (0, 1))
    left, right, top, bottom = 70, WIDTH - 20, 40, 260

    def place(x: float, y: float) -> tuple[float, float]:
        width, height = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
        return left + (x - min(xs)) / width * (right - left), bottom - (y - min(ys)) / height * (bottom - top)

    parts = []
    for y in np.linspace(min(ys), max(ys), 4):
        across = place(min(xs), float(y))[1]
        parts.append(f'<path d="M{left},{across:.1f}H{right}" stroke="{GRID}"/>')
        parts.append(_text(left - 8, across + 4, f"{y:.3g}", "end"))
    for x in sorted({round(float(x)) for x in np.linspace(min(xs), max(xs), 6)}):
        parts.append(_text(place(x, min(ys))[0], bottom + 18, str(x), "middle"))
    parts += [_text((left + right) / 2, bottom + 38, x_title, "middle"), _text(8, 20, y_title)]
    for number, (name, line) in enumerate(series.items()):
        color, dash = OKABE_ITO[number % len(OKABE_ITO)], "" if number == 0 else ' stroke-dasharray="6 4"'
        style = f'stroke="{color}" stroke-width="2" fill="none"{dash}'
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line if np.isfinite(p[1])))
        parts.append(f'<polyline points="{path}" {style}/>')
        legend = 140 + 130 * number
        parts += [f'<path d="M{legend},16h26" {style}/>', _text(legend + 32, 20, name)]
    told = "; ".join(f"{name}: {line[0][1]:.3g} to {line[-1][1]:.3g}" for name, line in series.items() if line)
    return _svg(f"{y_title} over {x_title}. {told}", parts, height=310)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    style = f'font-family="{html.escape(FONT)}" font-size="13" fill="{INK}" color="{MUTED}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" {style}>'
    return "\n".join([head, f"<title>{html.escape(title)}</title>", *parts, "</svg>\n"])
