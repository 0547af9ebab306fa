"""How well a latent space is aligned (method 3): Recall@K beside chance, silhouette, alignment and uniformity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import polars as pl
from sklearn.metrics import silhouette_samples


def _unit(latents: np.ndarray) -> np.ndarray:
    return latents / np.maximum(np.linalg.norm(latents, axis=-1, keepdims=True), 1e-12)


def recall_at_k(
    latents: np.ndarray, present: np.ndarray, modalities: Sequence[str], ks: Sequence[int] = (1, 5, 10)
) -> pl.DataFrame:
    """Recall@K of every ordered pair of modalities.

    Query and gallery are the stays that hold both; a query counts when its own stay is among the K most similar.
    Ties count against the query.

    Args:
        latents: float[B, M, D].
        present: bool[B, M].
        modalities: M names.
        ks: values of K.

    Returns:
        columns query, gallery, k, recall, random (K / gallery size, at most 1), stays; no row for pairs nobody holds.
    """
    unit = _unit(latents)
    rows = []
    for q, query in enumerate(modalities):
        for g, gallery in enumerate(modalities):
            both = np.flatnonzero(present[:, q] & present[:, g])
            if q == g or not len(both):
                continue
            similarity = unit[both, q] @ unit[both, g].T
            rank = (similarity >= similarity.diagonal()[:, None]).sum(axis=1)  # 1 is best; the stay itself counts
            for k in ks:
                chance = min(1.0, k / len(both))
                rows.append((query, gallery, k, float((rank <= k).mean()), chance, len(both)))
    columns = ["query", "gallery", "k", "recall", "random", "stays"]
    return pl.DataFrame(rows, schema=columns, orient="row")


def silhouette(
    latents: np.ndarray, present: np.ndarray, modalities: Sequence[str], most: int = 5000
) -> dict[str, float]:
    """Silhouette score of unit latents labelled by modality, overall and per modality; near 0 the modalities mix.

    Args:
        latents: float[B, M, D].
        present: bool[B, M].
        modalities: M names.
        most: latents used at the most, evenly spaced, since the cost grows with their square.

    Returns:
        "overall" and every modality with a latent; empty where fewer than two modalities have one.
    """
    stays, labels = np.nonzero(present)
    if not len(stays):
        return {}
    chosen = np.unique(np.linspace(0, len(stays) - 1, min(most, len(stays))).astype(int))
    stays, labels = stays[chosen], labels[chosen]
    if len(np.unique(labels)) < 2 or len(np.unique(labels)) >= len(labels):
        return {}
    points = _unit(latents[stays, labels])
    scores = silhouette_samples(points, labels)
    by_modality = {modalities[m]: float(scores[labels == m].mean()) for m in np.unique(labels)}
    return {"overall": float(scores.mean())} | by_modality


def alignment(latents: np.ndarray, present: np.ndarray, modalities: Sequence[str]) -> dict[str, float]:
    """How close two modalities of one stay lie: mean squared distance of their unit latents (Wang and Isola, 2020).

    Args:
        latents: float[B, M, D].
        present: bool[B, M].
        modalities: M names.

    Returns:
        "mean" over pairs of modalities, and every pair that a stay holds as "one, other"; from 0, the same direction,
        to 4, opposite ones. Empty where no stay holds two.
    """
    unit = _unit(latents)
    by_pair = {}
    for one, other in combinations(range(len(modalities)), 2):
        both = present[:, one] & present[:, other]
        if both.any():
            squared = ((unit[both, one] - unit[both, other]) ** 2).sum(axis=-1)
            by_pair[f"{modalities[one]}, {modalities[other]}"] = float(squared.mean())
    return {"mean": float(np.mean(list(by_pair.values())))} | by_pair if by_pair else {}


def uniformity(
    latents: np.ndarray, present: np.ndarray, modalities: Sequence[str], most: int = 2000
) -> dict[str, float]:
    """How evenly unit latents spread over the sphere: log mean exp(-2 squared distance) over pairs of stays.

    Args:
        latents: float[B, M, D].
        present: bool[B, M].
        modalities: M names.
        most: stays used of a modality at the most, evenly spaced, since the cost grows with their square.

    Returns:
        "mean" over modalities, and every modality that two stays hold; 0 where all latents are one point, about -4
        where they are spread evenly over many dimensions (Wang and Isola, 2020). Empty where no modality has two.
    """
    unit = _unit(latents).astype(np.float64)
    by_modality = {}
    for column, name in enumerate(modalities):
        held = np.flatnonzero(present[:, column])
        if len(held) < 2:
            continue
        points = unit[held[np.linspace(0, len(held) - 1, min(most, len(held))).astype(int)], column]
        squared = (2 - 2 * points @ points.T)[np.triu_indices(len(points), k=1)]
        by_modality[name] = float(np.log(np.exp(-2 * squared).mean()))
    return {"mean": float(np.mean(list(by_modality.values())))} | by_modality if by_modality else {}
