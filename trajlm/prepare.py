"""A raw release to a prepared folder: read, split, fit on the training split, audit, write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
from tqdm import tqdm

from trajlm.cohorts import SYNTHETIC_MARK, load_cohort
from trajlm.cohorts.ledger import RowLedger
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError
from trajlm.grouping import build_events, fit_features, group_measurements
from trajlm.schema import ADMISSION_RANK, MORTALITY, PHENOTYPE_PREFIX, SPLITS, TRAIN, FittedFeature, RawTimelines
from trajlm.splits import assign_splits, combination, read_splits

ROW_GROUP_EVENTS = 50_000
_PATHS = ("raw", "splits")  # where files lie is not what they hold: contents are compared by their sums


def prepare(settings: PrepareConfig, out: Path) -> None:
    """Write the prepared folder of a release (contract of :mod:`trajlm.schema`).

    Everything is written to a hidden folder beside ``out`` that takes its name in the end, so that ``out`` is whole or
    absent whatever happens. A folder that was made from the same files with the same settings is left as it is.

    Raises:
        TrajlmError: for files that are not what the cohort expects, and for an ``out`` that holds anything else.
    """
    out = Path(os.path.abspath(out))
    if settings.raw is None:
        raise TrajlmError("prepare.raw is not set: name the folder of the release, --raw DIR")
    raw_place, earlier = Path(settings.raw), _earlier(out)
    if earlier is not None:
        _require_same_settings(settings, earlier, out)
        listed = [_resolve(raw_place, name) for name in earlier["inputs"]]
        if _listing(raw_place, out) == earlier["raw_listing"] and all(path.is_file() for path in listed):
            _require_same_inputs(_inputs(settings, listed), earlier, out)
            tqdm.write(f"{out}: already prepared")
            return
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _write(settings, partial, out, earlier)
        if manifest is None:
            tqdm.write(f"{out}: already prepared")
            return
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    tqdm.write(summary(manifest))
    tqdm.write(f"{out}: prepared")


def _write(settings: PrepareConfig, folder: Path, out: Path, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Write all that a prepared folder holds and return its manifest; None where ``earlier`` came of the same files."""
    with _Stages(6) as stages:
        return _write_stages(settings, folder, out, earlier, stages)


