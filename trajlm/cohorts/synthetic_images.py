"""Paints chest X-rays whose opacities follow a given severity: smooth shapes, ribs, lines and noise."""

from __future__ import annotations

import io

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

PIXELS = 96
Plane = NDArray[np.float64]  # float[96, 96], 0 dark to 1 bright

_Y, _X = np.mgrid[0:PIXELS, 0:PIXELS] / (PIXELS - 1) * 2 - 1  # -1 top/left of the picture to 1 bottom/right


def chest_xray(
    rng: Generator, severity: float, *, illness: str, side: str, view: str, ventilated: bool, lines: bool
) -> bytes:
    """A greyscale JPEG of 96 x 96 pixels.

    Args:
        rng: draws anatomy, position and noise.
        severity: as the image shows it; about -2 (clear lungs) to 3 (white lungs).
        illness: decides where opacities lie, see ``synthetic_course.ILLNESSES``.
        side: of the patient; the picture shows the patient's right on its left.
        view: AP, PA or LATERAL.
        ventilated: paints a tube in the trachea; ``lines`` a central line.
    """
    centre = rng.normal(0, 0.03, 2)
    x, y = _X - centre[0], _Y - centre[1]
    if view == "LATERAL":
        picture, lungs = _lateral_anatomy(rng, x, y, illness)
    else:
        picture, lungs = _frontal_anatomy(rng, x, y, illness, view)
    picture = picture + _opacities(rng, x, y, lungs, severity, illness, side, view)
    if view != "LATERAL":
        picture = np.maximum(picture, 0.85 * _devices(x, y, ventilated, lines))
    grain = rng.normal(0, 0.022, (PIXELS, PIXELS))
    picture = rng.normal(1, 0.04) * picture + rng.normal(0, 0.015) + grain
    levels = np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)
    stored = io.BytesIO()
    Image.fromarray(levels).save(stored, format="JPEG", quality=85)
    return stored.getvalue()


def _ellipse(x: Plane, y: Plane, cx: float, cy: float, rx: float, ry: float, softness: float = 0.12) -> Plane:
    """1 inside, 0 outside, with an edge about ``softness`` of the radius wide."""
    radius = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2)
    return 1 / (1 + np.exp(np.clip((radius - 1) / (softness / 3), -40, 40)))


def _frontal_anatomy(rng: Generator, x: Plane, y: Plane, illness: str, view: str) -> tuple[Plane, Plane]:
    size = rng.normal(1, 0.05)
    right = _ellipse(x, y, -0.40 * size, -0.05, 0.29 * size, 0.62 * size)
    left = _ellipse(x, y, 0.41 * size, -0.05, 0.27 * size, 0.60 * size)
    # Domes of the diaphragm cut the lungs from below; the patient's right one stands higher.
    domes = _ellipse(x, y, -0.40, 0.98, 0.48, 0.52) + _ellipse(x, y, 0.42, 1.04, 0.46, 0.52)
    lungs = np.clip(right + left, 0, 1) * np.clip(1 - domes, 0, 1)
    enlarged = (1.3 if illness == "heart failure" else 1.0) * (1.12 if view == "AP" else 1.0)
    heart = _ellipse(x, y, 0.10, 0.30, 0.30 * enlarged * rng.normal(1, 0.06), 0.30, 0.2)
    body = _ellipse(x, y, 0, 0.35, 0.95, 1.35, 0.1)
    tissue = 0.08 + 0.56 * body - 0.40 * lungs
    spine = 0.10 * np.exp(-((x / 0.09) ** 2)) * (1 + 0.25 * np.sin(y * 26))
    phase = rng.uniform(0, 2 * np.pi)
    ribs = 0.055 * np.maximum(np.sin(19 * (y + 0.45 * (np.abs(x) - 0.35) ** 2 * 2) + phase), 0) ** 2 * body
    clavicles = 0.10 * np.exp(-(((y + 0.66 + 0.22 * np.abs(x)) / 0.035) ** 2)) * (np.abs(x) > 0.08) * body
    vessels = 0.09 * (np.exp(-(((np.abs(x) - 0.17) / 0.10) ** 2) - ((y - 0.02) / 0.2) ** 2)) * lungs
    # Opacities are told from air only where no heart lies before them.
    return tissue + heart * (0.08 + 0.26 * lungs) + spine + ribs + clavicles + vessels, lungs * (1 - 0.9 * heart)


def _lateral_anatomy(rng: Generator, x: Plane, y: Plane, illness: str) -> tuple[Plane, Plane]:
    size = rng.normal(1, 0.05)
    dome = _ellipse(x, y, -0.05, 1.0, 0.75, 0.5)
    lungs = _ellipse(x, y, 0.02, -0.05, 0.58 * size, 0.72 * size) * (1 - dome)
    heart = _ellipse(x, y, -0.25, 0.28, 0.30 * (1.2 if illness == "heart failure" else 1.0), 0.30, 0.2)
    body = _ellipse(x, y, 0.02, 0.3, 0.85, 1.35, 0.1)
    spine = 0.16 * np.exp(-(((x - 0.55 - 0.12 * y) / 0.10) ** 2)) * (1 + 0.4 * np.sin(y * 24)) * body
    ribs = 0.04 * np.maximum(np.sin(17 * (y - 0.5 * x) + rng.uniform(0, 6)), 0) ** 2 * body
    return 0.08 + 0.54 * body - 0.34 * lungs + heart * (0.04 + 0.24 * lungs) + spine + ribs, lungs * (1 - 0.9 * heart)


def _opacities(
    rng: Generator, x: Plane, y: Plane, lungs: Plane, severity: float, illness: str, side: str, view: str
) -> Plane:
    """Haze over both lungs, patches on the worse side, and fluid at the bases, all growing with severity."""
    strength = float(np.logaddexp(0, 1.1 * (severity + 0.25 + rng.normal(0, 0.2))) / 1.1)
    worse = 0.0 if view == "LATERAL" else -0.40 if side == "right" else 0.41
    one_sided = illness in ("pneumonia", "trauma")
    patches = np.zeros_like(x)
    for patch in range(5):
        near = worse if one_sided and patch < 4 else float(rng.choice([-0.40, 0.41]))
        cx, cy = near + rng.normal(0, 0.10), rng.normal(0.18, 0.24)
        width = rng.uniform(0.10, 0.20)
        patches += rng.uniform(0.6, 1.1) * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * width**2))
    haze = 0.5 + 0.5 * np.clip(y + 0.4, 0, 1)
    effusion = np.clip((y - 0.12) / 0.35, 0, 1) * (0.9 if illness == "heart failure" else 0.4)
    whiteness = strength * (0.055 * haze + 0.085 * patches + 0.06 * effusion)
    return lungs * 0.45 * (1 - np.exp(-whiteness / 0.45 * 1.6))


def _devices(x: Plane, y: Plane, ventilated: bool, lines: bool) -> Plane:
    shown = np.zeros_like(x)
    if ventilated:
        shown += np.exp(-(((x - 0.01) / 0.018) ** 2)) * (y < -0.28)
    if lines:
        shown += np.exp(-(((x + 0.16 - 0.10 * (y + 0.6)) / 0.014) ** 2)) * ((y > -0.75) & (y < 0.05))
    return np.clip(shown, 0, 1)
