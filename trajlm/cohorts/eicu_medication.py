"""Drug orders of eICU: one category per drug, dated by when it was known to be given.

Two rows in five name no drug but its code in the HICL list, and one drug has many spellings and brands. So the code
says what a drug is where there is one, by the readable names of ``eicu_drugs.csv`` for the common ones; else the name
does, without case, package, strength and form.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from trajlm.cohorts.eicu_rows import HOURS, STAY, EventTables
from trajlm.cohorts.tables import Format
from trajlm.schema import Feature

MEDICATION = "medication"
DRUGS = pl.read_csv(Path(__file__).with_name("eicu_drugs.csv"))

_COLUMNS: dict[str, Format] = {
    "drugorderoffset": "number", "drugstartoffset": "number", "drugstopoffset": "number",
    "drugordercancelled": "string", "drugname": "string", "drughiclseqno": "number",
}  # fmt: skip
_PACKAGE = r"^\W*(?:[.\d][^:]*:|[.\d][.\d,]*\s*[a-z]+\s+-\s)\s*"  # "5 ml vial : ", "20 ml  -  "
_FORMS = ["inj", "injection", "tab", "tabs", "tablet", "tablets", "cap", "caps", "capsule", "po", "oral", "iv", "ivpb",
          "im", "ij", "sc", "sl", "re", "soln", "solution", "susp", "liq", "vial", "bag", "syr", "syringe", "neb",
          "nebu", "ud", "ec", "er", "pf", "hcl", "hydrochloride", "sodium", "sod"]  # fmt: skip


def read_medication(tables: EventTables) -> list[Feature]:
    """Spool the drug orders that were not cancelled.

    An order is known when it is entered and begins when it starts: its date is the later of the two, but hour 0 if it
    began before admission to the unit and still ran then. ``paper_faithful`` dates it by its start alone.

    Returns:
        A feature for every drug met.
    """
    found: set[str] = set()
    for table in tables.batches(MEDICATION, _COLUMNS):
        frame = table.frame.with_columns(drug_feature().alias("feature"))
        rules = [
            ("cancelled order is not an administration", _said("drugordercancelled") == "yes"),
            ("names no drug", pl.col("feature").is_null()),
        ]
        known, begun = _times(tables.settings.paper_faithful)
        frame = tables.dated(table, frame, known, rules=rules, begun=begun)
        rows = frame.select(STAY, HOURS, "feature").unique(maintain_order=True).with_columns(value=pl.lit(1.0))
        found.update(rows["feature"].unique().to_list())
        tables.deliver(table, frame, rows, MEDICATION)
    if found:
        tables.release.notes.append(
            "a row of medication is an order; whether it was given, as for those as needed, is not told"
        )
    share = tables.settings.least_code_share
    return [Feature(MEDICATION, name, kind="category", least_share=share) for name in sorted(found)]


def _times(by_start: bool) -> tuple[pl.Expr, pl.Expr]:
    """Minutes from admission until an order is known to run, and minutes that tell whether it lies before admission."""
    ordered, start, stop = (pl.col(f"drug{what}offset") for what in ("order", "start", "stop"))
    known = start if by_start else pl.max_horizontal(ordered, start)
    # Zero stands where no time of stopping was recorded: such an order had not ended by admission either. Whether one
    # is ever recorded is known only later, so it must decide nothing.
    ended = (start < 0) & (stop < 0).fill_null(False)
    running = (start < 0) & ~ended
    known = pl.when(running).then(pl.max_horizontal(known, 0)).otherwise(known)
    return known, pl.when(ended).then(start).otherwise(known)


def _said(column: str) -> pl.Expr:
    return pl.col(column).str.strip_chars().str.to_lowercase()


def drug_feature() -> pl.Expr:
    """``drugname=...`` or ``drughiclseqno=...`` of a row; null where it names no drug."""
    code = pl.col("drughiclseqno").cast(pl.Int64)
    code = pl.when(code > 0).then(code)
    listed = code.replace_strict(DRUGS["drughiclseqno"], DRUGS["drug"], default=None, return_dtype=pl.String)
    name = pl.when(code.is_null()).then(plain_drug_name(pl.col("drugname"))).otherwise(listed)
    return pl.coalesce(pl.format("drugname={}", name), pl.format("drughiclseqno={}", code))


def plain_drug_name(name: pl.Expr) -> pl.Expr:
    """A drug's name without case, package, strength and form; null where no letter is left.

    >>> pl.select(plain_drug_name(pl.lit("2 ML VIAL : ONDANSETRON HCL 4 MG/2ML IJ SOLN"))).item()
    'ondansetron'
    """
    plain = name.str.to_lowercase().str.replace(_PACKAGE, "").str.replace_all(r"\([^)]*\)", " ")
    plain = plain.str.replace_all(r"[^a-z0-9%.,/&'-]+", " ").str.strip_chars(" .,/&'-")
    plain = plain.str.replace(r"\s+\.?\d.*$", "")
    plain = plain.str.replace(rf"(?:\s+(?:{'|'.join(_FORMS)}))+$", "").str.strip_chars(" .,/&'-")
    return pl.when(plain.str.contains("[a-z]")).then(plain)
