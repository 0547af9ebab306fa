"""A finished run, opened for analysis: its model, its records and the latents it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from trajlm.assemble import load_trajectory_model
from trajlm.checkpoint import data_fingerprint, read_run
from trajlm.columns import read_note
from trajlm.dataset import Prepared, load_prepared
from trajlm.errors import TrajlmError
from trajlm.latents import Latents
from trajlm.schema import HELD_OUT
from trajlm.trajectory import TrajectoryModel


@dataclass(frozen=True)
class OpenRun:
    """A finished fine-tuning run.

    Attributes:
        folder: where it lies.
        recipe: its settings.
        metrics: its ``metrics.json``.
        prepared: the records it was made from.
        model: in evaluation mode.
        latents: of its stays.
        beliefs: its ``beliefs.parquet``.
    """

    folder: Path
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    prepared: Prepared
    model: TrajectoryModel
    latents: Latents
    beliefs: pl.DataFrame

    @property
    def targets(self) -> list[tuple[str, str]]:
        """(name, kind) of every target, in order."""
        return [(str(t["name"]), str(t["kind"])) for t in self.metrics["targets"]]

    @property
    def held_out(self) -> pl.Series:
        """stay_id of the held-out stays, sorted."""
        return self.beliefs.filter(pl.col("split") == HELD_OUT)["stay_id"].unique().sort()

    def positions(self, stays: pl.Series) -> np.ndarray:
        """int64[N]: where these stays lie among the records, in order of their length."""
        positions = np.array([self.prepared.position(stay) for stay in stays])
        return positions[np.argsort(np.diff(self.prepared.bounds)[positions], kind="stable")]


def drawn(stays: pl.Series, most: int, seed: int) -> pl.Series:
    """At most ``most`` of sorted stay ids, drawn by the seed and sorted; 0 is all of them."""
    return stays if most == 0 or len(stays) <= most else stays.sample(most, seed=seed).sort()


def finished_run(folder: Path, data: Path | str | None) -> tuple[dict[str, Any], Prepared]:
    """What a run's folder says of it, and the prepared folder it was made from; ``data`` is where that lies now.

    Raises:
        TrajlmError: fine-tuning has not finished there, or the prepared folder is another.
    """
    about = read_run(folder)
    if about["stage"] != "finetuning":
        raise TrajlmError(f"{folder} is a run of {about['stage']}; expected one of finetune.py")
    if not (folder / "metrics.json").exists():
        raise TrajlmError(f"{folder}: fine-tuning has not finished there; run finetune.py again to resume it")
    made_from = Path(data or about["recipe"]["data"])
    if data is None and not made_from.exists():
        raise TrajlmError(
            f"{folder} was made from {made_from}, which is not there, seen from here; name it with --data"
        )
    prepared = load_prepared(made_from)
    if data_fingerprint(prepared.folder) != about["inputs"]["data"]:
        raise TrajlmError(f"{prepared.folder} is not what {folder} was made from; name the right folder with --data")
    return about, prepared


def open_run(run: Path | str, data: Path | str | None = None) -> OpenRun:
    """Open a run folder of finetune.py.

    Args:
        run: the folder.
        data: its prepared folder, if it moved since.

    Raises:
        TrajlmError: the run is not finished, or its records or latents are no longer there.
    """
    folder = Path(run)
    about, prepared = finished_run(folder, data)
    if read_note(folder / "latents") is None:
        raise TrajlmError(f"{folder} has no latents/ any more; run finetune.py again")
    model = load_trajectory_model(folder)
    return OpenRun(
        folder,
        about["recipe"],
        json.loads((folder / "metrics.json").read_text()),
        prepared,
        model,
        Latents(folder / "latents", prepared, model.encoders.modalities),
        pl.read_parquet(folder / "beliefs.parquet"),
    )
