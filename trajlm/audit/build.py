"""Everything an audit says of one prepared folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajlm.audit import tables
from trajlm.audit.checks import checks_table, contradictions
from trajlm.audit.folder import Folder, read_folder


@dataclass(frozen=True)
class Audit:
    """An audit; each table is described by the function of :mod:`trajlm.audit.tables` that makes it.

    Attributes:
        leaks: open leaks in words: those the cohort names, then those found by ``checks``.
        faults: in words, what is wrong with the folder itself; empty for a sound one.
        checks: of :func:`trajlm.audit.checks.checks_table`.
        attrition: None for folders made before it was recorded.
        superseded: values for which a newer one of the same feature stands, in their event or known before; None
            where it was not recorded.
    """

    folder: Folder
    leaks: list[str]
    faults: list[str]
    checks: pl.DataFrame
    splits: pl.DataFrame
    attrition: pl.DataFrame | None
    tables: pl.DataFrame
    rejected: pl.DataFrame
    combinations: pl.DataFrame
    modalities: pl.DataFrame
    prevalence: pl.DataFrame
    hours: pl.DataFrame
    superseded: int | None


def audit_folder(prepared: Path) -> Audit:
    """Audit a prepared folder, in one pass over its events.

    Raises:
        TrajlmError: where ``prepared`` is no prepared folder, or a file of it is damaged.
    """
    folder = read_folder(prepared)
    manifest, checks = folder.manifest, checks_table(folder)
    made: dict[str, Any] = {
        "splits": tables.splits_table(folder),
        "attrition": tables.attrition_table(manifest),
        "tables": tables.tables_table(manifest),
        "rejected": tables.rejected_table(folder),
        "combinations": tables.combinations_table(folder),
        "modalities": tables.modalities_table(folder),
        "prevalence": tables.prevalence_table(folder.stays),
    }
    found = [(f"{count:,} {what}", leak) for what, count, leak in checks.iter_rows() if count]
    return Audit(
        folder=folder,
        leaks=[*manifest.get("open_leaks", []), *(said for said, leak in found if leak)],
        faults=[*(said for said, leak in found if not leak), *contradictions(manifest, **made)],
        checks=checks,
        hours=tables.hours_table(folder.stays),
        superseded=manifest.get("superseded_measurements"),
        **made,
    )
