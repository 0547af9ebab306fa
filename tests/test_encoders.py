"""Encoders: what they read of a view, and that what is absent never reaches them."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import command
from encoder_example import CONFIG, FEATURES, MEASURED, build, random_view
from hypothesis import given, settings
from hypothesis import strategies as st

from trajlm.config import EncoderConfig
from trajlm.dataset import StayBatch
from trajlm.encoders import ENCODERS, build_encoder
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.encoders.augment import augment
from trajlm.encoders.numeric import VALUE_KNOTS, NumericInputs, PiecewiseShares
from trajlm.encoders.text import BUCKETS, bag, hashed_words
from trajlm.errors import TrajlmError
from trajlm.schema import FittedFeature, Modality
from trajlm.views import CarriedState, ImageView, TextView, numeric_view, padded_view

EACH = {name: build("numeric", name) for name, (kind, _) in ENCODERS.items() if kind == "numeric"}
MODALITIES = [
    Modality("age", "numeric", static=True),
    Modality("labs", "numeric"),
    Modality("note", "text"),
    Modality("xray", "image"),
]


def aligned(**options) -> AlignedEncoders:
    torch.manual_seed(0)
    features = [FittedFeature("age", "age", feature_id=0)]
    features += [FittedFeature("labs", f"lab{i}", feature_id=1 + i) for i in range(FEATURES)]
    return AlignedEncoders(MODALITIES, features, replace(CONFIG, **options)).eval()


def stays(present: list[list[int]], seed: int = 0) -> StayBatch:
    """Stays that hold these of age, labs, note, xray."""
    mask, random = torch.tensor(present, dtype=torch.bool), np.random.default_rng(seed)
    age, labs, notes, pictures = (int(n) for n in mask.sum(dim=0))
    views = {}
    if age:
        ones = [np.ones((1, 1), dtype=bool)] * age
        values = [random.normal(size=(1, 1)).astype(np.float32) for _ in range(age)]
        views["age"] = numeric_view(values, ones, [np.zeros(1)] * age)
    if labs:
        views["labs"] = random_view([1 + i % 3 for i in range(labs)], seed)
    if notes:
        views["note"] = TextView([f"note number {i} is stable" for i in range(notes)])
    if pictures:
        views["xray"] = ImageView(torch.from_numpy(random.integers(0, 256, (pictures, 16, 16), dtype=np.uint8)))
    return StayBatch(torch.arange(len(present)), mask, tuple(m.name for m in MODALITIES), views)


# Numeric inputs


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_shares_keep_the_order_of_numbers(one, other):
    shares = PiecewiseShares(VALUE_KNOTS)
    low, high = shares(torch.tensor([[min(one, other)], [max(one, other)]]))
    assert (low <= high).all()
    assert ((low >= 0) & (high <= 1)).all()
    # Inside the outermost knots the code tells the number: whole intervals passed, and the share of the one it is in.
    inner = torch.tensor([[np.clip(one, VALUE_KNOTS[0], VALUE_KNOTS[-1])]], dtype=torch.float32)
    assert VALUE_KNOTS[0] + float((shares(inner) * shares.width).sum()) == pytest.approx(float(inner), abs=1e-4)


@pytest.mark.parametrize("state", [True, False])
def test_the_code_of_a_value_never_observed_is_zero(state):
    inputs = NumericInputs(MEASURED, replace(CONFIG, state=state))
    never = CarriedState.unobserved(1, FEATURES).features(np.array([5.0]))
    nothing = torch.zeros(1, FEATURES)
    assert not inputs(nothing, nothing.bool(), torch.from_numpy(never)).any()


@pytest.mark.parametrize("name", EACH)
def test_a_slip_of_a_sensor_counts_no_more_than_an_extreme_value(name):
    model, hours, seen = EACH[name], [np.zeros(1)], [np.ones((1, FEATURES), dtype=bool)]
    views = [numeric_view([np.full((1, FEATURES), v, dtype=np.float32)], seen, hours) for v in (6.0, 28.0)]
    with torch.no_grad():
        assert torch.equal(model(views[0]), model(views[1]))


def test_the_series_encoder_reads_the_order_of_its_steps():
    model, view = build("numeric", "lstm"), random_view([3])
    turned = replace(view, values=view.values.flip(1), observed=view.observed.flip(1), state=view.state.flip(1))
    with torch.no_grad():
        assert not torch.allclose(model(view), model(turned))


@settings(deadline=None, max_examples=10)
@given(steps=st.integers(1, 8), seed=st.integers(0, 999))
def test_single_steps_are_what_a_stream_would_see(steps, seed):
    """The views of events cut from a stay equal those made one event at a time with the state carried by hand."""
    random = np.random.default_rng(seed)
    observed = random.random((steps, FEATURES)) < 0.4
    values = (random.normal(size=observed.shape) * observed).astype(np.float32)
    hours = np.sort(random.uniform(0, 48, steps))
    events = numeric_view([values], [observed], [hours]).single_steps()
    assert len(events) == steps
    last: dict[int, tuple[float, float]] = {}
    carried = CarriedState.unobserved(FEATURES)
    for step in range(steps):
        for feature in np.flatnonzero(observed[step]):
            last[feature] = (float(values[step, feature]), hours[step])
        expected = [last[f][0] if f in last else 0.0 for f in range(FEATURES)]
        expected += [float(f in last) for f in range(FEATURES)]
        expected += [np.log1p(hours[step] - last[f][1]) if f in last else 0.0 for f in range(FEATURES)]
        seen = [values[: step + 1, f][observed[: step + 1, f]] for f in range(FEATURES)]
        expected += [float(own.mean()) if len(own) else 0.0 for own in seen]
        assert np.allclose(events.state[step, 0], expected, atol=1e-6)
        carried = carried.advance(values[step], observed[step], np.array(hours[step]))
        assert np.array_equal(carried.features(np.array(hours[step])), events.state[step, 0].numpy())
    for model in EACH.values():
        with torch.no_grad():
            one_by_one = torch.cat([model(events.select(torch.tensor([i]))) for i in range(steps)])
            torch.testing.assert_close(model(events), one_by_one, rtol=1e-5, atol=1e-6)


def test_an_input_reduced_to_some_steps_is_those_steps():
    view = random_view([4, 2, 3])
    known = [[part[row, :end].numpy() for row, end in enumerate([3, 2, 1])]
             for part in (view.values, view.observed, view.hours)]  # fmt: skip
    reduced = padded_view(*(np.concatenate(part) for part in known), np.array([3, 2, 1]), np.array([2, 0, 0]))
    assert reduced.steps.sum(dim=1).tolist() == [1, 2, 1]
    singles = view.single_steps()
    for model in EACH.values():
        with torch.no_grad():
            latents, each, whole = model(reduced), model(singles), model(view)
        torch.testing.assert_close(latents, torch.stack([each[2], whole[1], each[6]]), rtol=1e-5, atol=1e-6)


def test_a_view_refuses_padding_at_the_front():
    view = random_view([3, 2])
    with pytest.raises(ValueError, match="padding belongs at the end"):
        replace(view, steps=view.steps.flip(1))
    with pytest.raises(ValueError, match="expected state"):
        replace(view, state=view.values)


# Text


def test_hashed_words_are_the_same_in_every_process():
    text = "Chest tube in place. No pneumothorax; 3 ribs."
    code = f"from trajlm.encoders.text import hashed_words; print(*hashed_words({text!r}))"
    for seed in ("1", "2"):
        done = command(sys.executable, "-c", code, PYTHONHASHSEED=seed)
        assert [int(word) for word in done.stdout.split()] == list(hashed_words(text))


def test_hashed_words_are_pinned():
    """Saved weights are addressed by these numbers: another hash would scramble every saved run in silence."""
    grams = ["no", "edema", ".", "no edema", "edema ."]
    digests = [hashlib.blake2b(gram.encode(), digest_size=4).hexdigest() for gram in grams]
    assert hashed_words("No edema.") == tuple(int(digest, 16) % 2**14 for digest in digests)
    assert hashed_words("No edema.") == (2863, 12088, 4746, 343, 536)
    assert all(0 <= bucket < BUCKETS for bucket in hashed_words("No edema. No edema!"))
    assert hashed_words("EDEMA") == hashed_words("edema")
    assert hashed_words("") == (0,)
    assert hashed_words("left lung") != hashed_words("lung left")


def test_a_note_is_remembered_in_two_bytes_a_word():
    text = "Chest tube in place. " * 300
    kept = bag(text)
    assert kept.nbytes == 2 * len(hashed_words(text))
    assert kept.tolist() == list(hashed_words(text))
    assert bag(text) is kept


# Pictures


def test_a_picture_is_read_alone_and_whole():
    model = build("image", "cnn")
    pixels = stays([[0, 0, 0, 1]] * 3).views["xray"].pixels
    with torch.no_grad():
        together = model(ImageView(pixels))
        alone = torch.cat([model(ImageView(pixels[i : i + 1])) for i in range(3)])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
        changed = pixels.clone()
        changed[0, -1, -1] = 255 - changed[0, -1, -1]
        assert not torch.equal(model(ImageView(changed))[0], together[0])


def test_augmentation_happens_in_training_alone_and_stays_a_picture():
    torch.manual_seed(0)
    pixels = torch.rand(4, 1, 16, 16)
    moved = augment(pixels)
    assert moved.shape == pixels.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert not torch.allclose(moved, augment(pixels))
    model, view = build("image", "cnn"), ImageView((pixels[:, 0] * 255).byte())
    with torch.no_grad():
        assert torch.equal(model(view), model(view))
        model.train()
        assert not torch.equal(model(view), model(view))


def test_pictures_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="expected pixels uint8"):
        ImageView(torch.zeros(1, 3, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected pixels uint8"):
        ImageView(torch.zeros(1, 4, 4))


# All together


def test_an_absent_modality_never_runs_and_its_token_stands_in():
    model = aligned()
    ran: dict[str, list[int]] = {}
    for name, part in model.encoders.items():
        part.register_forward_hook(lambda _, inputs, output, name=name: ran.setdefault(name, []).append(len(inputs[0])))
    batch = stays([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]])
    with torch.no_grad():
        latents = model(batch)
    assert ran == {"age": [3], "labs": [1], "note": [1]}
    for stay, column in (~batch.present).nonzero().tolist():
        assert torch.equal(latents[stay, column], model.missing_tokens[column])
    for column, name in enumerate(model.modalities):
        held = batch.present[:, column]
        if held.any():
            with torch.no_grad():
                assert torch.equal(latents[held, column], model.encode(name, batch.views[name]))


@pytest.mark.parametrize("modality", ["labs", "note", "xray"])
def test_raw_input_of_a_masked_modality_changes_nothing(modality):
    """NaN weights in its encoder would spread, were it run; its inputs reach no output and no gradient."""
    model, batch = aligned(), stays([[1, 1, 1, 1], [1, 1, 1, 1]])
    column = model.modalities.index(modality)
    fewer = batch.present.clone()
    fewer[:, column] = False
    before = model(batch.masked(fewer))
    with torch.no_grad():
        for parameter in model.encoders[modality].parameters():
            parameter.fill_(float("nan"))
    after = model(batch.masked(fewer))
    assert torch.equal(before, after)
    after.sum().backward()
    assert all(p.grad is None for p in model.encoders[modality].parameters())
    assert model.missing_tokens.grad[column].abs().sum() > 0
    assert not model(batch).isfinite().all()


def test_masking_leaves_the_right_inputs_with_each_stay():
    model, batch = aligned(), stays([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 1, 1]])
    fewer = batch.present.clone()
    fewer[0, 2] = fewer[2, 1] = False
    with torch.no_grad():
        whole, masked = model(batch), model(batch.masked(fewer))
    torch.testing.assert_close(masked[fewer], whole[fewer], rtol=1e-5, atol=1e-6)
    assert torch.equal(masked[0, 2], model.missing_tokens[2])
    with pytest.raises(ValueError, match="cannot be made present"):
        batch.masked(torch.ones_like(batch.present))


def test_a_batch_counts_its_inputs():
    batch = stays([[1, 1, 0, 0], [1, 1, 0, 0]])
    short = {**batch.views, "labs": batch.views["labs"].select(torch.tensor([0]))}
    with pytest.raises(ValueError, match="2 stays hold labs, its view holds 1"):
        replace(batch, views=short)


# Names


@pytest.mark.parametrize(
    ("modality", "name", "said"),
    [
        (Modality("labs", "numeric"), "lstmm", "the nearest is 'lstm'"),
        (Modality("labs", "numeric"), "cnn", "reads image inputs"),
        (Modality("note", "text"), "hashed", "the nearest is 'hashed-text'"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused(modality, name, said):
    with pytest.raises(TrajlmError, match=said):
        build_encoder(modality, MEASURED, EncoderConfig(by_modality={modality.name: name}))


def test_defaults_by_kind():
    kinds = {m.name: type(aligned().encoders[m.name]).__name__ for m in MODALITIES}
    assert kinds == {"age": "TabularMLP", "labs": "Recurrent", "note": "HashedText", "xray": "ImageCNN"}
