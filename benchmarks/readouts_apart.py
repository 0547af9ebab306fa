"""What network, regression and trees each give: held-out figures of every component alone, of pairs and of all.

    python benchmarks/readouts_apart.py GRID...

Reads finished grids of ``trajlm experiment``; trains nothing. A pair is a mean in which both count alike, all three are
as the run's shares have them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import polars as pl
import torch
from measuring import machine

from trajlm.interpret.ablation import cohort_batches
from trajlm.latents import Latents
from trajlm.metrics import LANDMARKS, evaluate
from trajlm.report.run import open_run
from trajlm.schema import HELD_OUT

FIGURES = {"probability": "auroc", "hours": "mae"}


@torch.no_grad()
def apart(folder: Path) -> pl.DataFrame:
    """Held-out figures of a run: component, target, landmark, value."""
    opened, prepared = open_run(folder, None)
    model, names = opened.model, opened.model.components
    of = pl.read_parquet(folder / "beliefs.parquet").filter(pl.col("split") == HELD_OUT)
    positions = np.array([prepared.position(stay) for stay in of["stay_id"].unique().sort()])
    latents = Latents(folder / "latents", prepared, model.encoders.modalities)
    pairs = list(itertools.combinations(range(len(names)), 2)) if len(names) > 2 else []
    means = {name: torch.eye(len(names))[i, :, None] for i, name in enumerate(names)}
    means |= {f"{names[i]} and {names[j]}": torch.eye(len(names))[[i, j]].mean(0)[:, None] for i, j in pairs}
    means["all, by the run's shares"] = model.shares
    found: dict[str, list[pl.DataFrame]] = {name: [] for name in means}
    for batch in cohort_batches(model, prepared, latents, positions, 32):
        said = model.apart(batch)
        for name, shares in means.items():
            readouts = (said * shares).sum(dim=2)
            found[name].append(model.belief_frame(batch, readouts, counted=True))
    kinds = [(task.target, task.kind) for task in model.fitted_tasks]
    frames = [
        evaluate(pl.concat(frames), prepared.stays, kinds, LANDMARKS, 2, 0).with_columns(component=pl.lit(name))
        for name, frames in found.items()
    ]
    return pl.concat(frames).select("component", "target", "landmark", "metric", "value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grids", type=Path, nargs="+", help="folders that `trajlm experiment` filled")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    lines = [
        "# What network, regression and trees each give",
        "",
        f"`python benchmarks/readouts_apart.py {' '.join(f'runs/{g.name}' for g in arguments.grids)}`, {machine()}. "
        "Means over the runs of an arm on held-out stays; AUROC of probabilities, mean absolute error of hours.",
    ]
    for grid in arguments.grids:
        runs = json.loads((grid / "grid.json").read_text())["runs"]
        for arm in dict.fromkeys(run["arm"] for run in runs):
            tables = [apart(grid / run["path"]) for run in runs if run["arm"] == arm]
            mean = pl.concat(tables).group_by("component", "target", "landmark", "metric", maintain_order=True)
            table = mean.agg(pl.col("value").mean())
            lines += ["", f"## {grid.name}, {arm}: {len(tables)} runs"]
            for target, metric in table.select("target", "metric").unique(maintain_order=True).rows():
                if metric not in FIGURES.values():
                    continue
                at = table.filter((pl.col("target") == target) & (pl.col("metric") == metric))
                heads = ["end of window" if h is None else f"{h:g} h" for h in LANDMARKS]
                lines += ["", f"| {target}, {metric} | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
                for name in at["component"].unique(maintain_order=True):
                    own = dict(at.filter(pl.col("component") == name).select("landmark", "value").rows())
                    cells = " | ".join(f"{own[h]:.3f}" if metric == "auroc" else f"{own[h]:.1f}" for h in LANDMARKS)
                    lines.append(f"| {name} | {cells} |")
            print("\n".join(lines), flush=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
