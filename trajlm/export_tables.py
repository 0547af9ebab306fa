"""What an export to MEDS writes: rows of events, codes, splits, labels, and the mapping that reads them back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from trajlm.errors import TrajlmError
from trajlm.schema import LENGTH_OF_STAY, SPLITS

MEDS_VERSION = "0.4.1"  # the standard's schema that this writes
ANCHOR = datetime(2000, 1, 1)
START, END = "ICU_ADMISSION", "ICU_DISCHARGE"
PATIENT = "patient_id"
MAPPING = "mapping.yaml"

DATA = pa.schema([
    ("subject_id", pa.int64()), ("time", pa.timestamp("us")), ("code", pa.string()), ("numeric_value", pa.float32()),
    ("text_value", pa.large_string()), (PATIENT, pa.string()),
])  # fmt: skip
_SPLITS = pa.schema([("subject_id", pa.int64()), ("split", pa.string())])
_CODES = pa.schema([
    ("code", pa.string()), ("description", pa.string()), ("parent_codes", pa.list_(pa.string())), ("unit", pa.string()),
    ("aggregate", pa.string()),
])  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A prepared folder, its events not yet read.

    Attributes:
        features: ``feature_id, code, continuous`` in order of id.
        stays: as stored, in order of ``stay_id``.
    """

    folder: Path
    manifest: dict[str, Any]
    feature_rows: list[dict[str, Any]]
    features: pl.DataFrame
    stays: pl.DataFrame
    events: list[Path]

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Read all but the events; raises TrajlmError where ``folder`` is no prepared folder."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            rows = json.loads((folder / "features.json").read_text())["features"]
            stays = pl.read_parquet(folder / "stays.parquet").sort("stay_id")
        except (OSError, ValueError, KeyError):
            raise TrajlmError(f"{folder} is not a prepared folder; write one with trajlm prepare") from None
        features = pl.DataFrame(
            [(row["feature_id"], _code(row), row["kind"] == "continuous") for row in rows],
            schema={"feature_id": pl.Int32, "code": pl.String, "continuous": pl.Boolean},
            orient="row",
        )
        return cls(folder, manifest, rows, features, stays, sorted((folder / "events").glob("*.parquet")))

    def modalities(self, kind: str) -> list[str]:
        """Names of the modalities of a kind."""
        return [modality["name"] for modality in self.manifest["modalities"] if modality["kind"] == kind]

    @property
    def static(self) -> list[str]:
        """Names of the static modalities."""
        return [modality["name"] for modality in self.manifest["modalities"] if modality["static"]]

    @property
    def targets(self) -> list[str]:
        """Columns of the stays that are targets."""
        return [column for column in self.stays.columns if column.startswith("target_")]


@dataclass
class Tally:
    """What was written: rows by split, pictures left out and other oddities by name, and each stay's last hour."""

    rows: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    late_static: int = 0
    after_end: int = 0
    last_hours: list[pl.DataFrame] = field(default_factory=list)


def _code(feature: dict[str, Any]) -> str:
    return f"{feature['modality']}//{feature['name']}"


def _text_code(modality: str) -> str:
    return f"{modality}//text"


def _time(hours: pl.Expr) -> pl.Expr:
    return pl.lit(ANCHOR, pl.Datetime("us")) + pl.duration(microseconds=(hours * 3.6e9).round().cast(pl.Int64))


