"""Stays of a MEDS dataset, from the rows that start and end them, and which static row stands for which stay."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.meds_files import Dataset
from trajlm.cohorts.meds_index import PATIENT, Index
from trajlm.cohorts.meds_mapping import MedsMapping
from trajlm.errors import TrajlmError
from trajlm.schema import AttritionStep

STAYS_PER_SUBJECT = 1000  # most starts of a subject; the last three digits of a stay_id count them from 1
_LARGEST_SUBJECT = (2**63 - 1) // STAYS_PER_SUBJECT - 1

NO_STAY = "subject has no stay"
LEFT_OUT = "its stay is left out"
NO_TIME = "no time"
_DEAD = "died before admission to the unit"


@dataclass(frozen=True)
class Stays:
    """Every start that begins a stay, and the fate of the rows that say so.

    Attributes:
        table: ``stay_id, subject_id, patient, start, left, died, next_start, birth, kept`` in order of subject and
            start; ``left`` is null where nothing ends the stay, ``died`` the first death of the subject whenever.
        fates: ``part, line, reason`` of every marker row and dated static row; null where it is kept.
        statics: ``part, line, stay_id``: the dated static rows that stand.
        attrition: what each rule cost.
    """

    table: pl.DataFrame
    fates: pl.DataFrame
    statics: pl.DataFrame
    attrition: tuple[AttritionStep, ...]


def find_stays(dataset: Dataset, mapping: MedsMapping, index: Index) -> Stays:
    """Stays of every subject.

    A stay runs from its start to the first end after it, if that comes before the subject's next start; with
    ``stay: subject`` from the first start to the first end, or where the mapping names no ends to the last dated row.

    Raises:
        TrajlmError: no row starts a stay, or one subject has more starts than a stay_id can count.
    """
    starts = _screened(_role(index, "start"), _start_rules(mapping))
    table = starts.filter(pl.col("reason").is_null()).sort("subject_id", "time")
    if table.is_empty():
        common = index.codes.sort("rows", "code", descending=[True, False])["code"].head(5).to_list()
        wanted = " or ".join(mapping.starts)
        raise TrajlmError(
            f"{dataset.root}: no dated row starts a stay; expected a code that begins with {wanted}, the most frequent "
            f"codes are {', '.join(common)}"
        )
    table = table.select("subject_id", PATIENT, start=pl.col("time"))
    table = table.with_columns(next_start=pl.col("start").shift(-1).over("subject_id"))
    ends, table = _with_ends(table, mapping, index)
    deaths = _first(_role(index, "death"), "not the first death of its subject")
    births = _first(_role(index, "birth"), "not the first birth of its subject")
    for name, rows in (("died", deaths), ("birth", births)):
        stands = rows.filter(pl.col("reason").is_null()).select("subject_id", pl.col("time").alias(name))
        table = table.join(stands, on="subject_id", how="left", maintain_order="left")
    table = table.with_columns(
        stay_id=_stay_ids(dataset, mapping, table),
        patient=pl.coalesce(PATIENT, pl.col("subject_id").cast(pl.String)),
        kept=(pl.col("died") >= pl.col("start")).fill_null(True),
    )
    statics, static_fates = _stand(index.statics, table)
    fates = [*(_fate(rows, table) for rows in (starts, ends, deaths, births)), static_fates]
    return Stays(table, pl.concat(fates), statics, _attrition(table))


def _role(index: Index, role: str) -> pl.DataFrame:
    rows = index.markers.filter(pl.col("role") == role)
    undated = pl.when(pl.col("time").is_null()).then(pl.lit(NO_TIME))
    return rows.with_columns(undated.alias("reason"))


def _screened(rows: pl.DataFrame, rules: list[tuple[str, pl.Expr]]) -> pl.DataFrame:
    """``rows`` with the first rule that each breaks as ``reason``; rules see only the rows that broke none before."""
    for reason, breaks in rules:
        open_rows = rows.filter(pl.col("reason").is_null())
        broken = open_rows.filter(breaks.fill_null(False)).with_columns(reason=pl.lit(reason))
        fine = open_rows.filter(~breaks.fill_null(False))
        rows = pl.concat([rows.filter(pl.col("reason").is_not_null()), broken, fine])
    return rows


def _start_rules(mapping: MedsMapping) -> list[tuple[str, pl.Expr]]:
    rules = [("repeats an earlier start of a stay", ~pl.struct("subject_id", "time").is_first_distinct())]
    if mapping.stay == "subject":
        later = pl.col("time") > pl.col("time").min().over("subject_id")
        rules.append(("not the first start of its subject", later))
    return rules


def _first(rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    later = pl.col("time") > pl.col("time").min().over("subject_id")
    return _screened(rows, [(reason, later), (reason, ~pl.col("subject_id").is_first_distinct())])


def _with_ends(table: pl.DataFrame, mapping: MedsMapping, index: Index) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The rows that end stays, and ``table`` with ``left``."""
    ends = _role(index, "end")
    if not mapping.ends:
        left = pl.when(pl.col("last") > pl.col("start")).then("last").alias("left")
        joined = table.join(index.subjects, on="subject_id", how="left", maintain_order="left")
        return ends, joined.with_columns(left).drop("last")
    dated = ends.filter(pl.col("reason").is_null()).select("subject_id", left=pl.col("time")).unique().sort("left")
    joined = table.join_asof(
        dated, left_on="start", right_on="left", by="subject_id", strategy="forward", allow_exact_matches=False,
        coalesce=False, check_sortedness=False,
    )  # fmt: skip
    beyond = pl.col("left") > pl.col("next_start")
    joined = joined.with_columns(left=pl.when(beyond.fill_null(False)).then(None).otherwise("left"))
    used = joined.filter(pl.col("left").is_not_null()).select("subject_id", time="left", ends=pl.lit(True))
    ends = ends.join(used.unique(), on=["subject_id", "time"], how="left", maintain_order="left")
    rules = [
        ("ends no stay", pl.col("ends").is_null()),
        ("repeats an earlier end of a stay", ~pl.struct("subject_id", "time").is_first_distinct()),
    ]
    return _screened(ends, rules).drop("ends"), joined


