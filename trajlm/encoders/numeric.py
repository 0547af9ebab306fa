"""How numbers enter a network: as they are, or as the shares of the intervals they have passed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trajlm.views import NumericView

# In training deviations of the signed log; close where values are common. The outer intervals are wide, so that a slip
# of a sensor saturates instead of drowning everything else.
VALUE_KNOTS = (-6.0, -2.0, -1.5, -1.0, -0.6, -0.3, 0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 6.0)
# In log(1 + hours): about 0, 1, 3, 7, 15 and 48 hours.
AGE_KNOTS = (0.0, 0.7, 1.4, 2.1, 2.8, 3.9)
OUTERMOST = 6.0


class PiecewiseShares(nn.Module):
    """A number as the share of each interval between knots that lies below it: a piecewise linear code.

    A linear layer on top can bend at every knot, so that "too low" and "too high" need no hidden units of their
    own; that is what trees do well and a few thousand stays do not teach a network.

    Args:
        knots: K + 1 increasing numbers.
    """

    lower: Tensor
    width: Tensor

    def __init__(self, knots: tuple[float, ...]) -> None:
        super().__init__()
        edges = torch.tensor(knots)
        self.register_buffer("lower", edges[:-1], persistent=False)
        self.register_buffer("width", edges[1:] - edges[:-1], persistent=False)
        self.shares = len(knots) - 1

    def forward(self, numbers: Tensor) -> Tensor:
        """float[..., F * K] in [0, 1] of float[..., F]; the K shares of one feature stand together."""
        return ((numbers[..., None] - self.lower) / self.width).clamp(0, 1).flatten(start_dim=-2)


class NumericInputs(nn.Module):
    """What a numeric encoder reads of every step of a view.

    The step's own values and whether each was observed; with ``state`` also the carried-forward last value, whether
    ever observed and log(1 + hours since). With ``piecewise`` the shares of the values (and of the hours) come on
    top, zero where nothing was observed.

    Args:
        features: F.
        state: read the carried-forward state.
        piecewise: add piecewise linear codes.
    """

    def __init__(self, features: int, state: bool, piecewise: bool) -> None:
        super().__init__()
        self.state = state
        self.values = PiecewiseShares(VALUE_KNOTS) if piecewise else None
        self.ages = PiecewiseShares(AGE_KNOTS) if piecewise else None
        plain = 5 if state else 2
        coded = (len(VALUE_KNOTS) - 1) + (len(AGE_KNOTS) - 1 if state else 0) if piecewise else 0
        self.width = features * (plain + coded)

    def forward(self, values: Tensor, observed: Tensor, state: Tensor) -> Tensor:
        """float[..., W] of values float[..., F], observed bool[..., F] and state float[..., 3F].

        With ``state`` the shares are those of the last known value, which an observed value is.
        """
        seen = observed.to(values.dtype)
        known, since, ever = values, None, seen
        parts = [values, seen]
        if self.state:
            parts.append(state)
            known, ever, since = state.chunk(3, dim=-1)
        if self.values is not None and self.ages is not None:
            parts = [part.clamp(-OUTERMOST, OUTERMOST) for part in parts]
            parts.append(self.values(known) * ever.repeat_interleave(self.values.shares, dim=-1))
            if since is not None:
                parts.append(self.ages(since))
        return torch.cat(parts, dim=-1)


def last_step(view: NumericView) -> tuple[Tensor, Tensor]:
    """int64[N] twice: rows of a view and the last real step of each."""
    last = view.steps.sum(dim=1) - 1
    return torch.arange(len(view), device=last.device), last
