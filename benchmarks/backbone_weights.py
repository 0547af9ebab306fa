"""What a backbone's pretrained weights give: networks of several runs against the first, on the same held-out stays.

    python benchmarks/backbone_weights.py --random runs/demo/random   # SmolLM2-135M, its weights drawn at random
    python benchmarks/backbone_weights.py RUN RUN...                  # reads finished runs; trains nothing

A network is the sequence model without the regression and the trees beside it. Intervals are of patients resampled.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from transformers import AutoModel

from trajlm.arms import NETWORK, paired_rows
from trajlm.backbones import config_of
from trajlm.compared import Run, load_runs
from trajlm.metrics import LANDMARKS, evaluate
from trajlm.report.tables import interval, signed_interval
from trajlm.result_tables import at_landmark
from trajlm.schema import HELD_OUT

FIGURES = ("auroc", "auprc", "mae")


def random_weights(name: str, folder: Path) -> None:
    """Save a backbone of the named one's shape, as the library draws its weights before any training."""
    torch.manual_seed(0)
    AutoModel.from_config(config_of(name)).save_pretrained(folder)


def figures(run: Run, first: Run) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the run's network, and of its difference to the first run's."""
    own, other = (r.beliefs(NETWORK, HELD_OUT) for r in (run, first))
    values = evaluate(own, run.stays, run.targets, LANDMARKS, run.resamples, 0).to_dicts()
    return values, paired_rows(own, other, run.stays, run.targets, run.resamples, 0) if run is not first else []


def _figure(row: dict[str, Any]) -> str:
    return interval(row["value"], row["low"], row["high"])


def _difference(row: dict[str, Any]) -> str:
    return signed_interval(row["value"], row["low"], row["high"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="finished runs of finetune.py, the first to compare with")
    parser.add_argument("--random", type=Path, help="folder for a backbone with random weights")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    if arguments.random:
        random_weights("smollm2-135m", arguments.random)
    if not arguments.runs:
        return
    runs = load_runs(arguments.runs)
    found = {run.name: figures(run, runs[0]) for run in runs}
    lines = [
        "# What pretrained weights of the backbone give",
        "",
        f"`python benchmarks/backbone_weights.py {' '.join(map(str, arguments.runs))}`, {machine()}. The networks "
        f"alone on the same {runs[0].known.height} held-out stays, one training each; 95 % intervals "
        "are of patients resampled and do not hold what another seed would change.",
        "",
        "The first is of `make demo`, the others of `python finetune.py --config recipes/demo.yaml --data "
        "runs/demo/prepared --encoders runs/demo/encoders --finetuning.baselines '[]'`, backbone and tuning as named. "
        "`random` is the folder that this script's `--random` writes; like pretrained weights and unlike `tiny` and "
        "`small` it learns at a quarter of the learning rate, the default.",
        "",
        "| run | backbone | tuning |",
        "|---|---|---|",
        *(f"| {run.name} | {Path(run.backbone).name} | {run.recipe['backbone']['tuning']} |" for run in runs),
    ]
    heads = " | ".join(at_landmark(hours) for hours in LANDMARKS)
    for target, _ in runs[0].targets:
        for metric in FIGURES:
            for part, (what, cell) in enumerate((("", _figure), (f", minus {runs[0].name}", _difference))):
                table = []
                for name, rows in found.items():
                    at = {r["landmark"]: r for r in rows[part] if (r["target"], r["metric"]) == (target, metric)}
                    if at:
                        table.append(f"| {name} | {' | '.join(cell(at[h]) for h in LANDMARKS)} |")
                if table:
                    lines += ["", f"| {target}, {metric}{what} | {heads} |", "|---|" + "---:|" * len(LANDMARKS), *table]
    arguments.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
