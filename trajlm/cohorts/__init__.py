"""Raw releases to the contract of :mod:`trajlm.schema`: one file per cohort, none knowing another.

A cohort is a module with ``read(raw, settings, ledger, spool) -> RawTimelines`` and ``DEFAULT_BIN_HOURS``. A new one is
one file and one line in ``COHORTS``.
"""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from types import ModuleType

from trajlm.errors import TrajlmError

COHORTS = {
    "mimic": "trajlm.cohorts.mimic",
    "eicu": "trajlm.cohorts.eicu",
    "physionet2012": "trajlm.cohorts.physionet2012",
    "meds": "trajlm.cohorts.meds",
}
SYNTHETIC = "synthetic"

# A folder with this file was written by `trajlm synthesize`; it names the layout.
SYNTHETIC_MARK = "SYNTHETIC.json"
# Invented releases are read by the reader of the release whose layout they have.
_READER_OF_LAYOUT = {"mimic-iv": "mimic", "eicu": "eicu"}


def load_cohort(name: str, raw: Path) -> ModuleType:
    """The module that reads a cohort from the folder ``raw``, imported on demand."""
    if name == SYNTHETIC:
        name = _layout(raw)
    if name not in COHORTS:
        known = [SYNTHETIC, *COHORTS]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise TrajlmError(f"cohort {name!r} is not known; the nearest is {nearest!r}, all are {', '.join(known)}")
    return importlib.import_module(COHORTS[name])


def _layout(raw: Path) -> str:
    mark = raw / SYNTHETIC_MARK
    if not mark.is_file():
        raise TrajlmError(
            f"{raw} holds no {SYNTHETIC_MARK}, so `trajlm synthesize` did not write it; for records of "
            f"MIMIC-IV use --cohort mimic, for eICU --cohort eicu"
        )
    try:
        layout = json.loads(mark.read_text()).get("layout", "mimic-iv")
    except (ValueError, AttributeError):
        raise TrajlmError(f"{mark} is not one that `trajlm synthesize` wrote; write the release again") from None
    if layout not in _READER_OF_LAYOUT:
        raise TrajlmError(f"{mark}: layout {layout!r} is not known; known are {', '.join(_READER_OF_LAYOUT)}")
    return _READER_OF_LAYOUT[layout]
