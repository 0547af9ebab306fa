"""The second pass over a MEDS dataset: every row to its modality and its stay, or rejected with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.meds_files import DATA, Dataset, Part, batches
from trajlm.cohorts.meds_index import Index
from trajlm.cohorts.meds_mapping import MedsMapping
from trajlm.cohorts.meds_stays import LEFT_OUT, NO_STAY, Stays
from trajlm.cohorts.meds_targets import CLOSES, hours_between
from trajlm.cohorts.tables import storable
from trajlm.config import PrepareConfig
from trajlm.schema import DOCUMENT_COLUMNS, MEASUREMENT_COLUMNS
from trajlm.spool import Spool

UNMAPPED, UNWANTED = "code is mapped to no modality", "code is left out by the mapping"
BEFORE, AFTER_DEATH, AFTER_STAY = "before admission to the unit", "after death", "after the patient left the unit"
AFTER_PREDICTION, AFTER_WINDOW = "after the prediction time", "after the window"

_PLACED = [LINE, "stay_id", "hours_since_admission", "code_index", "numeric_value", "text_value"]


# What becomes of a code's rows.
_ROLE, _UNMAPPED, _UNWANTED, _CONTINUOUS, _CATEGORY, _TEXT = range(6)


def _place() -> pl.Expr:
    unknown, unwanted = ~pl.col("mapped"), pl.col("modality").is_null()
    place = (
        pl.when(pl.col("role").is_not_null()).then(_ROLE).when(unknown).then(_UNMAPPED).when(unwanted).then(_UNWANTED)
    )
    place = place.when(pl.col("kind") == "text").then(_TEXT).when("continuous").then(_CONTINUOUS)
    return place.otherwise(_CATEGORY).cast(pl.Int8)


@dataclass
class EventReader:
    """Reads the shards once more and spools what belongs to a stay.

    Attributes:
        codes: of the index, one row per code, with ``code_index``, ``feature`` (its name) and ``place``.
        table: the stays, with ``closes``, in order of subject and start.
        used: ``code_index`` of every code that gave a measurement.
    """

    dataset: Dataset
    mapping: MedsMapping
    settings: PrepareConfig
    spool: Spool
    index: Index
    stays: Stays
    table: pl.DataFrame
    used: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        stripped = [name for name, modality in self.mapping.modalities.items() if modality.strip_prefix]
        rest = pl.col("code").str.slice(pl.col("prefix").str.len_chars())
        kinds = {name: modality.kind for name, modality in self.mapping.modalities.items()}
        self.codes = self.index.codes.with_columns(
            pl.int_range(pl.len(), dtype=pl.Int64).alias("code_index"),
            pl.when(pl.col("modality").is_in(stripped)).then(rest).otherwise("code").alias("feature"),
            pl.col("modality").replace_strict(kinds, default=None, return_dtype=pl.String).alias("kind"),
        ).with_columns(_place().alias("place"))
        window = self.settings.window_hours
        span = pl.lit(None, pl.Duration("us")) if window is None else pl.duration(microseconds=round(window * 3.6e9))
        if self.mapping.prediction_time == "ignored":
            self.table = self.table.with_columns(pl.lit(None, pl.Datetime("us")).alias(CLOSES))
        ends = ["died", "left", CLOSES]
        self._stays = self.table.select(
            "subject_id", "stay_id", "start", "kept", *ends, window_end=pl.col("start") + span
        )
        self._kept = self._stays.filter("kept")

    def read(self) -> None:
        """Read every shard; the ledger gets every row, the spool what is kept."""
        wanted = self.codes.select("code", "code_index", "place", "static").cast({"code": pl.Categorical})
        for number, part in enumerate(self.dataset.shards):
            fates = self.stays.fates.filter(pl.col("part") == number).drop("part")
            statics = self.stays.statics.filter(pl.col("part") == number).drop("part")
            for frame in batches(part, DATA):
                self.dataset.ledger.read(part.table, frame.height)
                rows = frame.join(wanted, on="code", how="left", maintain_order="left")
                rows = self._settled(part, rows, fates)
                placed = [self._standing(rows, statics), self._undated(part, rows), self._dated(part, rows)]
                self._spool(part, pl.concat(placed))

    def _screen(self, part: Part, rows: pl.DataFrame, rules: Sequence[tuple[str, pl.Expr]]) -> pl.DataFrame:
        return self.dataset.screen(part, rows, list(DATA), rules)

    def _settled(self, part: Part, rows: pl.DataFrame, fates: pl.DataFrame) -> pl.DataFrame:
        """Rows that may be events: neither settled by the first pass, nor unwanted, nor without content."""
        place, value = pl.col("place"), pl.col("numeric_value")
        early = (place == _ROLE) | (pl.col("static") & pl.col("time").is_not_null())
        settled = rows.filter(early).join(fates, on=LINE, how="left", maintain_order="left")
        for reason in settled["reason"].drop_nulls().unique().sort():
            self.dataset.reject(part, settled.filter(pl.col("reason") == reason), list(DATA), reason)
        settled = settled.filter(pl.col("reason").is_null()).drop("reason")
        self.dataset.ledger.keep(part.table, settled.filter(place == _ROLE).height)
        rows = pl.concat([settled.filter(place != _ROLE), rows.filter(~early)])
        rows = self._screen(part, rows, [
            (UNMAPPED, place == _UNMAPPED),
            (UNWANTED, place == _UNWANTED),
            ("no numeric value, of a code that has them elsewhere", (place == _CONTINUOUS) & value.is_null()),
            ("value is not finite", (place == _CONTINUOUS) & ~storable(value)),
        ])  # fmt: skip
        texts = rows.filter(place == _TEXT)
        if texts.is_empty():
            return rows
        text = pl.col("text_value")
        blank = texts.filter(text.is_null() | (text.str.strip_chars() == ""))[LINE]
        return self._screen(part, rows, [("no text", pl.col(LINE).is_in(blank.implode()))])

    def _standing(self, rows: pl.DataFrame, statics: pl.DataFrame) -> pl.DataFrame:
        """Dated rows of static modalities, at hour 0 of the stays they stand for."""
        dated = rows.filter("static", pl.col("time").is_not_null())
        joined = dated.join(statics, on=LINE, how="inner", maintain_order="left")
        return joined.with_columns(hours_since_admission=pl.lit(0.0)).select(_PLACED)

    def _undated(self, part: Part, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows without time, at hour 0 of every stay of their subject."""
        undated = rows.filter(pl.col("time").is_null())
        staying = self._kept["subject_id"].unique().implode()
        undated = self._screen(part, undated, [(NO_STAY, ~pl.col("subject_id").is_in(staying))])
        stays = self._kept.select("subject_id", "stay_id")
        joined = undated.join(stays, on="subject_id", how="inner", maintain_order="left_right")
        return joined.with_columns(hours_since_admission=pl.lit(0.0)).select(_PLACED)

    def _dated(self, part: Part, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows in a stay: of the last one begun by then, while it is open."""
        rows = rows.filter(pl.col("time").is_not_null(), ~pl.col("static"))
        within = rows.join_asof(
            self._stays, left_on="time", right_on="start", by="subject_id", coalesce=False, check_sortedness=False
        )
        ended = (pl.col("time") > pl.min_horizontal("died", "left")).fill_null(False)
        outside = pl.col("stay_id").is_null() | ended
        early = self._just_before(within.filter(outside).select(rows.columns))
        staying = self._stays["subject_id"].unique().implode()
        if early.height:
            within = within.filter(~pl.col(LINE).is_in(early[LINE].implode()))
        time = pl.col("time")
        within = self._screen(part, within, [
            (NO_STAY, ~pl.col("subject_id").is_in(staying)),
            (BEFORE, pl.col("stay_id").is_null()),
            (LEFT_OUT, ~pl.col("kept")),
            (AFTER_DEATH, time > pl.col("died")),
            (AFTER_STAY, time > pl.col("left")),
            (AFTER_PREDICTION, time > pl.col(CLOSES)),
            (AFTER_WINDOW, time > pl.col("window_end")),
        ])  # fmt: skip
        placed = within.with_columns(hours_since_admission=hours_between("start", "time")).select(_PLACED)
        return pl.concat([early.select(_PLACED), placed])

    def _just_before(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows in no stay that the next one takes, at its hour 0."""
        tolerance = round(self.settings.before_admission_hours * 3.6e9)
        if not tolerance:
            rows = rows.clear()
        joined = rows.join_asof(
            self._kept.select("subject_id", "stay_id", "start"), left_on="time", right_on="start", by="subject_id",
            strategy="forward", coalesce=False, check_sortedness=False,
        )  # fmt: skip
        close = (pl.col("start") - pl.col("time")) <= pl.duration(microseconds=tolerance)
        return joined.filter(close).with_columns(hours_since_admission=pl.lit(0.0))

    def _spool(self, part: Part, placed: pl.DataFrame) -> None:
        self.dataset.ledger.keep(part.table, placed[LINE].n_unique())
        names = self.codes.select("code_index", "modality", "feature", "place")
        rows = placed.join(names, on="code_index", how="left", maintain_order="left")
        texts = rows.filter(pl.col("place") == _TEXT).select(*list(DOCUMENT_COLUMNS)[:3], text="text_value")
        numbers = rows.filter(pl.col("place") != _TEXT)
        self.used.update(numbers["code_index"].unique().to_list())
        value = pl.when(pl.col("place") == _CONTINUOUS).then("numeric_value").otherwise(1.0).alias("value")
        self.spool.add_measurements(numbers.with_columns(value).select(list(MEASUREMENT_COLUMNS)))
        self.spool.add_documents(texts)
