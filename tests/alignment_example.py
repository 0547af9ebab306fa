"""A handful of invented stays, and the alignment objective over them: for tests of gradients and of processes."""

from __future__ import annotations

import numpy as np
import torch

from trajlm.config import EncoderConfig, PretrainingConfig
from trajlm.dataset import StayBatch
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.pretraining import AlignmentObjective
from trajlm.schema import FittedFeature, Modality
from trajlm.views import NumericView, TextView, numeric_view

MODALITIES = [Modality("age", "numeric", static=True), Modality("labs", "numeric"), Modality("note", "text")]
# Some stays hold everything, some one modality, one nothing; an odd number, so that shares differ in size.
PRESENT = [[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 1], [0, 1, 1], [1, 0, 0]]
ROWS = list(range(len(PRESENT)))


def objective(dropout: float = 0.0, **settings) -> AlignmentObjective:
    """In training mode; without modality dropout unless the settings say so."""
    torch.manual_seed(3)
    features = [FittedFeature("age", "age", feature_id=0), FittedFeature("labs", "lab", feature_id=1)]
    encoders = AlignedEncoders(MODALITIES, features, EncoderConfig(latent_width=6, hidden_width=8, dropout=dropout))
    return AlignmentObjective(encoders, PretrainingConfig(**{"modality_dropout": 0.0} | settings)).train()


def stays_batch(rows: list[int], dtype: torch.dtype = torch.float32) -> StayBatch:
    """These stays, each the same in whatever company."""
    present = torch.tensor([PRESENT[r] for r in rows], dtype=torch.bool)

    def numbers(row: int, seed: int) -> np.ndarray:
        return np.random.default_rng([row, seed]).normal(size=(1, 1)).astype(np.float32)

    views = {}
    for column, name in enumerate(("age", "labs")):
        held = [r for r in rows if PRESENT[r][column]]
        if held:
            seen = [np.ones((1, 1), dtype=bool)] * len(held)
            view = numeric_view([numbers(r, column) for r in held], seen, [np.zeros(1)] * len(held))
            views[name] = NumericView(
                view.values.to(dtype), view.observed, view.state.to(dtype), view.hours.to(dtype), view.steps
            )
    notes = [f"word{r} word{r * r} lungs" for r in rows if PRESENT[r][2]]
    if notes:
        views["note"] = TextView(notes)
    return StayBatch(torch.tensor(rows), present, tuple(m.name for m in MODALITIES), views)


def gradients(module: AlignmentObjective) -> dict[str, torch.Tensor]:
    """By name; parameters that took no part are left out."""
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
