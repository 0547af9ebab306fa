"""Is what attention suggests what happens? Edges knocked out, activations patched, and the belief measured.

Beyond the paper, which reads attention alone. The backbone's sequence is event, [PREDICT], event, [PREDICT], ...: event
``s`` of a timeline stands at position ``2 s``, its read-out at ``2 s + 1``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from trajlm.adapters import bare
from trajlm.errors import TrajlmError
from trajlm.interception import Interception, depth, intercepted, layer_numbers
from trajlm.latents import TrajectoryBatch
from trajlm.trajectory import TrajectoryModel, TrajectoryOutput

TOGETHER = 16  # versions of a timeline read at once


def edges_of_events(batch: TrajectoryBatch, events: Tensor) -> Tensor:
    """bool[B, 2S, 2S]: every edge by which ``events`` bool[B, S] reach a later position.

    Their own read-outs lose them too, and later positions lose these read-outs; each position still sees itself. With
    ``event_context: own``, no direct read-out and nothing beside the network, nothing of these events is then left in
    any belief, as if they had never been read, but for the places they keep.
    """
    gone = (events & batch.present).repeat_interleave(2, dim=1)
    own = torch.eye(gone.shape[1], dtype=torch.bool, device=gone.device)
    return gone[:, None, :] & ~own


@torch.no_grad()
def knock_out(
    model: TrajectoryModel, batch: TrajectoryBatch, blocked: Tensor, layers: Sequence[int] | None = None
) -> TrajectoryOutput:
    """Read timelines with edges of the attention knocked out.

    Args:
        model: in evaluation mode.
        batch: B timelines of up to S events.
        blocked: bool[B or 1, 2S, 2S], True for (querying position, seen position) that are cut.
        layers: in which layers; None is all. Layers of a hybrid that have no attention cannot be cut, so there an event
            may still pass.

    Raises:
        TrajlmError: the backbone has no attention that can be changed, or a position would be left nothing to see.
    """
    model.require_no_prompt("knock-out")
    length = 2 * batch.present.shape[1]
    if tuple(blocked.shape[1:]) != (length, length) or blocked.shape[0] not in (1, len(batch.stay_ids)):
        raise TrajlmError(
            f"expected edges of shape [1 or {len(batch.stay_ids)}, {length}, {length}], came {blocked.shape}"
        )
    numbers = layer_numbers(model.backbone, range(depth(model.backbone)) if layers is None else layers)
    with intercepted(model.backbone, Interception(blocked=dict.fromkeys(numbers, blocked))) as run:
        output = model(batch)
    if not run.reached:
        raise TrajlmError("no attention was there to be cut; ablation and integrated gradients work for every backbone")
    return output


@torch.no_grad()
def knock_out_effects(
    model: TrajectoryModel, batch: TrajectoryBatch, layers: Sequence[int] | None = None
) -> pl.DataFrame:
    """How far the last belief of a stay moves when each event in turn is cut off from everything after it.

    Args:
        model: in evaluation mode.
        batch: of one timeline.
        layers: in which layers; None is all.

    Returns:
        one row per event: event_index, modality, hours_since_admission, and for each target ``effect_<t>``: the last
        belief with the event cut off minus that without. What an event passes on by other ways (values that later
        events carry forward, newest events brought along, the direct read-out) is not cut.

    Raises:
        TrajlmError: as :func:`knock_out`.
    """
    count = _one_timeline(batch)
    whole = last_beliefs(model, model(batch), batch)
    each = torch.eye(count, dtype=torch.bool, device=batch.present.device)
    found: dict[str, list[Tensor]] = {target: [] for target in model.targets}
    for part in each.split(TOGETHER):
        many = batch.select(torch.zeros(len(part), dtype=torch.long, device=part.device))
        output = knock_out(model, many, edges_of_events(many, part), layers)
        for target, belief in last_beliefs(model, output, many).items():
            found[target].append(belief - whole[target])
    return event_rows(model, batch).with_columns(
        pl.Series(f"effect_{target}", torch.cat(parts).cpu().double().numpy()) for target, parts in found.items()
    )


def last_beliefs(model: TrajectoryModel, output: TrajectoryOutput, batch: TrajectoryBatch) -> dict[str, Tensor]:
    """float[B] by target: the belief after each timeline's last event."""
    rows = torch.arange(len(batch.stay_ids), device=output.readouts.device)
    return model.beliefs_of(output.readouts[rows, batch.present.sum(dim=1) - 1])


def event_rows(model: TrajectoryModel, batch: TrajectoryBatch) -> pl.DataFrame:
    """event_index, modality and hours_since_admission of a batch of one timeline."""
    frame = pl.DataFrame(
        {
            "event_index": batch.event_index[0].cpu().numpy(),
            "modality": [model.encoders.modalities[int(m)] for m in batch.modality[0]],
            "hours_since_admission": batch.hours[0].cpu().numpy(),
        }
    )
    return frame.filter(pl.Series(batch.present[0].cpu().numpy()))


def _one_timeline(batch: TrajectoryBatch) -> int:
    if len(batch.stay_ids) != 1 or not bool(batch.present.all()):
        raise ValueError(f"expected one timeline without padding, came {len(batch.stay_ids)}")
    return batch.present.shape[1]


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """The backbone's layers in order."""
    count = depth(backbone)
    for module in bare(backbone).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise TrajlmError(f"this backbone ({bare(backbone).config.model_type}) does not keep its layers in a list")


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooked(block: nn.Module, hook: Any) -> Iterator[None]:
    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def activations(model: TrajectoryModel, batch: TrajectoryBatch, at: int) -> Tensor:
    """float[B, 2S, H]: the backbone's stream at a depth: 0 is what enters it, k what its k-th layer returns."""
    if at == 0:
        return model(batch).embeddings
    kept: list[Tensor] = []
    with _hooked(_block_at(model, at), lambda module, inputs, output: kept.append(_stream(output).clone())):
        model(batch)
    return kept[0]


