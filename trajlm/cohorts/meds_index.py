"""A first, narrow pass over the shards of a MEDS dataset: its codes, the rows that make stays, and its order checked.

Whether a code has values, where stays start and end and which static rows stand cannot be told from a row alone;
events are read in a second pass. What is kept in memory grows with subjects, stays and distinct codes, not with rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.meds_files import DATA, Dataset, Part, batches, refuse
from trajlm.cohorts.meds_mapping import MedsMapping
from trajlm.errors import TrajlmError, UnexpectedInput

PATIENT = "patient"
_NARROW = {name: DATA[name] for name in ("subject_id", "time", "code", "numeric_value")}
_WHERE = {"part": pl.Int32(), LINE: pl.Int64(), "subject_id": pl.Int64(), "time": pl.Datetime("us")}
_CODES = {"code": pl.Categorical(), "role": pl.String(), "modality": pl.String(), "prefix": pl.String(),
          "mapped": pl.Boolean(), "static": pl.Boolean()}  # fmt: skip
# Share of a code's rows that must have a value for it to be a quantity: by a stray one all its other rows would go.
LEAST_VALUED = 0.1
_COUNTS = {"code": pl.Categorical(), "rows": pl.Int64(), "valued": pl.Int64()}


@dataclass(frozen=True)
class Index:
    """What the first pass found.

    Attributes:
        codes: ``code, role, modality, prefix, mapped, static, rows, valued, continuous`` of every distinct code;
            ``modality`` is null where the mapping leaves the code out or (not ``mapped``) does not know it; ``valued``
            counts its rows with a numeric value, and it is ``continuous`` where they are ``LEAST_VALUED`` of all.
        markers: ``part, line, subject_id, time, role, patient`` of the rows that start or end a stay or a life.
        statics: ``part, line, subject_id, time, modality, prefix`` of the dated rows of static modalities.
        subjects: ``subject_id, last`` of every subject, ``last`` being its last dated row.
    """

    codes: pl.DataFrame
    markers: pl.DataFrame
    statics: pl.DataFrame
    subjects: pl.DataFrame


def read_index(dataset: Dataset, mapping: MedsMapping) -> Index:
    """Read subject, time and code of every row.

    Raises:
        UnexpectedInput: a row without subject or code; a subject whose rows are not together, not in order of time, or
            in two shards, which the standard rules out.
    """
    further = [] if mapping.patient_column is None else [mapping.patient_column]
    gathered = _Gathered(mapping)
    subjects = []
    for number, part in enumerate(dataset.shards):
        order = _Order(part)
        for frame in batches(part, _NARROW, further):
            for column in ("subject_id", "code"):
                refuse(part, frame, pl.col(column).is_null(), column, "one in every row", "nothing")
            order.add(frame)
            gathered.add(number, frame)
        subjects.append(order.subjects().with_columns(part=pl.lit(number, pl.Int32)))
    known = pl.concat(subjects)
    twice = known.filter(~pl.col("subject_id").is_first_distinct()).head(1)
    if twice.height:
        subject = twice["subject_id"][0]
        first, second = known.filter(pl.col("subject_id") == subject)["part"].head(2)
        came = f"subject {subject} also in {dataset.shards[first].name}"
        raise UnexpectedInput(dataset.shards[second].path, expected="every subject in one shard", came=came)
    if known.is_empty():
        raise TrajlmError(f"{dataset.root}: the shards under data hold no row")
    return gathered.index(known.drop("part"))


class _Order:
    """Checks that the rows of a subject are together and in order of time, batch after batch."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._runs: list[pl.DataFrame] = []
        self._last: list[pl.DataFrame] = []
        self._dated: pl.DataFrame | None = None

    def add(self, frame: pl.DataFrame) -> None:
        """Take the next rows of the shard."""
        if frame.is_empty():
            return
        begins = pl.col("subject_id") != pl.col("subject_id").shift(1)
        self._runs.append(frame.filter(begins.fill_null(True)).select(LINE, "subject_id"))
        dated = frame.filter(pl.col("time").is_not_null()).select(LINE, "subject_id", "time")
        self._last.append(dated.group_by("subject_id").agg(last=pl.col("time").max()))
        if self._dated is not None:
            dated = pl.concat([self._dated, dated])
        same = pl.col("subject_id") == pl.col("subject_id").shift(1)
        back = same & (pl.col("time") < pl.col("time").shift(1))
        refuse(self._part, dated, back, "time", "the rows of a subject in order of time")
        self._dated = dated.tail(1)

    def subjects(self) -> pl.DataFrame:
        """``subject_id, last``, once the shard is read."""
        empty = pl.DataFrame(schema={LINE: pl.Int64, "subject_id": pl.Int64})
        runs = pl.concat([empty, *self._runs])
        runs = runs.filter((pl.col("subject_id") != pl.col("subject_id").shift(1)).fill_null(True))
        again = ~pl.col("subject_id").is_first_distinct()
        refuse(self._part, runs, again, "subject_id", "the rows of a subject together")
        nothing = pl.DataFrame(schema={"subject_id": pl.Int64, "last": pl.Datetime("us")})
        last = pl.concat([nothing, *self._last]).group_by("subject_id").agg(pl.col("last").max())
        return runs.select("subject_id").join(last, on="subject_id", how="left", maintain_order="left")


