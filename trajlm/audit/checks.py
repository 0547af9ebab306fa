"""Whether a prepared folder is sound, and whether its manifest tells of the files that lie beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from trajlm.audit.folder import ALL, Folder
from trajlm.schema import SPLITS

_ROUNDING_HOURS = 1e-6


def checks_table(folder: Folder) -> pl.DataFrame:
    """check (what is counted), found (0 is sound), leak (a model could read the answer there, as against damage)."""
    stays, held = folder.stays, folder.held
    dated = held.join(stays.select("stay_id", "hours_in_unit"), on="stay_id")
    after_unit = dated.filter(pl.col("last_hour") > pl.col("hours_in_unit") + _ROUNDING_HOURS)
    several = stays.group_by("subject_id").agg(pl.col("split").n_unique() > 1)["split"].sum()
    rows = [
        ("patients in more than one split", several, True),
        ("stays with events after they left the unit", _stays(after_unit), True),
        ("stays in no split", stays.height - int(stays["split"].is_in(SPLITS).sum()), False),
        ("stay ids that stand twice", stays.height - _stays(stays), False),
        ("stays with events that stays.parquet lacks", _stays(held.join(stays, on="stay_id", how="anti")), False),
        ("stays whose presence flags contradict their events", _flagged_wrongly(folder), False),
        ("stays with events before admission to the unit", _stays(held.filter(pl.col("first_hour") < 0)), False),
    ]  # fmt: skip
    window = folder.manifest.get("settings", {}).get("window_hours")
    if window is not None:
        late = held.filter(pl.col("last_hour") > window + _ROUNDING_HOURS)
        rows.insert(2, (f"stays with events after the window of {window:g} hours", _stays(late), True))
    return pl.DataFrame(rows, schema={"check": pl.String, "found": pl.Int64, "leak": pl.Boolean}, orient="row")


def _stays(frame: pl.DataFrame) -> int:
    return frame["stay_id"].n_unique()


def _flagged_wrongly(folder: Folder) -> int:
    key = ["stay_id", "modality"]
    flags = folder.stays.select("stay_id", *(pl.col(f"present_{name}").alias(name) for name in folder.modalities))
    flagged = flags.unpivot(index="stay_id", variable_name="modality", value_name="present").filter("present")
    known = folder.held.join(folder.stays, on="stay_id", how="semi")
    sides = flagged.join(known, on=key, how="anti"), known.join(flagged, on=key, how="anti")
    return _stays(pl.concat([side.select(key) for side in sides]))


def contradictions(
    manifest: dict[str, Any],
    splits: pl.DataFrame,
    attrition: pl.DataFrame | None,
    tables: pl.DataFrame,
    rejected: pl.DataFrame,
    combinations: pl.DataFrame,
    modalities: pl.DataFrame,
    prevalence: pl.DataFrame,
) -> list[str]:
    """Each figure of the manifest that the files tell otherwise, in words; what it does not state is not asked for."""
    stays = dict(splits.select("split", "stays").iter_rows())
    patients = dict(splits.select("split", "patients").iter_rows())
    pairs = [(f"{name} of {split}", manifest.get(name, {}).get(split), counted[split])
             for name, counted in (("stays", stays), ("patients", patients)) for split in SPLITS]  # fmt: skip
    pairs += [
        (
            f"{row['modality']} events of {row['split']}",
            _at(manifest, "events", row["split"], row["modality"]),
            row["events"],
        )
        for row in modalities.iter_rows(named=True)
    ]
    for split in SPLITS:
        told = manifest.get("combinations", {}).get(split)
        if told is not None:
            counted = {name: n for name, n in combinations.select("combination", split).iter_rows() if n}
            names = sorted({*told, *counted})
            pairs += [(f"stays of {split} with {name}", told.get(name, 0), counted.get(name, 0)) for name in names]
    for row in prevalence.iter_rows(named=True):
        told = _at(manifest, "prevalence", row["split"], row["target"]) or {}
        pairs += [
            (f"{row['target']} {name} of {row['split']}", told.get(name), row[name]) for name in ("known", "positive")
        ]
    if attrition is not None and attrition.height:
        pairs.append(("stays left after the last rule", attrition["stays"][-1], stays[ALL]))
    pairs += _rows(manifest, tables, rejected)
    return [f"the manifest says {told:,} {what}, the files say {counted:,}" for what, told, counted in pairs
            if told is not None and told != counted]  # fmt: skip


def _at(manifest: dict[str, Any], *keys: str) -> Any:
    found: Any = manifest
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _rows(manifest: dict[str, Any], tables: pl.DataFrame, rejected: pl.DataFrame) -> Iterator[tuple[str, int, int]]:
    """Rows of raw tables; of rejected ones no more are stored per reason than the settings allow."""
    for name, read, kept, lost in tables.iter_rows():
        yield f"rows of {name} read", read, kept + lost
        reasons = rejected.filter(pl.col("table") == name)
        yield f"rows of {name} rejected", lost, int(reasons["rows"].sum())
    most = manifest.get("settings", {}).get("rejected_rows")
    kept = pl.col("rows") if most is None else pl.col("rows").clip(upper_bound=most)
    for (name,), own in rejected.with_columns(told=kept).group_by("table", maintain_order=True):
        told, counted = int(own["told"].sum()), int(own["stored"].sum())
        yield f"rejected rows of {name} to be stored", told, counted
        if told == counted:
            for reason, one, other in own.select("reason", "told", "stored").iter_rows():
                yield f"rejected rows of {name} to be stored for {reason!r}", one, other
