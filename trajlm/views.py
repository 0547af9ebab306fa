"""What an encoder reads: one view per kind of input, each a batch that checks its own shapes.

A view holds only inputs that are present: an absent modality never reaches an encoder. A whole stay, a window and a
single event are the same view with more or fewer steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trajlm.schema import FittedFeature


def signed_log(values: np.ndarray) -> np.ndarray:
    """``sign(x) log(1 + |x|)``, the paper's input scale (B.1)."""
    return np.sign(values) * np.log1p(np.abs(values))


class Standardiser:
    """Values in their features' units to training-split z-scores of their signed log; categories stay 1."""

    def __init__(self, features: Sequence[FittedFeature]) -> None:
        self._mean = np.array([f.mean for f in features], dtype=np.float64)
        self._std = np.array([f.std for f in features], dtype=np.float64)
        self._category = np.array([f.kind == "category" for f in features], dtype=bool)

    def __call__(self, values: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """float32[K] of values float[K], whose features stand at ``columns`` int[K]."""
        scaled = (signed_log(values.astype(np.float64)) - self._mean[columns]) / self._std[columns]
        return np.where(self._category[columns], values, scaled).astype(np.float32)


STATE_PARTS = 4  # last value, whether ever observed, log(1 + hours since), mean of the values so far


@dataclass
class CarriedState:
    """The last known value of every feature of a modality, carried forward (method 6), and the mean so far beside it.

    Attributes:
        value: float32[..., F], standardised; 0 where never observed.
        last_hours: float64[..., F], hours since admission of that value; NaN where never observed.
        total: float64[..., F], sum of the values so far.
        count: int64[..., F], how many they were.
    """

    value: np.ndarray
    last_hours: np.ndarray
    total: np.ndarray
    count: np.ndarray

    @classmethod
    def unobserved(cls, *shape: int) -> CarriedState:
        """Nothing known yet, for features of this shape ``[..., F]``."""
        return cls(np.zeros(shape, np.float32), np.full(shape, np.nan), np.zeros(shape), np.zeros(shape, np.int64))

    def advance(self, values: np.ndarray, observed: np.ndarray, hours: np.ndarray) -> CarriedState:
        """The state after a step of ``values`` and ``observed`` [..., F] at ``hours`` [...]."""
        return CarriedState(
            np.where(observed, values, self.value),
            np.where(observed, hours[..., None], self.last_hours),
            self.total + np.where(observed, values, 0.0),
            self.count + observed,
        )

    def features(self, hours: np.ndarray) -> np.ndarray:
        """float32[..., 4F]: last value, whether ever observed, log(1 + hours since) as of ``hours``, mean so far."""
        ever = ~np.isnan(self.last_hours)
        since = np.log1p(np.where(ever, hours[..., None] - self.last_hours, 0.0))
        mean = self.total / np.maximum(self.count, 1)
        return np.concatenate([self.value, ever, since, mean], axis=-1).astype(np.float32)


def runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[sum of lengths]: the rows ``starts[i]`` to ``starts[i] + lengths[i] - 1`` of every i, one after another."""
    return np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())


def carried_forward(
    values: np.ndarray,
    observed: np.ndarray,
    hours: np.ndarray,
    first: np.ndarray,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """The carried-forward state after events of many stays at once, as :meth:`CarriedState.features` gives it.

    Args:
        values, observed: float32[E, F] and bool[E, F] of one modality's events, stay after stay in order of time.
        hours: float64[E], hours since admission.
        first: int[E], the row at which the event's stay begins.
        rows: int[K], events whose state is asked for. None: all of them.

    Returns:
        float32[K, 4F].
    """
    begins = np.unique(first)
    row = np.arange(len(values), dtype=np.int32)[:, None]
    last = np.maximum.accumulate(np.where(observed, row, np.int32(-1)), axis=0)
    if rows is not None:
        row, last, first = row[rows], last[rows], first[rows]
    ever = last >= first[:, None]
    last = np.where(ever, last, row)
    total, count = np.where(observed, values, np.float64(0)), observed.astype(np.int32)
    for begin, end in itertools.pairwise([*begins, len(values)]):  # in a stream's order: equal to its last bit
        for counted in (total, count):
            np.cumsum(counted[begin:end], axis=0, out=counted[begin:end])
    if rows is not None:
        total, count = total[rows], count[rows]
    state = np.empty((len(last), STATE_PARTS, values.shape[1]), dtype=np.float32)
    state[:, 0] = np.where(ever, np.take_along_axis(values, last, axis=0), np.float32(0))
    state[:, 1] = ever
    # Where nothing was observed the last event is the event itself, no hours ago.
    state[:, 2] = np.log1p(hours[row] - hours[last])
    state[:, 3] = total / np.maximum(count, 1)
    return state.reshape(len(last), -1)


@dataclass
class NumericView:
    """N inputs of S steps over the F features of one modality; steps are right-padded.

    Attributes:
        values: float32[N, S, F], standardised; 0 where not observed.
        observed: bool[N, S, F].
        state: float32[N, S, 4F], carried-forward state after each step (:class:`CarriedState`).
        hours: float32[N, S], hours since admission.
        steps: bool[N, S], False for padding, where nothing is observed.
    """

    values: Tensor
    observed: Tensor
    state: Tensor
    hours: Tensor
    steps: Tensor

    def __post_init__(self) -> None:
        n, s, f = self.values.shape
        expected = {"observed": (n, s, f), "state": (n, s, STATE_PARTS * f), "hours": (n, s), "steps": (n, s)}
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"numeric view: expected {name} of shape {shape}, came {getattr(self, name).shape}")
        if n and not self.steps[:, 0].all():
            raise ValueError("numeric view: every input needs at least one step, and padding belongs at the end")

    def __len__(self) -> int:
        return self.values.shape[0]

    def select(self, rows: Tensor) -> NumericView:
        """The inputs of these rows (bool[N] or int[K])."""
        indices = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        names = ("values", "observed", "state", "hours", "steps")
        return NumericView(*(getattr(self, n).index_select(0, indices) for n in names))

    def to(self, device: torch.device) -> NumericView:
        """The same view on a device."""
        names = ("values", "observed", "state", "hours", "steps")
        return NumericView(*(getattr(self, n).to(device) for n in names))

    def single_steps(self) -> NumericView:
        """Every real step as an input of its own, in order: ``N' = steps.sum()``, ``S = 1``."""
        names = ("values", "observed", "state", "hours", "steps")
        return NumericView(*(getattr(self, n)[self.steps].unsqueeze(1) for n in names))


@dataclass(frozen=True)
class ViewMix:
    """What an encoder sees of a modality in training: mostly the whole stay, or less of it.

    Attributes:
        window: probability of a random run of neighbouring events.
        event: probability of one random event.
    """

    window: float = 0.0
    event: float = 0.0

    def draw(self, counts: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """int[N] twice: first and last event to show of stays that hold ``counts`` int[N] events of the modality."""
        kind = random.random(len(counts))
        ends = np.sort(random.integers(0, counts, (2, len(counts))), axis=0)
        one, some = kind < self.event, kind < self.event + self.window
        first = np.where(some, ends[0], 0)
        return first, np.where(one, first, np.where(some, ends[1], counts - 1))


def numeric_view(
    values: Sequence[np.ndarray], observed: Sequence[np.ndarray], hours: Sequence[np.ndarray]
) -> NumericView:
    """Pad timelines of one modality to a view and carry their state forward.

    Args:
        values: per input float32[S_i, F].
        observed: per input bool[S_i, F].
        hours: per input float[S_i], not decreasing.
    """
    lengths = np.array([len(timeline) for timeline in values])
    joined = np.concatenate(values), np.concatenate(observed), np.concatenate(hours).astype(np.float64)
    return padded_view(*joined, lengths)


def padded_view(
    values: np.ndarray,
    observed: np.ndarray,
    hours: np.ndarray,
    lengths: np.ndarray,
    first: np.ndarray | None = None,
) -> NumericView:
    """:func:`numeric_view` of timelines that lie one after another.

    Args:
        values: float32[E, F].
        observed: bool[E, F].
        hours: float64[E].
        lengths: int[N], events of each timeline; none is 0.
        first: int[N], first event of each timeline to show. The state behind a shown event stays what it was. None: 0.
    """
    ends = np.cumsum(lengths)
    kept = lengths if first is None else lengths - first
    rows = runs(ends - kept, kept)
    steps = np.arange(kept.max()) < kept[:, None]
    n, s, f = *steps.shape, values.shape[1]
    padded = np.zeros((n, s, f), dtype=np.float32)
    mask = np.zeros((n, s, f), dtype=bool)
    state = np.zeros((n, s, STATE_PARTS * f), dtype=np.float32)
    # Beyond an input's last step time stands still; nothing else is there.
    clock = np.repeat(hours[ends - 1, None], s, axis=1).astype(np.float32)
    begins = np.repeat(ends - lengths, lengths)
    padded[steps], mask[steps], clock[steps] = values[rows], observed[rows], hours[rows]
    state[steps] = carried_forward(values, observed, hours, begins, rows)
    return NumericView(*(torch.from_numpy(array) for array in (padded, mask, state, clock, steps)))


@dataclass
class TextView:
    """N notes."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Tensor) -> TextView:
        """The notes of these rows (bool[N] or int[K])."""
        indices = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return TextView([self.texts[int(i)] for i in indices])

    def to(self, device: torch.device) -> TextView:
        """Text lives nowhere in particular."""
        return self


@dataclass
class ImageView:
    """N greyscale pictures, ``pixels`` uint8[N, P, P]."""

    pixels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[1] != self.pixels.shape[2] or self.pixels.dtype != torch.uint8:
            raise ValueError(f"expected pixels uint8[N, P, P], came {self.pixels.dtype}{tuple(self.pixels.shape)}")

    def __len__(self) -> int:
        return self.pixels.shape[0]

    def select(self, rows: Tensor) -> ImageView:
        """The pictures of these rows (bool[N] or int[K])."""
        return ImageView(self.pixels[rows])

    def to(self, device: torch.device) -> ImageView:
        """The same view on a device."""
        return ImageView(self.pixels.to(device))


View = NumericView | TextView | ImageView


def single_events(view: View) -> View:
    """Every event as an input of its own: the steps of series, and notes and pictures as they are."""
    return view.single_steps() if isinstance(view, NumericView) else view
