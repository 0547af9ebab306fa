"""What a run folder holds: settings, environment, log, metrics, checkpoints. Written atomically, resumed exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trajlm.config import Recipe
from trajlm.distributed import gathered, placed_like
from trajlm.errors import TrajlmError
from trajlm.resources import peak_memory_gb

PACKAGES = (
    "trajlm", "torch", "transformers", "peft", "accelerate", "safetensors", "polars", "numpy", "scikit-learn",
    "lightgbm",
)  # fmt: skip

LOG = "log.jsonl"
GRID_DONE, GRID_RECORD = "stages.json", "grid.json"  # beside the runs of a grid: what is done, and what was run


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either absent, old or whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save tensors as safetensors, atomically."""
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, partial)
    os.replace(partial, path)


def trainable_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and all buffers that are saved: what a checkpoint needs beside frozen weights."""
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    # Not all else of the state: 4-bit weights come with a tail of their own.
    kept = trained | {name for name, _ in module.named_buffers()}
    return {name: tensor for name, tensor in module.state_dict().items() if name in kept}


def load_trainable(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`trainable_tensors` gave; missing or left-over names are an error."""
    expected = set(trainable_tensors(module))
    if expected != set(tensors):
        raise TrajlmError(
            f"checkpoint does not fit the model: missing {sorted(expected - set(tensors))[:3]}, "
            f"left over {sorted(set(tensors) - expected)[:3]}"
        )
    own = module.state_dict()
    module.load_state_dict({name: placed_like(tensor, own[name]) for name, tensor in tensors.items()}, strict=False)


def fingerprint(*parts: Any) -> str:
    """Hex digest of tensors' bytes, files' contents and JSON values, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(str((part.dtype, tuple(part.shape))).encode())
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Path):
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def data_fingerprint(prepared: Path) -> str:
    """Hex digest of everything in a prepared folder that a model reads."""
    files = [prepared / "features.json", prepared / "stays.parquet", *sorted((prepared / "events").glob("*.parquet"))]
    manifest = json.loads((prepared / "manifest.json").read_text())
    return fingerprint(*files, manifest["modalities"], manifest["settings"]["image_pixels"])


def environment(seed: int, inputs: dict[str, str]) -> dict[str, Any]:
    """Versions, hardware, seed, git commit and the hashes of what was read."""
    commit = None
    if shutil.which("git"):
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        commit = found.stdout.strip() or None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": {"device": device, "cpu_count": os.cpu_count(), "threads": torch.get_num_threads()},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seed": seed,
        "git_commit": commit,
        "inputs_sha256": inputs,
    }


# Of these a run may be given more later: what it holds already stays as it is.
GROWING = ("recipe.finetuning.baselines", "recipe.finetuning.ensembles")


class RunFolder:
    """One run on disk. Opening a folder that another recipe or other inputs made is an error.

    A recipe that asks for all that the folder's did and for more ``GROWING`` makes of a finished run one to go on with;
    until that is finished too, the folder stays what it was.

    Args:
        path: the folder.
        stage: pretraining or finetuning.
        recipe: its settings, saved as ``config.yaml``.
        inputs: name to sha256 of everything the run reads.
        main: whether this is the process that writes.
    """

    def __init__(self, path: Path | str, stage: str, recipe: Recipe, inputs: dict[str, str], main: bool = True) -> None:
        self.path = Path(path)
        self.stage = stage
        self.main = main  # only one of several processes writes
        self._started = time.monotonic()
        self._process = f"{time.time_ns():x}"
        self.growth: dict[str, Any] | None = None  # what to note of it when the run has grown
        identity = {"stage": stage, "inputs": inputs, "recipe": _settings(recipe, stage)}
        if not (self.path / "config.yaml").exists():
            if not main:
                return
            if self.path.exists() and any(self.path.iterdir()):
                raise TrajlmError(f"{self.path} is not empty and not a run; choose another --out")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                write_text(self.path / "config.yaml", yaml.safe_dump(identity, sort_keys=False))
            except OSError as error:
                raise TrajlmError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from error
        elif self._grows(identity):
            self.growth = {"config": identity, "made_by": environment(recipe.seed, inputs)}
        if main and not (self.path / "environment.json").exists():
            write_text(self.path / "environment.json", json.dumps(environment(recipe.seed, inputs), indent=1))

    def _grows(self, identity: dict[str, Any]) -> bool:
        """Whether more is asked for than the folder was made for; an error where it is not more, but something else."""
        before = yaml.safe_load((self.path / "config.yaml").read_text())
        old, new = _flatten(before), _flatten(identity)
        moved = {"recipe.data", "recipe.out", "recipe.encoders"}  # the hashes of what lies there are compared instead
        changed = sorted(key for key in (set(old) | set(new)) - moved if old.get(key) != new.get(key))
        for key in changed:
            if key not in GROWING or not set(old.get(key) or ()) < set(new.get(key) or ()):
                raise TrajlmError(
                    f"{self.path} was made with {key.removeprefix('recipe.')} = {old.get(key)!r}, now it is "
                    f"{new.get(key)!r}; choose another --out, or delete the folder to start again"
                )
        return bool(changed)

    @property
    def finished(self) -> bool:
        """Whether the run holds all that is asked for: ``metrics.json`` is the last file that a stage writes."""
        return self.growth is None and (self.path / "metrics.json").exists()

    def log(self, **record: Any) -> None:
        """Append a line to ``log.jsonl``; after one that was cut short, on a line of its own."""
        if self.main:
            path = self.path / LOG
            cut = path.exists() and not path.read_bytes().endswith(b"\n")
            with path.open("a") as stream:
                told = {"process": self._process, "seconds": round(time.monotonic() - self._started, 2)}
                stream.write("\n" * cut + json.dumps({"stage": self.stage} | record | told) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of ``log.jsonl``, of none yet nothing (:func:`read_log`)."""
        return read_log(self.path) if (self.path / LOG).exists() else []

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``, note time and memory, and drop the checkpoints."""
        if not self.main:
            return
        path = self.path / "environment.json"
        facts = json.loads(path.read_text())
        self.log(event="finished")
        facts["seconds"] = round(_seconds(self.read_log()), 1)
        facts["peak_memory_gb"] = max(round(peak_memory_gb(), 2), facts.get("peak_memory_gb", 0.0))
        if self.growth is not None:
            facts["grown_by"] = [*facts.get("grown_by", []), self.growth["made_by"]]
        write_text(path, json.dumps(facts, indent=1))
        write_text(self.path / "metrics.json", json.dumps(metrics, indent=1))
        if self.growth is not None:
            write_text(self.path / "config.yaml", yaml.safe_dump(self.growth["config"], sort_keys=False))
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        for leftover in self.path.rglob(".*.partial"):
            leftover.unlink()


def read_run(path: Path | str) -> dict[str, Any]:
    """``config.yaml`` of a run: stage, inputs (hashes) and recipe (a plain dict)."""
    file = Path(path) / "config.yaml"
    if not file.is_file():
        raise TrajlmError(f"{path} is not a run folder: no config.yaml")
    return yaml.safe_load(file.read_text())


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``; one that a kill or a full disk cut short is left out."""
    found = []
    for line in (run / LOG).read_text().splitlines():
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _seconds(log: list[dict[str, Any]]) -> float:
    """Time spent by every process that worked on the run, each up to its last line."""
    last: dict[str, float] = {}
    for record in log:
        last[record["process"]] = record["seconds"]
    return sum(last.values())


