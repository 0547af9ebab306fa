"""How numbers enter a network: standardised, on the paper's scale, or as the shares of intervals they have passed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.schema import FittedFeature
from trajlm.views import STATE_PARTS, NumericView

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


class InputScale(nn.Module):
    """Standardised values of a view to the scale that an encoder reads (``encoder.values``).

    A view holds (signed log - mean) / deviation of the training split, and categories as they are. ``linear`` takes it
    so, ``signed_log`` undoes the standardisation, which leaves the paper's sign(x) log(1 + |x|), and ``piecewise``
    holds values within the outermost knots.

    Args:
        features: the F features of the modality, in order.
        kind: linear, signed_log or piecewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: Sequence[FittedFeature], kind: str) -> None:
        super().__init__()
        self.kind = kind
        shifts = [(f.mean, f.std) if f.kind == "continuous" else (0.0, 1.0) for f in features]
        self.register_buffer("mean", torch.tensor([mean for mean, _ in shifts]), persistent=False)
        self.register_buffer("std", torch.tensor([std for _, std in shifts]), persistent=False)

    def forward(self, values: Tensor, known: Tensor) -> Tensor:
        """float[..., F] of values float[..., F]; zero where not ``known`` bool[..., F], whatever stands there."""
        if self.kind == "signed_log":
            values = values * self.std + self.mean
        elif self.kind == "piecewise":
            values = values.clamp(-OUTERMOST, OUTERMOST)
        return values.masked_fill(~known, 0.0)


class NumericInputs(nn.Module):
    """What a numeric encoder reads of every step of a view.

    The step's own values and whether each was observed; with ``state`` also the carried-forward last value, whether
    ever observed and log(1 + hours since). ``piecewise`` adds the shares of the last known value, which an observed
    value is, and of its age. A feature that was not observed is a row of zeros: what stands in its place is never read.

    Args:
        features: the F features of the modality, in order.
        config: of it ``state`` and ``values``.
    """

    def __init__(self, features: Sequence[FittedFeature], config: EncoderConfig) -> None:
        super().__init__()
        self.state = config.state
        self.scale = InputScale(features, config.values)
        piecewise = config.values == "piecewise"
        self.value_shares = PiecewiseShares(VALUE_KNOTS) if piecewise else None
        self.age_shares = PiecewiseShares(AGE_KNOTS) if piecewise else None
        plain = 5 if self.state else 2
        coded = (len(VALUE_KNOTS) - 1) + (len(AGE_KNOTS) - 1 if self.state else 0) if piecewise else 0
        self.per_feature = plain + coded
        self.width = len(features) * self.per_feature

    def forward(self, values: Tensor, observed: Tensor, state: Tensor) -> Tensor:
        """float[..., F, K] of values float[..., F], observed bool[..., F] and state float[..., 4F]."""
        scaled = self.scale(values, observed)
        parts = [scaled, observed.to(values.dtype)]
        known = scaled
        if self.state:
            last, ever, since, _ = state.chunk(STATE_PARTS, dim=-1)
            seen = ever > 0
            known, since = self.scale(last, seen), since.masked_fill(~seen, 0.0)
            parts += [known, seen.to(values.dtype), since]
        else:
            seen = observed
        coded = [part[..., None] for part in parts]
        if self.value_shares is not None and self.age_shares is not None:
            coded.append(self.value_shares(known[..., None]) * seen[..., None])
            if self.state:
                coded.append(self.age_shares(since[..., None]))
        return torch.cat(coded, dim=-1)


def last_step(view: NumericView) -> tuple[Tensor, Tensor]:
    """int64[N] twice: rows of a view and the last real step of each."""
    last = view.steps.sum(dim=1) - 1
    return torch.arange(len(view), device=last.device), last
