"""A model handed on as one folder: bit-equal, complete, free of places and of patients."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from conftest import FINETUNING
from trajectory_example import toy_model

from trajlm.errors import TrajlmError
from trajlm.finetuning import finetune
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.trajectory import TrajectoryModel


@pytest.fixture(scope="module")
def adapted(prepared_folder, encoders_run, tmp_path_factory):
    """A run whose adapters stand on a backbone that was drawn at random."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    flags = [*FINETUNING, "--backbone.tuning", "lora", "--finetuning.epochs", "1", "--finetuning.baselines", "[]"]
    places = ["--data", str(prepared_folder), "--encoders", str(encoders_run), "--out", str(out)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*base_model_name_or_path.*")
        warnings.filterwarnings("error", message=".*Could not find a config file.*")
        return finetune(parse_recipe(recipe_parser("finetune.py", ""), [*flags, *places]))


@pytest.mark.parametrize("kind", ["run", "adapted"])
def test_a_model_handed_on_believes_bit_for_bit_the_same(kind, request, prepared, tmp_path):
    run = request.getfixturevalue(kind)
    model = TrajectoryModel.from_pretrained(run)
    saved = model.save_pretrained(tmp_path / "model")
    torch.manual_seed(99)
    again = TrajectoryModel.from_pretrained(saved)
    for stay in pl.read_parquet(run / "beliefs.parquet")["stay_id"].unique().sort().head(5):
        timeline = prepared.timeline(stay)
        assert again.beliefs(timeline).equals(model.beliefs(timeline))
    assert (saved / "adapter").exists() == (kind == "adapted")
    # And on from there.
    third = TrajectoryModel.from_pretrained(again.save_pretrained(tmp_path / "third"))
    assert third.beliefs(timeline).equals(model.beliefs(timeline))


def test_the_folder_holds_weights_settings_card_and_figures_and_no_patient(
    run, prepared_folder, encoders_run, tmp_path
):
    saved = TrajectoryModel.from_pretrained(run).save_pretrained(tmp_path / "model")
    files = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert {"config.yaml", "inputs.json", "trajectory.safetensors", "README.md", "metrics.json"} <= files
    assert not [name for name in files if name.startswith(".")]
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".yaml", ".md"}
    settings = yaml.safe_load((saved / "config.yaml").read_text())
    assert settings["recipe"]["finetuning"] == yaml.safe_load((run / "config.yaml").read_text())["recipe"]["finetuning"]
    everything = "".join((saved / name).read_text() for name in files if not name.endswith(".safetensors"))
    for place in (run, prepared_folder, encoders_run):
        assert str(place) not in everything
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: trajlm\n")
    for part in ("## Intended use", "## Data", "open leak", "95 % patient-level bootstrap", "not a medical device"):
        assert part in card
    assert json.loads((saved / "metrics.json").read_text())["arms"]["held_out"]


def test_it_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    model = TrajectoryModel.from_pretrained(run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(TrajlmError, match="is not empty"):
        model.save_pretrained(tmp_path / "full")
    with pytest.raises(TrajlmError, match="loaded from a run"):
        toy_model().save_pretrained(tmp_path / "toy")
    monkeypatch.setattr("trajlm.hub.write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "cut")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_nothing_is_uploaded_unless_called(run, tmp_path, monkeypatch):
    """The hub's client is replaced: a test must not reach a hub."""
    calls: list[tuple] = []

    class Client:
        def __init__(self, token=None) -> None:
            calls.append(("client", token))

        def create_repo(self, repository, **options) -> None:
            calls.append(("create", repository, options))

        def upload_folder(self, repo_id, folder_path, commit_message) -> str:
            names = sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
            calls.append(("upload", repo_id, names))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Client)
    model = TrajectoryModel.from_pretrained(run)
    saved = model.save_pretrained(tmp_path / "model")
    assert not calls
    assert model.push_to_hub("me/model") == "https://hub/commit"
    assert calls[1] == ("create", "me/model", {"private": True, "exist_ok": True})
    assert calls[2][2] == sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
