"""Notes of MIMIC-IV-Note: radiology reports and discharge summaries, cleaned and dated."""

from __future__ import annotations

import re

import polars as pl

from trajlm.cohorts.ledger import LINE
from trajlm.cohorts.mimic_links import HOURS, link_by_time, within_stay
from trajlm.cohorts.mimic_tables import Format, Release
from trajlm.schema import DOCUMENT_COLUMNS, conform, empty

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


def read_notes(release: Release, stays: pl.DataFrame, modality: str, *, wanted: bool = True) -> pl.DataFrame:
    """DOCUMENT_COLUMNS of the notes of one modality, of all kept stays; an absent table is noted in the release.

    Args:
        stays: STAY_WINDOW of :mod:`trajlm.cohorts.mimic_links`.
        modality: ``radiology_note`` or ``discharge_note``.
        wanted: False rejects every note with the reason that it was written after the outcome.

    Raises:
        UnexpectedInput: the table is not what a release holds.
    """
    place = f"note/{modality.removesuffix('_note')}"
    table = release.table(place, columns=_COLUMNS)
    if table is None:
        release.notes.append(f"{place} is absent: no {modality}")
        return empty(DOCUMENT_COLUMNS)
    rules = [("no time", pl.col("charttime").is_null())]
    if not wanted:
        rules = [(AFTER_OUTCOME, pl.lit(True))]
    frame = release.screen(table, table.frame, rules)
    frame = link_by_time(frame, stays, "charttime")
    frame = within_stay(release, table, frame, "charttime", "no ICU stay of this admission")
    cleaned = pl.Series("cleaned", [clean_note(text or "") for text in frame["text"]], pl.String)
    frame = release.screen(
        table, frame.with_columns(cleaned), [("nothing left after cleaning", pl.col("cleaned") == "")]
    )
    release.ledger.keep(table.name, frame.height)
    frame = frame.sort("stay_id", HOURS, LINE).select(
        stay_id="stay_id", hours_since_admission=HOURS, modality=pl.lit(modality), text="cleaned"
    )
    return conform(frame, DOCUMENT_COLUMNS, modality)