def _block_at(model: TrajectoryModel, at: int) -> nn.Module:
    blocks = _blocks(model.backbone)
    if not 0 <= at <= len(blocks):
        raise TrajlmError(f"the backbone's stream has depths 0 to {len(blocks)}, asked for {at}")
    return blocks[at - 1]


@torch.no_grad()
def patched(
    model: TrajectoryModel, batch: TrajectoryBatch, source: TrajectoryBatch, events: Tensor, at: int
) -> TrajectoryOutput:
    """Read timelines with the activations of ``events``, and of their read-outs, taken from other versions of them.

    The cut at depth ``at`` crosses everything that runs past it: the backbone's stream and, where beliefs are also read
    from the events themselves, these. So all events patched at any depth give the source's beliefs, where both versions
    have the same places (``how="missing_token"``).

    Args:
        model: in evaluation mode.
        batch: the versions that are read (ablated).
        source: the versions that activations come from (whole); matched by stay and ``event_index``.
        events: bool[B, S], events of ``batch`` to patch; one that the source lacks is an error.
        at: depth, 0 to the number of layers.

    Raises:
        TrajlmError: the depth does not exist, or the source lacks an event.
    """
    model.require_no_prompt("patching")
    place, found = _matched(batch, source)
    chosen = events & batch.present
    if (chosen & ~found).any():
        stay = int(batch.stay_ids[(chosen & ~found).any(dim=1)][0])
        raise TrajlmError(
            f"stay {stay}: the activations of an event are asked for that the other version does not hold"
        )
    embedded, origin = model.embed(batch), model.embed(source)
    wide = place[..., None].expand(-1, -1, embedded.shape[-1])
    crossing = torch.where(chosen[..., None], origin.gather(1, wide), embedded)
    own, other = model.direct(batch, embedded), model.direct(source, origin)
    direct = torch.where(chosen[..., None], other.gather(1, place[..., None].expand_as(own)), own)
    if at == 0:
        return model.read(crossing, direct, batch.present)
    positions = chosen.repeat_interleave(2, dim=1)[..., None]
    pairs = torch.stack([2 * place, 2 * place + 1], dim=2).flatten(1)
    stream = activations(model, source, at)
    taken = stream.gather(1, pairs[..., None].expand(-1, -1, stream.shape[-1]))

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        mixed = torch.where(positions, taken, _stream(output))
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    with _hooked(_block_at(model, at), hook):
        return model.read(embedded, direct, batch.present)


def _matched(batch: TrajectoryBatch, source: TrajectoryBatch) -> tuple[Tensor, Tensor]:
    """int64[B, S] where each event stands in the source, and bool[B, S] whether it does."""
    if not torch.equal(batch.stay_ids, source.stay_ids):
        raise TrajlmError("activations can only be taken from versions of the same stays, in the same order")
    same = (batch.event_index[:, :, None] == source.event_index[:, None, :]) & source.present[:, None, :]
    return same.long().argmax(dim=2), same.any(dim=2) & batch.present


@torch.no_grad()
def patching_effects(
    model: TrajectoryModel, whole: TrajectoryBatch, ablated: TrajectoryBatch, depths: Sequence[int] | None = None
) -> pl.DataFrame:
    """How much of the belief an ablation took comes back when one event's activations are those of the whole stay.

    Args:
        model: in evaluation mode.
        whole, ablated: one timeline, and a version of it (:meth:`trajlm.interpret.edits.Ablation.apply`).
        depths: of the backbone's stream; None is all, from what enters it to what leaves its last layer.

    Returns:
        one row per depth and event of the ablated stay: depth, event_index, modality, hours_since_admission, and for
        each target ``belief_<t>`` (the last belief once patched) and ``restored_<t>``: the share of the change that the
        ablation made which the patch undoes (1 all of it; null where the ablation changed nothing).
    """
    count = _one_timeline(ablated)
    before, after = (last_beliefs(model, model(one), one) for one in (whole, ablated))
    each = torch.eye(count, dtype=torch.bool, device=ablated.present.device)
    held = _matched(ablated, whole)[1][0]
    frames = []
    for at in range(depth(model.backbone) + 1) if depths is None else depths:
        parts = []
        for some in each[held].split(TOGETHER):
            rows = torch.zeros(len(some), dtype=torch.long, device=some.device)
            many = ablated.select(rows)
            output = patched(model, many, whole.select(rows), some, at)
            parts.append(last_beliefs(model, output, many))
        beliefs = {t: torch.cat([part[t] for part in parts]) for t in model.targets}
        rows_here = event_rows(model, ablated).filter(pl.Series(held.cpu().numpy()))
        frames.append(
            rows_here.select(pl.lit(at).alias("depth"), pl.all()).with_columns(
                column
                for t in model.targets
                for column in (
                    pl.Series(f"belief_{t}", beliefs[t].cpu().double().numpy()),
                    pl.Series(f"restored_{t}", _restored(beliefs[t], before[t], after[t])).fill_nan(None),
                )
            )
        )
    return pl.concat(frames)


def _restored(patched_belief: Tensor, before: Tensor, after: Tensor) -> Any:
    change = (before - after).double()
    share = (patched_belief - after).double() / change
    return torch.where(change.abs() > 1e-7, share, float("nan")).cpu().numpy()
