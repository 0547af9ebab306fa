"""Long stays: memory and time of reading one, of a training step on one and of one more streamed event; bytes on disk.

    OMP_NUM_THREADS=1 python benchmarks/long_stays.py --data PREPARED PREPARED

The model is that of `streaming.py`, with random weights. Each row is a process of its own; memory is the most that it
held during the work beyond what it held after the same work on ten events. A training step is a forward and a backward
pass on one stay, its events encoded anew. Times are CPU time of the one thread. The latent cache is that
of fine-tuning with the defaults of its recipe and encoders that were never pretrained, which changes no size.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import machine
from streaming import events, model_of, stream_at

from trajlm.assemble import build_encoders
from trajlm.config import EncoderConfig, FinetuningConfig
from trajlm.dataset import load_prepared
from trajlm.latents import cache_latents
from trajlm.schema import Timeline
from trajlm.sequence_objective import SequenceObjective

LENGTHS, DEFAULT = (1000, 5000, 20000), FinetuningConfig().max_events
# Reading costs the square of the length in attention: the largest shape is measured at the default's length alone.
ROWS = [(shape, n, most) for shape in ("tiny", "small") for n in LENGTHS for most in (DEFAULT, n) if most <= n]
ROWS = [*dict.fromkeys(ROWS), ("smollm2-135m", DEFAULT, DEFAULT)]


def held(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM the most since the last reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def cost(work: Callable[[], object], before: float) -> tuple[float, float]:
    """CPU seconds of a piece of work, and the most MiB held during it beyond ``before``."""
    Path("/proc/self/clear_refs").write_text("5")
    begin = time.thread_time()
    work()
    return time.thread_time() - begin, held("VmHWM") - before


def one(shape: str, length: int, most: int) -> dict[str, float]:
    model, line = model_of(shape), events(length)
    model.max_events = most
    objective = SequenceObjective(model, FinetuningConfig(modality_dropout=0.0))
    targets = {"mortality": 1.0, "length_of_stay_hours": 2000.0}

    def timeline(count: int) -> Timeline:
        return Timeline(1, "p", "held_out", None, targets, tuple(line[:count]))

    def step(count: int) -> None:
        objective.train()(model.encode_timeline(timeline(count))).backward()
        model.zero_grad(set_to_none=True)

    model.beliefs(timeline(10))
    step(10)
    before = held("VmRSS")
    read = cost(lambda: model.beliefs(timeline(length)), before)
    train = cost(lambda: step(length), before)
    stream = stream_at(model, line, most)
    stream.streams._stays[0].events = 10  # so that the rule does not end the stay here
    took = sorted(cost(lambda: stream.push(line[-1]), before)[0] for _ in range(7))
    return {"read_s": read[0], "read": read[1], "train_s": train[0], "train": train[1], "push": 1000 * took[3]}


def sizes(data: Path, folder: Path) -> tuple[dict[str, tuple[int, float]], int, int]:
    """Bytes and bytes per event of each column of a folder's latents; events and stays."""
    prepared = load_prepared(data)
    torch.manual_seed(0)
    encoders = build_encoders(prepared, EncoderConfig())
    stays = prepared.positions("train")[:1000]
    reach = FinetuningConfig().event_latents
    latents = cache_latents(prepared, encoders, stays, folder / data.name, "benchmark", reach)
    count = len(latents.hours)
    files = {path.stem: path.stat().st_size for path in sorted((folder / data.name).glob("*.bin"))}
    return {name: (size, size / count) for name, size in files.items()}, count, len(stays)


def stays_table() -> None:
    print(
        "| backbone | events of the stay | `max_events` | read: seconds | MiB | forward and backward: seconds | MiB | "
        "one more event streamed, ms |\n|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for shape, length, most in ROWS:
        command = [sys.executable, __file__, "--one", shape, str(length), str(most)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        of = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {shape} | {length:,} | {most:,} | {of['read_s']:.2f} | {of['read']:,.0f} | {of['train_s']:.2f} | "
            f"{of['train']:,.0f} | {of['push']:.1f} |",
            flush=True,
        )


def cache_table(folders: list[Path]) -> None:
    print("\n| latent cache | column | bytes per event | share |\n|---|---|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch:
        for data in folders:
            columns, count, stays = sizes(data, Path(scratch))
            whole = sum(size for size, _ in columns.values())
            name = json.loads((data / "manifest.json").read_text())["cohort"]
            print(
                f"| {name}: {stays:,} stays, {count:,} events | all | {whole / count:,.1f} "
                f"({whole / stays / 1024:,.1f} KiB a stay) | 100 % |"
            )
            for column, (size, each) in sorted(columns.items(), key=lambda item: -item[1][0]):
                print(f"| | `{column}` | {each:,.1f} | {100 * size / whole:.1f} % |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="prepared folders")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        shape, length, most = arguments.one
        print(json.dumps(one(shape, int(length), int(most))))
        return
    print("# Long stays\n\n`OMP_NUM_THREADS=1 python benchmarks/long_stays.py --data PREPARED PREPARED`\n")
    print(f"{machine()} of an Intel Xeon at 2.5 GHz, no GPU; one thread, on a machine that does other work too.\n")
    stays_table()
    cache_table(arguments.data)


if __name__ == "__main__":
    main()
