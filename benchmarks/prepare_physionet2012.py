"""Time and memory of `prepare` on PhysioNet 2012 set A, beside a bare reading of the same archive.

Both run in processes of their own, in turn. The bare reading does what any reader must: unpack, cut lines into time,
parameter and value, turn values into numbers; it neither checks nor groups, splits, fits or writes.

    python benchmarks/prepare_physionet2012.py --raw DIR
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import json, resource, sys, time
start = time.perf_counter()
{body}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print("\\n" + json.dumps({{"seconds": time.perf_counter() - start, "peak_mib": peak}}))
"""
PREPARE = """
from pathlib import Path
from trajlm.config import PrepareConfig
from trajlm.prepare import prepare
prepare(PrepareConfig(cohort="physionet2012", raw=sys.argv[1], sets=["a"]), Path(sys.argv[2]) / "prepared")
"""
BARE = """
import io, tarfile
from pathlib import Path
import polars as pl
with tarfile.open(Path(sys.argv[1]) / "set-a.tar.gz") as archive:
    members = [archive.extractfile(member).read() for member in archive if member.isfile()]
rows = pl.read_csv(io.BytesIO(b"".join(members)), infer_schema=False)
rows = rows.with_columns(pl.col("Value").cast(pl.Float64, strict=False))
assert rows.height > 1_000_000
"""


def measure(body: str, raw: Path) -> dict[str, float]:
    """Seconds from before the first import to the end, and peak resident memory in MiB, of one process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", MEASURE.format(body=body), str(raw), folder]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of set-a.tar.gz and Outcomes-a.txt")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median is told")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"prepare": [], "bare reading": []}
    for _ in range(arguments.repeats):
        runs["prepare"].append(measure(PREPARE, arguments.raw.resolve()))
        runs["bare reading"].append(measure(BARE, arguments.raw.resolve()))
    lines = [
        "# Preparing PhysioNet 2012, set A",
        "",
        f"`python benchmarks/prepare_physionet2012.py --raw DIR --repeats {arguments.repeats}`, Python "
        f"{platform.python_version()}, {len(os.sched_getaffinity(0))} cores; each figure is a process from its first "
        "import to its end: median (least to most).",
        "",
        "| run | wall seconds | peak memory, MiB |",
        "|---|---|---|",
    ]
    for name, results in runs.items():
        cells = [name]
        for key, form in (("seconds", ".1f"), ("peak_mib", ".0f")):
            values = [result[key] for result in results]
            cells.append(f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})")
        lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    arguments.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