def rows_of(source: Source, stays: pl.DataFrame, events: pl.DataFrame, tally: Tally) -> pl.DataFrame:
    """MEDS rows of whole stays, with their ``split``, in order of subject and time, undated ones first."""
    pictures = events.filter(pl.col("modality").is_in(source.modalities("image")))
    tally.pictures.update(pictures["modality"].to_list())
    tally.last_hours.append(events.group_by("stay_id").agg(last=pl.col("hours_since_admission").max()))
    events = events.filter(~pl.col("modality").is_in(source.modalities("image"))).with_row_index("order")
    numbers = (
        events.filter(pl.col("feature_ids").is_not_null())
        .drop("text")
        .explode(["feature_ids", "values"])
        .join(source.features, left_on="feature_ids", right_on="feature_id", how="left", maintain_order="left")
        .with_columns(numeric_value=pl.when("continuous").then("values"), text_value=pl.lit(None, pl.String))
    )
    codes = {name: _text_code(name) for name in source.modalities("text")}
    texts = events.filter(pl.col("text").is_not_null()).with_columns(
        code=pl.col("modality").replace_strict(codes, default=None, return_dtype=pl.String),
        numeric_value=pl.lit(None, pl.Float32),
        text_value=pl.col("text"),
    )
    columns = ["stay_id", "hours_since_admission", "modality", "code", "numeric_value", "text_value", "order"]
    held = pl.concat([numbers.select(columns), texts.select(columns)])
    if held["code"].null_count():
        raise TrajlmError(f"{source.folder}: an event holds a feature or modality that is not listed; prepare it again")
    static, hours = pl.col("modality").is_in(source.static), pl.col("hours_since_admission")
    tally.late_static += held.filter(static & (hours > 0)).height
    held = held.with_columns(time=pl.when(~(static & (hours == 0))).then(_time(hours)), rank=pl.lit(1, pl.Int8))
    named = stays.select("stay_id", "split", "hours_in_unit", pl.col("subject_id").alias(PATIENT))
    starts = named.with_columns(code=pl.lit(START), time=_time(pl.lit(0.0)), rank=pl.lit(0, pl.Int8))
    ends = named.filter(pl.col("hours_in_unit").is_not_null())
    ends = ends.with_columns(code=pl.lit(END), time=_time(pl.col("hours_in_unit")), rank=pl.lit(2, pl.Int8))
    held = held.join(named, on="stay_id", how="left")
    tally.after_end += held.filter(pl.col("hours_since_admission") > pl.col("hours_in_unit")).height
    rows = pl.concat([held, starts, ends], how="diagonal")
    rows = rows.sort("stay_id", "time", "rank", "order", nulls_last=[False, False, False, True], maintain_order=True)
    return rows.rename({"stay_id": "subject_id"})


def write_metadata(source: Source, folder: Path) -> None:
    """``metadata/``: splits, every code with its unit, and what the dataset is."""
    place = folder / "metadata"
    place.mkdir()
    splits = source.stays.select(pl.col("stay_id").alias("subject_id"), "split")
    pq.write_table(splits.to_arrow().cast(_SPLITS), place / "subject_splits.parquet")
    codes = [(START, "admission to the unit", "", "last"), (END, "the end of the stay in the unit", "", "last")]
    codes += [(_text_code(name), f"a note of {name}", "", "last") for name in source.modalities("text")]
    for row in source.feature_rows:
        unit = f" in {row['unit']}" if row["unit"] else ""
        codes.append((_code(row), f"{row['name']}{unit}, of {row['modality']}", row["unit"], row["aggregate"]))
    names, descriptions, units, aggregates = zip(*codes, strict=True)
    table = [names, descriptions, [None] * len(codes), units, aggregates]
    arrays = [pa.array(column, kind) for column, kind in zip(table, _CODES.types, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=_CODES), place / "codes.parquet")
    about = {
        "dataset_name": source.manifest["release"],
        "etl_name": "trajlm export",
        "etl_version": _version(),
        "meds_version": MEDS_VERSION,
        "raw_source_id_columns": [PATIENT],
    }
    (place / "dataset.json").write_text(json.dumps(about, indent=1) + "\n")


