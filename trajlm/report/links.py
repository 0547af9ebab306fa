"""Attention between events, small enough for a page: where each read-out looks, and so who looks at each event."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from trajlm.report.contents import EVENT, PREDICT, AttentionMap

LARGEST = 48  # events listed per read-out; what they leave is stated as a sum
STEPS = 65535  # a share is sent as an unsigned 16-bit part of 1


def readout_links(attention: AttentionMap, largest: int = LARGEST) -> dict[str, Any] | None:
    """For the read-out after each event: the events it attends to most, and sums over all of them.

    Only weights on event positions are links; what lies on read-outs ([PREDICT] positions) is one sum, since those hold
    everything that came before them.

    Args:
        attention: of S events, each followed by its read-out, and of any other positions.
        largest: links kept per read-out, by their share.

    Returns:
        None where events and read-outs do not alternate one to one. Else ``counts`` int[S], links of each read-out;
        ``events`` and ``shares``, all links one after another in falling order of share (base64 of little-endian
        uint16: the event's place in the stay, its share in parts of 65535); ``readouts`` uint16[S], share on read-outs;
        ``modalities``, names, and ``by_modality`` uint16[S, len(modalities)], share on each modality's events.
    """
    kinds = attention.positions["kind"].to_numpy()
    events, readouts = np.flatnonzero(kinds == EVENT), np.flatnonzero(kinds == PREDICT)
    if len(events) != len(readouts) or not len(events) or not (readouts > events).all() or len(events) > STEPS:
        return None
    rows = attention.weights[readouts].astype(np.float64)
    on_events = _parts(rows[:, events])
    modality = attention.positions["modality"].to_numpy()[events]
    names = list(dict.fromkeys(modality.tolist()))
    by_modality = np.stack([rows[:, events[modality == name]].sum(axis=1) for name in names], axis=1)
    kept = np.argsort(-on_events.astype(np.int64), axis=1, kind="stable")[:, :largest]
    shares = np.take_along_axis(on_events, kept, axis=1)
    return {
        "counts": (shares > 0).sum(axis=1).tolist(),
        "events": _encoded(kept[shares > 0]),
        "shares": _encoded(shares[shares > 0]),
        "readouts": _encoded(_parts(rows[:, readouts].sum(axis=1))),
        "modalities": names,
        "by_modality": _encoded(_parts(by_modality)),
    }


def _parts(shares: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.rint(shares.clip(0, 1) * STEPS).astype(np.uint16)


def _encoded(values: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<u2").tobytes()).decode("ascii")
