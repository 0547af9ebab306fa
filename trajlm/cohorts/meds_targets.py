"""Targets of a MEDS dataset's stays, from label files or from the stays themselves, and the dataset's own splits."""

from __future__ import annotations

import difflib

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.meds_files import LABELS, SPLITS, Dataset, Part, refuse
from trajlm.cohorts.meds_index import PATIENT
from trajlm.cohorts.meds_mapping import MedsMapping
from trajlm.cohorts.meds_stays import LEFT_OUT, NO_STAY
from trajlm.errors import TrajlmError, UnexpectedInput
from trajlm.schema import LENGTH_OF_STAY, MORTALITY, PHENOTYPE_PREFIX
from trajlm.schema import SPLITS as NAMES

CLOSES = "closes"  # of a stay: the earliest prediction time of its labels
_HOUR = 3.6e9  # microseconds


def hours_between(start: str, end: str) -> pl.Expr:
    """float64 hours from one time column to another."""
    return (pl.col(end) - pl.col(start)).dt.total_microseconds() / _HOUR


def with_targets(dataset: Dataset, mapping: MedsMapping, table: pl.DataFrame, subjects: pl.DataFrame) -> pl.DataFrame:
    """``table`` (of :class:`Stays`) with ``hours_in_unit``, a column per target and ``closes``.

    Targets without a label file are told from the stay: mortality is a death up to its end, unknown where neither end
    nor death is; length of stay runs up to the end, or to the death where nothing ends the stay. ``hours_in_unit`` runs
    up to the death where that comes first, so that nobody counts as still in the unit after it.

    Raises:
        UnexpectedInput: a label file lacks the columns it must have, or holds a value that its target cannot be.
    """
    until = pl.coalesce("left", "next_start", _open_until(mapping))
    died = pl.col("died").is_between("start", until).fill_null(False)
    in_stay = pl.when(died).then("died")
    table = table.with_columns(gone=pl.coalesce(in_stay, "left"), ended=pl.coalesce("left", in_stay))
    table = table.with_columns(
        pl.when(died).then(1).when(pl.col("left").is_not_null()).then(0).cast(pl.Int8).alias(MORTALITY),
        hours_between("start", "gone").alias("hours_in_unit"),
        hours_between("start", "ended").alias(LENGTH_OF_STAY),
    )
    if not mapping.deaths:
        table = table.with_columns(pl.lit(None, pl.Int8).alias(MORTALITY))
    closing = [pl.DataFrame(schema={"stay_id": pl.Int64, CLOSES: pl.Datetime("us")})]
    for target, pattern in mapping.target_columns().items():
        labels = _labels(dataset, pattern, target, table, subjects)
        table = table.drop(target, strict=False).join(
            labels.select("stay_id", pl.col("value").alias(target)), on="stay_id", how="left", maintain_order="left"
        )
        closing.append(labels.select("stay_id", pl.col("prediction_time").alias(CLOSES)))
        absent = table.filter("kept")[target].null_count()
        if absent:
            dataset.notes.append(f"{absent} stays have no label for {target.removeprefix('target_')}")
    closes = pl.concat(closing).group_by("stay_id").agg(pl.col(CLOSES).min())
    return table.join(closes, on="stay_id", how="left", maintain_order="left")


def _open_until(mapping: MedsMapping) -> pl.Expr:
    return pl.col("start") + pl.duration(microseconds=round(mapping.open_stay_days * 24 * _HOUR))


def died_late(mapping: MedsMapping) -> pl.Expr:
    """Whether a stay that nothing closes is followed by a death too late to be told its own."""
    return pl.col("left").is_null() & pl.col("next_start").is_null() & (pl.col("died") > _open_until(mapping))


def _labels(dataset: Dataset, pattern: str, target: str, table: pl.DataFrame, subjects: pl.DataFrame) -> pl.DataFrame:
    """``stay_id, prediction_time, value`` of the labels that stand, the earliest of each stay.

    Of a target that the contract does not know ``value`` is 0 or 1 where every label is, and else a number.
    """
    taken = pl.DataFrame(schema={"stay_id": pl.Int64, "prediction_time": pl.Datetime("us")})
    read = []
    for part in dataset.labels(pattern):
        frame = _values(part, dataset.read(part, LABELS), target)
        read.append((part, _attached(dataset, part, frame, table, subjects)))
    # The earliest label of a stay may be in any of the files, so none is settled before all are read.
    found = [
        frame.select("stay_id", "prediction_time", LINE, pl.lit(i).alias("part")) for i, (_, frame) in enumerate(read)
    ]
    first = pl.concat(found).sort("stay_id", "prediction_time", "part", LINE).unique("stay_id", keep="first")
    stands = []
    for i, (part, frame) in enumerate(read):
        mine = first.filter(pl.col("part") == i).select(LINE, pl.lit(True).alias("stands"))
        frame = frame.join(mine, on=LINE, how="left", maintain_order="left")
        later = ("a later label of a stay that has an earlier one", pl.col("stands").is_null())
        frame = dataset.screen(part, frame, _shown(frame), [later])
        dataset.ledger.keep(part.table, frame.height)
        stands.append(frame.select(*taken.columns, "value"))
    labels = pl.concat(stands)
    if _of_contract(target):
        return labels
    numbers = any(frame["float_value"].is_not_null().any() for _, frame in read)
    binary = not numbers and labels["value"].is_in([0.0, 1.0]).all()
    return labels.with_columns(pl.col("value").cast(pl.Int8)) if binary else labels


