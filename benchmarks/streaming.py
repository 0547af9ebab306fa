"""A belief after one more event: time against the length of the history, and against reading the stay again.

OMP_NUM_THREADS=1 python benchmarks/streaming.py

Random weights in the shapes of `tiny`, SmolLM2-135M and the 130M Mamba-2: the work is that of trained ones. The long
histories are the keys and values of a short one, repeated: what they hold does not change the work, and a state-space
model's state has one size whatever it has read. Times are CPU time of the one thread,
so that other work on the machine counts less; histories are measured in turns and ratios are of medians.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import torch
from measuring import machine
from transformers import AutoConfig, AutoModel

from trajlm.backbones import build_backbone
from trajlm.config import BackboneConfig, EncoderConfig
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.schema import Event, FittedFeature, Modality, Timeline
from trajlm.tasks import build_tasks
from trajlm.trajectory import TrajectoryModel

SMOLLM2 = {
    "vocab_size": 8, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip
MAMBA2 = {
    "vocab_size": 8, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 128, "num_heads": 24, "head_dim": 64,
    "n_groups": 1, "expand": 2,
}  # fmt: skip
SHAPES = {"smollm2-135m": ("llama", SMOLLM2), "mamba2-130m": ("mamba2", MAMBA2)}
FEATURES, SHORT, LONG, RECOMPUTED, TURNS, STAYS = 40, 10, 1000, 500, 9, 16


def model_of(shape: str) -> TrajectoryModel:
    torch.manual_seed(0)
    backbone = (
        build_backbone(BackboneConfig(name=shape, tuning="full"))
        if shape not in SHAPES
        else AutoModel.from_config(AutoConfig.for_model(SHAPES[shape][0], **SHAPES[shape][1]))
    )
    modalities = [Modality("age", "numeric", static=True), Modality("labs", "numeric")]
    features = [FittedFeature("age", "age", feature_id=0)]
    features += [FittedFeature("labs", f"lab{i}", feature_id=1 + i) for i in range(FEATURES)]
    tasks = build_tasks(["mortality", "length_of_stay"])
    encoders = AlignedEncoders(modalities, features, EncoderConfig())
    rich = {"context": "newest", "inputs": "latent_and_state", "readout": "predict_and_event"}
    return TrajectoryModel(encoders, backbone, tasks, modalities, features, 16, max_events=10**6, **rich).eval()


def events(count: int) -> list[Event]:
    random = np.random.default_rng(0)
    found = [Event(0.0, "age", (0,), (60.0,))]
    for step in range(1, count):
        ids = tuple(sorted(random.choice(FEATURES, 8, replace=False) + 1).__iter__())
        found.append(Event(step / 10, "labs", tuple(int(i) for i in ids), tuple(random.normal(size=8).tolist())))
    return found


def seconds(work) -> float:
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def stream_at(model: TrajectoryModel, line: list[Event], history: int):
    """A stream that has read so many events."""
    stream = model.stream()
    for event in line[:SHORT]:
        stream.push(event)
    if history > SHORT:
        streams = stream.streams
        held = streams._memory.tensors(0)
        if "0.keys" in held:
            streams._memory.put(0, {name: tensor.repeat(1, history // SHORT, 1) for name, tensor in held.items()})
        streams._stays[0].events = history
    return stream


def measure(shape: str) -> str:
    model, line = model_of(shape), events(RECOMPUTED + TURNS)
    streams = {length: stream_at(model, line, length) for length in (SHORT, RECOMPUTED, LONG)}
    many = model.streams()
    for event in line[:2]:
        many.push(dict.fromkeys(range(STAYS), event))
    took: dict[object, list[float]] = {name: [] for name in (*streams, "many", "again")}
    for turn in range(TURNS):
        event = line[SHORT + turn]
        for length, stream in streams.items():
            took[length].append(seconds(lambda s=stream, e=event: s.push(e)))
        if turn % 3 == 0:
            took["many"].append(seconds(lambda e=event: many.push(dict.fromkeys(range(STAYS), e))))
    timeline = Timeline(1, "p", "held_out", None, {}, tuple(line[:RECOMPUTED]))
    for _ in range(2):
        took["again"].append(seconds(lambda: model.beliefs(timeline)))
    of = {name: statistics.median(times) for name, times in took.items()}
    figures = (of[LONG] / of[SHORT], of["again"] / of[RECOMPUTED], STAYS * of[SHORT] / of["many"])
    return f"| {shape} | {1000 * of[SHORT]:.1f} ms | {figures[0]:.2f} | {figures[1]:.1f} | {figures[2]:.1f} |"


def main() -> None:
    torch.set_num_threads(1)
    print("`OMP_NUM_THREADS=1 python benchmarks/streaming.py`\n")
    print(f"{machine()} of an Intel Xeon at 2.5 GHz, no GPU; one thread, on a machine that does other work too.\n")
    print(
        f"| backbone | an event at history {SHORT} | one at {LONG:,}, over that | reading {RECOMPUTED} events again, "
        f"over one event at {RECOMPUTED} | {STAYS} events one by one, over one push of {STAYS} stays |"
    )
    print("|---|---:|---:|---:|---:|")
    for shape in sys.argv[1:] or ["tiny", *SHAPES]:
        print(measure(shape), flush=True)


if __name__ == "__main__":
    main()
