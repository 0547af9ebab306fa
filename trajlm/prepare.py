"""A raw release to a prepared folder: read, split, fit on the training split, audit, write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import polars as pl
from tqdm import tqdm

from trajlm.cohorts import SYNTHETIC_MARK, load_cohort
from trajlm.cohorts.ledger import RowLedger
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError
from trajlm.grouping import Catalogue, LeftOut, fit_features, left_out_note, merge_statistics
from trajlm.locks import locked
from trajlm.schema import (
    ADMISSION_RANK,
    MORTALITY,
    SCORE_PREFIX,
    SPLITS,
    TRAIN,
    FittedFeature,
    RawTimelines,
)
from trajlm.shards import Grouping, Shard, Writing, over_shards, plan_shards
from trajlm.splits import assign_splits, combination, read_splits
from trajlm.spool import Spool

_Part = TypeVar("_Part")
# Where files lie is not what they hold, whose sums are compared; how the work is shared changes nothing.
_FREE = ("raw", "splits", "notes_folder", "images_folder", "mapping", "processes")


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
        if _listings(settings, out) == earlier["raw_listing"] and all(path.is_file() for path in listed):
            _require_same_inputs(_inputs(settings, listed), earlier, out)
            _require_whole(earlier, out)
            tqdm.write(f"{out}: already prepared")
            return
    with locked(out):
        _replace_whole(settings, out, earlier)


def _replace_whole(settings: PrepareConfig, out: Path, earlier: dict[str, Any] | None) -> None:
    """Prepare beside ``out``, and put it there when all of it is written."""
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
    place = Path(settings.raw or "")
    cohort = load_cohort(settings.cohort, place)
    stages.next(f"reading {settings.raw}")
    ledger = RowLedger(folder / "rejected", settings.rejected_rows)
    spool = Spool(folder / "spool")
    raw: RawTimelines = cohort.read(place, settings, ledger, spool)
    files = [Path(name) for name in raw.inputs]
    if earlier is not None:
        _require_same_inputs(_inputs(settings, files), earlier, out)
        return None
    summing = ThreadPoolExecutor(1)  # reading gigabytes once more need not wait for the work, nor the work for it
    inputs = summing.submit(_inputs, settings, files)
    summing.shutdown(wait=False)
    bin_hours = cohort.DEFAULT_BIN_HOURS if settings.bin_hours is None else settings.bin_hours
    stages.next("splitting patients")
    counts = spool.counts()
    stays = _split(raw, settings, counts)
    folded = _fold(raw, settings, folder, bin_hours, stays, plan_shards(spool, counts, stays["stay_id"]), stages)
    stays = _with_presence(raw, stays, folded.held)
    stages.next("writing the manifest")
    stays.write_parquet(folder / "stays.parquet")
    (folder / "features.json").write_text(_features_json(folded.fitted))
    manifest = {
        "cohort": settings.cohort,
        "release": raw.release,
        "invented": (place / SYNTHETIC_MARK).is_file(),
        "trajlm_version": _version(),
        "settings": dataclasses.asdict(settings),
        "bin_hours": bin_hours,
        "inputs": inputs.result(),
        "splits_sha256": _splits_sum(settings),
        "raw_listing": _listings(settings, out),
        "split_source": "own" if settings.splits is None and raw.splits is None else "published",
        "tables": ledger.close(),
        "attrition": [dataclasses.asdict(step) for step in raw.attrition],
        "modalities": [dataclasses.asdict(modality) for modality in raw.modalities],
        **_audit(raw, stays, folded.events),
        "superseded_measurements": folded.superseded,
        "bytes": _sizes(folder),
        "open_leaks": list(raw.open_leaks),
        "notes": [*raw.notes, *folded.notes],
    }
    shutil.rmtree(spool.folder, ignore_errors=True)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    stages.next("done")
    return manifest


@dataclass(frozen=True)
class _Folded:
    """What the two passes over the shards leave: events on disk, and this."""

    fitted: list[FittedFeature]
    held: pl.DataFrame
    events: Counter[tuple[str, str]]
    superseded: int
    notes: list[str]


def _fold(
    raw: RawTimelines,
    settings: PrepareConfig,
    folder: Path,
    bin_hours: float,
    stays: pl.DataFrame,
    shards: list[Shard],
    stages: _Stages,
) -> _Folded:
    """Spooled rows to ``events/*.parquet``: group and count every shard, fit, then write every shard."""
    catalogue = Catalogue(raw.modalities, raw.features)
    train_ids = stays.filter(pl.col("split") == TRAIN)["stay_id"]
    (folder / "events").mkdir()
    with over_shards(settings.processes) as spread:
        stages.next(f"grouping the measurements of {stays.height:,} stays")
        group = Grouping(catalogue, bin_hours, stays["stay_id"], train_ids)
        grouped = stages.each(spread(group, shards), len(shards))
        stages.next("fitting features on the training split")
        statistics = merge_statistics(part for part, _ in grouped)
        fitted = fit_features(catalogue, statistics, len(train_ids))
        stages.next("writing events")
        write = Writing(catalogue, fitted, stays.select("stay_id", "split"), folder / "events")
        written = stages.each(spread(write, shards), len(shards))
    superseded = sum(lost for _, lost in grouped)
    lost = LeftOut(sum(w.left_out.measurements for w in written), sum(w.left_out.events for w in written))
    notes = left_out_note(catalogue, fitted, lost)
    if superseded:
        notes.append(
            f"{superseded} measurements were superseded by a newer one of the same feature, in their event or known "
            "before"
        )
    held = pl.concat(w.held for w in written)
    return _Folded(fitted, held, sum((w.events for w in written), Counter()), superseded, notes)


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

    def each(self, parts: Iterable[_Part], count: int) -> list[_Part]:
        """Collect the parts of a stage, telling how many are done."""
        done = []
        for part in parts:
            done.append(part)
            self._bar.set_postfix_str(f"{len(done)} of {count} shards")
        self._bar.set_postfix_str("")
        return done

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _split(raw: RawTimelines, settings: PrepareConfig, counts: pl.DataFrame) -> pl.DataFrame:
    """``raw.stays`` with their split, sorted by stay; strata are told from everything the release holds."""
    if settings.splits is not None:
        splits = read_splits(Path(settings.splits), raw.stays)
    elif raw.splits is not None:
        splits = raw.splits
    else:
        splits = assign_splits(_with_presence(raw, raw.stays, counts), settings.seed)
    if not splits["split"].is_in([TRAIN]).any():
        raise TrajlmError("no stay is in the training split: there is nothing to fit")
    stays = raw.stays.join(splits, on="stay_id").sort("stay_id")
    if stays.height != raw.stays.height:
        raise ValueError(f"{raw.stays.height - stays.height} stays have no split")
    return stays


def _with_presence(raw: RawTimelines, stays: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Columns in the order of the contract: identity, ``present_<modality>``, targets, scores."""
    held = items.select("stay_id", "modality").unique()
    present = [
        pl.col("stay_id")
        .is_in(held.filter(pl.col("modality") == m.name)["stay_id"].implode())
        .alias(f"present_{m.name}")
        for m in raw.modalities
    ]
    targets = [name for name in stays.columns if name.startswith(("target_", SCORE_PREFIX))]
    rank = [] if "split" in stays.columns else [ADMISSION_RANK]
    split = ["split"] if "split" in stays.columns else []
    return stays.select("stay_id", "subject_id", *split, *rank, "hours_in_unit", *present, *targets)


def _audit(raw: RawTimelines, stays: pl.DataFrame, events: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Counts by split, read from what is written."""
    present = [f"present_{m.name}" for m in raw.modalities]
    binary = [c for c in stays.columns if c.startswith("target_") and stays.schema[c] == pl.Int8]
    audit: dict[str, Any] = {k: {} for k in ("stays", "patients", "events", "combinations", "prevalence")}
    for split in SPLITS:
        mine = stays.filter(pl.col("split") == split)
        held = mine.select(combination(present).alias("held"))["held"].value_counts()
        audit["stays"][split] = mine.height
        audit["patients"][split] = mine["subject_id"].n_unique()
        audit["events"][split] = {m.name: events[split, m.name] for m in raw.modalities}
        audit["combinations"][split] = dict(held.sort(["count", "held"], descending=[True, False]).iter_rows())
        audit["prevalence"][split] = {target: _prevalence(mine[target].drop_nulls()) for target in binary}
    return audit


def _prevalence(known: pl.Series) -> dict[str, float | int | None]:
    positive = int(known.sum())
    return {"known": len(known), "positive": positive, "prevalence": positive / len(known) if len(known) else None}


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


def _listings(settings: PrepareConfig, out: Path) -> str:
    """SHA-256 over the names under the folders of the release: a file added there may be one that would be read."""
    places = (settings.raw or "", settings.notes_folder, settings.images_folder)
    return hashlib.sha256("\n".join(_listing(Path(p), out) for p in places if p is not None).encode()).hexdigest()


def _listing(raw: Path, out: Path) -> str:
    base = _base(raw)
    found = base.rglob("*") if raw.is_dir() else base.glob("*")
    names = [p.relative_to(base) for p in found if not Path(os.path.abspath(p)).is_relative_to(out)]
    shown = sorted(n.as_posix() for n in names if not any(part.startswith(".") for part in n.parts))
    return "\n".join(shown)


def _earlier(out: Path) -> dict[str, Any] | None:
    """The manifest that ``out`` holds already."""
    if (out / "manifest.json").is_file():
        try:
            manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
            return {
                **manifest,
                **{key: manifest[key] for key in ("settings", "inputs", "splits_sha256", "raw_listing", "bytes")},
            }
        except (ValueError, KeyError, TypeError):
            raise TrajlmError(f"{out}/manifest.json is not one of ours; name another --out or remove {out}") from None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrajlmError(f"{out} exists and is not a prepared folder; name another --out or remove it")
    return None


def _require_same_settings(settings: PrepareConfig, earlier: dict[str, Any], out: Path) -> None:
    for name, value in dataclasses.asdict(settings).items():
        before = earlier["settings"].get(name)
        if name not in _FREE and value != before:
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


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every table of a prepared folder, by its place in it."""
    tables = sorted(path for path in folder.rglob("*.parquet") if "spool" not in path.relative_to(folder).parts)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in tables}


def _require_whole(earlier: dict[str, Any], out: Path) -> None:
    found = _sizes(out)
    for name, size in earlier["bytes"].items():
        if found.get(name) != size:
            came = "is gone" if name not in found else f"has {found[name]} bytes, not the {size} written"
            raise TrajlmError(f"{out}: {name} {came}; remove {out} and prepare it again")


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
