"""Streams: many stays at once, saved and restored, every family, and the batch's own rule for long stays."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from trajectory_example import RICH, toy_model, with_random_beside

from trajlm.backbones import build_backbone
from trajlm.caches import FIRST_ROOM
from trajlm.config import BackboneConfig, EncoderConfig
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.errors import TrajlmError
from trajlm.presets import families
from trajlm.schema import Event, FittedFeature, Modality, Timeline
from trajlm.tasks import build_tasks
from trajlm.trajectory import TrajectoryModel

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = {11: 9, 12: 2, 13: 6, 14: 1}


def family_model(family: str, **options) -> TrajectoryModel:
    """A tiny model of a family, in the richest reading of events."""
    torch.manual_seed(0)
    modalities = [Modality("age", "numeric", static=True), Modality("labs", "numeric"), Modality("note", "text")]
    features = [FittedFeature("age", "age", feature_id=0)]
    features += [FittedFeature("labs", f"lab{i}", feature_id=1 + i, mean=0.5 * i, std=1.0 + i) for i in range(3)]
    tasks = build_tasks(["mortality", "length_of_stay"])
    tasks[0].fit(torch.tensor([0.0, 0.0, 1.0]))
    tasks[1].fit(torch.tensor([24.0, 48.0, 99.0]))
    encoders = AlignedEncoders(modalities, features, EncoderConfig(latent_width=8, hidden_width=16))
    backbone = build_backbone(BackboneConfig(name=f"tiny-{family.replace('_', '-')}", tuning="full"))
    model = TrajectoryModel(encoders, backbone, tasks, modalities, features, 16, **RICH | options).eval()
    return with_random_beside(model)


def events_of(count: int, seed: int, static_last: bool = False) -> list[Event]:
    random = np.random.default_rng(seed)
    found = [Event(0.0, "age", (0,), (50.0 + seed,))]
    for hour in np.sort(random.uniform(0, 40, count - 1)):
        if random.random() < 0.3:
            found.append(Event(float(hour), "note", text=f"note {random.integers(9)}"))
        else:
            ids = tuple(sorted(random.choice([1, 2, 3], random.integers(1, 4), replace=False).tolist()))
            found.append(Event(float(hour), "labs", ids, tuple(random.normal(size=len(ids)).tolist())))
    if static_last:
        found.append(Event(41.0, "age", (0,), (51.0,)))
    return found


def timeline_of(events: list[Event]) -> Timeline:
    return Timeline(1, "p", "held_out", 50.0, {}, tuple(events))


def whole(model: TrajectoryModel, events: list[Event]) -> np.ndarray:
    frame = model.beliefs(timeline_of(events))
    return frame.select(f"belief_{t}" for t in model.targets).to_numpy()


def table(beliefs) -> np.ndarray:
    return np.array([list(b.values()) for b in beliefs])


@pytest.mark.parametrize("family", sorted(families()))
def test_many_stays_at_once_believe_what_each_believes_alone(family):
    """Stays of every length, that begin and fall silent at different pushes; a slot left by one is taken by another."""
    model = family_model(family)
    streams, timelines = model.streams(), {s: events_of(n, s) for s, n in LENGTHS.items()}
    said: dict[int, list] = {stay: [] for stay in timelines}
    pushed = dict.fromkeys(timelines, 0)
    random = np.random.default_rng(0)
    while any(pushed[s] < len(events) for s, events in timelines.items()):
        now = {s: e[pushed[s]] for s, e in timelines.items() if pushed[s] < len(e) and random.random() < 0.7}
        for stay, belief in streams.push(now).items():
            said[stay].append(belief)
            pushed[stay] += 1
    for stay, events in timelines.items():
        np.testing.assert_allclose(table(said[stay]), whole(model, events), **CLOSE)
    streams.forget(11)
    later = events_of(5, 99)
    again = [streams.push({77: event})[77] for event in later]
    np.testing.assert_allclose(table(again), whole(model, later), **CLOSE)
    assert streams.stay_ids == [12, 13, 14, 77]


@pytest.mark.parametrize("family", sorted(families()))
def test_a_saved_stream_goes_on_as_if_never_interrupted(family, tmp_path, monkeypatch):
    model, timelines = family_model(family), {s: events_of(n + 3, s) for s, n in LENGTHS.items()}
    streams = model.streams()
    for step in range(12):
        streams.push({s: e[step] for s, e in timelines.items() if step < len(e) - 2})
    streams.save(tmp_path / "saved")
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("pickle was loaded"))
    restored = model.streams(tmp_path / "saved")
    assert restored.stay_ids == streams.stay_ids
    for step in (-2, -1):
        last = {s: e[step] for s, e in timelines.items()}
        mine, theirs = restored.push(last), streams.push(last)
        for stay in timelines:
            np.testing.assert_allclose(table([mine[stay]]), table([theirs[stay]]), rtol=1e-6, atol=1e-6)
    for stay, events in timelines.items():
        np.testing.assert_allclose(table([mine[stay]])[0], whole(model, events)[-1], **CLOSE)


def test_a_stream_of_another_model_is_refused(tmp_path):
    model = toy_model()
    stream = model.stream()
    stream.push(Event(0.0, "age", (0,), (70.0,)))
    stream.save(tmp_path)
    with torch.no_grad():
        model.predict[0] += 1e-4
    with pytest.raises(TrajlmError, match="another model"):
        model.stream(tmp_path)
    with pytest.raises(TrajlmError, match=r"no saved stream: no stream\.json"):
        model.stream(tmp_path / "nowhere")


def test_a_save_cut_short_is_no_stream(tmp_path, monkeypatch):
    model = toy_model()
    stream = model.stream()
    stream.push(Event(0.0, "age", (0,), (70.0,)))
    stream.save(tmp_path)
    monkeypatch.setattr("trajlm.streaming.write_tensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        stream.save(tmp_path)
    with pytest.raises(TrajlmError, match="no saved stream"):
        model.stream(tmp_path)


@pytest.mark.parametrize("static_last", [False, True])
def test_a_stream_reads_as_many_events_as_the_batch(static_last):
    """The first ``max_events`` and every later static one; what is not read gets no belief and leaves no trace."""
    model = toy_model(max_events=4)
    events = events_of(9, 3, static_last)
    stream = model.stream()
    said = [stream.push(event) for event in events]
    frame = model.beliefs(timeline_of(events))
    assert [i for i, belief in enumerate(said) if belief] == frame["event_index"].to_list()
    assert frame.height == 4 + static_last
    np.testing.assert_allclose(table([b for b in said if b]), whole(model, events), **CLOSE)


@pytest.mark.parametrize("visible", [True, False])
@pytest.mark.parametrize("time", ["hours", "order", "off"])
@pytest.mark.parametrize("kinds", [True, False])
def test_every_option_streams_as_it_batches(visible, time, kinds):
    options = {"predict_visible": visible, "time_encoding": time, "modality_embedding": kinds}
    prompt = {"prompt_ids": [3, 1, 4]} if visible else {}
    model, events = toy_model(**options, **prompt), events_of(8, 5)
    stream = model.stream()
    np.testing.assert_allclose(table([stream.push(e) for e in events]), whole(model, events), **CLOSE)


def test_a_long_stay_outgrows_its_first_room():
    model, events = toy_model(), events_of(FIRST_ROOM // 2 + 9, 7)
    streams, other = model.streams(), events_of(3, 8)
    said = []
    for step, event in enumerate(events):
        said.append(streams.push({1: event} | ({2: other[step - 150]} if 150 <= step < 153 else {})))
    np.testing.assert_allclose(table([s[1] for s in said]), whole(model, events), **CLOSE)


def test_a_refused_event_refuses_the_push_and_leaves_no_trace():
    model = toy_model()
    streams, steady = model.streams(), model.streams()
    first, second = events_of(4, 1), events_of(4, 2)
    for each in (streams, steady):
        each.push({1: first[0], 2: second[0]})
    wrong = [
        ({1: first[1], 2: replace(second[1], modality="ecg")}, "never learned 'ecg'"),
        ({1: first[1], 2: Event(1.0, "labs", (0,), (1.0,))}, "feature id of another modality"),
        ({1: first[1], 3: Event(1.0, "ecg", (0,), (1.0,))}, "never learned"),
    ]
    for events, message in wrong:
        with pytest.raises(TrajlmError, match=message):
            streams.push(events)
    assert streams.stay_ids == [1, 2]
    assert streams.push({1: first[1], 2: second[1]}) == steady.push({1: first[1], 2: second[1]})
    with pytest.raises(TrajlmError, match="not in the streams"):
        streams.forget(3)


def test_streams_of_real_timelines(prepared, beliefs, model, tmp_path):
    """Raw events of held-out stays, pictures and notes among them, all stays in one stream, saved half-way."""
    stays = beliefs["stay_id"].unique().sort().head(6).to_list()
    timelines = {stay: prepared.timeline(stay).events for stay in stays}
    streams, said = model.streams(), {stay: [] for stay in stays}
    longest = max(map(len, timelines.values()))
    for step in range(longest):
        if step == longest // 2:
            streams.save(tmp_path / "saved")
            streams = model.streams(tmp_path / "saved")
        for stay, belief in streams.push({s: e[step] for s, e in timelines.items() if step < len(e)}).items():
            said[stay].append(belief)
    for stay in stays:
        expected = model.beliefs(prepared.timeline(stay)).select(f"belief_{t}" for t in model.targets).to_numpy()
        np.testing.assert_allclose(table(said[stay]), expected, **CLOSE)
    assert json.loads((tmp_path / "saved/stream.json").read_text())["stays"].keys() == {str(s) for s in stays}


@pytest.mark.parametrize("family", sorted(families()))
def test_a_model_goes_on_learning_after_it_streamed(family):
    """Nothing that a push made is left in the model, where a backward pass would meet it."""
    streamed, other = family_model(family), family_model(family)
    stream = streamed.stream()
    for event in events_of(4, 1):
        stream.push(event)
    gradients = []
    for model in (streamed, other):
        torch.manual_seed(0)
        model.train()(model.encode_timeline(timeline_of(events_of(5, 2)))).readouts.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    for name, gradient in gradients[1].items():
        assert torch.equal(gradients[0][name], gradient)
