"""How stays of different length go through a backbone together: padded, packed, streamed; [PREDICT]s visible or not.

Every way gives each stay what it gets alone. Which masks a family computes exactly was measured, not assumed:
additive float masks are right under sdpa and eager (boolean ones are not under eager), and without a mask and a cache
positions that start again at 0 keep the stays of a row apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from trajlm.adapters import bare
from trajlm.errors import TrajlmError
from trajlm.presets import Family

MOST_PADDING = 0.05  # of the positions of packed rows


@dataclass(frozen=True)
class Layout:
    """Where sequences stand in rows.

    Attributes:
        row: int64[B], the row of each sequence.
        start: int64[B], its first position there.
        rows, length: the rectangle.
    """

    row: Tensor
    start: Tensor
    rows: int
    length: int

    def places(self, lengths: Tensor) -> Tensor:
        """int64[sum of lengths]: place of every position in the flattened rectangle, sequence by sequence."""
        first = self.row * self.length + self.start
        offsets = torch.arange(int(lengths.sum()), device=lengths.device)
        return offsets + (first - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)


def arrange(lengths: Sequence[int], width: int, most_rows: int | None = None) -> Layout:
    """Rows of nearly equal length: as many as cost least, of those that leave at most MOST_PADDING unfilled.

    The longest sequence goes first, each into the shortest row. More rows mean more padding, fewer mean more attention
    between stays that is computed only to be masked: a position costs 24 H^2 products in a layer's linear maps and
    4 L H in its attention.

    Args:
        lengths: positions of each sequence.
        width: H of the backbone.
        most_rows: 1 where an attention kernel takes packed stays in one row only.
    """
    counts = range(1, min(len(lengths), most_rows or len(lengths)) + 1)
    layouts = [_balanced(lengths, count) for count in counts]
    filled = sum(lengths)
    # One row has no padding at all, so some are left.
    tight = [found for found in layouts if filled >= (1 - MOST_PADDING) * found.rows * found.length]
    return min(tight, key=lambda found: found.rows * found.length * (1 + found.length / (6 * width)))


def _balanced(lengths: Sequence[int], count: int) -> Layout:
    filled, row, start = [0] * count, [0] * len(lengths), [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row[index] = min(range(count), key=filled.__getitem__)
        start[index] = filled[row[index]]
        filled[row[index]] += lengths[index]
    return Layout(torch.tensor(row), torch.tensor(start), count, max(filled))


def positions_of(steps: Tensor, predict_visible: bool) -> Tensor:
    """Position ids of the steps of a sequence of event, [PREDICT], event, [PREDICT], ...

    A hidden [PREDICT] takes no position: it stands where the next event will, which does not see it.
    """
    return steps if predict_visible else (steps + 1) // 2


def hidden_mask(stay: Tensor, step: Tensor, past: int = 0, window: int | None = None) -> Tensor:
    """float32[R, 1, L, past + L], to be added to the scores: every step sees its stay's earlier events and itself.

    Args:
        stay: int64[R, L], which stay a position belongs to; positions of several stays may share a row.
        step: int64[R, L], its step within the stay; even ones are events.
        past: steps of the same stays in a cache before these.
        window: how many events back a sliding layer sees, itself included.
    """
    rows = len(step)
    before = torch.arange(past, device=step.device).expand(rows, past)
    keys = torch.cat([before, step], dim=1)[:, None, :]
    owners = torch.cat([stay[:, :1].expand(rows, past), stay], dim=1)[:, None, :]
    queries = step[:, :, None]
    seen = (owners == stay[:, :, None]) & ((keys < queries) & (keys % 2 == 0) | (keys == queries))
    if window is not None:
        seen &= positions_of(keys, False) > positions_of(queries, False) - window
    return torch.zeros(seen.shape, device=step.device).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def _masks(config: Any, family: Family, stay: Tensor, step: Tensor, past: int) -> Tensor | dict[str, Tensor]:
    window = getattr(config, "sliding_window", None)
    if family.masks == "one":
        return hidden_mask(stay, step, past, window)
    kinds = set(config.layer_types)
    return {kind: hidden_mask(stay, step, past, window if kind.startswith("sliding") else None) for kind in kinds}


class SequenceReader:
    """Runs sequences of events and [PREDICT]s through a backbone.

    Args:
        config: the decoder's settings.
        family: what is true of them.
        predict_visible: later positions may attend to earlier [PREDICT]s.

    Raises TrajlmError where hidden [PREDICT]s would not be exact.
    """

    def __init__(self, config: Any, family: Family, predict_visible: bool = True) -> None:
        if not predict_visible:
            require_exact(family, "finetuning.predict_visible false", "true")
        self.config, self.family, self.predict_visible = config, family, predict_visible

    def __call__(
        self, backbone: nn.Module, sequence: Tensor, present: Tensor, cache: Any, use_cache: bool, packed: bool
    ) -> tuple[Tensor, Any]:
        """Hidden states float[B, T, H] and, if one was asked for, the cache.

        Args:
            backbone: the decoder.
            sequence: float[B, T, H], padded at the end.
            present: bool[B, T], False at padding.
            cache: of an earlier call on the same sequences, without padding.
            use_cache: return a cache.
            packed: join sequences into rows; not with a cache.
        """
        if packed:
            return self._packed(backbone, sequence, present), None
        if not use_cache:
            return self._padded(backbone, sequence, present), None
        if not present.all():
            raise ValueError("a cache was asked for a padded batch")
        steps = [sequence[:, t : t + 1] for t in range(sequence.shape[1])] if self.family.recurrent else [sequence]
        read = []
        for step in steps:
            hidden, cache = self._streamed(backbone, step, cache)
            read.append(hidden)
        return torch.cat(read, dim=1), cache

    def _padded(self, backbone: nn.Module, sequence: Tensor, present: Tensor) -> Tensor:
        if self.predict_visible:
            # Padding stands after what is read, and no position sees a later one: a mask would only cost time.
            return backbone(inputs_embeds=sequence, attention_mask=None, use_cache=False).last_hidden_state
        step = torch.arange(sequence.shape[1], device=sequence.device).expand(present.shape)
        return self._hidden(backbone, sequence, torch.zeros_like(step), step).last_hidden_state

    def _hidden(
        self, backbone: nn.Module, sequence: Tensor, stay: Tensor, step: Tensor, past: int = 0, **cache: Any
    ) -> Any:
        return backbone(
            inputs_embeds=sequence,
            attention_mask=_masks(self.config, self.family, stay, step, past),
            position_ids=positions_of(step, predict_visible=False),
            **{"use_cache": False, **cache},
        )

    def _packed(self, backbone: nn.Module, sequence: Tensor, present: Tensor) -> Tensor:
        lengths = present.sum(dim=1)
        most = 1 if self.config._attn_implementation == "flash_attention_2" else None
        layout = arrange(lengths.tolist(), sequence.shape[-1], most)
        device = sequence.device
        places = Layout(layout.row.to(device), layout.start.to(device), layout.rows, layout.length).places(lengths)
        rectangle = (layout.rows, layout.length)
        # What no stay fills is one more stay of each row, which nobody reads.
        step = torch.arange(layout.length, device=device).repeat(layout.rows)
        filled = torch.zeros_like(step).index_fill(0, places, 1).reshape(rectangle).sum(dim=1)
        step = step.reshape(rectangle) - filled[:, None]
        stay = torch.full_like(step, -1).flatten()
        within = torch.arange(sequence.shape[1], device=device).expand(present.shape)[present]
        step = step.flatten().index_copy(0, places, within).reshape(rectangle)
        owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        stay = stay.index_copy(0, places, owner).reshape(rectangle)
        rows = sequence.new_zeros(layout.rows * layout.length, sequence.shape[-1])
        rows = rows.index_copy(0, places, sequence[present]).reshape(*rectangle, -1)
        if self.predict_visible:
            read = backbone(inputs_embeds=rows, attention_mask=None, position_ids=step, use_cache=False)
        else:
            read = self._hidden(backbone, rows, stay, step)
        hidden = read.last_hidden_state
        unpacked = hidden.new_zeros(*present.shape, hidden.shape[-1])
        unpacked[present] = hidden.flatten(0, 1)[places]
        return unpacked

    def _streamed(self, backbone: nn.Module, sequence: Tensor, cache: Any) -> tuple[Tensor, Any]:
        name = "cache_params" if _names_cache_params(backbone) else "past_key_values"
        if self.predict_visible:
            # The cache alone decides what a streamed event may see.
            output = backbone(inputs_embeds=sequence, use_cache=True, **{name: cache})
        else:
            # Not the family's own cache, whose sliding layers would count hidden positions before they forget.
            cache = DynamicCache() if cache is None else cache
            past = cache.get_seq_length()
            step = past + torch.arange(sequence.shape[1], device=sequence.device).expand(sequence.shape[:2])
            output = self._hidden(
                backbone, sequence, torch.zeros_like(step), step, past, use_cache=True, past_key_values=cache
            )
        return output.last_hidden_state, output[name]


def _names_cache_params(backbone: nn.Module) -> bool:
    return "cache_params" in inspect.signature(bare(backbone).forward).parameters


def require_exact(family: Family, setting: str, instead: str) -> None:
    """Raise TrajlmError where a family computes packed stays or hidden [PREDICT]s wrongly."""
    if family.inexact:
        raise TrajlmError(f"{setting}: not with a {family.model_type} backbone, for {family.inexact}; use {instead}")
