"""Raw values to encoder inputs, for batches of a prepared folder and for single events that a user streams."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from trajlm.errors import TrajlmError
from trajlm.schema import Event, FittedFeature, Modality
from trajlm.views import ImageView, Standardiser, TextView, View, numeric_view


class InputReader:
    """Events of one modality to encoder inputs: standardised numbers, text, pixels."""

    def __init__(self, modality: Modality, features: Sequence[FittedFeature], image_pixels: int) -> None:
        self.modality = modality
        self.features = tuple(f for f in features if f.modality == modality.name)
        self.image_pixels = image_pixels
        self._first_id = self.features[0].feature_id if self.features else 0
        self._standardise = Standardiser(self.features)

    def columns(self, feature_ids: np.ndarray) -> np.ndarray:
        """Position of each feature id within the modality; an id of another modality is an error."""
        columns = np.asarray(feature_ids, dtype=np.int64) - self._first_id
        if columns.size and (columns.min() < 0 or columns.max() >= len(self.features)):
            raise TrajlmError(f"an event of {self.modality.name} holds a feature id of another modality")
        return columns

    def dense(self, lengths: np.ndarray, feature_ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ragged measurements to float32[E, F] standardised values and bool[E, F] observed.

        Args:
            lengths: int[E], measurements of each event.
            feature_ids, values: int[K], float[K] of all events, one after another.
        """
        columns = self.columns(feature_ids)
        rows = np.repeat(np.arange(len(lengths)), lengths)
        dense = np.zeros((len(lengths), len(self.features)), dtype=np.float32)
        observed = np.zeros(dense.shape, dtype=bool)
        dense[rows, columns] = self._standardise(np.asarray(values), columns)
        observed[rows, columns] = True
        return dense, observed

    def pixels(self, image: bytes) -> np.ndarray:
        """uint8[P, P] of an encoded picture."""
        with Image.open(io.BytesIO(image)) as picture:
            grey = picture.convert("L")
            if grey.size != (self.image_pixels, self.image_pixels):
                raise TrajlmError(
                    f"a picture of {self.modality.name} has {grey.size[0]} x {grey.size[1]} pixels, expected "
                    f"{self.image_pixels} x {self.image_pixels} (prepare.image_pixels)"
                )
            return np.asarray(grey, dtype=np.uint8)

    def event_view(self, events: Sequence[Event]) -> View:
        """Events of one stay, in order: numbers as the steps of one input, the others each as their own."""
        if self.modality.kind != "numeric":
            return self.payload_view(events)
        values, observed, hours = self.measured(events)
        return numeric_view([values], [observed], [hours])

    def payload_view(self, events: Sequence[Event]) -> TextView | ImageView:
        """Notes or pictures, each an input of its own."""
        if self.modality.kind == "text":
            return TextView([str(event.text) for event in events])
        return ImageView(torch.from_numpy(np.stack([self.pixels(event.image or b"") for event in events])))

    def measured(self, events: Sequence[Event]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32[E, F] standardised values, bool[E, F] whether observed and float64[E] hours of E numeric events."""
        lengths = np.array([len(event.values) for event in events])
        ids = np.concatenate([event.feature_ids for event in events])
        values, observed = self.dense(lengths, ids, np.concatenate([event.values for event in events]))
        return values, observed, np.array([event.hours_since_admission for event in events])
