"""Notes of MIMIC-IV-Note: radiology reports and discharge summaries, cleaned and dated."""

from __future__ import annotations

import re

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.mimic_links import HOURS, KNOWN, Timing, link_by_time, within_stay
from trajlm.cohorts.mimic_places import has_column
from trajlm.cohorts.tables import Format, Release, Table
from trajlm.spool import Spool

RADIOLOGY_NOTE, DISCHARGE_NOTE = "radiology_note", "discharge_note"
AFTER_OUTCOME = "written after the outcome of the stay is known (prepare.discharge_notes is off)"

_COLUMNS: dict[str, Format] = {"subject_id": "integer", "hadm_id": "integer", "charttime": "time", "text": "text"}
_HEADER = re.compile(
    r"^[^\S\n]*(name|unit no|admission date|discharge date|date of birth)[^\S\n]*:.*$", re.IGNORECASE | re.MULTILINE
)
# The mark of undecodable bytes, control characters other than white space, zero-width and private-use characters.
_BROKEN = re.compile(
    "[\ufffd\x00-\x08\x0e-\x1b\x7f\x80-\x84\x86-\x9f\u200b-\u200f\u2028\u2029\u2060\ufeff\ue000-\uf8ff]"
)


def clean_note(text: str) -> str:
    """Lower case, without identifying header lines and broken characters, white space squeezed (paper, App. B).

    Punctuation and stop words stay: language models were trained with them.
    """
    text = _BROKEN.sub("", text)
    text = _HEADER.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return " ".join(text.lower().split())


def read_notes(
    release: Release, stays: pl.DataFrame, timing: Timing, modality: str, spool: Spool, *, wanted: bool = True
) -> tuple[int, int]:
    """Spool the notes of one modality, of all kept stays; an absent table is noted in the release.

    Args:
        release: the folder in which the tables of MIMIC-IV-Note lie.
        stays: STAY_WINDOW of :mod:`trajlm.cohorts.mimic_links`.
        timing: which notes count, and when.
        modality: ``radiology_note`` or ``discharge_note``.
        spool: gets the documents.
        wanted: False rejects every note with the reason that it was written after the outcome.

    Returns:
        Notes kept, and how many of them do not say when they were stored.

    Raises:
        UnexpectedInput: the table is not what a release holds.
    """
    name = modality.removesuffix("_note")
    stored = timing.available and wanted and has_column(release, name, "storetime")
    batches = release.batches(name, columns={**_COLUMNS, "storetime": "time"} if stored else _COLUMNS)
    if batches is None:
        release.notes.append(f"{name} of MIMIC-IV-Note is absent: no {modality}")
        return 0, 0
    kept = unstored = 0
    for table in batches:
        if not wanted:
            release.screen(table, table.frame, [(AFTER_OUTCOME, pl.col(LINE).is_not_null())])
            continue
        if table.frame.is_empty():
            continue
        frame = _screened(release, table, stays, timing)
        release.ledger.keep(table.name, frame.height)
        kept += frame.height
        unstored += frame["storetime"].null_count() if stored else frame.height
        dated = frame.select("stay_id", hours_since_admission=HOURS, modality=pl.lit(modality), text="cleaned")
        spool.add_documents(dated)
    return kept, unstored


def _screened(release: Release, table: Table, stays: pl.DataFrame, timing: Timing) -> pl.DataFrame:
    frame = release.screen(table, table.frame, [("no time", pl.col("charttime").is_null())])
    frame = link_by_time(timing.known(frame, "charttime"), stays, KNOWN, timing.before_hours)
    frame = within_stay(release, table, frame, timing, "charttime", "no ICU stay of this admission")
    cleaned = pl.Series("cleaned", [clean_note(text or "") for text in frame["text"]], pl.String)
    nothing = [("nothing left after cleaning", pl.col("cleaned") == "")]
    return release.screen(table, frame.with_columns(cleaned), nothing)
