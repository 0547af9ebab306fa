"""A loaded run that answers the inspector's page: its stays, and the beliefs of an edited one as they stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import polars as pl

from trajlm.dataset import Prepared
from trajlm.errors import TrajlmError
from trajlm.inspector.editing import Edits, edited
from trajlm.interpret.beliefs import summary
from trajlm.report.inline import render_page
from trajlm.report.page import TargetInfo
from trajlm.report.style import base_layout, modality_styles
from trajlm.schema import HELD_OUT, Event
from trajlm.trajectory import TrajectoryModel

MOST_LISTED = 500  # stays offered by name; any other can be typed
SCRIPTS = ("draw.js", "timeline.js", "inspect.js")


class Session:
    """One model and its prepared folder; the model answers one question at a time.

    Args:
        model: fine-tuned.
        prepared: the folder it was made from.
        targets: what it believes in, as a reader meets them.
        show_notes: send the text of notes to the page; by default only their length.
    """

    def __init__(
        self, model: TrajectoryModel, prepared: Prepared, targets: list[TargetInfo], show_notes: bool = False
    ) -> None:
        self.model, self.prepared, self.targets, self.show_notes = model.eval(), prepared, targets, show_notes
        self._features = {feature.feature_id: feature for feature in model.features}
        self._lock = threading.Lock()

    def page(self, key: str) -> str:
        """The page itself, one HTML document; ``key`` is what it must send with every question."""
        stays = self.prepared.stays.filter(pl.col("split") == HELD_OUT)["stay_id"].head(MOST_LISTED).to_list()
        names = list(self.model.encoders.modalities)
        shared = {
            "key": key,
            "layout": base_layout(),
            "figures": {},
            "modalities": modality_styles(sorted(names)),
            "targets": [{"name": t.name, "title": t.title, "unit": t.unit, "kind": t.kind} for t in self.targets],
            "kinds": {name: self.model.timelines.modalities[name].kind for name in names},
            "features": {
                name: [[f.feature_id, f.name, f.unit, f.kind] for f in self.model.timelines.inputs[name].features]
                for name in names
            },
        }
        return render_page(
            "inspect.html",
            shared,
            SCRIPTS,
            stays=stays,
            targets=self.targets,
            modalities=[name for name in names if self.model.timelines.modalities[name].kind != "image"],
        )

    def outcomes(self, stay_id: int) -> dict[str, float | None]:
        """What happened, by target. Raises TrajlmError for a stay that the folder does not hold."""
        timeline = self.prepared.timeline(stay_id)
        return {t.name: timeline.targets.get(t.name) for t in self.targets}

    def beliefs(self, stay_id: int, edits: Edits) -> Iterator[dict[str, Any]]:
        """The edited stay's events; then the belief after each, as streamed; at last all of them from one pass.

        The last line's beliefs are ``model.beliefs`` of the edited timeline, and say by how much streaming differed.

        Raises:
            TrajlmError: at the first line, for an unknown stay or an edit that cannot be made.
        """
        timeline, names = edited(self.model, self.prepared.timeline(stay_id), edits)
        with self._lock:
            frame = self.model.beliefs(timeline)  # also says which events the model reads at all
            read = frame["event_index"].to_list()
            events = [self._described(timeline.events[i], names[i]) for i in read]
            yield {"events": events, "left_out": len(timeline.events) - len(read)}
            stream, largest = self.model.stream(), 0.0
            exact = {target: frame[f"belief_{target}"].to_list() for target in self.model.targets}
            for place, index in enumerate(read):
                belief = stream.push(timeline.events[index])
                if belief is None:
                    raise TrajlmError(f"event {index} is read with the whole stay and not when it is streamed")
                largest = max(largest, *(_apart(belief[target], exact[target][place]) for target in belief))
                yield {"event": place, "belief": belief}
            yield {"beliefs": exact, "largest_difference": largest}

    def _described(self, event: Event, name: str) -> dict[str, Any]:
        """An event for the page; the text of a note only where notes are shown."""
        values = [list(pair) for pair in zip(event.feature_ids, event.values, strict=True)]
        return {
            "name": name,
            "hours": event.hours_since_admission,
            "modality": event.modality,
            "summary": summary(event, self._features, self.show_notes),
            "values": values,
            "text": event.text if self.show_notes else None,
        }


def _apart(value: float, exact: float) -> float:
    """Probabilities by their difference; hours, which are large, in parts of themselves."""
    return abs(value - exact) / max(1.0, abs(exact))
