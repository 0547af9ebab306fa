"""What tells that a model leans on demographics: drift, knock-out, or attention's share, over several trainings.

Models of tests/test_planted.py, one seed after another: outcomes planted in demographics alone, or following severity.

    PYTHONPATH=tests python benchmarks/planted_truth.py --raw RAW --data PREPARED --encoders RUN
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import polars as pl
from measuring import machine
from test_planted import CAUSES, all_latents, moved_by_knock_out, planted_model, share_on_demographics

from trajlm.assemble import load_encoders
from trajlm.dataset import load_prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="release of `trajlm synthesize`, with its truth")
    parser.add_argument("--data", type=Path, required=True, help="it, prepared")
    parser.add_argument("--encoders", type=Path, required=True, help="run of pretrain.py on it")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    prepared = load_prepared(arguments.data)
    encoders, _ = load_encoders(arguments.encoders, prepared)
    lines = [
        "# What tells that a model leans on demographics",
        "",
        "`PYTHONPATH=tests python benchmarks/planted_truth.py --raw RAW --data PREPARED --encoders RUN --seeds "
        f"{arguments.seeds}`, {machine()}. The three are of `trajlm synthesize --stays 200 --seed 0`, prepared and "
        "pretrained with `recipes/tiny.yaml`. Drift: mean change of the last belief without demographics; knock-out: "
        "where nothing may attend to them; share: of a layer's attention that falls on them.",
        "",
        "| seed | outcomes follow | drift | knock-out | share, first layer | share, last layer |",
        "|---|---|---:|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        latents = all_latents(prepared, encoders.eval(), Path(folder) / "latents")
        for seed in range(arguments.seeds):
            for planted in CAUSES:
                model, batch, changes = planted_model(arguments.raw, prepared, encoders, latents, planted, seed)
                without = changes.filter(pl.col("ablated") == "demographics")
                drift = (without["belief_after"] - without["belief_before"]).abs().mean()
                shares = " | ".join(f"{share_on_demographics(model, batch, layer).mean():.2f}" for layer in (0, 1))
                row = f"| {seed} | {planted} | {drift:.3f} | {moved_by_knock_out(model, batch):.3f} | {shares} |"
                lines.append(row)
                print(row, flush=True)
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
