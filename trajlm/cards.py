"""Model cards: what a run folder is, on what data, how good, which leaks are open, and what it is not for."""

from __future__ import annotations

from typing import Any

from trajlm.config import FinetuningConfig, Recipe
from trajlm.dataset import Prepared
from trajlm.schema import HELD_OUT

NOT_A_DEVICE = (
    "A research tool, not a medical device: not for the care of patients. Beliefs were learned from one cohort and "
    "were not validated elsewhere."
)


def _head(title: str, prepared: Prepared) -> list[str]:
    leaks = prepared.manifest["open_leaks"] or ["none known"]
    return [
        "---",
        "library_name: trajlm",
        "tags: [intensive-care, clinical-time-series, multimodal, missing-modalities]",
        "---",
        f"# {title}",
        "",
        NOT_A_DEVICE,
        "",
        "## Intended use",
        "",
        "Research on how models read patients' stays: comparing methods, ablations, missing modalities, on records of "
        "the cohort below or prepared as it was. Out of scope: decisions about patients, other units or countries "
        "without a validation there, and telling whom a record belongs to. It learned what was charted, and so the "
        "habits of those who charted: look at the subgroups before comparing people.",
        "",
        "## Data",
        "",
        f"- cohort: {prepared.manifest['cohort']}, release: {prepared.manifest['release']}",
        f"- stays: {prepared.stays.height}, modalities: {', '.join(m.name for m in prepared.modalities)}",
        *(f"- open leak: {leak}" for leak in leaks),
        "",
    ]


def pretraining_card(recipe: Recipe, prepared: Prepared, metrics: dict[str, Any]) -> str:
    """Markdown card of a pretraining run."""
    lines = _head("Encoders pretrained with Masked Global Alignment", prepared)
    lines += [
        "## Held-out retrieval, mean over ordered pairs of modalities",
        "",
        "| K | Recall@K | random |",
        "|---|---|---|",
    ]
    for row in metrics["splits"].get(HELD_OUT, {}).get("recall_mean_over_pairs", []):
        lines.append(f"| {row['k']} | {row['recall']:.4f} | {row['random']:.4f} |")
    lines += ["", f"Latent width {recipe.encoder.latent_width}, seed {recipe.seed}.", ""]
    return "\n".join(lines)


def _beside(config: FinetuningConfig) -> list[str]:
    """What stands beside the network, if anything does."""
    asked = {"a regression": config.linear_readout, "gradient-boosted trees": config.tree_readout}
    named = " and ".join(name for name, stands in asked.items() if stands)
    return [f"- averaged with {named} of what is known at each moment (`shares.json`)"] if named else []


def finetuning_card(recipe: Recipe, prepared: Prepared, stays: str, metrics: dict[str, Any]) -> str:
    """Markdown card of a fine-tuning run."""
    lines = _head("Trajectory model: a belief after every event of an ICU stay", prepared)
    encoders = "never pretrained" if recipe.encoders == "scratch" else "pretrained with Masked Global Alignment, frozen"
    lines += [
        f"- {stays}",
        "",
        "## Model",
        "",
        f"- backbone: {recipe.backbone.name}, tuning: {recipe.backbone.tuning}",
        f"- encoders: {encoders}",
        *_beside(recipe.finetuning),
        "",
        "## Held-out figures, with 95 % patient-level bootstrap intervals",
        "",
        "| arm | target | landmark | metric | value | interval | stays |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, rows in metrics["arms"][HELD_OUT].items():
        for row in rows:
            landmark = "end of window" if row["landmark"] is None else f"{row['landmark']:g} h"
            value = "undefined" if row["value"] is None else f"{row['value']:.4f}"
            interval = "" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
            lines.append(
                f"| {arm} | {row['target']} | {landmark} | {row['metric']} | {value} | {interval} | {row['stays']} |"
            )
    lines += ["", "## Load", "", "```python", "model = trajlm.TrajectoryModel.from_pretrained(run)", "```", ""]
    return "\n".join(lines)