class _Gathered:
    """Codes, markers and dated static rows, batch after batch."""

    def __init__(self, mapping: MedsMapping) -> None:
        self._mapping = mapping
        self._codes = pl.DataFrame(schema=_CODES)
        self._counts = pl.DataFrame(schema=_COUNTS)
        self._markers = [pl.DataFrame(schema={**_WHERE, "role": pl.String(), PATIENT: pl.String()})]
        self._statics = [pl.DataFrame(schema={**_WHERE, "modality": pl.String(), "prefix": pl.String()})]

    def add(self, number: int, frame: pl.DataFrame) -> None:
        """Take rows of the shard of this number."""
        counts = frame.group_by("code").agg(
            rows=pl.len().cast(pl.Int64), valued=pl.col("numeric_value").count().cast(pl.Int64)
        )
        new = counts.join(self._codes, on="code", how="anti")["code"]
        self._codes = pl.concat([self._codes, self._classified(new.to_list())])
        total = pl.concat([self._counts, counts.select(list(_COUNTS))])
        self._counts = total.group_by("code").agg(pl.col("rows", "valued").sum())
        where = frame.with_columns(part=pl.lit(number, pl.Int32))
        here = self._codes.join(counts, on="code", how="semi")
        roles = here.filter(pl.col("role").is_not_null()).select("code", "role")
        column = self._mapping.patient_column
        patient = pl.lit(None, pl.String) if column is None else pl.col(column)
        self._markers.append(
            where.join(roles, on="code", maintain_order="left").select(*_WHERE, "role", patient.alias(PATIENT))
        )
        statics = here.filter("static", pl.col("role").is_null()).select("code", "modality", "prefix")
        dated = where.filter(pl.col("time").is_not_null())
        self._statics.append(
            dated.join(statics, on="code", maintain_order="left").select(*_WHERE, "modality", "prefix")
        )

    def _classified(self, codes: list[str]) -> pl.DataFrame:
        rows = []
        for code in codes:
            role, place = self._mapping.roles.find(code), self._mapping.modality_codes.find(code)
            prefix, modality = place or (None, None)
            static = modality is not None and self._mapping.modalities[modality].static
            rows.append((code, role[1] if role else None, modality, prefix, place is not None, static))
        return pl.DataFrame(rows, schema=_CODES, orient="row")

    def index(self, subjects: pl.DataFrame) -> Index:
        """All that was taken."""
        codes = self._codes.join(self._counts, on="code", how="left").cast({"code": pl.String}).sort("code")
        enough = (pl.col("valued") > 0) & (pl.col("valued") >= LEAST_VALUED * pl.col("rows"))
        codes = codes.with_columns(enough.alias("continuous"))
        return Index(codes, pl.concat(self._markers), pl.concat(self._statics), subjects)
