"""A sequence model small enough to reason about, and batches and timelines for it."""

from __future__ import annotations

import numpy as np
import torch

from trajlm.backbones import build_backbone
from trajlm.config import BackboneConfig, EncoderConfig
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.latents import TrajectoryBatch
from trajlm.schema import FittedFeature, Modality, Timeline
from trajlm.tasks import build_tasks
from trajlm.trajectory import TrajectoryModel
from trajlm.tree_readout import as_tensors
from trajlm.views import STATE_PARTS

WIDTH = 8
STATE = 3 * STATE_PARTS  # of each of the three laboratory features
PAPER = {"context": "own", "inputs": "latent", "readout": "predict", "linear": False, "trees": False}
RICH = {
    "context": "newest",
    "inputs": "latent_and_state",
    "running_mean": True,
    "readout": "predict_and_event",
    "linear": True,
    "trees": True,
}
HISTORY = RICH | {"reach": "both"}


def toy_model(
    tuning: str = "full", name: str = "tiny", quantisation: str = "none", last_task: str = "length_of_stay", **options
) -> TrajectoryModel:
    """A model of random weights that reads two numeric modalities (one static) and notes; ``RICH`` unless told."""
    torch.manual_seed(0)
    options = RICH | options
    modalities = [
        Modality("age", "numeric", static=True),
        Modality("labs", "numeric"),
        Modality("note", "text"),
    ]
    features = [FittedFeature("age", "age", feature_id=0)]
    features += [FittedFeature("labs", f"lab{i}", feature_id=1 + i, mean=0.5 * i, std=1.0 + i) for i in range(3)]
    tasks = build_tasks(["mortality", last_task])
    tasks[0].fit(torch.tensor([0.0, 0.0, 1.0]))
    tasks[1].fit(torch.tensor([24.0, 48.0, 99.0]))
    encoders = AlignedEncoders(modalities, features, EncoderConfig(latent_width=WIDTH, hidden_width=16))
    backbone = build_backbone(BackboneConfig(name=name, tuning=tuning, quantisation=quantisation))
    model = TrajectoryModel(encoders, backbone, tasks, modalities, features, 16, **options).eval()
    return with_random_beside(model)


def with_random_beside(model: TrajectoryModel) -> TrajectoryModel:
    """The same model; a regression and trees that were never fitted would tell nothing."""
    if model.linear is not None:
        for weight in model.linear.buffers():
            weight.copy_(0.1 * torch.randn(weight.shape))
    if model.trees is not None:
        grown = [random_tree(model.trees.width) for _ in range(12)]
        for name, tensor in as_tensors(grown, [i % len(model.targets) for i in range(12)]).items():
            model.trees.set(name, tensor)
    return model


def random_tree(inputs: int, depth: int = 3) -> dict:
    """As LightGBM tells a tree."""
    if depth == 0:
        return {"leaf_value": float(torch.randn(()))}
    return {
        "split_feature": int(torch.randint(inputs, ())),
        "threshold": float(torch.randn(())),
        "default_left": bool(torch.rand(()) < 0.5),
        "missing_type": "NaN",
        "left_child": random_tree(inputs, depth - 1),
        "right_child": random_tree(inputs, depth - int(torch.randint(1, depth + 1, ()))),
    }


def toy_batch(lengths: list[int], seed: int = 0) -> TrajectoryBatch:
    """Random latents; every timeline opens with a static event, padding holds what the contract asks for."""
    random = np.random.default_rng(seed)
    b, s = len(lengths), max(lengths)
    present = torch.arange(s)[None] < torch.tensor(lengths)[:, None]
    modality = torch.from_numpy(random.integers(1, 3, (b, s)))
    modality[:, 0] = 0
    hours = torch.from_numpy(np.sort(random.uniform(0, 48, (b, s)), axis=1))
    hours[:, 0] = 0
    return TrajectoryBatch(
        stay_ids=torch.arange(b),
        latents=torch.from_numpy(random.normal(size=(b, s, WIDTH)).astype(np.float32)) * present[..., None],
        state=torch.from_numpy(random.normal(size=(b, s, STATE)).astype(np.float32)) * present[..., None],
        modality=modality * present,
        hours=hours * present,
        event_index=torch.arange(s).expand(b, s) * present,
        present=present,
        targets=torch.tensor([[float(i % 2), 24.0 + 10 * i] for i in range(b)]),
    )


def timeline_of(events, **targets) -> Timeline:
    return Timeline(1, "p", "held_out", 50.0, {"mortality": 1, "length_of_stay_hours": None, **targets}, tuple(events))
