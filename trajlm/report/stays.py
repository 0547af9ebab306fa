"""One stay as the page draws it: columns ready for JSON, and attention maps small enough to show."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import polars as pl

from trajlm.interpret.agreement import disagreement
from trajlm.report.contents import (
    EVENT,
    IMPORTANCE_COLUMNS,
    PREDICT,
    AblatedStay,
    AttentionMap,
    StayPage,
    TargetInfo,
)
from trajlm.report.links import STEPS, readout_links
from trajlm.report.tables import movers
from trajlm.report.values import packed_values

SHOWN_POSITIONS = 400  # about the most cells a side that a screen can tell apart
UNPOOLED_POSITIONS = 8  # the first positions hold demographics: never averaged with what follows


def stay_data(stay: StayPage, targets: list[TargetInfo]) -> dict[str, Any]:
    """A JSON-ready copy of the stay: trajectory by column, what moved each belief, attention, ablations, values."""
    whole = AblatedStay(stay.trajectory, stay.attention)
    data = {
        "stay_id": stay.stay_id,
        "split": stay.split,
        "unread": stay.unread,
        "targets": {t.name: _plain(stay.targets.get(t.name)) for t in targets},
        **_run(whole, stay.ablations, targets),
        "movers": {t.name: movers(stay.trajectory, t.name)["event_index"].to_list() for t in targets},
        "values": None if stay.values is None else packed_values(stay.values),
        "against": None,
        "importance": {name: _importance(frame) for name, frame in stay.importance.items()},
    }
    # The other events of the stay, ablated or read by another run, are named under the same hours in its own summary.
    data["trajectory"]["summary"] = stay.trajectory["summary"].fill_null("").to_list()
    if stay.against is not None:
        other = AblatedStay(stay.against.trajectory, stay.against.attention)
        data["against"] = _run(other, stay.against.ablations, targets)
    return data


def _run(whole: AblatedStay, ablations: dict[str, AblatedStay], targets: list[TargetInfo]) -> dict[str, Any]:
    def one(part: AblatedStay) -> dict[str, Any]:
        map_ = part.attention
        return {
            "trajectory": _trajectory(part.trajectory, targets),
            "attention": None if map_ is None else packed_attention(map_),
            "links": None if map_ is None else readout_links(map_),
        }

    return {**one(whole), "ablations": {name: one(ablated) for name, ablated in ablations.items()}}


def importance_adds(frame: pl.DataFrame) -> pl.DataFrame:
    """IMPORTANCE_COLUMNS as what each event adds to the last belief.

    Interventions take an event away, so their effect is turned round.
    """
    return frame.with_columns(-pl.col("knock_out"), -pl.col("removal"))


def _importance(frame: pl.DataFrame) -> dict[str, Any]:
    adds = importance_adds(frame)
    columns = {name: _rounded(adds[name], 6) for name in IMPORTANCE_COLUMNS[1:]}
    return {"event": frame["event_index"].to_list(), **columns, "agreement": disagreement(frame)}


def _plain(value: float | None) -> float | None:
    """JSON has no NaN."""
    return None if value is None or not math.isfinite(value) else float(value)


def _rounded(values: pl.Series, digits: int) -> list[float | None]:
    return [None if v is None or not math.isfinite(v) else round(v, digits) for v in values.cast(pl.Float64)]


def _trajectory(frame: pl.DataFrame, targets: list[TargetInfo]) -> dict[str, Any]:
    return {
        "event": frame["event_index"].to_list(),
        "hours": _rounded(frame["hours_since_admission"], 4),
        "modality": frame["modality"].to_list(),
        "belief": {t.name: _rounded(frame[f"belief_{t.name}"], 5) for t in targets},
        "change": {t.name: _rounded(frame[f"change_{t.name}"], 5) for t in targets},
    }


def packed_attention(attention: AttentionMap) -> dict[str, Any]:
    """A map as ``attention.js`` draws it, pooled to what a screen can tell apart."""
    weights, positions = shown_attention(attention)
    encoded = np.rint(weights.astype(np.float64).clip(0, 1) * STEPS).astype("<u2")
    # Each row is sent up to its last weight: about half the map, as no position attends to a later one.
    ends = [int(row.nonzero()[0][-1]) + 1 if row.any() else 0 for row in encoded]
    packed = np.concatenate([row[:end] for row, end in zip(encoded, ends, strict=True)]) if ends else encoded.ravel()
    return {
        "positions": attention.positions.height,
        "kind": positions["kind"].to_list(),
        "modality": positions["modality"].to_list(),
        "first_hour": _rounded(positions["first_hour"], 4),
        "last_hour": _rounded(positions["last_hour"], 4),
        "pooled": positions["pooled"].to_list(),
        "ends": ends,
        "weights": base64.b64encode(packed.tobytes()).decode("ascii"),
    }


def shown_attention(attention: AttentionMap, most: int = SHOWN_POSITIONS) -> tuple[np.ndarray[Any, Any], pl.DataFrame]:
    """An attention map of at most ``most`` positions a side, as float32, and what each side's positions are.

    A longer map is pooled: neighbouring events form one group, their read-outs another; weights are added over the
    attended positions of a group and averaged over its querying ones, so that every row still sums to 1. The first
    UNPOOLED_POSITIONS stay alone.

    Returns:
        weights: float32[N, N], N <= most; N = T where T <= most.
        positions: N rows: kind, modality (names joined by ", "), first_hour, last_hour, pooled (positions in it).
    """
    groups = _groups(attention.positions, most)
    labelled = attention.positions.with_columns(group=pl.Series(groups, dtype=pl.Int64))
    pooled = (
        labelled.group_by("group")
        .agg(
            pl.col("kind").first(),
            pl.col("modality").unique(maintain_order=True).str.join(", "),
            pl.col("hours_since_admission").min().alias("first_hour"),
            pl.col("hours_since_admission").max().alias("last_hour"),
            pl.len().alias("pooled"),
        )
        .sort("group")
        .drop("group")
    )
    if pooled.height == attention.positions.height:
        return attention.weights.astype(np.float32, copy=False), pooled
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(pooled.height))
    columns = np.add.reduceat(attention.weights[:, order], starts, axis=1)
    rows = np.add.reduceat(columns[order], starts, axis=0)
    return (rows / pooled["pooled"].to_numpy()[:, None]).astype(np.float32), pooled


def _groups(positions: pl.DataFrame, most: int) -> np.ndarray[Any, Any]:
    length = positions.height
    if length <= most:
        return np.arange(length)
    head = min(UNPOOLED_POSITIONS, most // 2)
    width = math.ceil((length - head) / max(1, (most - head) // 2))
    rank = {EVENT: 0, PREDICT: 1}
    kinds = np.array([rank[kind] for kind in positions["kind"]])
    blocks = np.maximum(np.arange(length) - head, 0) // width
    keys = np.where(np.arange(length) < head, np.arange(length), head + 2 * blocks + kinds)
    return np.unique(keys, return_inverse=True)[1]
