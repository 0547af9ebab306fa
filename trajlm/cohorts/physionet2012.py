"""PhysioNet/CinC Challenge 2012: the first 48 hours of ICU stays, one small text file per stay.

Releases read: sets a, b and c, each an archive (``set-a.tar.gz``, ``.tgz``, ``.zip``) or a folder ``set-a`` of
``NNNNNN.txt``, with ``Outcomes-a.txt`` beside it where the release has one.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from trajlm.cohorts.ledger import LINE, RowLedger
from trajlm.cohorts.physionet2012_files import RecordSet, find_sets, read_records, split_lines
from trajlm.cohorts.physionet2012_variables import (
    ADMISSION_WEIGHT,
    AMOUNTS,
    BY_CUFF,
    CODES,
    DESCRIPTORS,
    FEATURES,
    MODALITIES,
    PARAMETERS,
    feature_table,
)
from trajlm.config import PrepareConfig
from trajlm.errors import UnexpectedInput
from trajlm.schema import (
    ADMISSION_RANK,
    LENGTH_OF_STAY,
    MEASUREMENT_COLUMNS,
    MORTALITY,
    STAY_COLUMNS,
    AttritionStep,
    RawTimelines,
    conform,
)
from trajlm.spool import Spool

DEFAULT_BIN_HOURS = 0.0
RECORDED_HOURS = 48.0  # stays shorter than this are not in the release, and nothing later is recorded

RAW_COLUMNS = ("Time", "Parameter", "Value")
SCORES = {"SAPS-I": "score_saps_i", "SOFA": "score_sofa"}  # where the outcomes file has them; -1 is unknown
OUTCOME_COLUMNS = ("RecordID", "Length_of_stay", "In-hospital_death")


@dataclass(frozen=True)
class _Set:
    """One set, read: its stays and measurements, and what a user should know of it."""

    stays: pl.DataFrame
    measurements: pl.DataFrame
    inputs: tuple[str, ...]
    notes: tuple[str, ...]


def read(raw: Path, settings: PrepareConfig, ledger: RowLedger, spool: Spool) -> RawTimelines:
    """Read the sets that ``settings.sets`` names, or every one found.

    Args:
        raw: folder that holds the sets, or one set's folder or archive.
        settings: ``sets`` and ``window_hours`` are respected.
        ledger: gets one table per set (``set-a``) and per outcomes file (``Outcomes-a``).
        spool: gets the measurements.

    Raises:
        UnexpectedInput: with file, line and column, where a file is not built as the release's are.
    """
    sources = find_sets(Path(raw), settings.sets)
    read_sets = [_read_set(source, settings, ledger) for source in sources]
    stays = pl.concat([one.stays for one in read_sets])
    twice = stays.filter(pl.col("stay_id").is_duplicated())
    if twice.height:
        stay_id = int(twice["stay_id"][0])
        raise UnexpectedInput(raw, expected="every RecordID in one set only", came=f"record {stay_id} in two sets")
    notes = [note for one in read_sets for note in one.notes]
    notes.append(f"hours_in_unit is {RECORDED_HOURS:g} for every stay: the least the release states and all it records")
    by_cuff = ", ".join(f"{cuff} as {name}" for cuff, name in BY_CUFF.items())
    notes.append(f"a pressure is one feature, by cuff or by a line in an artery: {by_cuff}")
    notes.append(f"{LENGTH_OF_STAY} counts days in hospital, from the outcomes file; the release has none for the unit")
    for one in read_sets:
        spool.add_measurements(one.measurements)
    return RawTimelines(
        release="PhysioNet/CinC Challenge 2012, " + ", ".join(source.name for source in sources),
        modalities=MODALITIES,
        features=FEATURES,
        stays=stays.sort("stay_id"),
        inputs=tuple(path for one in read_sets for path in one.inputs),
        open_leaks=(
            "laboratory and blood gas values stand at the time the release gives them; it does not tell whether the "
            "result was known by then",
        ),
        notes=tuple(notes),
        attrition=(AttritionStep("records in the sets read", stays.height, stays["subject_id"].n_unique()),),
    )


def _read_set(source: RecordSet, settings: PrepareConfig, ledger: RowLedger) -> _Set:
    records = read_records(source)
    rows = _rows(source, split_lines(source.place, records.files))
    ledger.read(source.name, rows.height)
    measured = _screen(source.name, rows, settings.window_hours, ledger)
    names_stay = pl.col("Parameter") == "RecordID"
    ledger.keep(source.name, measured.height)
    measurements = measured.filter(~names_stay).select(
        "stay_id",
        (pl.col("minute") / 60).alias("hours_since_admission"),
        "modality",
        "feature",
        pl.when(pl.col("category")).then(1.0).otherwise(pl.col("number")).alias("value"),
    )
    ids = pl.DataFrame({"stay_id": sorted(records.stay_ids)}, schema={"stay_id": pl.Int64})
    targets, outcome_notes = _outcomes(source, ids, ledger)
    stays = targets.select(
        "stay_id",
        pl.format("stay-{}", "stay_id").alias("subject_id"),
        pl.lit(RECORDED_HOURS).alias("hours_in_unit"),
        MORTALITY,
        LENGTH_OF_STAY,
        pl.lit(0, dtype=pl.Int64).alias(ADMISSION_RANK),
        *SCORES.values(),
    )
    inputs = records.inputs if source.outcomes is None else (*records.inputs, str(source.outcomes))
    described = pl.col("modality") == MODALITIES[0].name
    bare = ids.height - measurements.filter(~described)["stay_id"].n_unique()
    notes = [f"{source.name}: {note}" for note in (*records.notes, *outcome_notes)]
    notes.append(f"{source.name}: {bare} stays hold nothing beyond descriptors and stay in the cohort")
    scores = dict.fromkeys(SCORES.values(), pl.Float64())
    stays = conform(stays, {**STAY_COLUMNS, ADMISSION_RANK: pl.Int64(), **scores}, source.name)
    return _Set(stays, conform(measurements, MEASUREMENT_COLUMNS, source.name), inputs, tuple(notes))


def _fault(
    where: Path, rows: pl.DataFrame, broken: pl.Expr, column: str, expected: str, hint: str | None = None
) -> None:
    """Raise for the first row that is broken (a null counts as broken)."""
    first = rows.filter(broken.fill_null(True)).head(1)
    if first.height:
        row = first.row(0, named=True)
        came = repr(row[column])
        raise UnexpectedInput(
            where / row["file"], line=row[LINE], column=column, expected=expected, came=came, hint=hint
        )


def _table(where: Path, lines: pl.DataFrame, header: tuple[str, ...]) -> pl.DataFrame:
    """Split lines at commas into the header's columns; header lines are checked and left out."""
    first = pl.col(LINE) == 1
    odd = lines.filter(first & (pl.col("text") != ",".join(header))).head(1)
    if odd.height:
        file, text = odd.select("file", "text").row(0)
        raise UnexpectedInput(where / file, line=1, expected=f"the header {','.join(header)}", came=repr(text))
    rows = lines.filter(~first).with_columns(pl.col("text").str.count_matches(",", literal=True).alias("commas"))
    ragged = rows.filter(pl.col("commas") != len(header) - 1).head(1)
    if ragged.height:
        file, line, text = ragged.select("file", LINE, "text").row(0)
        raise UnexpectedInput(where / file, line=line, expected=f"{len(header)} fields", came=repr(text))
    split = pl.col("text").str.split_exact(",", len(header) - 1).struct.rename_fields(list(header)).alias("fields")
    return rows.select("file", "stay_id", LINE, split).unnest("fields")


