"""Where MIMIC-IV, MIMIC-IV-Note and MIMIC-CXR-JPG lie on a researcher's disk.

Downloads nest (``physionet.org/files/mimiciv/3.1/``) and the three are separate projects. Each is looked for in the
folder that the user names and then below it; the one found is used and noted, several are an error that names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from trajlm.cohorts.tables import SUFFIXES, Release
from trajlm.config import PrepareConfig
from trajlm.errors import TrajlmError

NOTE_TABLES = ("discharge", "radiology")

_LEVELS = 5  # physionet.org/files/mimic-cxr-jpg/2.1.0 below the folder that is named, and one more
_PATIENTS_AND_STUDIES = re.compile(r"[ps]\d+")  # the hundred thousand folders of MIMIC-CXR-JPG hold no table
_METADATA = re.compile(r"(mimic-cxr-[\d.]+-metadata)(?:\.csv|\.csv\.gz|\.parquet)")
_ANCHORS = ("icu/icustays", "hosp/patients", "core/patients")


def find_release(raw: Path) -> Path:
    """The folder that holds ``icu/`` and ``hosp/`` (or ``core/``): ``raw``, or the only such folder below it.

    Raises:
        TrajlmError: ``raw`` is no folder, holds no release, or several.
    """
    if not raw.is_dir():
        came = "a file" if raw.exists() else "no folder"
        raise TrajlmError(f"{raw}: expected the folder of a MIMIC-IV release, came {came}")
    found = _only(raw, lambda folder: any(_table(folder / anchor) for anchor in _ANCHORS), "releases of MIMIC-IV")
    if found is not None:
        return found
    wanted = " or ".join(f"{anchor}.csv[.gz]" for anchor in _ANCHORS)
    beside = any(_table(raw.resolve().parent / anchor) for anchor in _ANCHORS)
    hint = f"name the folder above it, {raw.resolve().parent}" if beside else "is this the folder of MIMIC-IV?"
    raise TrajlmError(f"{raw}: expected {wanted}, came no such file; {hint}")


def find_notes(raw: Path, root: Path, settings: PrepareConfig) -> Path | None:
    """The folder in which the tables of MIMIC-IV-Note lie; None where there is none.

    Raises:
        TrajlmError: ``settings.notes_folder`` holds no such table, or several folders do.
    """

    def holds(folder: Path) -> bool:
        return any(_table(folder / name) for name in NOTE_TABLES)

    what = "folders of MIMIC-IV-Note"
    if settings.notes_folder is None:
        return root / "note" if holds(root / "note") else _only(raw, holds, what)
    return _named(
        settings.notes_folder, holds, what, "prepare.notes_folder", "discharge.csv[.gz] or radiology.csv[.gz]"
    )


def find_images(raw: Path, root: Path, settings: PrepareConfig) -> tuple[Path, str] | None:
    """The folder of MIMIC-CXR-JPG and its metadata table's name without suffix; None where there is none.

    Raises:
        TrajlmError: ``settings.images_folder`` holds no such table, or there are several.
    """

    def holds(folder: Path) -> bool:
        return bool(_metadata(folder))

    what = "folders of MIMIC-CXR-JPG"
    if settings.images_folder is None:
        found = root / "cxr" if holds(root / "cxr") else _only(raw, holds, what)
    else:
        wanted = "mimic-cxr-2.0.0-metadata.csv[.gz]"
        found = _named(settings.images_folder, holds, what, "prepare.images_folder", wanted)
    if found is None:
        return None
    names = _metadata(found)
    if len(names) > 1:
        raise TrajlmError(f"{found} holds {' and '.join(names)}; keep the one that is to be read")
    return found, names[0]


def has_column(release: Release, place: str, column: str) -> bool:
    """Whether a table exists and names a column, whatever its case."""
    batches = release.batches(place, columns={})
    if batches is None:
        return False
    header = next(batches).raw
    return column in {name.strip().lower() for name in header}


def _table(place: Path) -> bool:
    return any(place.with_name(place.name + suffix).is_file() for suffix in SUFFIXES)


def _metadata(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted({found[1] for path in folder.iterdir() if (found := _METADATA.fullmatch(path.name))})


def _named(name: str, holds: Callable[[Path], bool], what: str, setting: str, wanted: str) -> Path:
    folder = Path(name)
    found = _only(folder, holds, what) if folder.is_dir() else None
    if found is None:
        came = "no such file in it or below" if folder.is_dir() else "no folder"
        raise TrajlmError(f"{setting} {folder}: expected a folder with {wanted}, came {came}")
    return found


def _only(top: Path, holds: Callable[[Path], bool], what: str) -> Path | None:
    """``top`` itself where it holds what is looked for, else the only folder below it that does."""
    if holds(top):
        return top
    found = list(_below(top, holds, _LEVELS))
    if len(found) > 1:
        shown = ", ".join(str(folder) for folder in found[:4]) + (", ..." if len(found) > 4 else "")
        raise TrajlmError(f"{top} holds {len(found)} {what}: {shown}; name the one to read")
    return found[0] if found else None


def _below(top: Path, holds: Callable[[Path], bool], levels: int) -> Iterator[Path]:
    if not levels:
        return
    try:
        folders = sorted(path for path in top.iterdir() if path.is_dir())
    except PermissionError:
        return
    for folder in folders:
        if folder.name.startswith(".") or _PATIENTS_AND_STUDIES.fullmatch(folder.name):
            continue
        if holds(folder):
            yield folder
        else:
            yield from _below(folder, holds, levels - 1)
