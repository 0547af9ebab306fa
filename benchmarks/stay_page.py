"""The page of a long stay: what it takes to make it, what it weighs, and how fast it answers in a browser.

OMP_NUM_THREADS=1 python benchmarks/stay_page.py > benchmarks/stay_page.md

A backbone of random weights reads a timeline of random values in four modalities, with nothing and with each of the
other three ablated, as `interpret.py` has it do for every stay shown; "two runs" is the page under `--against`. Needs
playwright and a Chromium (`--browser`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from audit_cost import NAMES, random_model
from measuring import machine
from playwright.sync_api import Page, sync_playwright

from trajlm.report.build import StayFindings, stay_page
from trajlm.report.contents import CALIBRATION_COLUMNS, METRIC_COLUMNS, PRESENCE_COLUMNS, Report, TargetInfo
from trajlm.report.page import render
from trajlm.report.run import stay_findings
from trajlm.schema import Event, Timeline
from trajlm.trajectory import TrajectoryModel

FEATURES, MEASURED, PRESSES = 12, 6, 40
TARGETS = [
    TargetInfo("mortality", "Death", "", "probability"),
    TargetInfo("length_of_stay_hours", "Stay", "h", "hours"),
]
PRESS = "new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})"
WORDS = f"""Made: processor seconds for beliefs and attention of the stay and its three ablations. Weight: of the stay's
part of the page; the page itself weighs as much as in the first row. The browser's figures are times on the clock, on a
machine that does other work: open is until belief and heatmap are drawn; event, to show the next event, median of
{PRESSES} arrow keys; ablation, to switch one on or off; heap, that of the page's scripts.
"""


def timeline(stay_id: int, events: int) -> Timeline:
    """Demographics, then vital signs, laboratory values and drugs over four days."""
    random = np.random.default_rng(stay_id)
    found = [Event(0.0, NAMES[0], (0, 1), (64.0, 1.0))]
    for hour in np.sort(random.uniform(0.1, 96, events - 1)):
        place = int(random.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
        ids = FEATURES * place + np.sort(random.choice(FEATURES, MEASURED, replace=False))
        values = random.normal(50, 20, MEASURED)
        found.append(Event(float(hour), NAMES[place], tuple(int(i) for i in ids), tuple(values.tolist())))
    return Timeline(stay_id, "p", "held_out", 96.0, {"mortality": 0.0, "length_of_stay_hours": 96.0}, tuple(found))


def findings(model: TrajectoryModel, events: int, other: TrajectoryModel | None) -> StayFindings:
    records: Any = SimpleNamespace(timeline=lambda stay: timeline(stay, events))
    return stay_findings(model, records, 1, NAMES[1:], other=other)


def report(found: list[StayFindings], model: TrajectoryModel, against: str | None) -> Report:
    """A page of these stays and of nothing else."""
    text = {"arm", "target", "landmark", "metric", "combination"}
    tables = [
        pl.DataFrame(schema={name: pl.String if name in text else pl.Float64 for name in columns})
        for columns in (METRIC_COLUMNS, CALIBRATION_COLUMNS, PRESENCE_COLUMNS)
    ]
    stays = [stay_page(one, [target.name for target in TARGETS], model) for one in found]
    return Report("A long stay", "", TARGETS, [], [], *tables, stays=stays, against=against)


def clock(page: Page, script: str) -> float:
    """Milliseconds from a script's first line to the frame after it."""
    return float(
        page.evaluate(
            f"""() => new Promise(done => {{ const start = performance.now(); {script};
            requestAnimationFrame(() => setTimeout(() => done(performance.now() - start), 0)); }})"""
        )
    )


def in_browser(page: Page, path: Path) -> dict[str, float]:
    start = time.perf_counter()
    page.goto(f"{path.as_uri()}#stay-1")
    page.wait_for_selector("#belief-plot .main-svg")
    page.wait_for_selector("#attention-plot .main-svg")
    found = {"open": time.perf_counter() - start}
    press = f"document.getElementById('belief').dispatchEvent({PRESS})"
    found["event"] = statistics.median(clock(page, press) for _ in range(PRESSES))
    button = "document.querySelector('[data-ablation=labs]').click()"
    found["ablation"] = statistics.median(clock(page, button) for _ in range(6))
    found["heap"] = float(page.evaluate("performance.memory ? performance.memory.usedJSHeapSize : NaN")) / 2**20
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    program = parser.parse_args().browser
    torch.set_num_threads(1)
    print(f"# The page of a long stay\n\n`OMP_NUM_THREADS=1 python {' '.join(sys.argv)}`, {machine()}, no GPU. "
          "Backbone `shallow` (one layer of width 128).\n")  # fmt: skip
    print(WORDS)
    print("| events | runs | made, s | weight, MB | open, s | event, ms | ablation, ms | heap, MB |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    torch.manual_seed(0)
    model, other = (random_model("shallow", FEATURES) for _ in range(2))
    for one in (model, other):
        one.max_events = 10**6
    empty = len(render(report([], model, None)).encode())
    print(f"| 0 | | | {empty / 1e6:.1f} | | | | |", flush=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--enable-precise-memory-info"]
        )
        for events, beside in ((100, None), (500, None), (2000, None), (2000, other)):
            start = time.process_time()
            found = findings(model, events, beside)
            made = time.process_time() - start
            path = Path(folder) / "page.html"
            path.write_text(render(report([found], model, "other" if beside else None)), encoding="utf-8")
            weight = (path.stat().st_size - empty) / 1e6
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            seen = in_browser(page, path)
            page.close()
            print(f"| {events:,} | {1 + bool(beside)} | {made:.1f} | {weight:.1f} | {seen['open']:.1f} | "
                  f"{seen['event']:.0f} | {seen['ablation']:.0f} | {seen['heap']:.0f} |", flush=True)  # fmt: skip
        browser.close()


if __name__ == "__main__":
    main()