def _rows(source: RecordSet, lines: pl.DataFrame) -> pl.DataFrame:
    """Every row of the set below the headers, checked: ``stay_id, file, line``, the raw columns, minute and number."""
    where = source.place
    rows = _table(where, lines, RAW_COLUMNS).with_columns(
        (pl.col("Time").str.slice(0, 2).cast(pl.Int32, strict=False) * 60).alias("minute")
        + pl.col("Time").str.slice(3, 2).cast(pl.Int32, strict=False),
        pl.col("Value").cast(pl.Float64, strict=False).alias("number"),
    )
    named = rows.filter(pl.col("Parameter") != "")
    _fault(where, rows, ~pl.col("Time").str.contains(r"^\d\d:[0-5]\d$"), "Time", "a time HH:MM")
    unknown = ~pl.col("Parameter").is_in(PARAMETERS)
    strange = named.filter(unknown).head(1)
    nearest = difflib.get_close_matches(strange["Parameter"][0], PARAMETERS, 1, 0.0)[0] if strange.height else ""
    _fault(where, named, unknown, "Parameter", "a parameter of the release", f"the nearest is {nearest}")
    _fault(where, named, ~pl.col("number").is_finite(), "Value", "a number")
    ids = named.filter(pl.col("Parameter") == "RecordID")
    _fault(where, ids, pl.col("number") != pl.col("stay_id"), "Value", "the RecordID that names the file")
    nameless = lines.filter(pl.col(LINE) == 1).join(ids, on="stay_id", how="anti").head(1)
    if nameless.height:
        raise UnexpectedInput(where / nameless["file"][0], expected="a row RecordID that names the stay", came="none")
    return rows


