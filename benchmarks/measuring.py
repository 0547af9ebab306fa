"""Seconds and peak memory of a piece of Python in a process of its own, from its first import to its end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
{body}
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
print("\\n" + json.dumps({{"seconds": time.perf_counter() - start, "peak_mib": peak}}))
"""


def measure(body: str, *arguments: object) -> dict[str, float]:
    """Wall seconds and peak resident MiB of ``body``, which finds the arguments in ``sys.argv``."""
    command = [sys.executable, "-c", _MEASURE.format(body=body), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    """What the figures were measured on."""
    return f"Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores"


def spread(runs: Sequence[dict[str, float]], key: str, form: str) -> str:
    """Median (least to most) of one figure."""
    values = [run[key] for run in runs]
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
