"""Memory of a training step: measured in a process of its own, and as `trajlm.memory` computes it from the shape.

Measured is the peak of the resident memory over what the process held before it built the backbone, in two LoRA steps
with AdamW on random inputs; freed memory is given back to the system at once, so that the peak is of what was held.

    python benchmarks/step_memory.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from measuring import ROOT, machine

from trajlm.config import BackboneConfig
from trajlm.memory import step_memory, table
from trajlm.presets import presets

# Blocks over 64 KiB get pages of their own, which go back when they are freed.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
STEP = """
import json, resource, sys, torch
from transformers import AutoModel
from trajlm.adapters import add_lora
from trajlm.backbones import shape_of
from trajlm.config import BackboneConfig
name, checkpointing, bf16, stays, positions = json.loads(sys.argv[1])
autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
layer = torch.nn.Linear(64, 64)
with autocast():
    layer(torch.randn(4, 64)).sum().backward()
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
trunk = AutoModel.from_config(shape_of(name))
if checkpointing:
    trunk.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
backbone = add_lora(trunk, BackboneConfig(name=name, tuning="lora")).train()
optimiser = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad])
inputs = torch.randn(stays, positions, trunk.config.hidden_size, requires_grad=True)
for _ in range(2):
    with autocast():
        states = backbone(inputs_embeds=inputs * 1.0, use_cache=False).last_hidden_state
    loss = states[:, 1::2].float().sum()
    del states
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps((peak - before) / 1e9))
"""


def measured(name: str, checkpointing: bool, bf16: bool, stays: int, positions: int) -> float:
    """GB."""
    command = [sys.executable, "-c", STEP, json.dumps([name, checkpointing, bf16, stays, positions])]
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m", help="preset whose shape is measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="table to write")
    arguments = parser.parse_args()
    lines = [
        "# Memory of a training step",
        "",
        f"`python benchmarks/step_memory.py`, {machine()}. LoRA of rank 16, {arguments.backbone}, float32 weights:",
        "",
        "| stays x positions | checkpointing | bfloat16 autocast | measured | computed | computed / measured |",
        "|---|---|---|---|---|---|",
    ]
    for stays, positions, checkpointing, bf16 in (
        (4, 256, False, False),
        (4, 256, True, False),
        (4, 256, False, True),
    ):
        real = measured(arguments.backbone, checkpointing, bf16, stays, positions)
        config = BackboneConfig(arguments.backbone, tuning="lora", gradient_checkpointing=checkpointing)
        said = step_memory(presets()[arguments.backbone], config, "adamw", stays, positions, bf16).total / 1e9
        asked = f"{'yes' if checkpointing else 'no'} | {'yes' if bf16 else 'no'}"
        lines.append(f"| {stays} x {positions} | {asked} | {real:.2f} GB | {said:.2f} GB | {said / real:.2f} |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "Computed for the real shapes (`trajlm backbones --memory`): bfloat16 autocast, 8-bit AdamW. After the colon "
        "the smallest GPU of 16, 24, 40 and 80 GB that holds the step, 1 GB for the CUDA context and a tenth in "
        "reserve. What state-space layers keep depends on their kernels, so for them only the frozen weights are "
        "computed.",
        "",
        table(stays=8, events=256),
    ]
    arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
