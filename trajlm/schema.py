"""The data contract: what a cohort delivers, and what a prepared folder holds.

Raw releases differ; everything after :mod:`trajlm.cohorts` sees only what is written here. All times are hours since
admission to the unit, as float64; all values are in the unit that the feature names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import polars as pl

TRAIN, TUNING, HELD_OUT = "train", "tuning", "held_out"
SPLITS = (TRAIN, TUNING, HELD_OUT)
NOTHING = "nothing"  # the name, among modalities ablated, of the cohort as it is

ModalityKind = Literal["numeric", "text", "image"]
FeatureKind = Literal["continuous", "category"]

MORTALITY = "target_mortality"
LENGTH_OF_STAY = "target_length_of_stay_hours"
PHENOTYPE_PREFIX = "target_phenotype_"
SCORE_PREFIX = "score_"
SCORE_HOURS = 24.0  # a severity score sums up the first day: earlier it is not known


@dataclass(frozen=True)
class Modality:
    """One kind of input.

    Attributes:
        name: lower-case identifier, used as a column suffix (``present_<name>``).
        kind: which payload its events carry.
        static: dated at hour 0 and never dropped from a long timeline (demographics).
        title: how a report writes it.
    """

    name: str
    kind: ModalityKind
    static: bool = False
    title: str = ""


@dataclass(frozen=True)
class Feature:
    """One measurable quantity of a numeric modality.

    Attributes:
        modality: the modality it belongs to.
        name: unique within the modality; a one-hot category is ``column=value``.
        unit: unit of the stored values ("" if none).
        kind: a category holds the value 1 where it applies and is absent elsewhere.
        aggregate: what stands where one event holds several values: the last, or for amounts (urine) their sum.
        least_share: leave the feature out unless at least this share of the training split's stays hold it.
    """

    modality: str
    name: str
    unit: str = ""
    kind: FeatureKind = "continuous"
    aggregate: Literal["last", "sum"] = "last"
    least_share: float = 0.0


@dataclass(frozen=True)
class FittedFeature(Feature):
    """A feature with what the training split alone says of it (a row of ``features.json``).

    Attributes:
        feature_id: unique over all modalities, contiguous within each.
        mean, std: of ``signed_log(value)`` over the training split's events; 0 and 1 for categories and for features
            the training split never shows.
        observed_in_training: events of the training split that hold the feature.
    """

    feature_id: int = -1
    mean: float = 0.0
    std: float = 1.0
    observed_in_training: int = 0


# Columns that every cohort delivers and every prepared folder holds. Targets are null where unknown.
STAY_COLUMNS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "subject_id": pl.String(),  # "stay-<stay_id>" where the release names no patient
    "hours_in_unit": pl.Float64(),  # how long the stay is known to have lasted in the unit
    MORTALITY: pl.Int8(),
    LENGTH_OF_STAY: pl.Float64(),
}
# Only while preparing: orders the stays of one patient, so that the first one names the patient's stratum.
ADMISSION_RANK = "admission_rank"

MEASUREMENT_COLUMNS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "hours_since_admission": pl.Float64(),
    "modality": pl.String(),
    "feature": pl.String(),
    "value": pl.Float64(),
}
# Hours since admission of what a measurement tells of, where that is not when it was known: a specimen drawn, a value
# charted late; below 0 before admission. A reader may leave the column out.
MEASURED = "measured"
SPOOLED_COLUMNS: dict[str, pl.DataType] = {**MEASUREMENT_COLUMNS, MEASURED: pl.Float64()}
DOCUMENT_COLUMNS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "hours_since_admission": pl.Float64(),
    "modality": pl.String(),
    "text": pl.String(),
}
IMAGE_COLUMNS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "hours_since_admission": pl.Float64(),
    "modality": pl.String(),
    "image": pl.Binary(),  # an encoded greyscale PNG or JPEG, already resized
}
EVENT_COLUMNS: dict[str, pl.DataType] = {
    "stay_id": pl.Int64(),
    "hours_since_admission": pl.Float64(),
    "modality": pl.String(),
    "feature_ids": pl.List(pl.Int32()),
    "values": pl.List(pl.Float32()),
    "text": pl.String(),
    "image": pl.Binary(),
}


def empty(columns: dict[str, pl.DataType]) -> pl.DataFrame:
    """A frame of no rows with exactly these columns."""
    return pl.DataFrame(schema=columns)


def conform(frame: pl.DataFrame, columns: dict[str, pl.DataType], what: str) -> pl.DataFrame:
    """Check and cast a frame to the contract; extra columns are an error, as a typo would be."""
    missing = [name for name in columns if name not in frame.columns]
    extra = [name for name in frame.columns if name not in columns]
    if missing or extra:
        raise ValueError(f"{what}: missing columns {missing}, unexpected columns {extra}")
    return frame.select([pl.col(name).cast(dtype) for name, dtype in columns.items()])


def with_measured(measurements: pl.DataFrame) -> pl.DataFrame:
    """MEASUREMENT_COLUMNS with ``measured``, the hour of each row where that is missing or null."""
    told = [MEASURED] if MEASURED in measurements.columns else []
    return measurements.with_columns(pl.coalesce(*told, "hours_since_admission").alias(MEASURED))


@dataclass(frozen=True)
class AttritionStep:
    """Stays and patients left after leaving out those that ``rule`` names; the first step is the release."""

    rule: str
    stays: int
    patients: int


@dataclass(frozen=True)
class RawTimelines:
    """What a cohort delivers beside the rows it spools: a release read, cleaned and dated, not yet split.

    Attributes:
        release: name and version as far as the files tell, for the manifest.
        modalities: in the fixed order that breaks ties between events of the same time.
        features: every feature that the measurements may hold.
        stays: STAY_COLUMNS, ADMISSION_RANK, any ``target_phenotype_<name>`` or other ``target_<name>`` (Int8 of 0 and
            1, or numbers), and any ``score_<name>``: a severity score of the first SCORE_HOURS as the release states
            it, null where unknown. A score is never an input.
        inputs: every file that was read.
        open_leaks: in words, each way in which a belief may still see the future.
        notes: anything else a user should know, counted.
        attrition: what each rule that leaves stays out cost, in order.
        splits: ``stay_id, split`` where the release itself publishes splits that are to be used.
    """

    release: str
    modalities: tuple[Modality, ...]
    features: tuple[Feature, ...]
    stays: pl.DataFrame
    inputs: tuple[str, ...] = ()
    open_leaks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    attrition: tuple[AttritionStep, ...] = ()
    splits: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        targets = {c: self.stays.schema[c] for c in self.stays.columns if c.startswith("target_")}
        scores = {c: pl.Float64() for c in self.stays.columns if c.startswith(SCORE_PREFIX)}
        conform(self.stays, {**targets, **STAY_COLUMNS, ADMISSION_RANK: pl.Int64(), **scores}, "stays")
        if self.stays["stay_id"].is_duplicated().any():
            raise ValueError("stays: stay_id is not unique")


@dataclass(frozen=True)
class Event:
    """One dated item of one modality: exactly one of the three payloads is set.

    Attributes:
        hours_since_admission: the last moment the event has seen.
        feature_ids, values: the measurements of a numeric event, values in the features' units.
        text: a note.
        image: an encoded picture.
    """

    hours_since_admission: float
    modality: str
    feature_ids: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    text: str | None = None
    image: bytes | None = None

    def __post_init__(self) -> None:
        if len(self.feature_ids) != len(self.values):
            raise ValueError(f"event of {self.modality}: {len(self.feature_ids)} features, {len(self.values)} values")
        if bool(self.feature_ids) + (self.text is not None) + (self.image is not None) != 1:
            raise ValueError(f"event of {self.modality}: expected exactly one of measurements, text and image")


@dataclass(frozen=True)
class Timeline:
    """All of a stay, in order of time; ties in the order of the modalities in the manifest."""

    stay_id: int
    subject_id: str
    split: str
    hours_in_unit: float | None
    targets: dict[str, float | None]
    events: tuple[Event, ...]

    def __post_init__(self) -> None:
        hours = [event.hours_since_admission for event in self.events]
        if any(later < earlier for earlier, later in pairwise(hours)):
            raise ValueError(f"stay {self.stay_id}: events are not in order of time")

    def stay_value(self, column: str) -> float | None:
        """A column of the stay's row: hours_in_unit or ``target_<name>``; None where unknown."""
        return self.hours_in_unit if column == "hours_in_unit" else self.targets.get(column.removeprefix("target_"))

    def without(self, *modalities: str) -> Timeline:
        """The same stay with every event of these modalities ablated."""
        return replace(self, events=tuple(e for e in self.events if e.modality not in modalities))

    def until(self, hours_since_admission: float) -> Timeline:
        """What was known at that hour."""
        kept = tuple(e for e in self.events if e.hours_since_admission <= hours_since_admission)
        return replace(self, events=kept)