def write_labels(source: Source, tally: Tally, folder: Path) -> None:
    """``labels/<target>/<split>.parquet``: one label per stay whose target is known."""
    last = pl.concat(tally.last_hours)
    window = pl.lit(source.manifest["settings"]["window_hours"], pl.Float64)
    stays = source.stays.join(last, on="stay_id", how="left", maintain_order="left")
    hours = pl.coalesce(pl.min_horizontal(window, "hours_in_unit"), "last", 0.0)
    stays = stays.with_columns(prediction_time=_time(hours))
    for target in source.targets:
        number = source.stays.schema[target] != pl.Int8
        column, kind = ("float_value", pa.float32()) if number else ("boolean_value", pa.bool_())
        schema = pa.schema([("subject_id", pa.int64()), ("prediction_time", pa.timestamp("us")), (column, kind)])
        value = pl.col(target) if number else pl.col(target).cast(pl.Boolean)
        place = folder / "labels" / target.removeprefix("target_")
        place.mkdir(parents=True)
        for split in SPLITS:
            mine = stays.filter(pl.col("split") == split, pl.col(target).is_not_null())
            rows = mine.select(pl.col("stay_id").alias("subject_id"), "prediction_time", value.alias(column))
            pq.write_table(rows.to_arrow().cast(schema), place / f"{split}.parquet")


def _mapping_key(target: str) -> str:
    return "length_of_stay" if target == LENGTH_OF_STAY else target.removeprefix("target_")


def mapping_yaml(source: Source) -> str:
    """The YAML that ``trajlm prepare --cohort meds`` reads this export with."""
    modalities = {}
    for modality in source.manifest["modalities"]:
        if modality["kind"] != "image":
            entry = {"codes": [f"{modality['name']}//"], **{k: modality[k] for k in ("kind", "static", "title")}}
            modalities[modality["name"]] = {**entry, "strip_prefix": modality["kind"] == "numeric"}
    mapping = {
        "stay": "subject",
        "starts": [START],
        "ends": [END],
        "deaths": [],
        "patient_column": PATIENT,
        "splits": "dataset",
        "targets": {_mapping_key(t): f"labels/{t.removeprefix('target_')}/*.parquet" for t in source.targets},
        "modalities": modalities,
    }
    return f"# {_command(source)}\n" + yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)


def _command(source: Source) -> str:
    window = source.manifest["settings"]["window_hours"]
    span = "--whole-stay" if window is None else f"--window-hours {window:g}"
    return f"trajlm prepare --cohort meds --raw . --mapping {MAPPING} {span} --out PREPARED"


def notes_on(source: Source, tally: Tally) -> list[str]:
    """What the export could not take along, counted."""
    notes = [
        f"{count} pictures of {name} are left out: MEDS has no place for them"
        for name, count in sorted(tally.pictures.items())
    ]
    if tally.late_static:
        notes.append(
            f"{tally.late_static} measurements of static modalities are later than hour 0; they are not read back"
        )
    if tally.after_end:
        notes.append(f"{tally.after_end} rows are later than the end of their stay, which the mapping does not read")
    return notes


def readme(source: Source, notes: Sequence[str]) -> str:
    """What a reader of the dataset must know."""
    invented = " The records are invented." if source.manifest["invented"] else ""
    told = "".join(f"- {note}\n" for note in notes)
    return f"""# {source.manifest["release"]}, in MEDS {MEDS_VERSION}

Written by `trajlm export` from a prepared folder; the terms of the release it came from apply.{invented}

- Every stay is a subject of its own, `subject_id` being its stay id; `{PATIENT}` names the patient, all of whose stays
  are in one split.
- Times are not calendar times: every stay begins at {ANCHOR:%Y-%m-%d %H:%M}.
- Codes are `<modality>//<feature>`, notes `<modality>//text`; `metadata/codes.parquet` holds the units.
- Labels under `labels/` stand at the end of the window or, if earlier, of the stay. Lengths of stay are hours.
{told}
Read back with

    {_command(source)}
"""


def _version() -> str:
    try:
        return metadata.version("trajlm")
    except metadata.PackageNotFoundError:
        return "not installed"