def _screen(table: str, rows: pl.DataFrame, window_hours: float | None, ledger: RowLedger) -> pl.DataFrame:
    """Reject what the release is known to hold that no stay should; the rows left name their feature."""
    parameter, admitted = pl.col("Parameter"), pl.col("minute") == 0
    key = (
        pl.when((parameter == "Weight") & admitted)
        .then(pl.lit(ADMISSION_WEIGHT))
        .when(parameter.is_in(CODES))
        .then(pl.format("{}={}", parameter, "number"))
        .otherwise(parameter)
    )
    rows = rows.with_columns(key.alias("key")).join(feature_table(), on="key", how="left", maintain_order="left")
    raw = ("file", *RAW_COLUMNS)
    only_at_admission = [name for name in DESCRIPTORS if name != "Weight"]
    missing = parameter.is_in(DESCRIPTORS) & admitted & (pl.col("number") == -1)
    late = pl.lit(False) if window_hours is None else pl.col("minute") > window_hours * 60
    rules = [
        ("no parameter named", parameter == ""),
        ("descriptor missing (-1)", missing),
        ("descriptor dated after admission", parameter.is_in(only_at_admission) & ~admitted),
        ("code unknown to the release", parameter.is_in(CODES) & pl.col("feature").is_null()),
    ]
    rows = ledger.screen(table, rows, rules, raw)
    in_range = ~pl.col("category") & ~pl.col("number").is_between("low", "high")
    for (name, low, high), group in rows.filter(in_range).group_by("Parameter", "low", "high", maintain_order=True):
        ledger.reject(table, group.select(LINE, *raw), f"impossible value: {name} outside {low:g} to {high:g}")
    again = pl.struct("stay_id", "minute", "key").is_last_distinct() | pl.col("Parameter").is_in(AMOUNTS)
    rows = rows.filter(~in_range.fill_null(False))
    rows = ledger.screen(table, rows, [(f"later than the window of {window_hours} h", late)], raw)
    rows = ledger.screen(table, rows, [("same parameter and minute: a later row of the file stands", ~again)], raw)
    doubled = parameter.is_in(BY_CUFF) & (pl.len().over("stay_id", "minute", "modality", "feature") > 1)
    return ledger.screen(table, rows, [("pressure by cuff in a minute that tells it by line too", doubled)], raw)


def _outcomes(source: RecordSet, ids: pl.DataFrame, ledger: RowLedger) -> tuple[pl.DataFrame, list[str]]:
    """``stay_id`` with both targets and the severity scores, for every stay of the set, and notes."""
    if source.outcomes is None:
        nothing = [pl.lit(None, pl.Int8).alias(MORTALITY), pl.lit(None, pl.Float64).alias(LENGTH_OF_STAY)]
        nothing += [pl.lit(None, pl.Float64).alias(name) for name in SCORES.values()]
        return ids.with_columns(nothing), [f"no {source.outcomes_name} beside it, so no targets"]
    where, file = source.outcomes.parent, source.outcomes.name
    lines = split_lines(where, {file: (0, source.outcomes.read_bytes())})
    header = tuple(lines["text"][0].split(","))
    for column in OUTCOME_COLUMNS:
        if column not in header:
            came = f"the header {','.join(header)}"
            raise UnexpectedInput(source.outcomes, line=1, column=column, expected="a column of this name", came=came)
    table = _table(where, lines, header).drop("stay_id")
    days, death = (pl.col(name).cast(pl.Float64, strict=False) for name in OUTCOME_COLUMNS[1:])
    stay_id = pl.col("RecordID").cast(pl.Int64, strict=False)
    _fault(where, table, stay_id.is_null() | stay_id.is_duplicated(), "RecordID", "a whole number, once")
    _fault(where, table, ~death.is_in([0.0, 1.0]), "In-hospital_death", "0 or 1")
    _fault(where, table, ~((days >= 0) & days.is_finite() | (days == -1)), "Length_of_stay", "days, or -1 for unknown")
    points = {raw: pl.col(raw).cast(pl.Float64, strict=False) for raw in SCORES if raw in header}
    for raw, value in points.items():
        _fault(where, table, ~((value >= 0) & value.is_finite() | (value == -1)), raw, "points, or -1 for unknown")
    scores = [pl.when(points[raw] >= 0).then(points[raw]).alias(score) if raw in points
              else pl.lit(None, pl.Float64).alias(score) for raw, score in SCORES.items()]  # fmt: skip
    name = f"Outcomes-{source.letter}"
    ledger.read(name, table.height)
    known = table.with_columns(stay_id.alias("stay_id")).join(ids, on="stay_id", how="semi")
    ledger.keep(name, known.height)
    stray = table.filter(~stay_id.is_in(ids["stay_id"].implode()))
    ledger.reject(name, stray.select(LINE, *header), "no record of this RecordID in the set")
    absent = ids.join(known, on="stay_id", how="anti")
    if absent.height:
        came = f"none for {absent.height} of {ids.height} records, the first being {absent['stay_id'][0]}"
        raise UnexpectedInput(source.outcomes, expected="a row for every record of the set", came=came)
    hours = pl.when(days >= 0).then(days * 24).alias(LENGTH_OF_STAY)
    targets = ids.join(known, on="stay_id", how="left", maintain_order="left")
    targets = targets.select("stay_id", death.cast(pl.Int8).alias(MORTALITY), hours, *scores)
    return targets, [f"{targets[LENGTH_OF_STAY].null_count()} stays have no known length of stay (-1)"]
