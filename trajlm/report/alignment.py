"""Draws a pretraining run: what it measured as tables, its loss over epochs, and its latent space as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup
from sklearn.manifold import TSNE

from trajlm.assemble import load_encoders
from trajlm.checkpoint import read_log, read_run, write_text
from trajlm.config import Recipe, from_dict
from trajlm.dataset import load_prepared
from trajlm.pretraining import encode_stays
from trajlm.report.figures import SPLIT_TITLES
from trajlm.report.inline import render_still
from trajlm.report.svg import curves, scatter
from trajlm.report.tables import Block, Table, name_label, number, percent, retrieval_table
from trajlm.schema import HELD_OUT, TUNING
from trajlm.training import history

PAGE, PICTURE = "alignment.html", "latents.svg"
MOST_POINTS = 1200  # latents in the picture; t-SNE's cost grows with them


def alignment_report(run: Path, data: Path | None = None) -> str:
    """Write ``alignment.html`` and ``latents.svg`` into a finished run of pretrain.py, and return what to print.

    A page that is there already is left as it is.

    Args:
        run: the run folder.
        data: prepared folder, if it moved since.

    Raises:
        TrajlmError: no such run, or another prepared folder than it was made from.
    """
    metrics = json.loads((run / "metrics.json").read_text())
    split = HELD_OUT if HELD_OUT in metrics["splits"] else TUNING
    found = metrics["splits"].get(split)
    if found is None:
        return f"{run}: neither tuning nor held-out stays, so nothing was measured"
    tables = [retrieval_table(_retrieval(found)), space_table(found)]
    if not (run / PAGE).exists():
        recipe = from_dict(Recipe, read_run(run)["recipe"])
        picture = latent_picture(run, data or Path(recipe.data or ""), split)
        if picture is not None:
            write_text(run / PICTURE, picture)
        page = render_still(
            "alignment.html",
            split=SPLIT_TITLES[split],
            facts=_facts(recipe, metrics, found),
            tables=tables,
            picture=None if picture is None else Markup(picture),
            curve=Markup(_loss_curve(run)),
        )
        write_text(run / PAGE, page)
    return "\n".join([*_summary(found, split), f"{run / PAGE}: tables and a picture of the latent space"])


def _retrieval(found: dict[str, Any]) -> pl.DataFrame:
    schema = {"query": pl.String, "gallery": pl.String, "k": pl.Int64, "recall": pl.Float64, "random": pl.Float64,
              "stays": pl.Int64}  # fmt: skip
    return pl.DataFrame(found["recall_by_pair"], schema=schema)


def _facts(recipe: Recipe, metrics: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, str]]:
    p = recipe.pretraining
    return [
        ("Objective", name_label(p.objective)),
        ("Stays measured", f"{found['stays']:,}"),
        ("Loss, nats", f"{number(found['loss'])} in batches of {found['loss_batch']}"),
        ("Temperature", number(metrics["temperature"])),
        ("Missing-token loss", f"weight {p.missing_token_loss_weight:g}"),
        ("Views", f"{p.event_view_probability:.0%} events, {p.window_view_probability:.0%} windows, the rest whole"),
        ("Seed", str(recipe.seed)),
    ]


def space_table(found: dict[str, Any]) -> Table:
    """Silhouette, uniformity and movement under masking, a row per modality, the whole first."""
    silhouette, uniformity, moved = found["silhouette"], found["uniformity"], found["movement_when_masked"]
    names = list(dict.fromkeys([*silhouette, *uniformity, *moved]))
    mean = float(np.mean(list(moved.values()))) if moved else None
    rows = [["all", number(silhouette.get("overall")), number(uniformity.get("mean")), number(mean)]]
    rows += [
        [name_label(name), *(number(measure.get(name)) for measure in (silhouette, uniformity, moved))]
        for name in names
        if name not in ("overall", "mean")
    ]
    return Table(
        "The latent space by modality",
        ["Modality", "Silhouette", "Uniformity", "Movement when masked"],
        [Block("", "", rows)],
        note="Silhouette near 0: modalities mix. Uniformity: log mean exp(−2 d²) between stays, lower is more even. "
        "Movement: 1 − cosine between a stay's global representation with and without the modality. Alignment, the "
        f"mean squared distance between two modalities of a stay: {number(found['alignment'].get('mean'))}.",
    )


def _summary(found: dict[str, Any], split: str) -> list[str]:
    recalls = ", ".join(
        f"Recall@{r['k']} {percent(r['recall'])} (chance {percent(r['random'])})"
        for r in found["recall_mean_over_pairs"]
    )
    moved = found["movement_when_masked"]
    by_modality = ", ".join(f"{name_label(name)} {number(value)}" for name, value in moved.items())
    return [
        f"{SPLIT_TITLES[split]} stays, mean over pairs of modalities: {recalls or 'no two modalities in one stay'}",
        f"silhouette {number(found['silhouette'].get('overall'))}, alignment {number(found['alignment'].get('mean'))}, "
        f"uniformity {number(found['uniformity'].get('mean'))}",
        f"movement of the global representation when masked: {by_modality or 'nothing to mask'}",
    ]


def latent_picture(run: Path, data: Path, split: str) -> str | None:
    """SVG of the split's latents in two dimensions (t-SNE), by modality; None where there are too few."""
    prepared = load_prepared(data)
    encoders, _ = load_encoders(run, prepared)
    latents, present = encode_stays(prepared, encoders.eval(), prepared.positions(split))
    stays, labels = np.nonzero(present)
    chosen = np.unique(np.linspace(0, len(stays) - 1, min(MOST_POINTS, len(stays))).astype(int))
    if len(chosen) < 10:
        return None
    points = latents[stays[chosen], labels[chosen]].astype(np.float64)
    points /= np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    return scatter(flat, labels[chosen], [name_label(name) for name in encoders.modalities])


def _loss_curve(run: Path) -> str:
    log = read_log(run)
    epochs = history(log)
    series = {
        "training": [(r["epoch"], r["train_loss"]) for r in epochs],
        "tuning": [(r["epoch"], r["tuning_loss"]) for r in epochs],
    }
    return curves(series, "epoch", "loss, nats")