def _write_stages(
    settings: PrepareConfig, folder: Path, out: Path, earlier: dict[str, Any] | None, stages: _Stages
) -> dict[str, Any] | None:
    cohort = load_cohort(settings.cohort)
    invented = (Path(settings.raw or "") / SYNTHETIC_MARK).is_file()
    if settings.cohort == "synthetic" and not invented:
        raise TrajlmError(
            f"{settings.raw} holds no {SYNTHETIC_MARK}, so `trajlm synthesize` did not write it; for records of "
            "MIMIC-IV use --cohort mimic"
        )
    stages.next(f"reading {settings.raw}")
    ledger = RowLedger(folder / "rejected")
    raw: RawTimelines = cohort.read(Path(settings.raw or ""), settings, ledger)
    inputs = _inputs(settings, [Path(name) for name in raw.inputs])
    if earlier is not None:
        _require_same_inputs(inputs, earlier, out)
        return None
    bin_hours = cohort.DEFAULT_BIN_HOURS if settings.bin_hours is None else settings.bin_hours
    stages.next(f"grouping {raw.measurements.height:,} measurements of {raw.stays.height:,} stays")
    cells = group_measurements(raw, bin_hours)
    stages.next("splitting patients")
    stays = _split(raw, settings)
    stages.next("fitting features on the training split")
    fitted = fit_features(raw, cells, stays.filter(pl.col("split") == TRAIN)["stay_id"])
    stages.next("building events")
    events, left_out = build_events(raw, cells, fitted)
    stays = _with_presence(raw, stays, events)
    stages.next(f"writing {events.height:,} events")
    (folder / "events").mkdir()
    events.write_parquet(folder / "events" / "part-00000.parquet", row_group_size=ROW_GROUP_EVENTS)
    stays.write_parquet(folder / "stays.parquet")
    (folder / "features.json").write_text(_features_json(fitted))
    notes = [*raw.notes, *([left_out] if left_out else []), *_superseded(raw, cells)]
    manifest = {
        "cohort": settings.cohort,
        "release": raw.release,
        "invented": invented,
        "trajlm_version": _version(),
        "settings": dataclasses.asdict(settings),
        "bin_hours": bin_hours,
        "inputs": inputs,
        "splits_sha256": _splits_sum(settings),
        "raw_listing": _listing(Path(settings.raw or ""), out),
        "split_source": "own" if settings.splits is None else "published",
        "tables": ledger.close(),
        "modalities": [dataclasses.asdict(modality) for modality in raw.modalities],
        **_audit(raw, stays, events),
        "open_leaks": list(raw.open_leaks),
        "notes": notes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    stages.next("done")
    return manifest


class _Stages:
    """A progress bar over named stages."""

    def __init__(self, count: int) -> None:
        self._bar = tqdm(total=count, desc="starting", unit="stage")
        self._begun = False

    def next(self, what: str) -> None:
        """Begin a stage."""
        if self._begun:
            self._bar.update()
        self._begun = True
        self._bar.set_description(what)

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _split(raw: RawTimelines, settings: PrepareConfig) -> pl.DataFrame:
    """``raw.stays`` with their split, sorted by stay; strata are told from everything the release holds."""
    items = [frame.select("stay_id", "modality") for frame in (raw.measurements, raw.documents, raw.images)]
    stays = _with_presence(raw, raw.stays, pl.concat(items))
    if settings.splits is None:
        splits = assign_splits(stays, settings.seed)
    else:
        splits = read_splits(Path(settings.splits), stays)
    if not splits["split"].is_in([TRAIN]).any():
        raise TrajlmError("no stay is in the training split: there is nothing to fit")
    return raw.stays.join(splits, on="stay_id").sort("stay_id")


def _with_presence(raw: RawTimelines, stays: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Columns in the order of the contract: identity, ``present_<modality>``, targets."""
    held = items.select("stay_id", "modality").unique()
    present = [
        pl.col("stay_id")
        .is_in(held.filter(pl.col("modality") == m.name)["stay_id"].implode())
        .alias(f"present_{m.name}")
        for m in raw.modalities
    ]
    targets = [name for name in stays.columns if name.startswith("target_")]
    rank = [] if "split" in stays.columns else [ADMISSION_RANK]
    split = ["split"] if "split" in stays.columns else []
    return stays.select("stay_id", "subject_id", *split, *rank, "hours_in_unit", *present, *targets)


def _audit(raw: RawTimelines, stays: pl.DataFrame, events: pl.DataFrame) -> dict[str, Any]:
    """Counts by split, read from what is written."""
    present = [f"present_{m.name}" for m in raw.modalities]
    binary = [c for c in stays.columns if c == MORTALITY or c.startswith(PHENOTYPE_PREFIX)]
    audit: dict[str, Any] = {k: {} for k in ("stays", "patients", "events", "combinations", "prevalence")}
    for split in SPLITS:
        mine = stays.filter(pl.col("split") == split)
        counts = dict(events.join(mine, on="stay_id", how="semi")["modality"].value_counts().iter_rows())
        held = mine.select(combination(present).alias("held"))["held"].value_counts()
        audit["stays"][split] = mine.height
        audit["patients"][split] = mine["subject_id"].n_unique()
        audit["events"][split] = {m.name: counts.get(m.name, 0) for m in raw.modalities}
        audit["combinations"][split] = dict(held.sort(["count", "held"], descending=[True, False]).iter_rows())
        audit["prevalence"][split] = {target: _prevalence(mine[target].drop_nulls()) for target in binary}
    return audit


def _prevalence(known: pl.Series) -> dict[str, float | int | None]:
    positive = int(known.sum())
    return {"known": len(known), "positive": positive, "prevalence": positive / len(known) if len(known) else None}


def _superseded(raw: RawTimelines, cells: pl.DataFrame) -> list[str]:
    lost = raw.measurements.height - cells.height
    return [f"{lost} measurements were superseded by a later one of the same feature and event"] if lost else []


def _features_json(fitted: list[FittedFeature]) -> str:
    return json.dumps({"features": [dataclasses.asdict(feature) for feature in fitted]}, indent=1) + "\n"


def _version() -> str:
    try:
        return metadata.version("trajlm")
    except metadata.PackageNotFoundError:
        return "not installed"


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _base(raw: Path) -> Path:
    return raw if raw.is_dir() else raw.parent


def _resolve(raw: Path, name: str) -> Path:
    return _base(raw) / name


def _inputs(settings: PrepareConfig, files: Iterable[Path]) -> dict[str, str]:
    """Name from the raw folder to SHA-256, of every file read."""
    base = _base(Path(settings.raw or ""))
    return {Path(os.path.relpath(file, base)).as_posix(): _sum(file) for file in sorted(set(files))}


def _splits_sum(settings: PrepareConfig) -> str | None:
    if settings.splits is None:
        return None
    if not Path(settings.splits).is_file():
        raise TrajlmError(f"prepare.splits: {settings.splits} is not a file")
    return _sum(Path(settings.splits))


def _listing(raw: Path, out: Path) -> str:
    """SHA-256 over the names under the raw folder: a file added there may be one that would be read."""
    base = _base(raw)
    found = base.rglob("*") if raw.is_dir() else base.glob("*")
    names = [p.relative_to(base) for p in found if not Path(os.path.abspath(p)).is_relative_to(out)]
    shown = sorted(n.as_posix() for n in names if not any(part.startswith(".") for part in n.parts))
    return hashlib.sha256("\n".join(shown).encode()).hexdigest()


def _earlier(out: Path) -> dict[str, Any] | None:
    """The manifest that ``out`` holds already."""
    if (out / "manifest.json").is_file():
        try:
            manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
            return {
                **manifest,
                **{key: manifest[key] for key in ("settings", "inputs", "splits_sha256", "raw_listing")},
            }
        except (ValueError, KeyError, TypeError):
            raise TrajlmError(f"{out}/manifest.json is not one of ours; name another --out or remove {out}") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrajlmError(f"{out} exists and is not a prepared folder; name another --out or remove it")
    return None


def _require_same_settings(settings: PrepareConfig, earlier: dict[str, Any], out: Path) -> None:
    for name, value in dataclasses.asdict(settings).items():
        before = earlier["settings"].get(name)
        if name not in _PATHS and value != before:
            raise _differs(out, f"{name} was {json.dumps(before)} and is now {json.dumps(value)}")
    if _splits_sum(settings) != earlier["splits_sha256"]:
        raise _differs(out, "the file of splits is another")


def _require_same_inputs(inputs: dict[str, str], earlier: dict[str, Any], out: Path) -> None:
    for name in sorted({*inputs, *earlier["inputs"]}):
        now, before = inputs.get(name), earlier["inputs"].get(name)
        if now != before:
            raise _differs(
                out, f"{name} " + ("is new" if before is None else "is gone" if now is None else "has changed")
            )


def _differs(out: Path, what: str) -> TrajlmError:
    return TrajlmError(f"{out} was prepared differently: {what}; name another --out or remove it")


def summary(manifest: dict[str, Any]) -> str:
    """A few lines to print: rows by table, stays and prevalence by split, stays that hold each modality."""
    lines = [f"{'table':<24}{'read':>12}{'kept':>12}{'rejected':>12}"]
    for table, rows in manifest["tables"].items():
        lines.append(f"{table:<24}{rows['read']:>12,}{rows['kept']:>12,}{rows['rejected']:>12,}")
    lines.append(f"{'':<24}" + "".join(f"{split:>12}" for split in SPLITS))
    lines.append(f"{'stays':<24}" + "".join(f"{manifest['stays'][split]:>12,}" for split in SPLITS))
    for modality in manifest["modalities"]:
        name = modality["name"]
        counts = [
            sum(n for held, n in manifest["combinations"][split].items() if name in held.split("+")) for split in SPLITS
        ]
        lines.append(f"{'  with ' + name:<24}" + "".join(f"{count:>12,}" for count in counts))
    shares = [manifest["prevalence"][split].get(MORTALITY, {}).get("prevalence") for split in SPLITS]
    told = ["unknown" if share is None else f"{share:.1%}" for share in shares]
    return "\n".join([*lines, f"{'mortality':<24}" + "".join(f"{share:>12}" for share in told)])
