"""MuFuse: every observed value is a token of feature, value and time; nothing is imputed (MedFuse, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trajlm.config import EncoderConfig
from trajlm.encoders.attention import SummaryTransformer
from trajlm.encoders.base import Hidden, ProjectedEncoder, sines
from trajlm.encoders.numeric import VALUE_KNOTS, InputScale, PiecewiseShares
from trajlm.encoders.transformer import LONGEST, SHORTEST
from trajlm.errors import TrajlmError
from trajlm.schema import FittedFeature
from trajlm.views import NumericView


@dataclass
class Triplets:
    """The observed values of N inputs, at most T of one, in any order.

    Attributes:
        feature: int64[N, T]; 0 at padding.
        value: float[N, T], on the scale that the encoder reads; 0 at padding.
        hours: float[N, T], hours since admission; 0 at padding.
        present: bool[N, T], False at padding.
    """

    feature: Tensor
    value: Tensor
    hours: Tensor
    present: Tensor


def triplets_of(view: NumericView, scale: InputScale) -> Triplets:
    """Every observed value of a view with its feature and its time, in order of time and feature."""
    seen = view.observed & view.steps[..., None]
    row, step, feature = seen.nonzero(as_tuple=True)
    counts = seen.sum(dim=(1, 2))
    first = counts.cumsum(0) - counts
    place = torch.arange(len(row), device=row.device) - first[row]
    shape = (len(view), max(1, int(counts.max()) if len(view) else 1))
    values = scale(view.values, seen)

    def padded(chosen: Tensor) -> Tensor:
        out = chosen.new_zeros(shape)
        out[row, place] = chosen
        return out

    present = torch.arange(shape[1], device=row.device) < counts[:, None]
    return Triplets(padded(feature), padded(values[row, step, feature]), padded(view.hours[row, step]), present)


class MuFuse(nn.Module):
    """Embedding of a feature modulated by that of its value, and time added.

    ``e_v = gamma_f * phi(v) + beta_f`` of width d'; ``e = e_f * repeat(e_v, k)`` with d = k d'. The ablations add
    ``repeat(e_v, k)`` instead, or concatenate e_v with a feature embedding and map both to d; and multiply time.

    Args:
        features: F.
        config: of it ``hidden_width`` (d), ``partition`` (k), ``fusion``, ``time`` and ``values``.
    """

    def __init__(self, features: int, config: EncoderConfig) -> None:
        super().__init__()
        width, self.repeats = config.hidden_width, config.partition
        if width % self.repeats:
            raise TrajlmError(
                f"encoder.hidden_width {width} is no multiple of encoder.partition {self.repeats}; choose another of "
                "the two"
            )
        part = width // self.repeats
        self.fusion, self.time = config.fusion, config.time
        self.shares = PiecewiseShares(VALUE_KNOTS) if config.values == "piecewise" else None
        coded = 1 + (self.shares.shares if self.shares else 0)
        self.phi = nn.Sequential(nn.Linear(coded, part), nn.GELU(), nn.Linear(part, part))
        self.gamma = nn.Parameter(torch.ones(features, part) + 0.1 * torch.randn(features, part))
        self.beta = nn.Parameter(0.1 * torch.randn(features, part))
        self.feature = nn.Parameter(torch.randn(features, width))
        self.both = nn.Linear(width + part, width) if self.fusion == "concatenate" else None

    def forward(self, triplets: Triplets) -> Tensor:
        """float[N, T, d]."""
        value = triplets.value[..., None]
        coded = value if self.shares is None else torch.cat([value, self.shares(value)], dim=-1)
        e_v = self.gamma[triplets.feature] * self.phi(coded) + self.beta[triplets.feature]
        e_f = self.feature[triplets.feature]
        repeated = e_v.repeat(1, 1, self.repeats)
        if self.both is not None:
            fused = self.both(torch.cat([e_f, e_v], dim=-1))
        else:
            fused = e_f * repeated if self.fusion == "multiply" else e_f + repeated
        time = sines(triplets.hours, fused.shape[-1], SHORTEST, LONGEST)
        return fused + time if self.time == "add" else fused * time


class TripletEncoder(ProjectedEncoder):
    """MuFuse embeddings of the observed values through a Transformer; the summary position is projected.

    Reads what was measured alone, whatever ``encoder.state`` says: nothing is carried forward. Tokens are the
    measurements in order of time and feature; the levels are the summary after every layer.
    """

    def __init__(self, features: Sequence[FittedFeature], config: EncoderConfig) -> None:
        super().__init__()
        self.scale = InputScale(features, config.values)
        self.embed = MuFuse(len(features), config)
        self.body = SummaryTransformer(config)
        self.project = self.body.head(config)
        self.level_widths = (config.hidden_width,) * self.body.depth

    def read(self, view: NumericView, levels: bool) -> Hidden:
        """See :class:`ProjectedEncoder`."""
        return self.read_triplets(triplets_of(view, self.scale))

    def read_triplets(self, triplets: Triplets) -> Hidden:
        """The same of triplets in any order."""
        return self.body(self.embed(triplets), triplets.present)
