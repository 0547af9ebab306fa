"""How far back the latent of an event tells: the event alone, its modality's events so far, or both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_edits import BELIEFS, CLOSE, toy_timeline
from trajectory_example import HISTORY, RICH, WIDTH, toy_model

from trajlm.config import EncoderConfig
from trajlm.encoders import ENCODERS, build_encoder
from trajlm.latents import cache_latents
from trajlm.schema import FittedFeature, Modality
from trajlm.views import NumericView, numeric_view

REACHES = ("own", "history", "both")


def series_of(random: np.random.Generator, lengths: list[int], features: int = 3) -> NumericView:
    values = [random.normal(size=(n, features)).astype(np.float32) for n in lengths]
    observed = [random.random((n, features)) < 0.6 for n in lengths]
    hours = [np.sort(random.uniform(0, 48, n)) for n in lengths]
    return numeric_view([np.where(o, v, 0).astype(np.float32) for v, o in zip(values, observed, strict=True)],
                        observed, hours)  # fmt: skip


def steps_of(view: NumericView, row: int, first: int, end: int) -> NumericView:
    parts = (view.values, view.observed, view.state, view.hours, view.steps)
    return NumericView(*(part[row : row + 1, first:end] for part in parts))


def in_order() -> list[str]:
    found = [name for name, (kind, _) in ENCODERS.items() if kind == "numeric" and series_encoder(name).reads_in_order]
    assert {"lstm", "gru"} <= set(found)
    return found


def series_encoder(name: str):
    torch.manual_seed(0)
    features = [FittedFeature("series", f"f{i}", feature_id=i) for i in range(3)]
    config = EncoderConfig(latent_width=8, hidden_width=12, by_modality={"series": name})
    return build_encoder(Modality("series", "numeric"), features, config).eval()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", in_order())
def test_what_reads_in_order_says_after_a_step_what_it_says_of_the_steps_up_to_it(name, layers):
    """Every prefix encoded as an input of its own, and stepped through one event at a time."""
    torch.manual_seed(0)
    features = [FittedFeature("series", f"f{i}", feature_id=i) for i in range(3)]
    config = EncoderConfig(latent_width=8, hidden_width=12, layers=layers, by_modality={"series": name})
    encoder = build_encoder(Modality("series", "numeric"), features, config).eval()
    view = series_of(np.random.default_rng(1), [5, 1, 3])
    with torch.no_grad():
        tokens = encoder.encode(view, tokens=True).tokens
        for row, length in enumerate([5, 1, 3]):
            carried = None
            for step in range(length):
                prefix = steps_of(view, row, 0, step + 1)
                torch.testing.assert_close(tokens[row, step], encoder(prefix)[0], **CLOSE)
                one = steps_of(view, row, step, step + 1)
                latent, carried = encoder.advance(one, carried)
                torch.testing.assert_close(latent[0], tokens[row, step], **CLOSE)


def test_an_event_has_its_own_latent_its_history_or_both():
    encoders = toy_model().encoders
    timeline = toy_timeline()
    labs = [e for e in timeline.events if e.modality == "labs"]
    view = toy_model().timelines.inputs["labs"].event_view(labs)
    with torch.no_grad():
        own, history, both = (encoders.event_latents("labs", view, reach) for reach in REACHES)
        alone = torch.cat([encoders.encode("labs", view.single_steps().select(torch.tensor([i])))
                           for i in range(len(labs))])  # fmt: skip
        whole = encoders.encode("labs", view)
    torch.testing.assert_close(own, alone, **CLOSE)
    torch.testing.assert_close(history[-1], whole[0], **CLOSE)
    torch.testing.assert_close(history[0], own[0], **CLOSE)
    assert not torch.allclose(history[1:], own[1:])
    assert torch.equal(both, torch.cat([own, history], dim=-1))
    assert encoders.event_width("both") == 2 * WIDTH == both.shape[1]


def test_notes_and_tables_are_their_own_history():
    model = toy_model(**HISTORY)
    batch = model.encode_timeline(toy_timeline())
    labs = batch.modality[0] == model.encoders.modalities.index("labs")
    first, second = batch.latents[0, ~labs].chunk(2, dim=-1)
    assert torch.equal(first, second)
    assert len(first) > 2
    tokens = model.encoders.missing_latents("both")
    assert torch.equal(tokens, torch.cat([model.encoders.missing_tokens] * 2, dim=-1))


@pytest.mark.parametrize("reach", REACHES)
def test_streamed_beliefs_are_those_of_the_batch(reach):
    model = toy_model(**RICH | {"reach": reach})
    for seed in range(3):
        timeline = toy_timeline(seed)
        whole = model.beliefs(timeline)
        stream = model.stream()
        streamed = [stream.push(event) for event in timeline.events]
        for name in BELIEFS:
            found = [belief[name.removeprefix("belief_")] for belief in streamed]
            assert np.allclose(found, whole[name].to_numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reach", ["history", "both"])
def test_history_is_of_the_past_alone(reach):
    """A later value never moves an earlier belief; an earlier one moves a later latent."""
    model = toy_model(**RICH | {"reach": reach})
    timeline = toy_timeline(2)
    labs = [i for i, e in enumerate(timeline.events) if e.modality == "labs"]
    for place in labs[1:-1]:
        cut = timeline.events[: place + 1]
        whole, past = model.encode_timeline(timeline), model.encode_timeline(type(timeline)(
            timeline.stay_id, timeline.subject_id, timeline.split, timeline.hours_in_unit, {}, cut))  # fmt: skip
        torch.testing.assert_close(whole.latents[:, : place + 1], past.latents, **CLOSE)


def test_the_cache_holds_the_latents_that_a_timeline_is_given(prepared, model, tmp_path):
    """For each reach; another reach is another cache."""
    stays = prepared.positions("held_out")[:12]
    widths = []
    for reach in REACHES:
        latents = cache_latents(prepared, model.encoders, stays, tmp_path / "latents", "key", reach)
        targets = torch.zeros(len(stays), len(model.targets))
        batch = latents.trajectories(stays, targets, 1000)
        widths.append(batch.latents.shape[-1])
        for row, stay in enumerate(stays):
            timeline = prepared.timeline(prepared.stays["stay_id"][int(stay)])
            for index, name in enumerate(model.encoders.modalities):
                events = [e for e in timeline.events if e.modality == name]
                if events:
                    expected = model.encoders.event_latents(
                        name, model.timelines.inputs[name].event_view(events), reach
                    )
                    mine = batch.latents[row][(batch.modality[row] == index) & batch.present[row]]
                    torch.testing.assert_close(mine, expected.detach(), rtol=1e-4, atol=1e-5)
    own = model.encoders.latent_width
    assert widths == [own, own, 2 * own]
