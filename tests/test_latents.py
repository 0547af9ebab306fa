"""The latent cache: complete, compact, never stale, and all that fine-tuning reads of the events."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import FINETUNING

from trajlm import latents as module
from trajlm.checkpoint import data_fingerprint, fingerprint
from trajlm.columns import ColumnWriter, column_folder, open_column, read_note
from trajlm.dataset import ModalityStore, Prepared, load_prepared
from trajlm.errors import TrajlmError
from trajlm.finetuning import finetune
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.latents import Latents, cache_latents
from trajlm.views import STATE_PARTS, CarriedState


def key_of(prepared: Prepared, encoders) -> str:
    weights = [t for _, t in sorted(encoders.state_dict().items())]
    return fingerprint(data_fingerprint(prepared.folder), *weights)


@pytest.fixture
def watched(monkeypatch):
    """How often events were encoded."""
    calls = []
    original = module._encode
    monkeypatch.setattr(module, "_encode", lambda *a: (calls.append(1), original(*a)))
    return calls


# What it holds


def test_states_are_bit_for_bit_those_of_the_events(prepared, cached, model):
    """Put together from the cache for many stays at once, and carried by hand from the raw values, one by one."""
    stays = prepared.positions("held_out")
    batch = cached.latents.trajectories(stays, cached.targets[torch.from_numpy(stays)], model.max_events)
    carried = 0
    for row, stay in enumerate(stays):
        states: dict[str, CarriedState] = {}
        events = prepared.timeline(prepared.stays["stay_id"][int(stay)]).events
        read = [event for event in events if event.modality in model.encoders.modalities]
        assert len(read) == int(batch.present[row].sum())
        for step, event in enumerate(read):
            expected = np.zeros(model.encoders.state_width, dtype=np.float32)
            reader = model.timelines.inputs[event.modality]
            if reader.modality.kind == "numeric":
                values, observed = reader.dense(
                    np.array([len(event.values)]), np.array(event.feature_ids), np.array(event.values, np.float32)
                )
                hours = np.array(event.hours_since_admission)
                before = states.get(event.modality, CarriedState.unobserved(values.shape[1]))
                states[event.modality] = state = before.advance(values[0], observed[0], hours)
                expected[: STATE_PARTS * values.shape[1]] = state.features(hours)
                carried += 1
            assert np.array_equal(batch.state[row, step].numpy(), expected)
    assert carried > 100


def test_a_capped_timeline_keeps_its_states(prepared, cached, model):
    stays = prepared.positions("held_out")
    targets = cached.targets[torch.from_numpy(stays)]
    whole = cached.latents.trajectories(stays, targets, 1000)
    short = cached.latents.trajectories(stays, targets, 5)
    assert short.present.shape[1] < whole.present.shape[1]
    for row in range(len(stays)):
        index = short.event_index[row][short.present[row]]
        at = torch.isin(whole.event_index[row], index) & whole.present[row]
        assert torch.equal(short.state[row][short.present[row]], whole.state[row][at])


def test_parts_and_chunks_change_nothing(prepared, cached, model, tmp_path, monkeypatch):
    """Whatever number of events is read at once: the same rows, latents equal but for the order of sums."""
    monkeypatch.setattr(module, "EVENTS_AT_ONCE", 400)
    monkeypatch.setattr(module, "CHUNK", 3)
    stays = prepared.positions("tuning", "held_out")
    reach = cached.recipe.finetuning.event_latents
    other = cache_latents(prepared, model.encoders, stays[::-1].copy(), tmp_path / "latents", "key", reach)
    for name in ("hours", "modality", "event_index", "present"):
        assert np.array_equal(getattr(other, name), getattr(cached.latents, name))
    assert np.allclose(other.events, cached.latents.events, atol=1e-5)
    targets = cached.targets[torch.from_numpy(stays)]
    mine, theirs = (latents.trajectories(stays, targets, 1000).state for latents in (other, cached.latents))
    assert torch.equal(mine, theirs)


# What makes it stale


def test_a_cache_is_used_again_and_one_changed_weight_makes_another(prepared, model, tmp_path, watched):
    stays = prepared.positions("held_out")[:20]

    def open_cache() -> Latents:
        return cache_latents(prepared, model.encoders, stays, tmp_path / "latents", key_of(prepared, model.encoders))

    first = np.array(open_cache().events)
    assert len(watched) == 1
    assert np.array_equal(open_cache().events, first)
    assert len(watched) == 1
    weight = next(model.encoders.encoders["series"].parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        open_cache()
        assert len(watched) == 2
    finally:
        with torch.no_grad():
            weight.copy_(before)
    # As many stays, but others.
    cache_latents(
        prepared, model.encoders, prepared.positions("held_out")[1:21], tmp_path / "latents",
        key_of(prepared, model.encoders),
    )  # fmt: skip
    assert len(watched) == 3


@pytest.mark.parametrize("file", ["features.json", "stays.parquet", "events/part-00000.parquet", "manifest.json"])
def test_one_changed_byte_of_data_is_other_data(file, prepared, tmp_path):
    copy = tmp_path / "prepared"
    shutil.copytree(prepared.folder, copy)
    before = data_fingerprint(copy)
    path = copy / file
    if file == "manifest.json":
        path.write_text(path.read_text().replace('"static": true', '"static": false', 1))
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert data_fingerprint(copy) != before


# What interrupts it


@pytest.mark.parametrize("moment", ["first chunk", "before its note", "before its place"])
def test_an_interrupted_cache_never_looks_whole(moment, prepared, model, tmp_path, monkeypatch, watched):
    """Cut off anywhere, over an older cache or over none: the next call encodes anew."""
    stays, folder = prepared.positions("held_out")[:20], tmp_path / "latents"
    cache_latents(prepared, model.encoders, stays, folder, "old")

    def cut(*_, **__):
        raise KeyboardInterrupt

    original = shutil.rmtree
    with monkeypatch.context() as patch:
        if moment == "first chunk":
            patch.setattr(module, "_encode_chunk", cut)
        elif moment == "before its note":
            patch.setattr(ColumnWriter, "close", cut)
        else:
            patch.setattr(shutil, "rmtree", lambda path, *a, **k: cut() if path == folder else original(path, *a, **k))
        with pytest.raises(KeyboardInterrupt):
            cache_latents(prepared, model.encoders, stays, folder, "new")
    about = read_note(folder)
    assert about is None or about["key"] == "old"
    calls = len(watched)
    again = cache_latents(prepared, model.encoders, stays, folder, "new")
    assert len(watched) == calls + 1
    assert len(again.stays) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_column_cut_short_or_gone_is_no_cache(prepared, model, tmp_path, watched):
    stays, folder = prepared.positions("held_out")[:20], tmp_path / "latents"
    for spoil in (lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.unlink()):
        cache_latents(prepared, model.encoders, stays, folder, "key")
        spoil(folder / "events.bin")
        with pytest.raises(TrajlmError, match="no whole latents"):
            Latents(folder, prepared, model.encoders.modalities)
    cache_latents(prepared, model.encoders, stays, folder, "key")
    assert len(watched) == 3


def test_columns_come_back_as_they_went(tmp_path):
    parts = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0, 3), np.float32), np.ones((1, 3), np.float32)]
    with column_folder(tmp_path / "made", {"key": "k"}) as columns:
        for part in parts:
            columns.append("wide", part)
        columns.append("none", np.zeros(0, np.int16))
        with pytest.raises(ValueError, match="came float64"):
            columns.append("wide", np.zeros((1, 3)))
    about = read_note(tmp_path / "made")
    assert about is not None
    wide = open_column(tmp_path / "made", about, "wide")
    assert isinstance(wide, np.memmap)
    assert np.array_equal(wide, np.concatenate(parts))
    assert open_column(tmp_path / "made", about, "none").shape == (0,)
    with pytest.raises(ValueError, match="read-only"):
        wide[0] = 1


# What fine-tuning reads


def test_fine_tuning_reads_no_event_once_they_are_encoded(prepared_folder, run, tmp_path, monkeypatch):
    """With the cache of an earlier run; its fusion and sequence model never open a store of events."""
    flags = [*FINETUNING, "--finetuning.epochs", "1", "--finetuning.baseline_epochs", "1"]
    flags += ["--finetuning.baselines", "[mlp]", "--data", str(prepared_folder), "--out", str(tmp_path / "run")]
    recipe = parse_recipe(recipe_parser("finetune.py", ""), flags)
    opened = []
    original = ModalityStore.__init__

    def counted(self, reader, *rest) -> None:
        opened.append(reader.modality.name)
        original(self, reader, *rest)

    monkeypatch.setattr(ModalityStore, "__init__", counted)
    monkeypatch.setattr("trajlm.finetuning._conclude", lambda work, arms: None)
    finetune(recipe)
    assert opened
    opened.clear()
    shutil.rmtree(tmp_path / "run/checkpoints")
    finetune(recipe)
    assert not opened
    assert load_prepared(prepared_folder).stores["series"]
    assert opened == ["series"]


def test_the_encoders_settings_are_part_of_the_key(run, cached):
    """Weights alone do not tell how an encoder reads."""
    import yaml

    about = read_note(run / "latents")
    assert about is not None
    inputs = yaml.safe_load((run / "config.yaml").read_text())["inputs"]
    assert about["key"] == fingerprint(inputs, asdict(cached.recipe.encoder))
    assert about["key"] != fingerprint(inputs, asdict(cached.recipe.encoder) | {"state": False})
