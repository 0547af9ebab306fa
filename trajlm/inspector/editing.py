"""A stay edited event by event: what the inspector's page sends, checked, and the timeline that comes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from trajlm.errors import TrajlmError
from trajlm.schema import Event, Timeline
from trajlm.trajectory import TrajectoryModel

LATEST_HOUR = 24.0 * 366
LONGEST_TEXT = 200_000
MOST_ADDED = 1000


@dataclass(frozen=True)
class Edits:
    """What is different from the record; events are named by their place in it.

    Attributes:
        drop: events to leave out.
        change: by event, ``values`` (feature id to value in the feature's unit; None takes the measurement out),
            ``text`` and ``hours``, each only where it changes.
        add: new events: ``hours``, ``modality`` and either ``values`` or ``text``.
    """

    drop: frozenset[int] = frozenset()
    change: dict[int, dict[str, Any]] = field(default_factory=dict)
    add: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, sent: Any) -> Edits:
        """Edits from JSON. Raises TrajlmError for anything else than the three keys in their shapes."""
        if not isinstance(sent, dict) or set(sent) - {"drop", "change", "add"}:
            raise TrajlmError("edits: expected an object with drop, change and add")
        drop, change, add = sent.get("drop", []), sent.get("change", {}), sent.get("add", [])
        if not (isinstance(drop, list) and isinstance(change, dict) and isinstance(add, list)):
            raise TrajlmError("edits: expected a list to drop, an object to change and a list to add")
        if len(add) > MOST_ADDED:
            raise TrajlmError(f"edits: at most {MOST_ADDED} events can be added, came {len(add)}")
        if not all(isinstance(one, dict) for one in [*change.values(), *add]):
            raise TrajlmError("edits: expected an object for every event to change or add")
        return cls(frozenset(map(_place, drop)), {_place(k): v for k, v in change.items()}, tuple(add))


def _place(value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TrajlmError(f"edits: expected the place of an event, came {value!r}") from None


def edited(model: TrajectoryModel, timeline: Timeline, edits: Edits) -> tuple[Timeline, list[str]]:
    """The timeline with the edits made, and for each of its events a name: its place in the record, or ``new-<n>``.

    Events stand in order of time; ties as the prepared folder breaks them, by the order of the modalities.

    Raises:
        TrajlmError: an edit names an unknown event, modality or feature, a value is not a number, or no event is left.
    """
    unknown = sorted((edits.drop | set(edits.change)) - set(range(len(timeline.events))))
    if unknown:
        raise TrajlmError(f"stay {timeline.stay_id} has events 0 to {len(timeline.events) - 1}, asked for {unknown[0]}")
    events = [
        (str(i), _changed(model, event, edits.change[i]) if i in edits.change else event)
        for i, event in enumerate(timeline.events)
        if i not in edits.drop
    ]
    events += [(f"new-{n}", _added(model, one)) for n, one in enumerate(edits.add)]
    if not events:
        raise TrajlmError(f"stay {timeline.stay_id}: no event is left")
    order = {name: i for i, name in enumerate(model.timelines.modalities)}
    events.sort(key=lambda pair: (pair[1].hours_since_admission, order.get(pair[1].modality, len(order))))
    return replace(timeline, events=tuple(event for _, event in events)), [name for name, _ in events]


def _changed(model: TrajectoryModel, event: Event, change: dict[str, Any]) -> Event:
    hours = _hours(change.get("hours", event.hours_since_admission))
    if event.image is not None:
        if set(change) - {"hours"}:
            raise TrajlmError("a picture can be moved in time or dropped, not changed")
        return replace(event, hours_since_admission=hours)
    if event.text is not None:
        return Event(hours, event.modality, text=_text(change.get("text", event.text)))
    known: dict[int, float | None] = dict(zip(event.feature_ids, event.values, strict=True))
    return _numeric(hours, event.modality, known | _values(model, event.modality, change.get("values", {})))


def _added(model: TrajectoryModel, one: dict[str, Any]) -> Event:
    modality, hours = one.get("modality"), _hours(one.get("hours"))
    if modality not in model.encoders.modalities:
        raise TrajlmError(f"the model never learned {modality!r}; it reads {', '.join(model.encoders.modalities)}")
    kind = model.timelines.modalities[modality].kind
    if kind == "image":
        raise TrajlmError("a picture cannot be added by hand")
    if kind == "text":
        return Event(hours, modality, text=_text(one.get("text")))
    return _numeric(hours, modality, _values(model, modality, one.get("values", {})))


def _numeric(hours: float, modality: str, values: dict[int, float | None]) -> Event:
    kept = {feature: value for feature, value in sorted(values.items()) if value is not None}
    if not kept:
        raise TrajlmError(f"an event of {modality} needs a measurement; drop it to leave it out")
    return Event(hours, modality, tuple(kept), tuple(kept.values()))


def _values(model: TrajectoryModel, modality: str, sent: Any) -> dict[int, float | None]:
    if not isinstance(sent, dict):
        raise TrajlmError("edits: expected values as an object, feature id to number")
    known = {feature.feature_id: feature for feature in model.timelines.inputs[modality].features}
    found: dict[int, float | None] = {}
    for key, value in sent.items():
        feature = known.get(_place(key))
        if feature is None:
            raise TrajlmError(f"{modality} has no feature {key}")
        found[feature.feature_id] = None if value is None else _number(value, feature.name)
        if feature.kind == "category" and value not in (1, None):
            raise TrajlmError(f"{feature.name} is there (1) or not (null), came {value!r}")
    return found


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TrajlmError(f"{what}: expected a number, came {value!r}")
    return float(value)


def _hours(value: Any) -> float:
    hours = _number(value, "hours since admission")
    if not 0 <= hours <= LATEST_HOUR:
        raise TrajlmError(f"hours since admission: expected 0 to {LATEST_HOUR:g}, came {hours:g}")
    return hours


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_TEXT:
        raise TrajlmError(f"expected the text of a note, at most {LONGEST_TEXT:,} characters")
    return value
