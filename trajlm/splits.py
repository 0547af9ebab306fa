"""Who trains, who tunes, who is held out: our own splits, and published ones read from a file."""

from __future__ import annotations

import csv
import difflib
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from trajlm.errors import UnexpectedInput
from trajlm.schema import ADMISSION_RANK, HELD_OUT, SPLITS, TRAIN, TUNING

# 14 : 3 : 3 of 20, so spread that any 7 in a row hold every split, and any run of n about 0.7 n, 0.15 n and 0.15 n.
PATTERN = tuple(
    {3: TUNING, 10: TUNING, 16: TUNING, 6: HELD_OUT, 13: HELD_OUT, 19: HELD_OUT}.get(i, TRAIN) for i in range(20)
)
RARE = 7  # a stratum of fewer patients cannot give one to every split and is pooled with the others like it
_CUSTOMARY = {
    "val": TUNING,
    "valid": TUNING,
    "validation": TUNING,
    "dev": TUNING,
    "test": HELD_OUT,
    "holdout": HELD_OUT,
}


def combination(present: Sequence[str]) -> pl.Expr:
    """The names of the modalities a stay holds, joined by ``+``; "nothing" if it holds none.

    Args:
        present: the boolean columns ``present_<modality>``.
    """
    held = [pl.when(pl.col(name)).then(pl.lit(name.removeprefix("present_"))) for name in present]
    joined = pl.concat_str(held, separator="+", ignore_nulls=True)
    return pl.when(joined == "").then(pl.lit("nothing")).otherwise(joined)


def assign_splits(stays: pl.DataFrame, seed: int) -> pl.DataFrame:
    """Split patients 70/15/15, stratified by the modalities that their first stay holds (method 4).

    Strata of fewer than ``RARE`` patients are pooled. The order of the rows does not matter.

    Args:
        stays: ``stay_id``, ``subject_id``, ``admission_rank`` and one boolean ``present_<modality>`` each.
        seed: of the order within a stratum.

    Returns:
        ``stay_id, split``, sorted by ``stay_id``; all stays of a patient share a split.
    """
    present = [name for name in stays.columns if name.startswith("present_")]
    first = stays.sort("subject_id", ADMISSION_RANK, "stay_id").unique("subject_id", keep="first", maintain_order=True)
    rare = pl.len().over("stratum") < RARE
    subjects = (
        first.select("subject_id", combination(present).alias("stratum"))
        .with_columns(rare.alias("rare"))
        .with_columns(pl.when("rare").then(pl.lit("")).otherwise("stratum").alias("stratum"))
    )
    shuffled = np.random.default_rng(seed).random(subjects.height)
    order = subjects.with_columns(pl.Series("shuffled", shuffled)).sort("rare", "stratum", "shuffled")
    split = pl.Series("split", [PATTERN[i % len(PATTERN)] for i in range(order.height)], dtype=pl.String)
    by_subject = order.select("subject_id").with_columns(split)
    return (
        stays.select("stay_id", "subject_id")
        .join(by_subject, on="subject_id")
        .select("stay_id", "split")
        .sort("stay_id")
    )


def read_splits(file: Path, stays: pl.DataFrame) -> pl.DataFrame:
    """Published splits: a CSV file, packed if ``.gz``, with the columns ``stay_id`` and ``split``, one row per stay.

    Args:
        stays: ``stay_id`` and ``subject_id`` of the cohort; the file must name exactly these stays.

    Returns:
        ``stay_id, split``, sorted by ``stay_id``.

    Raises:
        UnexpectedInput: for a file not built so, an unknown split or stay, a stay without a split, and a patient in two
            splits; with line and column.
    """
    subject_of = dict(stays.select("stay_id", "subject_id").iter_rows())
    split_of: dict[int, str] = {}
    first_of: dict[str, tuple[str, int]] = {}  # subject: split, line
    rows = _rows(file)
    named = [row["stay_id"].strip() for _, row in rows]
    strange = sum(stay.isdecimal() and int(stay) not in subject_of for stay in named)
    for line, row in rows:
        stay_id = _stay(file, line, row["stay_id"], subject_of, f"{strange} of the {len(rows)} stays it lists")
        if stay_id in split_of:
            raise UnexpectedInput(
                file, line=line, column="stay_id", expected="every stay once", came=f"{stay_id} a second time"
            )
        split = split_of[stay_id] = _split(file, line, row["split"])
        subject = subject_of[stay_id]
        earlier, at = first_of.setdefault(subject, (split, line))
        if earlier != split:
            came = f"{split} for patient {subject}, who is in {earlier} on line {at}"
            raise UnexpectedInput(file, line=line, column="split", expected="every patient in one split", came=came)
    absent = sorted(set(subject_of) - set(split_of))
    if absent:
        came = f"none for {len(absent)} of {len(subject_of)} stays, the first being {absent[0]}"
        hint = "list them too, or read fewer stays (PhysioNet 2012: --sets a)"
        raise UnexpectedInput(file, expected="a split for every stay of the cohort", came=came, hint=hint)
    return pl.DataFrame(
        {"stay_id": list(split_of), "split": list(split_of.values())}, schema={"stay_id": pl.Int64, "split": pl.String}
    ).sort("stay_id")


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    if not file.is_file():
        raise UnexpectedInput(file, expected="a CSV file with the columns stay_id and split", came="no such file")
    try:
        packed = file.read_bytes()
        text = (gzip.decompress(packed) if file.suffix == ".gz" else packed).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError):
        raise UnexpectedInput(file, expected="a CSV file in UTF-8, or one packed as .gz", came="other bytes") from None
    reader = csv.reader(text.splitlines())
    header = next(reader, [])
    if sorted(header) != ["split", "stay_id"]:
        raise UnexpectedInput(file, line=1, expected="the header stay_id,split", came=repr(",".join(header)))
    rows = []
    for fields in reader:
        if len(fields) != len(header):
            raise UnexpectedInput(file, line=reader.line_num, expected="2 fields", came=repr(",".join(fields)))
        rows.append((reader.line_num, dict(zip(header, fields, strict=True))))
    return rows


def _stay(file: Path, line: int, came: str, known: dict[int, str], strange: str) -> int:
    if not came.strip().isdecimal():
        raise UnexpectedInput(file, line=line, column="stay_id", expected="a whole number", came=repr(came))
    if int(came) not in known:
        hint = f"these records lack {strange}: read the release that was split so, or leave them out of the file"
        raise UnexpectedInput(
            file, line=line, column="stay_id", expected="a stay of the cohort", came=came.strip(), hint=hint
        )
    return int(came)


def _split(file: Path, line: int, came: str) -> str:
    if came not in SPLITS:
        nearest = _CUSTOMARY.get(came.strip().lower()) or difflib.get_close_matches(came, SPLITS, n=1, cutoff=0.0)[0]
        hint = f"the nearest is {nearest}"
        raise UnexpectedInput(file, line=line, column="split", expected=" or ".join(SPLITS), came=repr(came), hint=hint)
    return came
