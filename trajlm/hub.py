"""A fine-tuned model as one folder that can be handed on: weights, settings, card and figures; nothing of any stay."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from trajlm.assemble import save_trajectory_model
from trajlm.checkpoint import write_text
from trajlm.config import BackboneConfig, EncoderConfig
from trajlm.errors import TrajlmError
from trajlm.trajectory import TrajectoryModel


def save_model(model: TrajectoryModel, folder: Path | str) -> Path:
    """Write a folder that :meth:`TrajectoryModel.from_pretrained` loads, on this machine or another.

    Encoders, projectors and heads, the adapter (or the whole backbone, where its weights exist nowhere else) as
    safetensors, ``config.yaml`` without the paths of this machine, and of the run the model card and its figures.

    Args:
        model: of ``from_pretrained``; a model that was put together by hand has no settings to go along.
        folder: must not exist, or be empty.

    Raises:
        TrajlmError: the folder holds something, or the model has no settings.
    """
    target = Path(folder)
    if model.origin is None:
        raise TrajlmError("only a model that was loaded from a run can be saved: it brings its settings and figures")
    if target.exists() and any(target.iterdir()):
        raise TrajlmError(f"{target} is not empty; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        about = _without_places(model.origin["about"])
        backbone = BackboneConfig(**about["recipe"]["backbone"])
        save_trajectory_model(model, backbone, EncoderConfig(**about["recipe"]["encoder"]), partial)
        write_text(partial / "config.yaml", yaml.safe_dump(about, sort_keys=False))
        for name, text in model.origin["papers"].items():
            write_text(partial / name, text)
        partial.chmod(0o755)
        if target.exists():
            target.rmdir()
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _without_places(about: dict[str, Any]) -> dict[str, Any]:
    """A run's settings without where its data and folders lay."""
    about = copy.deepcopy(about)
    recipe = about["recipe"]
    recipe["data"], recipe["out"] = None, None
    if recipe["encoders"] != "scratch":
        recipe["encoders"] = "pretrained"
    if os.path.isdir(os.path.expanduser(recipe["backbone"]["name"])):
        raise TrajlmError(
            f"the backbone is the local folder {recipe['backbone']['name']}, which nobody else has; train on a hub id "
            "or a preset, or hand on the run folder together with the backbone's"
        )
    return about


def push_model(model: TrajectoryModel, repository: str, private: bool = True, token: str | None = None) -> str:
    """Upload the folder of :func:`save_model` to a repository of the Hugging Face hub; only when called.

    Args:
        model: of ``from_pretrained``.
        repository: ``owner/name``; made if it does not exist.
        private: whether a new repository is.
        token: of the hub; None takes the one that is logged in.

    Returns:
        the address of the commit.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as place:
        folder = save_model(model, Path(place) / "model")
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="trajlm model"))
