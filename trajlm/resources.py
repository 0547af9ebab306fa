"""What a stage costs: time and peak memory, told in one line at its end."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB (1e9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


@contextmanager
def cost_of(stage: str) -> Iterator[None]:
    """Print the stage's time and peak memory when it ends well."""
    started = time.monotonic()
    yield
    print(f"{stage}: {time.monotonic() - started:.0f} s, peak memory {peak_memory_gb():.2f} GB")
