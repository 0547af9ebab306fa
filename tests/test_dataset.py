"""Prepared folder to inputs: every number a model reads, recomputed in plain Python."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from conftest import RECIPE, TRAJLM, command
from PIL import Image

import trajlm
from trajlm.dataset import load_prepared
from trajlm.errors import TrajlmError
from trajlm.finetuning import finetuning_splits
from trajlm.views import ViewMix


@pytest.fixture(scope="module")
def records(prepared):
    """stay_id to its rows of the events' files, read without our reader, in order."""
    events = pl.read_parquet(prepared.folder / "events" / "*.parquet")
    rows: dict[int, list[dict]] = {}
    for row in events.iter_rows(named=True):
        rows.setdefault(row["stay_id"], []).append(row)
    return rows


@pytest.fixture(scope="module")
def features(prepared):
    return json.loads((prepared.folder / "features.json").read_text())["features"]


def standardised(value: float, feature: dict) -> float:
    if feature["kind"] == "category":
        return value
    logged = math.copysign(math.log(1 + abs(value)), value)
    return (logged - feature["mean"]) / feature["std"]


def some_stays(prepared, count: int = 8) -> np.ndarray:
    return np.linspace(0, len(prepared.stays) - 1, count).astype(int)


def expected_steps(rows: list[dict], listed: list[dict]) -> list[tuple[dict, dict, dict]]:
    """Per event: values by feature, the last known values, and the hours of those."""
    last: dict[int, tuple[float, float]] = {}
    steps = []
    for row in rows:
        values = {f: standardised(v, listed[f]) for f, v in zip(row["feature_ids"], row["values"], strict=True)}
        last.update({f: (v, row["hours_since_admission"]) for f, v in values.items()})
        steps.append((values, dict(last), row["hours_since_admission"]))
    return steps


@pytest.mark.parametrize("modality", ["demographics", "series"])
def test_numeric_views_equal_a_plain_recomputation(prepared, records, features, modality):
    ids = [f["feature_id"] for f in features if f["modality"] == modality]
    stays = some_stays(prepared)
    stays = stays[prepared.present(stays, [modality])[:, 0].numpy()]
    whole = prepared.stores[modality].stay_view(stays)
    series, rows_of = prepared.stores[modality].event_view(stays)
    events = series.single_steps()
    place = 0
    for i, stay in enumerate(prepared.stays["stay_id"].to_numpy()[stays]):
        mine = [row for row in records[stay] if row["modality"] == modality]
        steps = expected_steps(mine, features)
        assert whole.steps[i].sum() == len(steps)
        so_far: dict[int, list[float]] = {f: [] for f in ids}
        for step, (values, last, hour) in enumerate(steps):
            for f, value in values.items():
                so_far[f].append(value)
            dense = np.array([values.get(f, 0.0) for f in ids])
            state = [last[f][0] if f in last else 0.0 for f in ids] + [float(f in last) for f in ids]
            state += [math.log(1 + hour - last[f][1]) if f in last else 0.0 for f in ids]
            state += [float(np.mean(so_far[f])) if so_far[f] else 0.0 for f in ids]
            for view, at in ((whole, (i, step)), (events, (place, 0))):
                assert np.allclose(view.values[at], dense, atol=1e-5)
                assert view.observed[at].tolist() == [f in values for f in ids]
                assert np.allclose(view.state[at], state, atol=1e-5)
                assert float(view.hours[at]) == pytest.approx(hour, rel=1e-6)
            assert prepared.hours[rows_of[place]] == hour
            place += 1
    assert place == len(events) == len(rows_of) > len(stays) - 1


def test_training_values_are_standardised(prepared):
    """Mean 0 and deviation 1 over the training split's events, feature by feature: nothing else was fitted on."""
    train = prepared.positions("train")
    train = train[prepared.present(train, ["series"])[:, 0].numpy()]
    events = prepared.stores["series"].event_view(train)[0].single_steps()
    values, observed = events.values[:, 0].double().numpy(), events.observed[:, 0].numpy()
    checked = 0
    for column, feature in enumerate(f for f in prepared.features if f.modality == "series"):
        seen = values[observed[:, column], column]
        assert len(seen) == feature.observed_in_training
        if feature.kind == "continuous" and len(seen) and feature.std != 1.0:
            assert seen.mean() == pytest.approx(0, abs=1e-4)
            assert seen.std() == pytest.approx(1, abs=1e-4)
            checked += 1
    assert checked > 5