def _stay_ids(dataset: Dataset, mapping: MedsMapping, table: pl.DataFrame) -> pl.Series:
    """Ids that stay the same whatever else the dataset holds: of the subject and the ordinal of its start.

    With one stay a subject, the subject's id. Else the subject's id times ``STAYS_PER_SUBJECT`` plus the ordinal from
    1; where the subject's id is too large for that (some sites hash it), 63 bits of a hash of both.
    """
    if mapping.stay == "subject":
        return table["subject_id"].alias("stay_id")
    ordinal = pl.int_range(1, pl.len() + 1, dtype=pl.Int64).over("subject_id")
    numbered = table.select("subject_id", ordinal.alias("ordinal"))
    most = numbered.sort("ordinal").tail(1)
    if most["ordinal"][0] >= STAYS_PER_SUBJECT:
        subject, count = most["subject_id"][0], most["ordinal"][0]
        raise TrajlmError(
            f"{dataset.root}: subject {subject} has {count} starts of a stay; expected fewer than {STAYS_PER_SUBJECT}"
        )
    ids = [
        subject * STAYS_PER_SUBJECT + number if abs(subject) <= _LARGEST_SUBJECT else _hashed(subject, number)
        for subject, number in numbered.iter_rows()
    ]
    if len(set(ids)) < len(ids):
        raise TrajlmError(f"{dataset.root}: two stays take the same id; number the subjects with smaller integers")
    return pl.Series("stay_id", ids, dtype=pl.Int64)


def _hashed(subject: int, ordinal: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{subject}/{ordinal}".encode()).digest()[:8], "big") >> 1


def _fate(rows: pl.DataFrame, table: pl.DataFrame) -> pl.DataFrame:
    """``part, line, reason``: a row that stands is still left out where its subject, or its stay, is."""
    of_subject = table.group_by("subject_id").agg(any_kept=pl.col("kept").any())
    own = table.select("subject_id", "kept", time="start", own_start=True)
    own_end = table.filter(pl.col("left").is_not_null()).select("subject_id", time="left", kept_end="kept")
    joined = (
        rows.join(of_subject, on="subject_id", how="left")
        .join(own, on=["subject_id", "time"], how="left")
        .join(own_end.unique(["subject_id", "time"]), on=["subject_id", "time"], how="left")
    )
    is_start, is_end = pl.col("role") == "start", pl.col("role") == "end"
    dead = pl.when(is_start).then(pl.lit(_DEAD)).otherwise(pl.lit(LEFT_OUT))
    stands = pl.when(is_start).then("kept").when(is_end).then("kept_end").otherwise("any_kept")
    reason = (
        pl.when(pl.col("reason").is_not_null())
        .then("reason")
        .when(pl.col("any_kept").is_null())
        .then(pl.lit(NO_STAY))
        .when(~stands.fill_null(False))
        .then(dead)
    )
    return joined.select("part", LINE, reason.alias("reason"))


def _stand(statics: pl.DataFrame, table: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Of every prefix the rows of its latest time up to a stay's start, and the fate of all dated static rows."""
    kept = table.filter("kept").select("subject_id", "stay_id", "start")
    pairs = statics.join(kept, on="subject_id", how="inner", maintain_order="left")
    early = pairs.filter(pl.col("time") <= pl.col("start"))
    group = ["stay_id", "modality", "prefix"]
    chosen = early.filter(pl.col("time") == pl.col("time").max().over(group)).select("part", LINE, "stay_id")
    known = [(pairs, "with_stay"), (early, "early"), (chosen, "stands")]
    fates = statics.select("part", LINE)
    for frame, name in known:
        lines = frame.select("part", LINE).unique().with_columns(pl.lit(True).alias(name))
        fates = fates.join(lines, on=["part", LINE], how="left", maintain_order="left")
    reason = (
        pl.when(pl.col("stands"))
        .then(pl.lit(None, pl.String))
        .when(pl.col("early"))
        .then(pl.lit("static, and a later row of its prefix stands"))
        .when(pl.col("with_stay"))
        .then(pl.lit("static, but dated after admission to the unit"))
        .otherwise(pl.lit(NO_STAY))
    )
    return chosen, fates.select("part", LINE, reason.alias("reason"))


def _attrition(table: pl.DataFrame) -> tuple[AttritionStep, ...]:
    kept = table.filter("kept")
    return (
        AttritionStep("stays that the dataset's codes start", table.height, table[PATIENT].n_unique()),
        AttritionStep(_DEAD, kept.height, kept[PATIENT].n_unique()),
    )
