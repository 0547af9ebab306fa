"""What it costs to train anchoring away: drift and attention on demographics under ablation, against AUROC.

python benchmarks/mitigation.py --data PREPARED --encoders ENCODERS --scratch FOLDER > benchmarks/mitigation.md

A tiny backbone of random weights learns mortality in the paper's reading of events, a fixed number of steps in every
arm (no early stopping, no averaging); only the settings named differ. Each arm is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import torch
from measuring import machine

from trajlm.assemble import load_encoders
from trajlm.backbones import build_backbone
from trajlm.config import BackboneConfig, FinetuningConfig
from trajlm.dataset import Prepared, load_prepared
from trajlm.interpret.ablation import anchoring, cohort_ablation, cohort_batches
from trajlm.latents import Latents, cache_latents
from trajlm.metrics import auroc
from trajlm.sequence_objective import SequenceObjective
from trajlm.tasks import build_tasks
from trajlm.trajectory import TrajectoryModel

ARMS: dict[str, dict[str, float]] = {
    "nothing": {"modality_dropout": 0.0},
    "modality dropout 0.2 (default)": {},
    "modality dropout 0.6": {"modality_dropout": 0.6},
    "drift penalty 2": {"drift_penalty": 2.0},
    "anchoring penalty 5": {"anchoring_penalty": 5.0},
}
BATCH = 24


def chosen_stays(prepared: Prepared, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to learn from and held out: ``most`` stays in all, in the share of the splits."""
    some = np.sort(np.random.default_rng(0).permutation(len(prepared.stays))[:most])
    train = np.isin(some, prepared.positions("train"))
    return some[train], some[~train]


def train(model: TrajectoryModel, prepared: Prepared, latents: Latents, stays: np.ndarray, settings: dict[str, float],
          seed: int, steps: int) -> TrajectoryModel:  # fmt: skip
    """A fixed number of steps; the same stays in the same order in every arm."""
    outcome = torch.tensor(prepared.stays["target_mortality"].cast(pl.Float32).fill_null(float("nan")).to_numpy())
    model.fitted_tasks[0].fit(outcome[stays])
    config = FinetuningConfig(loss_over="all", dropout=0.1, input_dropout=0.0, **settings)  # type: ignore[arg-type]
    objective, random = SequenceObjective(model, config).train(), np.random.default_rng(seed)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(steps):
        some = random.choice(stays, BATCH, replace=False)
        torch.manual_seed(seed * steps + step)
        loss = objective(latents.trajectories(some, outcome[some, None], model.max_events))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimiser.step()
    return model.eval()


def figures(arguments: argparse.Namespace, settings: dict[str, float]) -> dict[str, float]:
    """Means over the stays that were not learned from, and over seeds."""
    prepared = load_prepared(arguments.data)
    encoders, _ = load_encoders(Path(arguments.encoders), prepared)
    learned, held = chosen_stays(prepared, arguments.stays)
    latents = cache_latents(prepared, encoders, np.concatenate([learned, held]), arguments.scratch / "latents", "audit")
    rows = []
    for seed in range(arguments.seeds):
        torch.manual_seed(seed)
        model = TrajectoryModel(
            encoders, build_backbone(BackboneConfig(name="tiny")), build_tasks(["mortality"]),
            prepared.modalities, prepared.features, prepared.image_pixels, context="own", inputs="latent",
        )  # fmt: skip
        train(model, prepared, latents, learned, settings, seed, arguments.steps)
        order = held[np.argsort(np.diff(prepared.bounds)[held], kind="stable")]
        table = cohort_ablation(model, cohort_batches(model, prepared, latents, order), encoders.modalities)
        changes = anchoring(table, ["mortality"]).with_columns(drift=pl.col("belief_after") - pl.col("belief_before"))
        whole = table.filter(pl.col("ablated") == "nothing")
        gone = changes.filter(pl.col("ablated") == "demographics")
        rest = changes.filter(pl.col("ablated") != "demographics")
        rows.append(
            [auroc(whole["target_mortality"].to_numpy(), whole["belief_mortality"].to_numpy()),
             float(whole["belief_mortality"].std() or 0.0), rest["share_before"].mean(), rest["share_after"].mean(),
             rest["drift"].abs().mean(), gone["drift"].abs().mean()]
        )  # fmt: skip
    names = ("AUROC", "spread of beliefs", "share before", "share after", "drift", "drift without demographics")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="prepared folder of the synthetic ICU")
    parser.add_argument("--encoders", required=True, help="run folder of pretrain.py")
    parser.add_argument("--scratch", required=True, type=Path, help="folder for latents")
    parser.add_argument("--stays", type=int, default=400)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--arm", choices=ARMS, help="one arm alone, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.arm:
        print(json.dumps(figures(arguments, ARMS[arguments.arm])))
        return
    prepared = load_prepared(arguments.data)
    encoders, _ = load_encoders(Path(arguments.encoders), prepared)
    learned, held = chosen_stays(prepared, arguments.stays)
    cache_latents(prepared, encoders, np.concatenate([learned, held]), arguments.scratch / "latents", "audit")
    running = {
        arm: subprocess.Popen([sys.executable, *sys.argv, "--arm", arm], stdout=subprocess.PIPE, text=True)
        for arm in ARMS
    }
    table = {arm: json.loads(process.communicate()[0].splitlines()[-1]) for arm, process in running.items()}
    print(f"# Training anchoring away\n\n`python {' '.join(sys.argv)}`, {machine()}.\n")
    print(
        f"Synthetic ICU, {len(learned)} stays learned from for {arguments.steps} steps of {BATCH}, {len(held)} others"
    )
    print(
        f"audited, {arguments.seeds} seed(s). Share: of the last layer's attention that read-outs put on demographics,"
    )
    print("before and after another modality is ablated. Drift: mean size of the change in the belief of death under")
    print("those ablations, to be read beside the spread (standard deviation) of the beliefs themselves.\n")
    names = list(next(iter(table.values())))
    print("| arm | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names))
    for arm, row in table.items():
        print(f"| {arm} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |")


if __name__ == "__main__":
    main()
