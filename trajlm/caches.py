"""What a backbone remembers of many stays between events: its keys and values, or its recurrent states.

Attention families whose own masks are exact share one buffer per layer, a slot for each stay: an event is written in
place, and stays of different length go through the backbone together. Of other families every stay has the cache that
transformers gives it; those without attention, whose caches all have one shape, are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer

from trajlm.errors import TrajlmError
from trajlm.packing import SequenceReader, positions_of

GROUPED = "trajlm_grouped"
FIRST_ROOM = 256  # positions of a slot at first; doubled when they are filled


class Slots:
    """Which slots the running step writes, and what they hold before it.

    Attributes:
        chosen: int64[N].
        lengths: int64[N], positions already there.
        longest: the greatest of them.
        all: whether these are all slots in order, so that nothing needs to be copied out.
    """

    def __init__(self, chosen: Tensor, lengths: Tensor, count: int) -> None:
        self.chosen, self.lengths, self.longest = chosen, lengths, int(lengths.max())
        self.all = len(chosen) == count and bool((chosen == torch.arange(count, device=chosen.device)).all())


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, float[slots, heads, room, width]; rows of a step go to slots of their own."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.step: Slots | None = None
        self.count = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for the first stays."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._room(key_states, FIRST_ROOM)
        self.values = self._room(value_states, FIRST_ROOM)
        self.is_initialized = True

    def _room(self, like: Tensor, positions: int) -> Tensor:
        return like.new_zeros(self.count, like.shape[1], positions, like.shape[3])

    def grow(self, count: int, positions: int) -> None:
        """Make room for so many slots and positions."""
        self.count = max(count, self.count)
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            held: Tensor = getattr(self, name)
            room = held.shape[2]
            while room < positions:
                room *= 2
            if room > held.shape[2] or self.count > held.shape[0]:
                wider = self._room(held, room)
                wider[: held.shape[0], :, : held.shape[2]] = held
                setattr(self, name, wider)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a step's float[N, heads, T, width] behind what its slots hold; return all that they hold then."""
        step = self.step
        assert step is not None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        self.grow(self.count, step.longest + new)
        at = step.lengths[:, None] + torch.arange(new, device=key_states.device)
        found = []
        for held, states in ((self.keys, key_states), (self.values, value_states)):
            assert held is not None
            held[step.chosen[:, None], :, at] = states.transpose(1, 2)
            read = held[:, :, : step.longest + new]
            found.append(read if step.all else read[step.chosen])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset; the masks are given, so nothing is made of them."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Positions that the longest of the running stays holds."""
        return self.step.longest if self.step else 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def slot_mask(step: Slots, new: int, predict_visible: bool, window: int | None) -> Tensor:
    """float32[N, 1, new, longest + new], to be added to the scores: what each new position of a stay may see.

    Args:
        step: the stays.
        new: positions of each in this step.
        predict_visible: whether [PREDICT]s, the odd positions, are seen by later ones.
        window: how many positions back a sliding layer sees, itself included.
    """
    device = step.lengths.device
    keys = torch.arange(step.longest + new, device=device)[None, None, :]
    queries = (step.lengths[:, None] + torch.arange(new, device=device))[:, :, None]
    seen = keys <= queries
    if not predict_visible:
        seen &= (keys % 2 == 0) | (keys == queries)
    if window is not None:
        seen &= positions_of(keys, predict_visible) > positions_of(queries, predict_visible) - window
    return torch.zeros(seen.shape, device=device).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def attend_grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a few new positions to a long memory that several query heads share.

    The heads of a group stand as further queries of their one key head. The usual way repeats all keys and values for
    every head first: with a thousand events behind it, that costs more than the backbone's weights.

    Args:
        module: the attention layer.
        query: float[N, heads, T, width].
        key, value: float[N, key heads, L, width].
        attention_mask: float[N, 1, T, L], added to the scores.
        scaling: of the scores.

    Returns:
        float[N, T, heads, width], and nothing for weights.
    """
    n, heads, new, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(n, shared, heads // shared * new, width)
    mask = attention_mask.repeat(1, 1, heads // shared, 1)
    found = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(n, heads, new, value.shape[-1]).transpose(1, 2), None


AttentionInterface.register(GROUPED, attend_grouped)


@contextmanager
def grouped_attention(config: Any) -> Iterator[None]:
    """The backbone of these settings computes attention by :func:`attend_grouped` while the block runs."""
    usual = config._attn_implementation
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = usual


class SlotMemory:
    """One shared buffer per layer for all stays."""

    def __init__(self, reader: SequenceReader) -> None:
        self._reader = reader
        count = int(reader.config.num_hidden_layers)
        self._layers = [SlotLayer() for _ in range(count)]
        self._cache = Cache(layers=list(self._layers))
        self._lengths: list[int] = []

    def read(self, backbone: nn.Module, sequence: Tensor, slots: Sequence[int]) -> Tensor:
        """float[N, T, H] hidden states of the next T positions float[N, T, H] of these slots."""
        count, new = max([*slots, len(self._lengths) - 1]) + 1, sequence.shape[1]
        self._lengths += [0] * (count - len(self._lengths))
        lengths = torch.tensor([self._lengths[slot] for slot in slots], device=sequence.device)
        step = Slots(torch.tensor(list(slots), device=sequence.device), lengths, count)
        for layer in self._layers:
            layer.step = step
            layer.grow(count, step.longest + new)
        at = lengths[:, None] + torch.arange(new, device=sequence.device)
        reader = self._reader
        with grouped_attention(reader.config):
            hidden = backbone(
                inputs_embeds=sequence,
                attention_mask=self._masks(step, new),
                position_ids=positions_of(at, reader.predict_visible),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        for slot in slots:
            self._lengths[slot] += new
        return hidden

    def _masks(self, step: Slots, new: int) -> Tensor | dict[str, Tensor]:
        config, visible = self._reader.config, self._reader.predict_visible
        window = getattr(config, "sliding_window", None)
        if self._reader.family.masks == "one":
            return slot_mask(step, new, visible, window)
        return {
            kind: slot_mask(step, new, visible, window if kind.startswith("sliding") else None)
            for kind in set(config.layer_types)
        }

    def forget(self, slot: int) -> None:
        """Empty a slot; another stay may use it."""
        self._lengths[slot] = 0

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """What a slot holds, by name."""
        length, found = self._lengths[slot], {}
        for index, layer in enumerate(self._layers):
            assert layer.keys is not None
            assert layer.values is not None
            found[f"{index}.keys"] = layer.keys[slot, :, :length].clone()
            found[f"{index}.values"] = layer.values[slot, :, :length].clone()
        return found

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """Fill a new slot with what :meth:`tensors` gave."""
        length = tensors["0.keys"].shape[1]
        self._lengths += [0] * (slot + 1 - len(self._lengths))
        self._lengths[slot] = length
        for index, layer in enumerate(self._layers):
            keys, values = tensors[f"{index}.keys"], tensors[f"{index}.values"]
            layer.count = max(layer.count, len(self._lengths))
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.grow(layer.count, length)
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys[slot, :, :length], layer.values[slot, :, :length] = keys, values


class OwnMemory:
    """The family's own cache for every stay; stacked for a step where all have one shape."""

    def __init__(self, reader: SequenceReader) -> None:
        self._reader = reader
        self._stackable = bool(reader.family.tiny) and not reader.family.attention
        self._caches: dict[int, Any] = {}

    def read(self, backbone: nn.Module, sequence: Tensor, slots: Sequence[int]) -> Tensor:
        """See :meth:`SlotMemory.read`."""
        fresh = [slot not in self._caches for slot in slots]
        if len(slots) > 1 and self._stackable and not any(fresh):
            layers = [_layer_tensors(self._caches[slot]) for slot in slots]
            joined = {name: torch.cat([tensors[name] for tensors in layers]) for name in layers[0]}
            hidden, cache = self._run(backbone, sequence, _filled(self._reader.config, joined))
            after = _layer_tensors(cache)
            for row, slot in enumerate(slots):
                own = {name: tensor[row : row + 1].clone() for name, tensor in after.items()}
                self._caches[slot] = _filled(self._reader.config, own)
            return hidden
        found = []
        for row, slot in enumerate(slots):
            hidden, self._caches[slot] = self._run(backbone, sequence[row : row + 1], self._caches.get(slot))
            found.append(hidden)
        return torch.cat(found)

    def _run(self, backbone: nn.Module, sequence: Tensor, cache: Any) -> tuple[Tensor, Any]:
        present = torch.ones(sequence.shape[:2], dtype=torch.bool, device=sequence.device)
        return self._reader(backbone, sequence, present, cache, True, False)

    def forget(self, slot: int) -> None:
        """See :meth:`SlotMemory.forget`."""
        self._caches.pop(slot, None)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """See :meth:`SlotMemory.tensors`."""
        return {name: tensor.clone() for name, tensor in _layer_tensors(self._caches[slot]).items()}

    def put(self, slot: int, tensors: dict[str, Tensor]) -> None:
        """See :meth:`SlotMemory.put`."""
        self._caches[slot] = _filled(self._reader.config, tensors)


