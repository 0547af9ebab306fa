"""The one place that puts models together, from a recipe or from a run folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file
from torch import nn

from trajlm.backbones import (
    bare_trunk,
    build_backbone,
    config_of,
    load_adapter,
    load_trunk,
    prompt_tokens,
    starts_at_random,
    tunes_fully,
    use_attention,
)
from trajlm.checkpoint import data_fingerprint, read_run, write_tensors, write_text
from trajlm.config import BackboneConfig, EncoderConfig, FinetuningConfig, Recipe
from trajlm.dataset import Prepared
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.errors import TrajlmError
from trajlm.hardware import means_of
from trajlm.metrics import LANDMARKS
from trajlm.presets import family_of
from trajlm.schema import TRAIN, FittedFeature, Modality
from trajlm.tasks import Task, build_tasks
from trajlm.trajectory import TrajectoryModel

ENCODER_WEIGHTS, SEQUENCE_WEIGHTS = "encoders.safetensors", "trajectory.safetensors"
# What goes along when a model is handed on. Beliefs, latents, logs and the table of stays are about patients.
PAPERS = ("README.md", "metrics.json")
ADAPTER, BACKBONE = "adapter", "backbone"


def learnable_modalities(prepared: Prepared) -> list[Modality]:
    """Modalities that some training stay holds; an encoder of any other could learn nothing."""
    train = prepared.stays.filter(pl.col("split") == TRAIN)
    return [m for m in prepared.modalities if train[f"present_{m.name}"].any()]


def build_encoders(prepared: Prepared, config: EncoderConfig) -> AlignedEncoders:
    """Fresh encoders for the modalities of a prepared folder."""
    known = [m.name for m in prepared.modalities]
    unknown = sorted(set(config.by_modality) - set(known))
    if unknown:
        raise TrajlmError(
            f"encoder.by_modality names {', '.join(unknown)}; the cohort's modalities are {', '.join(known)}"
        )
    learnable = learnable_modalities(prepared)
    if not learnable:
        raise TrajlmError(f"{prepared.folder}: no training stay holds any event")
    return AlignedEncoders(learnable, prepared.features, config)


def save_encoders(encoders: AlignedEncoders, folder: Path) -> None:
    """Weights, and what they need to be put together again."""
    write_tensors(folder / ENCODER_WEIGHTS, encoders.state_dict())
    note = {"encoded_modalities": list(encoders.modalities)}
    write_text(folder / "encoders.json", json.dumps(note, indent=1))


def load_encoders(run: Path, prepared: Prepared) -> tuple[AlignedEncoders, EncoderConfig]:
    """The encoders of a pretraining run, for a folder prepared with the same vocabulary."""
    about = read_run(run)
    if about["stage"] != "pretraining":
        raise TrajlmError(f"--encoders {run}: expected a run of pretrain.py, came a run of {about['stage']}")
    if not (run / "metrics.json").exists():
        raise TrajlmError(f"--encoders {run}: pretraining has not finished there; run pretrain.py again to resume it")
    config = EncoderConfig(**about["recipe"]["encoder"])
    if about["inputs"]["data"] != data_fingerprint(prepared.folder):
        raise TrajlmError(
            f"--encoders {run} was pretrained on another prepared folder than {prepared.folder}: its splits and "
            "statistics may differ, and its training stays may be held out here; pretrain on this one"
        )
    note = json.loads((run / "encoders.json").read_text())
    modalities = {m.name: m for m in prepared.modalities}
    encoders = AlignedEncoders([modalities[n] for n in note["encoded_modalities"]], prepared.features, config)
    encoders.load_state_dict(load_file(run / ENCODER_WEIGHTS))
    return encoders, config


def _reading(config: FinetuningConfig) -> dict[str, Any]:
    """How a model reads events, as arguments of :class:`TrajectoryModel`."""
    return {
        "time_encoding": config.time_encoding,
        "modality_embedding": config.modality_embedding,
        "readout_at": config.readout_at,
        "landmarks": [landmark for landmark in LANDMARKS if landmark is not None],
        "reach": config.event_latents,
        "context": config.event_context,
        "inputs": config.event_inputs,
        "running_mean": config.running_mean,
        "readout": config.readout,
        "linear": config.linear_readout,
        "trees": config.tree_readout,
        "dropout": config.dropout,
        "input_dropout": config.input_dropout,
        "max_events": config.max_events,
        "predict_visible": config.predict_visible,
    }


def build_trajectory_model(
    recipe: Recipe, prepared: Prepared, encoders: AlignedEncoders, tasks: list[Task], device: torch.device
) -> TrajectoryModel:
    """A sequence model ready to be fine-tuned."""
    means = means_of(recipe, family_of(config_of(recipe.backbone.name).model_type), device)
    backbone = build_backbone(recipe.backbone, torch.bfloat16 if means.bf16 else torch.float32)
    return TrajectoryModel(
        encoders,
        backbone if means.attention == "flash" else use_attention(backbone, means.attention),
        tasks,
        prepared.modalities,
        prepared.features,
        prepared.image_pixels,
        **_reading(recipe.finetuning),
        prompt_ids=prompt_tokens(recipe.finetuning.prompt, recipe.backbone.name),
        bf16=means.bf16,
        flash=means.attention == "flash",
    )


def _without_backbone(model: TrajectoryModel) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if not name.startswith("backbone.")}


def save_trajectory_model(
    model: TrajectoryModel, backbone: BackboneConfig, encoder: EncoderConfig, folder: Path
) -> None:
    """Everything ``from_pretrained`` needs, as safetensors and JSON; the frozen base weights are named, not copied.

    A backbone whose weights were all trained, or started at random, is saved whole.
    """
    write_tensors(folder / SEQUENCE_WEIGHTS, _without_backbone(model))
    write_text(folder / "inputs.json", inputs_json(model))
    if starts_at_random(backbone) or tunes_fully(backbone):
        bare_trunk(model.backbone, backbone).save_pretrained(folder / BACKBONE)  # type: ignore[operator]
    if not tunes_fully(backbone):
        # The vocabulary is never trained; left to itself, peft would ask a hub whether it was.
        model.backbone.save_pretrained(folder / ADAPTER, save_embedding_layers=False)  # type: ignore[operator]


def load_trajectory_model(run: Path | str) -> TrajectoryModel:
    """See :meth:`TrajectoryModel.from_pretrained`."""
    folder = Path(run)
    if not folder.exists() and str(run).count("/") == 1:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(run), allow_patterns=["*.safetensors", "*.json", "*.yaml", "*.md"]))
    about = read_run(folder)
    if about["stage"] != "finetuning":
        raise TrajlmError(f"{run}: expected a run of finetune.py, came a run of {about['stage']}")
    if not (folder / SEQUENCE_WEIGHTS).exists():
        raise TrajlmError(f"{run}: fine-tuning has not finished there; run finetune.py again to resume it")
    settings: dict[str, Any] = about["recipe"]
    inputs = json.loads((folder / "inputs.json").read_text())
    modalities = {entry["name"]: Modality(**entry) for entry in inputs["modalities"]}
    features = [FittedFeature(**entry) for entry in inputs["features"]]
    backbone = BackboneConfig(**settings["backbone"])
    encoded = [modalities[name] for name in inputs["encoded_modalities"]]
    model = TrajectoryModel(
        AlignedEncoders(encoded, features, EncoderConfig(**settings["encoder"])),
        _trained_backbone(folder, backbone),
        build_tasks(settings["finetuning"]["tasks"]),
        list(modalities.values()),
        features,
        inputs["image_pixels"],
        **_reading(FinetuningConfig(**settings["finetuning"])),
        prompt_ids=inputs["prompt_ids"],
    )
    weights = load_file(folder / SEQUENCE_WEIGHTS)
    expected = set(_without_backbone(model))
    if expected != set(weights):
        odd = ", ".join(sorted(expected ^ set(weights))[:3])
        raise TrajlmError(f"{run}: another version of trajlm wrote {SEQUENCE_WEIGHTS} ({odd}); fine-tune again")
    model.load_state_dict(weights, strict=False)
    papers = {name: (folder / name).read_text() for name in PAPERS if (folder / name).is_file()}
    model.origin = {"about": about, "papers": papers}
    return model.eval()


def _trained_backbone(folder: Path, config: BackboneConfig) -> nn.Module:
    saved = folder / BACKBONE
    trunk = load_trunk(config, saved if saved.exists() else None)
    return trunk if tunes_fully(config) else load_adapter(trunk, folder / ADAPTER)


def inputs_json(model: TrajectoryModel) -> str:
    """What a model needs to read raw events, as the text of ``inputs.json``."""
    return json.dumps(
        {
            "image_pixels": model.image_pixels,
            "prompt_ids": model.prompt_ids.tolist(),
            "encoded_modalities": list(model.encoders.modalities),
            "modalities": [asdict(m) for m in model.timelines.modalities.values()],
            "features": [asdict(f) for f in model.features],
        },
        indent=1,
    )
