"""What each event adds to a belief, in numbers that add up: integrated gradients (Sundararajan et al. 2017).

The baseline is the stay with every event's content replaced by its modality's missing token, at the same hours. Along
the straight way from there to the stay, the gradient of the belief is gathered event by event; the attributions then
sum to the belief minus that of the baseline. Needs captum, an extra: ``pip install 'trajlm[interpret]'``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from trajlm.errors import TrajlmError
from trajlm.interpret.edits import ablate
from trajlm.interpret.interventions import TOGETHER, event_rows
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel

FIRST_STEPS, MOST_STEPS = 16, 2048
NEGLIGIBLE = 1e-6  # of a belief: differences of this size are rounding, and are not to be divided among events
Baseline = Literal["missing_token", "nothing"]


class IncompleteAttributionError(TrajlmError):
    """The attributions of a stay do not sum to the change in its belief, however many steps are taken."""


@dataclass(frozen=True)
class Attribution:
    """Attributions of one belief.

    Attributes:
        events: one row per event: event_index, modality, hours_since_admission, attribution (in the belief's unit).
        target: whose belief.
        belief: the belief that is explained.
        baseline: what is believed of the baseline.
        steps: points of the way at which gradients were taken.
        error: sum of the attributions minus (belief - baseline).
    """

    events: pl.DataFrame
    target: str
    belief: float
    baseline: float
    steps: int
    error: float


def integrated_gradients(
    model: TrajectoryModel,
    batch: TrajectoryBatch,
    target: str,
    event: int = -1,
    baseline: Baseline = "missing_token",
    tolerance: float = 0.01,
) -> Attribution:
    """Attribute one belief of a stay to its events.

    Steps are doubled until the attributions sum to the change in belief within ``tolerance``. What an event carries
    forward of earlier ones is attributed to the event that shows it.

    Args:
        model: fine-tuned; any backbone.
        batch: of one timeline without padding.
        target: whose belief.
        event: position of the event after which it is believed; -1 is the last.
        baseline: missing_token shows every event's missing token; nothing shows zeros for latent and state.
        tolerance: largest share of the change in belief that may be left unexplained.

    Raises:
        TrajlmError: captum is not installed, or the target is unknown.
        IncompleteAttributionError: the sum does not come close enough.
    """
    method = require_captum()
    if target not in model.targets:
        raise TrajlmError(f"expected a target of the model ({', '.join(model.targets)}), came {target!r}")
    if len(batch.stay_ids) != 1 or not bool(batch.present.all()):
        raise ValueError(f"expected one timeline without padding, came {len(batch.stay_ids)}")
    was_training = model.training
    model.eval()

    width = batch.latents.shape[-1]

    def content(version: TrajectoryBatch) -> Tensor:
        return torch.cat([version.latents, version.state.to(version.latents.dtype)], dim=-1)

    def believed(contents: Tensor) -> Tensor:
        versions = batch.select(torch.zeros(len(contents), dtype=torch.long, device=contents.device))
        versions = replace(versions, latents=contents[..., :width], state=contents[..., width:])
        return model.beliefs_of(model(versions).readouts[:, event])[target]

    end, start = content(batch), content(baseline_of(model, batch, baseline))
    with torch.no_grad():
        belief, base = float(believed(end)), float(believed(start))
    attribute = method(believed)
    allowed = max(tolerance * abs(belief - base), NEGLIGIBLE)
    steps, error, total = FIRST_STEPS, float("inf"), torch.zeros(0)
    while abs(error) > allowed:
        if steps > MOST_STEPS:
            raise IncompleteAttributionError(
                f"stay {int(batch.stay_ids[0])}: after {steps // 2} steps the attributions sum to "
                f"{float(total.sum()):.6f}, expected {belief - base:.6f}"
            )
        found = attribute.attribute(end, start, n_steps=steps, internal_batch_size=TOGETHER)
        total = found[0].double().sum(dim=-1)
        error, steps = float(total.sum()) - (belief - base), 2 * steps
    model.train(was_training)
    rows = event_rows(model, batch).with_columns(pl.Series("attribution", total.detach().cpu().numpy()))
    return Attribution(rows, target, belief, base, steps // 2, error)


def baseline_of(model: TrajectoryModel, batch: TrajectoryBatch, kind: Baseline) -> TrajectoryBatch:
    """The same places and hours with nothing said at them."""
    if kind == "missing_token":
        return ablate(model, batch, batch.present, "missing_token", "kept")
    return replace(batch, latents=torch.zeros_like(batch.latents), state=torch.zeros_like(batch.state))


def require_captum() -> Any:
    """The method of captum. Raises TrajlmError where captum is not installed."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError:
        raise TrajlmError("integrated gradients need captum: pip install 'trajlm[interpret]'") from None
    return IntegratedGradients
