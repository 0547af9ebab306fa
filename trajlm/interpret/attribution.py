"""What each event adds to a belief, in numbers that add up: integrated gradients (Sundararajan et al. 2017).

The baseline is the stay with every event's content replaced by its modality's missing token, at the same hours. Along
the straight way from there to the stay, the gradient of the belief is gathered event by event; the attributions then
sum to the belief minus that of the baseline. Trees beside the network have no gradient but steps: where one lies on the
way, the belief's jump there goes to the event whose content crosses it. Needs captum, an extra: ``pip install
'trajlm[interpret]'``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from trajlm.errors import TrajlmError
from trajlm.interpret.edits import ablate
from trajlm.interpret.interventions import TOGETHER, event_rows
from trajlm.latents import TrajectoryBatch
from trajlm.readings import newest
from trajlm.trajectory import TrajectoryModel
from trajlm.tree_readout import TreeReadout

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

    def versions(contents: Tensor) -> TrajectoryBatch:
        same = batch.select(torch.zeros(len(contents), dtype=torch.long, device=contents.device))
        return replace(same, latents=contents[..., :width], state=contents[..., width:])

    def believed(contents: Tensor) -> Tensor:
        return model.beliefs_of(model(versions(contents)).readouts[:, event])[target]

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
        if model.trees is not None:
            total = total + _jumps(model, model.trees, target, versions, start, end, event, steps)
        error, steps = float(total.sum()) - (belief - base), 2 * steps
    model.train(was_training)
    rows = event_rows(model, batch).with_columns(pl.Series("attribution", total.detach().cpu().numpy()))
    return Attribution(rows, target, belief, base, steps // 2, error)


@torch.no_grad()
def _jumps(
    model: TrajectoryModel,
    trees: TreeReadout,
    target: str,
    versions: Callable[[Tensor], TrajectoryBatch],
    start: Tensor,
    end: Tensor,
    event: int,
    steps: int,
) -> Tensor:
    """float64[S]: the belief's jumps on the way where trees step, each given to the event that crosses the threshold.

    Args:
        versions: the timelines with contents float[N, S, C].
        start, end: float[1, S, C], the contents that the way leads from and to.
        event: position after which it is believed.
        steps: of the way; events that cross in the same one are moved one after the other, in both orders, halved.
    """
    k = model.targets.index(target)
    task, share = model.fitted_tasks[k], model.shares[-1, k]

    def said(batch: TrajectoryBatch) -> Tensor:
        chosen = torch.zeros_like(batch.present)
        chosen[:, event] = True
        return share * trees.readouts(trees.rows(batch, chosen))[:, k]

    held = [newest(versions(end), index) for index in range(len(model.encoders.modalities))]
    places = [int(at[0, event]) for at, seen, _ in held if bool(seen[0, event])]
    found = torch.zeros(start.shape[1], dtype=torch.float64, device=start.device)
    ways = torch.arange(steps, device=start.device)[:, None, None] / steps
    for way in ways.split(TOGETHER):
        here, further = start + way * (end - start), start + (way + 1 / steps) * (end - start)
        readouts = model(versions(here)).readouts[:, event, k].double()
        smooth = readouts - said(versions(here))
        for order in (places, places[::-1]):
            moved, before = here.clone(), task.belief(readouts)
            for place in order:
                moved[:, place] = further[:, place]
                after = task.belief(smooth + said(versions(moved)))
                found[place] += (after - before).sum() / 2
                before = after
    return found


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
