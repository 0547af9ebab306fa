"""Summary features of a stay: what linear models and trees read instead of its events (method 7).

Per measured feature the last, first, least, greatest and mean value, their deviation and their count, from the events
up to a landmark; static descriptors as they are. Text and pictures have no summary here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trajlm.dataset import Prepared

STATISTICS = ("last", "first", "min", "max", "mean", "std", "count")


@dataclass(frozen=True)
class Measurements:
    """Measurements of N stays over F features, each stay's in order of time.

    Attributes:
        stay: int64[K], which of the N stays.
        feature: int64[K], which of the F features.
        hours: float64[K], hours since admission.
        values: float64[K], in the features' units.
        stays: N.
        features: F.
    """

    stay: NDArray[np.int64]
    feature: NDArray[np.int64]
    hours: NDArray[np.float64]
    values: NDArray[np.float64]
    stays: int
    features: int

    def until(self, landmark: float | None) -> Measurements:
        """What was measured up to that hour; None keeps all."""
        if landmark is None:
            return self
        kept = self.hours <= landmark
        return replace(
            self,
            stay=self.stay[kept],
            feature=self.feature[kept],
            hours=self.hours[kept],
            values=self.values[kept],
        )


def statistics(measured: Measurements) -> dict[str, NDArray[np.float64]]:
    """float64[N, F] for each of STATISTICS; NaN where a feature was never measured, except for the count, 0.

    The deviation is that of the values themselves (divided by their number): 0 for one value.
    """
    n, f = measured.stays, measured.features
    cell = measured.stay * f + measured.feature
    order = np.argsort(cell, kind="stable")  # stable: within a cell the order of time stays
    cells, starts, counts = np.unique(cell[order], return_index=True, return_counts=True)
    values = measured.values[order]

    def sums(of: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.add.reduceat(of, starts) if len(starts) else np.empty(0)

    mean = sums(values) / counts
    found = {
        "last": values[starts + counts - 1],
        "first": values[starts],
        "min": np.minimum.reduceat(values, starts) if len(starts) else values,
        "max": np.maximum.reduceat(values, starts) if len(starts) else values,
        "mean": mean,
        "std": np.sqrt(sums((values - np.repeat(mean, counts)) ** 2) / counts),
        "count": counts.astype(np.float64),
    }
    filled = {}
    for name in STATISTICS:
        table = np.full(n * f, 0.0 if name == "count" else np.nan)
        table[cells] = found[name]
        filled[name] = table.reshape(n, f)
    return filled


@dataclass(frozen=True)
class Summary:
    """Features of N stays.

    Attributes:
        names: C names, ``modality: feature, statistic``.
        values: float64[N, C], NaN where missing.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]


class SummaryReader:
    """Reads the summary features of any stays of a prepared folder, up to any landmark.

    Of a category only the count is kept (its value is always 1), of a static descriptor its last value alone, which for
    a static category is 1 where it applies and 0 elsewhere.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._modalities = [m for m in prepared.modalities if m.kind == "numeric" and m.name in prepared.stores]
        listed = {m.name: m for m in self._modalities}
        self._features = [f for f in prepared.features if f.modality in listed]
        ids = np.array([f.feature_id for f in self._features], dtype=np.int64)
        self._column = np.full(ids.max(initial=-1) + 1, -1, dtype=np.int64)
        self._column[ids] = np.arange(len(ids))
        static = np.array([listed[f.modality].static for f in self._features], dtype=bool)
        category = np.array([f.kind == "category" for f in self._features], dtype=bool)
        self._kept = dict.fromkeys(STATISTICS, ~static & ~category)
        self._kept["last"] = static & ~category | self._kept["last"]
        self._kept["count"] = category | self._kept["count"]
        self._flags = static & category

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns, in order."""
        return tuple(
            f"{feature.modality}: {feature.name}, {name}"
            for name in STATISTICS
            for feature, kept in zip(self._features, self._kept[name], strict=True)
            if kept
        )

    def measurements(self, stays: NDArray[np.int64]) -> Measurements:
        """Everything measured in these stays (positions)."""
        parts = [self._prepared.stores[m.name].measurements(stays) for m in self._modalities]
        if not parts:
            none = np.empty(0)
            return Measurements(none.astype(np.int64), none.astype(np.int64), none, none, len(stays), 0)
        stay, hours, ids, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Measurements(stay, self._column[ids], hours, values, len(stays), len(self._features))

    def summary(self, measured: Measurements, landmark: float | None) -> Summary:
        """The features as of ``landmark`` hours since admission (None: of everything)."""
        tables = statistics(measured.until(landmark))
        tables["count"][:, self._flags] = np.minimum(tables["count"][:, self._flags], 1.0)
        columns = [tables[name][:, self._kept[name]] for name in STATISTICS]
        return Summary(self.names, np.concatenate(columns, axis=1))