def test_notes_and_pictures_come_whole(prepared, records):
    stays = prepared.positions("held_out")
    for modality, payload in (("radiology_note", "text"), ("chest_xray", "image")):
        held = stays[prepared.present(stays, [modality])[:, 0].numpy()]
        events, rows = prepared.stores[modality].event_view(held)
        whole = prepared.stores[modality].stay_view(held)
        ids = prepared.stays["stay_id"].to_numpy()[held]
        raw = [[r[payload] for r in records[stay] if r["modality"] == modality] for stay in ids]
        flat = [item for items in raw for item in items]
        assert len(flat) == len(rows) == len(events)
        if payload == "text":
            assert events.texts == flat
            assert whole.texts == ["\n".join(dict.fromkeys(items)) for items in raw]
        else:
            pixels = [np.asarray(Image.open(io.BytesIO(item)).convert("L")) for item in flat]
            assert np.array_equal(events.pixels.numpy(), np.stack(pixels))
            latest = [np.asarray(Image.open(io.BytesIO(items[-1])).convert("L")) for items in raw]
            assert np.array_equal(whole.pixels.numpy(), np.stack(latest))


def test_presence_is_that_of_the_stays_table(prepared):
    everyone = np.arange(len(prepared.stays))
    names = [m.name for m in prepared.modalities]
    mask = prepared.present(everyone, names)
    table = prepared.stays.select(f"present_{name}" for name in names).to_numpy()
    assert np.array_equal(mask.numpy(), table)
    assert not mask.all()


def test_a_batch_holds_its_own_stays_in_any_order(prepared):
    names = [m.name for m in prepared.modalities]
    stays = prepared.positions("tuning")
    forward, backward = prepared.stay_batch(stays, names), prepared.stay_batch(stays[::-1].copy(), names)
    assert forward.stay_ids.tolist() == backward.stay_ids.tolist()[::-1]
    assert torch.equal(forward.present, backward.present.flip(0))
    assert forward.views["radiology_note"].texts == backward.views["radiology_note"].texts[::-1]
    series = forward.views["series"], backward.views["series"]
    assert torch.equal(series[0].values, series[1].values.flip(0))


def test_a_random_event_view_shows_one_event_of_the_stay(prepared):
    names = [m.name for m in prepared.modalities]
    stays = prepared.positions("tuning")
    whole = prepared.stay_batch(stays, names)
    single = prepared.stay_batch(stays, names, ViewMix(event=1.0), np.random.default_rng(0))
    some = prepared.stay_batch(stays, names, ViewMix(event=0.5), np.random.default_rng(0))
    assert torch.equal(single.present, whole.present)
    assert (single.views["series"].steps.sum(dim=1) == 1).all()
    for row in range(len(single.views["series"])):
        steps = int(whole.views["series"].steps[row].sum())
        same = (whole.views["series"].state[row, :steps] == single.views["series"].state[row, 0]).all(dim=-1)
        assert same.any()
    notes = whole.views["radiology_note"].texts, single.views["radiology_note"].texts
    assert all(one in all_of_them for all_of_them, one in zip(*notes, strict=True))
    counts = some.views["series"].steps.sum(dim=1)
    assert (counts == 1).any()
    assert (counts > 1).any()


def test_a_window_view_shows_neighbouring_events_as_they_stand_in_the_stay(prepared):
    names = [m.name for m in prepared.modalities]
    stays = prepared.positions("tuning")
    whole = prepared.stay_batch(stays, names)
    window = prepared.stay_batch(stays, names, ViewMix(window=1.0), np.random.default_rng(0))
    assert torch.equal(window.present, whole.present)
    entire, part = whole.views["series"], window.views["series"]
    lengths = []
    for row in range(len(part)):
        steps, shown = int(entire.steps[row].sum()), int(part.steps[row].sum())
        lengths.append((shown, steps))
        begin = [
            b
            for b in range(steps - shown + 1)
            if torch.equal(entire.hours[row, b : b + shown], part.hours[row, :shown])
        ]
        assert len(begin) == 1
        there = slice(begin[0], begin[0] + shown)
        for name in ("values", "observed", "state"):
            assert torch.equal(getattr(entire, name)[row, there], getattr(part, name)[row, :shown])
        assert not part.observed[row, shown:].any()
        assert (part.values[row, shown:] == 0).all()
        assert (part.hours[row, shown:] == part.hours[row, shown - 1]).all()
    assert any(1 < shown < steps for shown, steps in lengths)
    assert any(shown == 1 for shown, _ in lengths)


