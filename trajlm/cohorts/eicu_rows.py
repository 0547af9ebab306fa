"""Dated rows of an eICU table: which stay they belong to, when they were known, and why one may be left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import polars as pl

from trajlm.cohorts.tables import Format, Release, Select, Table
from trajlm.config import PrepareConfig
from trajlm.schema import MEASURED, SPOOLED_COLUMNS, with_measured
from trajlm.spool import Spool

STAY = "patientunitstayid"
HOURS = "hours_since_admission"
# What a row must know of its stay: minutes from admission to the unit until the patient left it, and the hospital.
STAY_ENDS = [STAY, "unit_end", "hospital_end"]

_DATE = "known_at"
_BEGUN = "begun_at"


@dataclass(frozen=True)
class EventTables:
    """Reads the tables of a release that hold dated rows, and spools their measurements.

    Attributes:
        release: where the tables lie.
        settings: ``window_hours`` and ``before_admission_hours`` say which rows count.
        spool: takes the measurements.
        stays: STAY_ENDS of the stays whose rows are wanted.
    """

    release: Release
    settings: PrepareConfig
    spool: Spool
    stays: pl.DataFrame

    def batches(self, name: str, columns: Mapping[str, Format]) -> Iterator[Table]:
        """The wanted stays' rows of a table; nothing but a note where the release lacks it.

        Args:
            name: official name, in camelCase; a file named in lower case is found too.
            columns: columns in use beside that of the stay.
        """
        ids = set(self.stays[STAY].to_list())
        select = Select(STAY, ids, "its stay is not in the cohort")
        found = self.release.batches(name, name.lower(), columns={STAY: "integer", **columns}, select=select)
        if found is None:
            self.release.notes.append(f"{name} is absent: its events are missing")
            return
        yield from found

    def dated(
        self,
        table: Table,
        frame: pl.DataFrame,
        known: pl.Expr,
        *,
        rules: Sequence[tuple[str, pl.Expr]] = (),
        begun: pl.Expr | None = None,
        measured: pl.Expr | None = None,
    ) -> pl.DataFrame:
        """Reject rows that break ``rules`` and rows outside their stay or the window; add ``HOURS`` and ``MEASURED``.

        Args:
            known: minutes from admission to the unit until the row could be known: its date, never before hour 0.
            begun: minutes until what it tells of, where that decides whether it lies before admission.
            measured: minutes until what it tells of, where that decides which of two values is the newer.
        """
        frame = frame.join(self.stays.select(STAY_ENDS), on=STAY, how="left", maintain_order="left")
        frame = frame.with_columns(known.cast(pl.Float64).alias(_DATE))
        frame = frame.with_columns((known if begun is None else begun).cast(pl.Float64).alias(_BEGUN))
        at, window = pl.col(_DATE), self.settings.window_hours
        late = pl.lit(False) if window is None else at > window * 60
        placed = [
            ("no time", at.is_null()),
            ("before admission to the unit", pl.col(_BEGUN) < -60 * self.settings.before_admission_hours),
            ("after the patient left the unit", at > pl.col("unit_end")),
            ("after discharge from the hospital or death", at > pl.col("hospital_end")),
            ("after the window", late),
        ]
        frame = self.release.screen(table, frame, [*rules, *placed])
        own = at if measured is None else measured.cast(pl.Float64)
        return frame.with_columns((pl.max_horizontal(at, 0) / 60).alias(HOURS), (own / 60).alias(MEASURED))

    def deliver(self, table: Table, kept: pl.DataFrame, rows: pl.DataFrame, modality: str) -> None:
        """Count ``kept``, the rows of the table, as kept and spool ``rows``, the measurements made of them.

        Args:
            rows: STAY, HOURS, ``feature`` and ``value``, and MEASURED where that decides which value is the newer.
        """
        self.release.ledger.keep(table.name, kept.height)
        rows = with_measured(rows).with_columns(pl.col(STAY).alias("stay_id"), pl.lit(modality).alias("modality"))
        self.spool.add_measurements(rows.select(list(SPOOLED_COLUMNS)))


def fahrenheit_to_celsius(degrees: pl.Expr) -> pl.Expr:
    """Degrees Celsius, of a column that holds some in Fahrenheit: no patient reaches 75 °C."""
    return pl.when(degrees.is_between(75, 115)).then((degrees - 32) / 1.8).otherwise(degrees)
