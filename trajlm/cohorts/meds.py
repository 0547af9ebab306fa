"""Any dataset in MEDS, the Medical Event Data Standard (0.3 and later): one timeline per stay that a mapping names.

Layout of ``raw``: shards in ``data/**/*.parquet`` (subject_id, time, code, and where there are any numeric_value and
text_value), ``metadata/codes.parquet``, ``metadata/dataset.json``, ``metadata/subject_splits.parquet``; label files
wherever the mapping says. ``settings.mapping`` sends code prefixes to stays, modalities and targets
(:class:`trajlm.cohorts.meds_mapping.MedsMapping`).

Events run from a stay's start to the earliest of its end, the death, the window's end and the prediction time of its
labels. Undated rows stand at hour 0 of every stay of their subject.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from trajlm.cohorts.leaks import length_leak
from trajlm.cohorts.ledger import RowLedger
from trajlm.cohorts.meds_events import EventReader
from trajlm.cohorts.meds_files import CODES, DATA, Dataset, check_columns
from trajlm.cohorts.meds_index import LEAST_VALUED, PATIENT, Index, read_index
from trajlm.cohorts.meds_mapping import MedsMapping, load_mapping
from trajlm.cohorts.meds_stays import find_stays
from trajlm.cohorts.meds_targets import dataset_splits, died_late, with_targets
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError
from trajlm.schema import (
    ADMISSION_RANK,
    MEASUREMENT_COLUMNS,
    MORTALITY,
    STAY_COLUMNS,
    Feature,
    Modality,
    RawTimelines,
    conform,
)
from trajlm.spool import Spool

DEFAULT_BIN_HOURS = 0.0
AGE = "age"
_DAYS_OF_A_YEAR = 365.2425
_MOST_SHOWN = 5

_LEAK = (
    "rows are dated as the dataset dates them; whether a result stands at its specimen's time or at the time it was "
    "available is a choice of whoever wrote the dataset"
)
_PREDICTION_LEAK = "events after the prediction time of a stay's labels are read, as the mapping asks"


def read(raw: Path, settings: PrepareConfig, ledger: RowLedger, spool: Spool) -> RawTimelines:
    """Read a MEDS dataset.

    Args:
        raw: folder of the dataset.
        settings: ``mapping``, ``window_hours`` and ``before_admission_hours`` are used here.
        ledger: gets a table per folder of shards (``data/train``) and of labels, and one per metadata table; a rejected
            row names its file as ``shard``.
        spool: gets measurements and documents.

    Raises:
        TrajlmError: no mapping, or one that does not fit.
        UnexpectedInput: a file is not as the standard says.
    """
    if settings.mapping is None:
        raise TrajlmError(
            "prepare.mapping is not set: name the YAML file that maps the dataset's codes, --mapping FILE"
        )
    file = Path(settings.mapping)
    mapping = load_mapping(file)
    dataset = Dataset(raw, ledger, settings.rejected_rows)
    dataset.inputs.append(str(file))
    for part in dataset.shards:
        check_columns(part, DATA, [] if mapping.patient_column is None else [mapping.patient_column])
    index = read_index(dataset, mapping)
    stays = find_stays(dataset, mapping, index)
    table = with_targets(dataset, mapping, stays.table, index.subjects)
    kept = table.filter("kept")
    if kept.is_empty():
        raise TrajlmError(f"{raw}: none of the {table.height} stays is kept: each begins after its subject's death")
    splits = dataset_splits(dataset, table) if mapping.splits == "dataset" and settings.splits is None else None
    reader = EventReader(dataset, mapping, settings, spool, index, stays, table)
    units = _units(dataset, reader.codes)
    _refuse_equal_names(file, mapping, reader.codes)
    spool.add_measurements(_ages(mapping, kept))
    reader.read()
    _note(dataset, mapping, index, kept, spool)
    return RawTimelines(
        release=dataset.release,
        modalities=tuple(Modality(name, m.kind, m.static, m.title) for name, m in mapping.modalities.items()),
        features=_features(mapping, reader, units),
        stays=_stay_rows(kept),
        inputs=tuple(dataset.inputs),
        open_leaks=_open_leaks(mapping, settings),
        notes=tuple(dataset.notes),
        attrition=stays.attrition,
        splits=splits,
    )


def _open_leaks(mapping: MedsMapping, settings: PrepareConfig) -> tuple[str, ...]:
    end = length_leak(settings.window_hours)
    ignored = mapping.targets and mapping.prediction_time == "ignored"
    return (_LEAK, end, _PREDICTION_LEAK) if ignored else (_LEAK, end)


def _units(dataset: Dataset, codes: pl.DataFrame) -> pl.DataFrame:
    """``code, unit, aggregate`` as far as ``metadata/codes.parquet`` tells, which need not hold the last two."""
    found = dataset.metadata("codes", CODES)
    if found is None:
        dataset.notes.append("metadata/codes.parquet is absent: units are unknown")
        return pl.DataFrame(schema={name: column.dtype for name, column in CODES.items()})
    part, frame = found
    used = codes.filter(pl.col("role").is_not_null() | pl.col("modality").is_not_null())["code"]
    held = dataset.screen(part, frame, list(CODES), [
        ("repeats an earlier code", ~pl.col("code").is_first_distinct()),
        ("the data holds no such code, or the mapping does not use it", ~pl.col("code").is_in(used.implode())),
        ("names no code", pl.col("code").is_null()),
    ])  # fmt: skip
    dataset.ledger.keep(part.table, held.height)
    unlisted = codes.join(frame, on="code", how="anti").height
    if unlisted:
        dataset.notes.append(f"{unlisted} codes of the data are not in metadata/codes.parquet, which should list all")
    return held.select(list(CODES))


def _refuse_equal_names(file: Path, mapping: MedsMapping, codes: pl.DataFrame) -> None:
    """Two codes whose features would be one are an error: the later would stand for both."""
    named = codes.filter(pl.col("kind") == "numeric", pl.col("role").is_null()).select("modality", "feature", "code")
    if mapping.age is not None:
        named = pl.concat([named, pl.DataFrame([(mapping.age, AGE, mapping.births[0])], named.schema, orient="row")])
    twice = named.filter(pl.struct("modality", "feature").is_duplicated()).sort("modality", "feature", "code")
    if twice.height:
        modality, feature, code = twice.row(0)
        raise TrajlmError(
            f"{file}: modalities.{modality}: the codes {code} and {twice['code'][1]} would both be the feature "
            f"{feature!r}; leave strip_prefix out, or give them modalities of their own"
        )


def _ages(mapping: MedsMapping, kept: pl.DataFrame) -> pl.DataFrame:
    """Age in years at the start of every stay whose birth is known, and not after it."""
    if mapping.age is None:
        return pl.DataFrame(schema=MEASUREMENT_COLUMNS)
    born = kept.filter(pl.col("birth") <= pl.col("start"))
    years = (pl.col("start") - pl.col("birth")).dt.total_microseconds() / (_DAYS_OF_A_YEAR * 24 * 3.6e9)
    rows = born.select(
        "stay_id",
        hours_since_admission=pl.lit(0.0),
        modality=pl.lit(mapping.age),
        feature=pl.lit(AGE),
        value=years,
    )
    return conform(rows, MEASUREMENT_COLUMNS, AGE)


def _features(mapping: MedsMapping, reader: EventReader, units: pl.DataFrame) -> tuple[Feature, ...]:
    """A feature per code that gave a measurement: continuous where the code has values, else a category."""
    features = [] if mapping.age is None else [Feature(mapping.age, AGE, "years")]
    used = reader.codes.filter(pl.col("code_index").is_in(sorted(reader.used)))
    for row in used.join(units, on="code", how="left", maintain_order="left").iter_rows(named=True):
        modality = mapping.modalities[row["modality"]]
        continuous = row["continuous"]
        features.append(
            Feature(
                modality=row["modality"],
                name=row["feature"],
                unit=row["unit"] or "",
                kind="continuous" if continuous else "category",
                aggregate="sum" if continuous and "sum" in (modality.aggregate, row["aggregate"]) else "last",
                least_share=modality.least_share,
            )
        )
    return tuple(features)


def _stay_rows(kept: pl.DataFrame) -> pl.DataFrame:
    rank = pl.struct("start", "stay_id").rank("ordinal").over(PATIENT)
    further = {c: kept.schema[c] for c in kept.columns if c.startswith("target_") and c not in STAY_COLUMNS}
    frame = kept.with_columns(rank.alias(ADMISSION_RANK)).drop("subject_id").rename({PATIENT: "subject_id"})
    columns = {**STAY_COLUMNS, ADMISSION_RANK: pl.Int64(), **further}
    return conform(frame.select(list(columns)), columns, "stays").sort("stay_id")


def _most(codes: pl.DataFrame, count: str) -> str:
    """The codes that have the most of ``count``, in words."""
    common = codes.sort(count, "code", descending=[True, False]).select("code", count).head(_MOST_SHOWN)
    return ", ".join(f"{code} ({number})" for code, number in common.iter_rows())


def _numeric(mapping: MedsMapping) -> list[str]:
    return [name for name, modality in mapping.modalities.items() if modality.kind == "numeric"]


def _note(dataset: Dataset, mapping: MedsMapping, index: Index, kept: pl.DataFrame, spool: Spool) -> None:
    """What the mapping may have missed."""
    subjects = index.subjects.height - index.markers.filter(pl.col("role") == "start")["subject_id"].n_unique()
    open_ended = kept["left"].null_count()
    notes = dataset.notes
    if subjects:
        notes.append(f"{subjects} of {index.subjects.height} subjects have no stay")
    if open_ended:
        notes.append(f"{open_ended} stays have no end: unless the patient died in it their length is unknown")
    late = kept.filter(died_late(mapping)).height
    if late and MORTALITY not in mapping.target_columns():
        notes.append(
            f"{late} stays have no end and a death more than {mapping.open_stay_days:g} days after their start: "
            "whether the patient died in it is unknown"
        )
    unmapped = index.codes.filter(~pl.col("mapped"), pl.col("role").is_null())
    if unmapped.height:
        notes.append(f"{unmapped.height} codes are mapped to no modality, most often {_most(unmapped, 'rows')}")
    stray = index.codes.filter(
        pl.col("valued") > 0,
        ~pl.col("continuous"),
        pl.col("role").is_null(),
        pl.col("modality").is_in(_numeric(mapping)),
    )
    if stray.height:
        notes.append(
            f"{stray.height} codes have a value in less than {LEAST_VALUED:.0%} of their rows and stand for their "
            f"presence alone: {stray['valued'].sum()} values are left out, most often of {_most(stray, 'valued')}"
        )
    codes = index.codes["code"]
    places = [*mapping.role_codes.values(), *(m.codes for m in mapping.modalities.values()), mapping.left_out]
    idle = [prefix for prefixes in places for prefix in prefixes if not codes.str.starts_with(prefix).any()]
    if idle:
        notes.append(f"no code starts with {', '.join(idle)}, which the mapping names")
    found = set(spool.counts()["modality"])
    absent = [name for name in mapping.modalities if name not in found]
    if absent:
        notes.append(f"without any event: {', '.join(absent)}")
