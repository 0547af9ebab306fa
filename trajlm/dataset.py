"""Prepared folder to self-checking batches. The presence mask is made here and nowhere else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from trajlm.errors import TrajlmError
from trajlm.inputs import InputReader
from trajlm.schema import Event, FittedFeature, Modality, Timeline
from trajlm.views import ImageView, NumericView, TextView, View, ViewMix, padded_view, runs


@dataclass
class StayBatch:
    """B stays, every present modality as a view of its own.

    Attributes:
        stay_ids: int64[B].
        present: bool[B, M], in the order of ``modalities``.
        modalities: names.
        views: per modality the inputs of the stays that hold it, in batch order.
    """

    stay_ids: Tensor
    present: Tensor
    modalities: tuple[str, ...]
    views: dict[str, View]

    def __post_init__(self) -> None:
        if tuple(self.present.shape) != (len(self.stay_ids), len(self.modalities)):
            raise ValueError(f"stay batch: {len(self.stay_ids)} stays, present {tuple(self.present.shape)}")
        for column, name in enumerate(self.modalities):
            count, held = len(self.views.get(name, ())), int(self.present[:, column].sum())
            if count != held:
                raise ValueError(f"stay batch: {held} stays hold {name}, its view holds {count}")

    def masked(self, present: Tensor) -> StayBatch:
        """The same stays with fewer modalities: ``present`` bool[B, M], a subset of this batch's."""
        if (present & ~self.present).any():
            raise ValueError("stay batch: a modality that is missing cannot be made present")
        views = {}
        for column, name in enumerate(self.modalities):
            if name in self.views:
                views[name] = self.views[name].select(present[:, column][self.present[:, column]])
        return StayBatch(self.stay_ids, present, self.modalities, views)

    def chunks(self, size: int) -> list[StayBatch]:
        """The same stays in order, at most ``size`` at a time."""
        parts = []
        for start in range(0, len(self.stay_ids), size):
            rows = torch.zeros_like(self.stay_ids, dtype=torch.bool)
            rows[start : start + size] = True
            views = {}
            for column, name in enumerate(self.modalities):
                if name in self.views:
                    views[name] = self.views[name].select(rows[self.present[:, column]])
            parts.append(StayBatch(self.stay_ids[rows], self.present[rows], self.modalities, views))
        return parts

    def to(self, device: torch.device) -> StayBatch:
        """The same batch on a device."""
        if self.stay_ids.device == device:
            return self
        views = {name: view.to(device) for name, view in self.views.items()}
        return StayBatch(self.stay_ids.to(device), self.present.to(device), self.modalities, views)