def test_views_are_mixed_in_the_shares_asked_for():
    counts = np.full(4000, 9)
    first, last = ViewMix(window=0.25, event=0.5).draw(counts, np.random.default_rng(0))
    assert ((first >= 0) & (first <= last) & (last < counts)).all()
    whole = (first == 0) & (last == 8)
    # A ninth of the windows is one event by chance, two in 81 the whole stay.
    assert abs((first == last).mean() - (0.5 + 0.25 / 9)) < 0.03
    assert abs(whole.mean() - (0.25 + 0.25 * 2 / 81)) < 0.03
    assert set(first[first == last]) == set(range(9))
    assert all(
        (end == whole_end).all()
        for end, whole_end in zip(ViewMix().draw(counts, np.random.default_rng(0)), (0, 8), strict=True)
    )


def test_cached_latents_are_those_of_a_timeline(prepared, cached, model):
    for stay in prepared.positions("held_out")[:4]:
        rows = cached.latents.rows(int(stay), model.max_events)
        timeline = prepared.timeline(prepared.stays["stay_id"][int(stay)])
        alone = model.encode_timeline(timeline)
        assert np.allclose(cached.latents.events[rows], alone.latents[0], atol=1e-5)
    batch = prepared.stay_batch(prepared.positions("held_out"), model.encoders.modalities)
    with torch.no_grad():
        whole = model.encoders(batch).numpy()
    places = cached.latents.places(prepared.positions("held_out"))
    assert np.allclose(cached.latents.stays[places], whole, atol=1e-5)


def test_stays_that_fine_tuning_never_uses_are_never_encoded(prepared, cached):
    """Pretraining's own training stays take no part in fine-tuning, not even as latents."""
    assert len(cached.latents.stays) == len(prepared.positions("tuning", "held_out"))
    cached.latents.places(prepared.positions("tuning", "held_out"))
    for stay in prepared.positions("train"):
        with pytest.raises(ValueError, match="was never encoded"):
            cached.latents.rows(int(stay), 100)


def test_unseen_stays_are_shared_out_by_patient(prepared):
    splits = finetuning_splits(prepared, "auto", 0)
    subject = prepared.stays["subject_id"].to_numpy()
    parts = [set(subject[part]) for part in (splits.train, splits.tuning, splits.held_out)]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert set(splits.train) | set(splits.tuning) == set(prepared.positions("tuning"))
    assert set(splits.held_out) == set(prepared.positions("held_out"))
    seen = finetuning_splits(prepared, "train", 0)
    assert set(seen.train) == set(prepared.positions("train"))
    assert set(seen.tuning) == set(prepared.positions("tuning"))


# Mistakes


def test_a_timeline_of_a_stranger_names_some_stays(prepared):
    with pytest.raises(TrajlmError, match=f"it holds {prepared.stays['stay_id'][0]}"):
        prepared.timeline(-1)


def test_a_folder_that_is_not_prepared_is_refused(tmp_path):
    with pytest.raises(TrajlmError, match="trajlm prepare"):
        trajlm.load_prepared(tmp_path)


def test_events_out_of_order_are_refused(prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path / "copy")
    path = tmp_path / "copy/events/part-00000.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    with pytest.raises(TrajlmError, match="not sorted"):
        load_prepared(tmp_path / "copy")


def test_a_picture_of_another_size_is_refused(prepared, tmp_path):
    shutil.copytree(prepared.folder, tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy/manifest.json").read_text())
    manifest["settings"]["image_pixels"] = 64
    (tmp_path / "copy/manifest.json").write_text(json.dumps(manifest))
    other = load_prepared(tmp_path / "copy")
    held = other.positions("train")
    with pytest.raises(TrajlmError, match="32 x 32 pixels, expected 64 x 64"):
        other.stay_batch(held, ["chest_xray"])


def test_published_splits_keep_their_training_stays(prepared, raw, tmp_path):
    """A file of splits is taken as it is, and fine-tuning then learns from its training split."""
    ids = prepared.stays["stay_id"].to_list()
    patients = prepared.stays["subject_id"].to_list()
    names = ["train", "tuning", "held_out"]
    of = {subject: names[i % 3] for i, subject in enumerate(sorted(set(patients)))}
    lines = [f"{stay},{of[subject]}" for stay, subject in zip(ids, patients, strict=True)]
    (tmp_path / "splits.csv").write_text("\n".join(["stay_id,split", *lines]) + "\n")
    command(*TRAJLM, "prepare", *RECIPE, "--raw", raw, "--splits", tmp_path / "splits.csv", "--out", tmp_path / "out")
    other = load_prepared(tmp_path / "out")
    assert other.published_splits
    assert not prepared.published_splits
    assert other.stays["split"].to_list() == [of[subject] for subject in patients]
    assert set(finetuning_splits(other, "auto", 0).train) == set(other.positions("train"))
