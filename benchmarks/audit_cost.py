"""What the cohort audit costs beside the bare forward passes that it needs.

python benchmarks/audit_cost.py > benchmarks/audit_cost.md

Backbones of random weights read random timelines. The bare passes are those of the same batches, whole and without each
modality in turn; the audit reads the same, and also computes the share of attention on demographics and its table. The
two alternate; the ratio is that of the least processor seconds of either.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from measuring import machine

from trajlm.backbones import build_backbone
from trajlm.config import BackboneConfig, EncoderConfig
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.interpret.ablation import cohort_ablation
from trajlm.latents import TrajectoryBatch
from trajlm.schema import FittedFeature, Modality
from trajlm.tasks import build_tasks
from trajlm.trajectory import TrajectoryModel

NAMES = ("demographics", "vitals", "labs", "drugs")


def random_model(backbone: str, features: int) -> TrajectoryModel:
    """A model of random weights over four modalities, demographics first."""
    modalities = [Modality(name, "numeric", static=name == NAMES[0]) for name in NAMES]
    listed = [
        FittedFeature(m, f"{m} {i}", feature_id=features * k + i) for k, m in enumerate(NAMES) for i in range(features)
    ]
    encoders = AlignedEncoders(modalities, listed, EncoderConfig())
    trunk = build_backbone(BackboneConfig(name=backbone))
    tasks = build_tasks(["mortality", "length_of_stay"])
    return TrajectoryModel(
        encoders, trunk, tasks, modalities, listed, 32, context="newest", inputs="latent_and_state",
        readout="predict_and_event",
    ).eval()  # fmt: skip


def random_batch(model: TrajectoryModel, stays: int, events: int, seed: int) -> TrajectoryBatch:
    """Timelines of this length, one demographic event first."""
    random = np.random.default_rng(seed)
    modality = torch.from_numpy(random.integers(1, len(NAMES), (stays, events)))
    modality[:, 0] = 0
    return TrajectoryBatch(
        stay_ids=torch.arange(stays) + seed * stays,
        latents=torch.from_numpy(random.normal(size=(stays, events, 64)).astype(np.float32)),
        state=torch.from_numpy(random.normal(size=(stays, events, model.encoders.state_width)).astype(np.float32)),
        modality=modality,
        hours=torch.from_numpy(np.sort(random.uniform(0, 48, (stays, events)), axis=1)),
        event_index=torch.arange(events).expand(stays, events),
        present=torch.ones(stays, events, dtype=torch.bool),
        targets=torch.full((stays, 2), float("nan")),
    )


@torch.no_grad()
def bare(model: TrajectoryModel, batches: list[TrajectoryBatch]) -> None:
    """The forward passes alone."""
    for batch in batches:
        model(batch)
        for index in range(len(NAMES)):
            model(batch.keep(batch.modality != index))


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(
        f"# What the cohort audit costs\n\n`python {' '.join(sys.argv)}`, {machine()} of an Intel Xeon at 2.5 GHz, no "
        "GPU.\n"
    )
    print("Audit over bare forward passes of the same batches, least processor seconds of "
          f"{repeats} alternating repeats. Target: at most 1.3.\n")  # fmt: skip
    print("| backbone | events per stay | stays | bare, s | audit, s | ratio |\n|---|---:|---:|---:|---:|---:|")
    for backbone, events, stays in (("shallow", 50, 64), ("shallow", 200, 32), ("tiny", 50, 64), ("small", 100, 32)):
        torch.manual_seed(0)
        model = random_model(backbone, 12)
        batches = [random_batch(model, 16, events, seed) for seed in range(stays // 16)]
        pairs = [
            (
                seconds(lambda m=model, b=batches: bare(m, b)),
                seconds(lambda m=model, b=batches: cohort_ablation(m, b, NAMES)),
            )
            for _ in range(repeats)
        ]
        least = [min(pair[side] for pair in pairs) for side in (0, 1)]
        print(
            f"| {backbone} | {events} | {stays} | {least[0]:.2f} | {least[1]:.2f} | {least[1] / least[0]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
