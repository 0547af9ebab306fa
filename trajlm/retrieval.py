"""How well a latent space is aligned: cross-modal Recall@K beside chance, and silhouette by modality (method 3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from sklearn.metrics import silhouette_samples


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
    unit = latents / np.maximum(np.linalg.norm(latents, axis=-1, keepdims=True), 1e-12)
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
    points = latents[stays, labels]
    points = points / np.maximum(np.linalg.norm(points, axis=-1, keepdims=True), 1e-12)
    scores = silhouette_samples(points, labels)
    by_modality = {modalities[m]: float(scores[labels == m].mean()) for m in np.unique(labels)}
    return {"overall": float(scores.mean())} | by_modality