def _layer_tensors(cache: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if not isinstance(cache, Cache):
        raise TrajlmError(f"this backbone remembers in a {type(cache).__name__}, which can be neither saved nor joined")
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            for kind in ("conv", "recurrent"):
                held = getattr(layer, f"{kind}_states")
                found |= {f"{index}.{kind}.{i}": t for i, t in held.items() if t is not None}
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            found |= {f"{index}.keys": layer.keys, f"{index}.values": layer.values}
            if getattr(layer, "cumulative_length", None) is not None:
                found[f"{index}.seen"] = torch.tensor([int(layer.cumulative_length)])
    return found


def _filled(config: Any, tensors: dict[str, Tensor]) -> DynamicCache:
    """A cache of the family that holds these tensors, as if it had read what they were made of."""
    cache = DynamicCache(config=config)
    for name, tensor in tensors.items():
        index, kind, *rest = name.split(".")
        layer: Any = cache.layers[int(index)]
        if kind in ("conv", "recurrent"):
            state = int(rest[0])
            getattr(layer, f"{kind}_states")[state] = tensor
            getattr(layer, f"is_{kind}_states_initialized")[state] = True
            if kind == "conv":
                layer.has_previous_state[state] = True
                layer.conv_kernel_size[state] = tensor.shape[-1]
                layer.device, layer.dtype = tensor.device, tensor.dtype
        elif kind == "seen":
            layer.cumulative_length = int(tensor)
        else:
            setattr(layer, kind, tensor)
            layer.device, layer.dtype, layer.is_initialized = tensor.device, tensor.dtype, True
    return cache


def memory_of(reader: SequenceReader) -> SlotMemory | OwnMemory:
    """The memory for a model's family: shared slots where its own masks are exact, its own caches elsewhere."""
    exact = reader.family.masks != "none" and not reader.family.recurrent
    return SlotMemory(reader) if exact else OwnMemory(reader)
