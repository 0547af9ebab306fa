"""Trees of all moments, and more trees from some hour on: figures of the trees alone, on tuning and held-out stays.

    python benchmarks/tree_hours.py GRID

Reads a finished grid of ``trajlm experiment`` and grows, beside the saved model of the first run of every split, one
group of forests for all moments and one for those after each hour. A setting is the mean of its groups, each from its
hour on (``finetuning.tree_hours``); the one to take is chosen by the tuning stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import polars as pl
import torch
from measuring import machine

from trajlm.config import FinetuningConfig
from trajlm.interpret.ablation import cohort_batches, known_targets
from trajlm.latents import Latents, TrajectoryBatch
from trajlm.metrics import LANDMARKS, evaluate
from trajlm.readings import Readings, readings
from trajlm.report.run import open_run
from trajlm.schema import HELD_OUT, TRAIN, TUNING
from trajlm.selection import finetuning_splits
from trajlm.sequence_objective import readout_weights
from trajlm.tree_readout import TreeReadout, fit_trees

HOURS = (8.0, 16.0, 30.0)
FIGURES = {"auroc": 3, "mae": 1}  # decimals


@torch.no_grad()
def figures(folder: Path) -> pl.DataFrame:
    """Of the trees of every setting beside a run's model: setting, split, target, landmark, metric, value."""
    opened, prepared = open_run(folder, None)
    model, recipe = opened.model, opened.about["recipe"]
    config = FinetuningConfig(**recipe["finetuning"])
    splits = finetuning_splits(prepared, config.stays, recipe["seed"])
    latents = Latents(folder / "latents", prepared, model.encoders.modalities)
    trees = TreeReadout(model.trees.features, model.trees.latent_width, len(model.fitted_tasks))

    def read(stays: np.ndarray) -> Readings:
        def trajectories(some: np.ndarray) -> TrajectoryBatch:
            return latents.trajectories(some, known_targets(model, prepared, some), config.max_events)

        return readings(trees.rows, model.fitted_tasks, stays, trajectories,
                        lambda batch: readout_weights(model, batch, config.loss_over))  # fmt: skip

    fit_trees(trees, model.fitted_tasks, read(splits.of(TRAIN)), read(splits.of(TUNING)), recipe["seed"], HOURS)
    starts = trees.starts.clone()
    found = []
    for setting in ((), *((hour,) for hour in HOURS)):
        chosen = torch.tensor([True, *(hour in setting for hour in HOURS)])
        trees.set("starts", starts.masked_fill(~chosen, torch.inf))
        for split in (TUNING, HELD_OUT):
            batches = cohort_batches(model, prepared, latents, np.sort(splits.of(split)), 32)
            beliefs = pl.concat([model.belief_frame(batch, trees(batch), counted=True) for batch in batches])
            kinds = [(task.target, task.kind) for task in model.fitted_tasks]
            table = evaluate(beliefs, prepared.stays, kinds, LANDMARKS, 2, 0)
            name = f"[{', '.join(f'{hour:g}' for hour in setting)}]"
            found.append(table.with_columns(setting=pl.lit(name), split=pl.lit(split)))
    return pl.concat(found).select("setting", "split", "target", "landmark", "metric", "value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, help="folder that `trajlm experiment` filled")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    runs = {}
    for run in json.loads((arguments.grid / "grid.json").read_text())["runs"]:
        runs.setdefault(run["split"], arguments.grid / run["path"])
    table = pl.concat([figures(folder) for folder in runs.values()])
    mean = table.group_by("setting", "split", "target", "landmark", "metric", maintain_order=True)
    table = mean.agg(pl.col("value").mean())
    first = next(iter(runs.values())).name
    lines = [
        "# Trees of all moments, and more trees from some hour on",
        "",
        f"`python benchmarks/tree_hours.py runs/{arguments.grid.name}`, {machine()}. The trees alone, without network "
        f"and regression; means over {len(runs)} runs ({first} of every split). AUROC of probabilities, mean absolute "
        "error of hours. `[]` are trees of all moments alone; tuning stays also say when to stop growing.",
    ]
    for split in (TUNING, HELD_OUT):
        for target, metric in table.select("target", "metric").unique(maintain_order=True).rows():
            if metric not in FIGURES:
                continue
            heads = ["end of window" if h is None else f"{h:g} h" for h in LANDMARKS]
            title = f"{split.replace('_', '-')} stays: {target}, {metric}, by `tree_hours`"
            lines += ["", f"| {title} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
            of = table.filter((pl.col("split") == split) & (pl.col("target") == target) & (pl.col("metric") == metric))
            for name in of["setting"].unique(maintain_order=True):
                own = dict(of.filter(pl.col("setting") == name).select("landmark", "value").rows())
                lines.append(f"| `{name}` | {' | '.join(f'{own[h]:.{FIGURES[metric]}f}' for h in LANDMARKS)} |")
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
