"""Time and memory of `prepare` as a MIMIC-IV release grows, beside a bare polars scan of the same event tables.

The MIMIC-IV demo is written many times over under other patient, admission and stay numbers. Both run in processes of
their own. The bare scan parses every cell of chartevents, labevents and outputevents into the types polars infers and
counts them; it neither checks nor links, groups, splits, fits or writes.

    python benchmarks/prepare_mimic.py --raw MIMIC_IV_DEMO --scratch DIR
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import polars as pl
from measuring import machine, measure, spread

EVENTS = ("icu/chartevents", "hosp/labevents", "icu/outputevents")
TABLES = (*EVENTS, "icu/icustays", "icu/d_items", "hosp/patients", "hosp/admissions", "hosp/diagnoses_icd",
          "hosp/d_labitems")  # fmt: skip
IDS = ("subject_id", "hadm_id", "stay_id")
STEP = 100_000_000  # larger than any number of the release
PREPARE = """
from pathlib import Path
from trajlm.config import PrepareConfig
from trajlm.prepare import prepare
prepare(PrepareConfig(cohort="mimic", raw=sys.argv[1], rejected_rows=100_000), Path(sys.argv[2]))
"""
SCAN = """
import polars as pl
for path in sys.argv[1:]:
    counts = pl.scan_csv(path, infer_schema_length=10_000, ignore_errors=True).select(pl.all().count())
    assert counts.collect(engine="streaming").height == 1
"""


def replicate(raw: Path, out: Path, copies: int) -> int:
    """Write the demo ``copies`` times over as one release; the rows of its event tables."""
    rows = 0
    for place in TABLES:
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        frame = pl.read_csv(raw / f"{place}.csv.gz", infer_schema=False)
        own = [name for name in IDS if name in frame.columns]
        repeats = copies if own else 1
        with (out / f"{place}.csv").open("wb") as stream:
            for copy in range(repeats):
                moved = [(pl.col(name).cast(pl.Int64) + copy * STEP).cast(pl.String) for name in own]
                frame.with_columns(moved).write_csv(stream, include_header=copy == 0)
        rows += frame.height * repeats if place in EVENTS else 0
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of the MIMIC-IV demo")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the copies, some 4 GB")
    parser.add_argument("--copies", type=int, nargs="+", default=[10, 20, 40, 75], help="sizes to measure")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the median is told")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    lines = [
        "# Preparing MIMIC-IV as it grows",
        "",
        f"`python benchmarks/prepare_mimic.py --raw DIR --scratch DIR --copies {' '.join(map(str, arguments.copies))} "
        f"--repeats {arguments.repeats}`, {machine()}. The demo's tables many times over, as CSV; each figure is a "
        "process from its first import to its end.",
        "",
        "| copies | rows of events | prepare, s | rows per second | peak memory, MiB | bare scan, s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for copies in arguments.copies:
        release, prepared = arguments.scratch / "release", arguments.scratch / "prepared"
        shutil.rmtree(release, ignore_errors=True)
        rows = replicate(arguments.raw, release, copies)
        files = [release / f"{place}.csv" for place in EVENTS]
        whole, bare = [], []
        for _ in range(arguments.repeats):
            bare.append(measure(SCAN, *files))
            shutil.rmtree(prepared, ignore_errors=True)
            whole.append(measure(PREPARE, release, prepared))
        seconds, scan = (sum(run["seconds"] for run in runs) / len(runs) for runs in (whole, bare))
        lines.append(
            f"| {copies} | {rows:,} | {spread(whole, 'seconds', '.1f')} | {rows / seconds:,.0f} | "
            f"{spread(whole, 'peak_mib', '.0f')} | {spread(bare, 'seconds', '.1f')} | {seconds / scan:.1f} |"
        )
        sys.stdout.write(lines[-1] + "\n")
    shutil.rmtree(arguments.scratch / "release", ignore_errors=True)
    shutil.rmtree(arguments.scratch / "prepared", ignore_errors=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