class ModalityStore:
    """All events of one modality, grouped by stay; reads encoder inputs from them."""

    def __init__(self, reader: InputReader, events: pl.DataFrame, event_rows: np.ndarray, stay_bounds: np.ndarray):
        self.reader = reader
        self.event_rows = event_rows  # int64[n]: row of each event among all events of the folder
        self._bounds = np.searchsorted(event_rows, stay_bounds)  # int64[stays + 1]
        self._hours = events["hours_since_admission"].to_numpy()
        if reader.modality.kind == "numeric":
            lengths = events["feature_ids"].list.len().to_numpy().astype(np.int64)
            self._offsets = np.concatenate([[0], np.cumsum(lengths)])
            self._feature_ids = events["feature_ids"].explode().drop_nulls().to_numpy()
            self._values = events["values"].explode().drop_nulls().to_numpy()
        else:
            self._payload = events[reader.modality.kind]

    def count(self, stays: np.ndarray) -> np.ndarray:
        """int64[len(stays)]: events of each stay (positions in ``Prepared.stays``)."""
        return self._bounds[stays + 1] - self._bounds[stays]

    def rows(self, stay: int) -> slice:
        """The stay's events in this store."""
        return slice(int(self._bounds[stay]), int(self._bounds[stay + 1]))

    def measurements(self, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Every measurement of these stays, in order of stay and time; numeric modalities only.

        Args:
            stays: int[N], positions.

        Returns:
            int64[K] place of the stay in ``stays``, float64[K] hours since admission, int64[K] feature ids, and
            float64[K] values in the features' units.
        """
        rows = self._all_rows(stays)
        lengths, cells = self._cells(rows)
        place = np.repeat(np.repeat(np.arange(len(stays)), self.count(stays)), lengths)
        ids, values = self._feature_ids[cells].astype(np.int64), self._values[cells].astype(np.float64)
        return place, np.repeat(self._hours[rows], lengths), ids, values

    def _cells(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64[E], measurements of each of these events, and where they lie among all of the modality."""
        lengths = self._offsets[rows + 1] - self._offsets[rows]
        return lengths, runs(self._offsets[rows], lengths)

    def _numeric(self, stays: np.ndarray, span: tuple[np.ndarray, np.ndarray] | None = None) -> NumericView:
        first, counts = (None, self.count(stays)) if span is None else (span[0], span[1] + 1)
        rows = runs(self._bounds[stays], counts)
        lengths, cells = self._cells(rows)
        values, observed = self.reader.dense(lengths, self._feature_ids[cells], self._values[cells])
        return padded_view(values, observed, self._hours[rows], counts, first)

    def _all_rows(self, stays: np.ndarray) -> np.ndarray:
        return runs(self._bounds[stays], self.count(stays))

    def event_view(self, stays: np.ndarray) -> tuple[View, np.ndarray]:
        """Every event of these stays, and int64[E], its row among all events.

        A stay's numeric events are the steps of one input; notes and pictures are inputs of their own.
        """
        rows = self._all_rows(stays)
        if self.reader.modality.kind == "numeric":
            return self._numeric(stays), self.event_rows[rows]
        return self._payload_view([[int(r)] for r in rows]), self.event_rows[rows]

    def stay_view(self, stays: np.ndarray, span: tuple[np.ndarray, np.ndarray] | None = None) -> View:
        """Whole stays as inputs: all steps of a series, the distinct notes joined, the latest picture (A.1).

        Args:
            stays: int[N], positions of stays that all hold the modality.
            span: int[N] twice, first and last event of the stay to show. None: all of them.
        """
        if self.reader.modality.kind == "numeric":
            return self._numeric(stays, span)
        first, last = span or (np.zeros(len(stays), dtype=np.int64), self.count(stays) - 1)
        begin = self._bounds[stays]
        return self._payload_view([list(range(b + f, b + e + 1)) for b, f, e in zip(begin, first, last, strict=True)])

    def _payload_view(self, groups: list[list[int]]) -> TextView | ImageView:
        if self.reader.modality.kind == "text":
            return TextView(["\n".join(dict.fromkeys(self._payload[r] for r in group)) for group in groups])
        pixels = np.stack([self.reader.pixels(self._payload[group[-1]]) for group in groups])
        return ImageView(torch.from_numpy(pixels))


class LazyStores(Mapping[str, ModalityStore]):
    """Stores by modality that are read when first asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], ModalityStore]) -> None:
        self._names, self._read = tuple(names), read
        self._open: dict[str, ModalityStore] = {}

    def __getitem__(self, name: str) -> ModalityStore:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._open:
            self._open[name] = self._read(name)
        return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Prepared:
    """A prepared folder, opened. When what happened is in memory at once, the payloads of events only when asked for.

    Attributes:
        folder: where it lies.
        manifest: its ``manifest.json``.
        modalities: in the order that breaks ties between events of the same time.
        features: fitted on the training split.
        stays: ``stays.parquet``, sorted by stay_id.
        hours: float64[E] of every event; events are grouped by stay, in order of time.
        modality_index: int16[E], position in ``modalities``.
        bounds: int64[stays + 1], the events of stay i are rows ``bounds[i]:bounds[i + 1]``.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise TrajlmError(
                f"{self.folder} is not a prepared folder: no manifest.json; make one with `trajlm prepare`"
            )
        self.manifest = json.loads(path.read_text())
        self.modalities = tuple(Modality(**entry) for entry in self.manifest["modalities"])
        listed = json.loads((self.folder / "features.json").read_text())["features"]
        self.features = tuple(FittedFeature(**entry) for entry in listed)
        self.stays = pl.read_parquet(self.folder / "stays.parquet").sort("stay_id")
        self._events = pl.scan_parquet(self.folder / "events" / "*.parquet")
        self._position = {stay_id: i for i, stay_id in enumerate(self.stays["stay_id"])}
        order = {modality.name: i for i, modality in enumerate(self.modalities)}
        place = pl.col("modality").replace_strict(order, return_dtype=pl.Int16)
        index = self._events.select("stay_id", "hours_since_admission", place).collect()
        ids = index["stay_id"].to_numpy()
        self.hours = index["hours_since_admission"].to_numpy()
        self.modality_index = index["modality"].to_numpy()
        self._check_order(ids)
        self.bounds = np.searchsorted(ids, np.append(self.stays["stay_id"].to_numpy(), np.iinfo(np.int64).max))
        self._held = np.zeros((len(self.stays), len(self.modalities)), dtype=bool)
        self._held[np.repeat(np.arange(len(self.stays)), np.diff(self.bounds)), self.modality_index] = True
        self.readers = {m.name: InputReader(m, self.features, self.image_pixels) for m in self.modalities}

    def _check_order(self, ids: np.ndarray) -> None:
        later = np.zeros(max(0, len(ids) - 1), dtype=bool)  # from the last key to the first: an earlier one decides
        for key in (self.modality_index, self.hours, ids):
            later = (key[1:] < key[:-1]) | ((key[1:] == key[:-1]) & later)
        if later.any():
            raise TrajlmError(f"{self.folder}: events are not sorted by stay, time and modality; prepare it again")
        unknown = set(np.unique(ids).tolist()) - set(self._position)
        if unknown:
            raise TrajlmError(f"{self.folder}: {len(unknown)} stays have events and no row in stays.parquet")

    @property
    def image_pixels(self) -> int:
        """Side of the stored pictures."""
        return int(self.manifest["settings"]["image_pixels"])

    @property
    def published_splits(self) -> bool:
        """Whether the splits came from a file rather than from us."""
        return self.manifest["split_source"] == "published"

    @cached_property
    def stores(self) -> Mapping[str, ModalityStore]:
        """Events by modality, each read when first asked for and held from then on; only modalities that have any."""
        return LazyStores([m.name for i, m in enumerate(self.modalities) if self._held[:, i].any()], self._read_all)

    def _read_all(self, name: str) -> ModalityStore:
        reader = self.readers[name]
        payload = ["feature_ids", "values"] if reader.modality.kind == "numeric" else [reader.modality.kind]
        own = self._events.filter(pl.col("modality") == name)
        rows = np.flatnonzero(self.modality_index == list(self.readers).index(name))
        return ModalityStore(reader, own.select("hours_since_admission", *payload).collect(), rows, self.bounds)

    def stores_between(self, first: int, last: int) -> dict[str, ModalityStore]:
        """Events of the stays at positions ``first`` to ``last`` (not with it) by modality, read anew."""
        low, high = int(self.bounds[first]), int(self.bounds[last])
        events = self._events.slice(low, high - low).collect()
        stores = {}
        for index, (name, reader) in enumerate(self.readers.items()):
            rows = np.flatnonzero(self.modality_index[low:high] == index)
            if len(rows):
                stores[name] = ModalityStore(reader, events[rows], rows + low, self.bounds)
        return stores

    def in_parts(self, stays: np.ndarray, events: int) -> Iterator[tuple[np.ndarray, dict[str, ModalityStore]]]:
        """These stays (sorted positions) in parts of about so many events, each part with its own stores."""
        part = self.bounds[stays] // events
        for own in np.split(stays, np.flatnonzero(np.diff(part)) + 1):
            if len(own):
                yield own, self.stores_between(int(own[0]), int(own[-1]) + 1)

    def until(self, hours: float) -> Prepared:
        """The same stays with the events known at that hour."""
        known = self.hours <= hours
        earlier = copy.copy(self)
        earlier.__dict__.pop("stores", None)
        earlier._events = self._events.filter(pl.col("hours_since_admission") <= hours)
        earlier.hours, earlier.modality_index = self.hours[known], self.modality_index[known]
        earlier.bounds = np.concatenate([[0], np.cumsum(known)])[self.bounds]
        earlier._held = np.zeros_like(self._held)
        stays = np.repeat(np.arange(len(self.stays)), np.diff(earlier.bounds))
        earlier._held[stays, earlier.modality_index] = True
        return earlier

    def positions(self, *splits: str) -> np.ndarray:
        """int64[n]: positions of the stays of these splits, in order of stay_id."""
        return np.flatnonzero(self.stays["split"].is_in(splits).to_numpy())

    def position(self, stay_id: int | str) -> int:
        """Position of a stay, or an error that says what to look at."""
        try:
            return self._position[int(stay_id)]
        except (KeyError, ValueError):
            some = ", ".join(str(s) for s in self.stays["stay_id"].head(3))
            raise TrajlmError(f"stay {stay_id} is not in {self.folder}; it holds {some}, ...") from None

    def present(self, stays: np.ndarray, modalities: Sequence[str]) -> Tensor:
        """bool[len(stays), len(modalities)]: whether the stay holds an event of the modality."""
        order = [m.name for m in self.modalities]
        columns = np.array([order.index(m) for m in modalities])
        return torch.from_numpy(self._held[stays][:, columns])

    def stay_batch(
        self,
        stays: np.ndarray,
        modalities: Sequence[str],
        mix: ViewMix | None = None,
        random: np.random.Generator | None = None,
        stores: Mapping[str, ModalityStore] | None = None,
    ) -> StayBatch:
        """Whole stays as encoder inputs; with a ``mix``, of each modality of a stay what ``random`` draws from it.

        ``stores`` that hold these stays are read instead of those of the whole folder.
        """
        stores = self.stores if stores is None else stores
        present = self.present(stays, modalities)
        views: dict[str, View] = {}
        for column, name in enumerate(modalities):
            held = stays[present[:, column].numpy()]
            if not len(held):
                continue
            store = stores[name]
            span = mix.draw(store.count(held), random) if mix is not None and random is not None else None
            views[name] = store.stay_view(held, span)
        stay_ids = torch.from_numpy(self.stays["stay_id"].to_numpy()[stays])
        return StayBatch(stay_ids, present, tuple(modalities), views)

    def timeline(self, stay_id: int | str) -> Timeline:
        """All of a stay, in order."""
        position = self.position(stay_id)
        row = self.stays.row(position, named=True)
        events = []
        first, last = self.bounds[position : position + 2].tolist()
        for item in self._events.slice(first, last - first).collect().iter_rows(named=True):
            numeric = item["feature_ids"] is not None
            events.append(
                Event(
                    hours_since_admission=item["hours_since_admission"],
                    modality=item["modality"],
                    feature_ids=tuple(item["feature_ids"]) if numeric else (),
                    values=tuple(item["values"]) if numeric else (),
                    text=item["text"],
                    image=item["image"],
                )
            )
        targets = {k.removeprefix("target_"): v for k, v in row.items() if k.startswith("target_")}
        return Timeline(row["stay_id"], row["subject_id"], row["split"], row["hours_in_unit"], targets, tuple(events))


def load_prepared(path: Path | str) -> Prepared:
    """Open a prepared folder."""
    return Prepared(path)