# What a stage reads of a recipe; a run is not remade because another stage's settings changed.
SECTIONS = {
    "pretraining": ("data", "out", "seed", "encoder", "pretraining"),
    "finetuning": ("data", "out", "seed", "encoders", "encoder", "backbone", "finetuning"),
}


def _settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    settings = dataclasses.asdict(recipe)
    return {name: settings[name] for name in SECTIONS[stage]}


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Checkpoints:
    """Training state under ``folder``: the best weights, and ``step-N-epoch-E/`` with all a resume needs.

    ``state.json`` is written last, so a folder that has it is whole. Tensors are written whole even where each process
    holds a part: all of them call, ``main`` writes.
    """

    def __init__(self, folder: Path, main: bool = True) -> None:
        self.folder, self.main = folder, main

    def save(
        self,
        module: nn.Module,
        optimiser: torch.optim.Optimizer,
        state: dict[str, Any],
        averages: dict[str, Tensor],
    ) -> None:
        """Save, ``averages`` of the weights along with them, then delete older checkpoints."""
        weights, means = gathered(trainable_tensors(module), self.main), gathered(averages, self.main)
        moments = gathered(_optimiser_tensors(optimiser), self.main)
        if not self.main:
            return
        # The epoch tells a save at an epoch's end from one after its last batch: no name is ever written twice.
        target = self.folder / f"step-{state['step']:09d}-epoch-{state['epoch']:06d}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        write_tensors(target / "weights.safetensors", weights)
        write_tensors(target / "optimiser.safetensors", moments)
        write_tensors(target / "averages.safetensors", means)
        write_text(target / "state.json", json.dumps(state))
        for other in self.folder.glob("step-*"):
            if other != target:
                (other / "state.json").unlink(missing_ok=True)  # first: a half-deleted folder must not look whole
                shutil.rmtree(other)

    def restore(
        self, module: nn.Module, optimiser: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Load the newest whole checkpoint and return its state and averages; None where there is none."""
        whole = sorted(path.parent for path in self.folder.glob("step-*/state.json"))
        if not whole:
            return None
        load_trainable(module, load_file(whole[-1] / "weights.safetensors"))
        _restore_optimiser(optimiser, load_file(whole[-1] / "optimiser.safetensors"))
        return json.loads((whole[-1] / "state.json").read_text()), load_file(whole[-1] / "averages.safetensors")

    def save_best(self, module: nn.Module) -> None:
        """Keep these weights as the best so far."""
        weights = gathered(trainable_tensors(module), self.main)
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self.folder / "best.safetensors", weights)

    def load_best(self, module: nn.Module) -> None:
        """Put the best weights back."""
        load_trainable(module, load_file(self.folder / "best.safetensors"))


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter and name; 8-bit moments lie one level deeper."""
    state = {str(index): slot for index, slot in optimiser.state_dict()["state"].items()}
    return {name: torch.as_tensor(value) for name, value in _flatten(state).items()}


def _restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        index, *path, name = key.split(".")
        slot = state.setdefault(int(index), {})
        for step in path:
            slot = slot.setdefault(step, {})
        # A count of steps that was saved as a whole number is one.
        if tensor.ndim == 0:
            slot[name] = int(tensor) if tensor.dtype == torch.int64 else tensor
        else:
            slot[name] = placed_like(tensor, trained[int(index)])
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
