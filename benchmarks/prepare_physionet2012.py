"""Time and memory of `prepare` on PhysioNet 2012 set A, beside a bare reading of the same archive.

Both run in processes of their own, in turn. The bare reading does what any reader must: unpack, cut lines into time,
parameter and value, turn values into numbers; it neither checks nor groups, splits, fits or writes.

    python benchmarks/prepare_physionet2012.py --raw DIR
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from measuring import machine, measure, spread

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of set-a.tar.gz and Outcomes-a.txt")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median is told")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {"prepare": [], "bare reading": []}
    for _ in range(arguments.repeats):
        for name, body in (("prepare", PREPARE), ("bare reading", BARE)):
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(measure(body, arguments.raw.resolve(), folder))
    lines = [
        "# Preparing PhysioNet 2012, set A",
        "",
        f"`python benchmarks/prepare_physionet2012.py --raw DIR --repeats {arguments.repeats}`, {machine()}; each "
        "figure is a process from its first import to its end: median (least to most).",
        "",
        "| run | wall seconds | peak memory, MiB |",
        "|---|---|---|",
        *(
            f"| {name} | {spread(results, 'seconds', '.1f')} | {spread(results, 'peak_mib', '.0f')} |"
            for name, results in runs.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    arguments.out.write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