def _of_contract(target: str) -> bool:
    """Whether the contract says what the target's values are."""
    return target in (MORTALITY, LENGTH_OF_STAY) or target.startswith(PHENOTYPE_PREFIX)


def _shown(frame: pl.DataFrame) -> list[str]:
    return [column for column in LABELS if column in frame.columns]


def _values(part: Part, frame: pl.DataFrame, target: str) -> pl.DataFrame:
    """``frame`` with ``value``: Int8 of what happened, float64 hours, or float64 of whatever another label holds."""
    if not _of_contract(target):
        happened, whole = (pl.col(name).cast(pl.Float64) for name in ("boolean_value", "integer_value"))
        value = pl.coalesce("float_value", whole, happened)
        refuse(part, frame, value.is_not_null() & ~value.is_finite(), "float_value", "a finite number")
        expected = "float_value, integer_value or boolean_value"
    elif target == LENGTH_OF_STAY:
        value = pl.coalesce("float_value", pl.col("integer_value").cast(pl.Float64))
        refuse(part, frame, ~value.is_finite() | (value < 0), "float_value", "hours, 0 or more")
        expected = "float_value, the length of stay in hours"
    else:
        value = pl.coalesce(pl.col("boolean_value").cast(pl.Int64), "integer_value").cast(pl.Int64)
        refuse(part, frame, ~value.is_in([0, 1]), "integer_value", "0 or 1")
        value, expected = value.cast(pl.Int8), "boolean_value"
    held = frame.with_columns(value.alias("value"))
    if frame.height and held["value"].null_count() == frame.height:
        came = ", ".join(column for column in LABELS if frame[column].null_count() < frame.height)
        raise UnexpectedInput(part.path, expected=expected, came=f"only {came}")
    return held


def _attached(
    dataset: Dataset, part: Part, frame: pl.DataFrame, table: pl.DataFrame, subjects: pl.DataFrame
) -> pl.DataFrame:
    """Labels with the stay that their prediction time lies in, or is the last one begun by then."""
    shown = _shown(frame)
    known, staying = subjects["subject_id"].implode(), table["subject_id"].unique().implode()
    frame = dataset.screen(part, frame, shown, [
        ("subject is not in the data", ~pl.col("subject_id").is_in(known).fill_null(False)),
        (NO_STAY, ~pl.col("subject_id").is_in(staying)),
        ("no prediction time", pl.col("prediction_time").is_null()),
        ("no value", pl.col("value").is_null()),
    ])  # fmt: skip
    stays = table.select("subject_id", "start", "stay_id", "kept").sort("start")
    joined = frame.sort("prediction_time").join_asof(
        stays, left_on="prediction_time", right_on="start", by="subject_id", coalesce=False, check_sortedness=False
    )
    return dataset.screen(part, joined.sort(LINE), shown, [
        ("its prediction time is before admission to the unit", pl.col("stay_id").is_null()),
        (LEFT_OUT, ~pl.col("kept")),
    ])  # fmt: skip


def dataset_splits(dataset: Dataset, table: pl.DataFrame) -> pl.DataFrame:
    """``stay_id, split`` of the kept stays, from ``metadata/subject_splits.parquet``.

    Raises:
        TrajlmError: the dataset has none.
        UnexpectedInput: a split that is not one of the standard's, a subject twice, a subject with a stay and no split,
            or a patient in two.
    """
    found = dataset.metadata("subject_splits", SPLITS)
    if found is None:
        raise TrajlmError(
            f"{dataset.root}: expected metadata/subject_splits.parquet, came no such file; splits: own in the mapping "
            "splits patients anew"
        )
    part, frame = found
    strange = frame.filter(~pl.col("split").is_in(NAMES).fill_null(False)).head(1)
    if strange.height:
        came = str(strange["split"][0])
        nearest = difflib.get_close_matches(came, NAMES, n=1, cutoff=0.0)[0]
        raise UnexpectedInput(
            part.path, line=strange[LINE][0], column="split", expected=" or ".join(NAMES), came=came,
            hint=f"the nearest is {nearest}",
        )  # fmt: skip
    refuse(part, frame, ~pl.col("subject_id").is_first_distinct(), "subject_id", "every subject once")
    kept = table.filter("kept")
    unknown = ("no stay of this subject is kept", ~pl.col("subject_id").is_in(kept["subject_id"].unique().implode()))
    held = dataset.screen(part, frame, list(SPLITS), [unknown])
    dataset.ledger.keep(part.table, held.height)
    splits = kept.join(held, on="subject_id", how="left", maintain_order="left")
    bare = splits.filter(pl.col("split").is_null()).head(1)
    if bare.height:
        came = f"none for subject {bare['subject_id'][0]}"
        raise UnexpectedInput(part.path, expected="a split for every subject with a stay", came=came)
    crossing = splits.filter(pl.col("split").n_unique().over(PATIENT) > 1).head(1)
    if crossing.height:
        came = f"patient {crossing[PATIENT][0]} in two"
        raise UnexpectedInput(part.path, expected="every patient in one split", came=came)
    return splits.select("stay_id", "split").sort("stay_id")
