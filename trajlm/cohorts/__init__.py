"""Raw releases to the contract of :mod:`trajlm.schema`: one file per cohort, none knowing another.

A cohort is a module with ``read(raw, settings, ledger) -> RawTimelines`` and ``DEFAULT_BIN_HOURS``. A new one is one
file and one line in ``COHORTS``.
"""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType

from trajlm.errors import TrajlmError

COHORTS = {
    "synthetic": "trajlm.cohorts.mimic",  # written as a MIMIC-IV release, so read by its reader
    "mimic": "trajlm.cohorts.mimic",
    "physionet2012": "trajlm.cohorts.physionet2012",
}

# A folder with this file was written by `trajlm synthesize`.
SYNTHETIC_MARK = "SYNTHETIC.json"


def load_cohort(name: str) -> ModuleType:
    """The module that reads a cohort, imported on demand."""
    if name not in COHORTS:
        nearest = difflib.get_close_matches(name, COHORTS, n=1, cutoff=0.0)[0]
        raise TrajlmError(f"cohort {name!r} is not known; the nearest is {nearest!r}, all are {', '.join(COHORTS)}")
    return importlib.import_module(COHORTS[name])
