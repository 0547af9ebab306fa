"""The sequence model: what a belief may see, and that every way of computing it agrees."""

from __future__ import annotations

import warnings
from dataclasses import asdict, fields, replace

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from conftest import FINETUNING
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectory_example import (
    HISTORY,
    PAPER,
    RICH,
    WIDTH,
    timeline_of,
    toy_batch,
    toy_model,
)

from trajlm.assemble import load_trajectory_model, save_trajectory_model
from trajlm.config import BackboneConfig, EncoderConfig, FinetuningConfig, Recipe
from trajlm.errors import TrajlmError
from trajlm.finetuning import finetune
from trajlm.flags import parse_recipe, recipe_parser
from trajlm.latents import TrajectoryBatch, fits
from trajlm.schema import Event
from trajlm.sequence_objective import HOURS_BEFORE_RISE, SequenceObjective, random_modality
from trajlm.trajectory import TrajectoryModel, interleave

BELIEFS = ["belief_mortality", "belief_length_of_stay_hours"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def busy_stays(prepared, beliefs, count: int = 3) -> list[int]:
    """Held-out stays that hold every modality, or as many as any does."""
    held_out = prepared.stays.filter(pl.col("split") == "held_out")
    present = pl.sum_horizontal(f"present_{m.name}" for m in prepared.modalities)
    chosen = held_out.sort(present, descending=True, maintain_order=True)["stay_id"].head(count).to_list()
    assert set(chosen) <= set(beliefs["stay_id"])
    return chosen


# What a belief may see


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(1, 8), seed=st.integers(0, 99))
@pytest.mark.parametrize("reading", [PAPER, RICH])
def test_a_later_event_never_changes_an_earlier_belief(reading, cut, seed):
    model, batch = toy_model(**reading), toy_batch([9, 6, 3], seed)
    with torch.no_grad():
        before = model(batch).readouts
        scrambled = TrajectoryBatch(*(getattr(batch, field.name).clone() for field in fields(batch)))
        scrambled.latents[:, cut:] = torch.randn_like(scrambled.latents[:, cut:]) * 100
        scrambled.state[:, cut:] = torch.randn_like(scrambled.state[:, cut:]) * 100
        scrambled.modality[:, cut:] = 3 - scrambled.modality[:, cut:].clamp_min(1)
        after = model(scrambled).readouts
    seen = batch.present[:, :cut]
    # Events go through their modality's projector together, and how many they are may move the last bit of a product.
    torch.testing.assert_close(before[:, :cut][seen], after[:, :cut][seen], **CLOSE)
    assert not torch.allclose(before[0, cut], after[0, cut])


@settings(deadline=None, max_examples=20)
@given(cut=st.integers(1, 8), seed=st.integers(0, 99))
def test_an_earlier_belief_has_no_gradient_of_a_later_event(cut, seed):
    """Exactly none: a tolerance could hide a leak."""
    model, batch = toy_model(), toy_batch([9, 6, 3], seed)
    watched = replace(batch, latents=batch.latents.clone().requires_grad_(), state=batch.state.clone().requires_grad_())
    model(watched).readouts[:, :cut][batch.present[:, :cut]].sum().backward()
    gradient = watched.latents.grad
    assert gradient is not None
    assert not gradient[:, cut:].any()
    assert watched.state.grad is not None
    assert not watched.state.grad[:, cut:].any()
    assert gradient[:, :cut][batch.present[:, :cut]].any(dim=-1).all()


def test_no_raw_value_dated_after_an_hour_changes_a_belief_before_it(prepared, beliefs, model):
    """From raw values on: through standardisation, carried state, encoders and backbone."""
    for stay in busy_stays(prepared, beliefs):
        timeline = prepared.timeline(stay)
        whole = model.beliefs(timeline)
        hours = [event.hours_since_admission for event in timeline.events]
        hour = hours[len(hours) // 2]

        def altered(event: Event, hour: float = hour) -> Event:
            if event.hours_since_admission <= hour:
                return event
            if event.text is not None:
                return replace(event, text="the patient has died")
            if event.image is not None:
                return event
            return replace(event, values=tuple(1000.0 * (1 + abs(v)) for v in event.values))

        changed = model.beliefs(replace(timeline, events=tuple(altered(e) for e in timeline.events)))
        early = pl.col("hours_since_admission") <= hour
        for other in (changed, model.beliefs(timeline.until(hour))):
            kept = other.filter(early)
            assert kept.height == whole.filter(early).height > 0
            assert np.allclose(kept.select(BELIEFS), whole.filter(early).select(BELIEFS), **CLOSE)
        late = changed.filter(~early)
        assert not np.allclose(late.select(BELIEFS), whole.filter(~early).select(BELIEFS))


def test_what_padding_holds_changes_no_belief():
    model, batch = toy_model(), toy_batch([7, 4])
    noisy = replace(batch, latents=batch.latents.clone(), hours=batch.hours.clone(), modality=batch.modality.clone())
    noisy.latents[1, 4:], noisy.hours[1, 4:], noisy.modality[1, 4:] = float("nan"), 1e3, 2
    with torch.no_grad():
        clean, dirty = model(batch).readouts, model(noisy).readouts
    assert torch.equal(clean[batch.present], dirty[batch.present])


def test_an_ablated_modality_never_enters(prepared, beliefs, model):
    for stay in busy_stays(prepared, beliefs):
        timeline = prepared.timeline(stay)
        for modality in {event.modality for event in timeline.events}:
            gone = timeline.without(modality)
            assert [e for e in timeline.events if e.modality != modality] == list(gone.events)
            batch = model.encode_timeline(timeline)
            kept = batch.modality != model.encoders.modalities.index(modality)
            with torch.no_grad():
                masked = model.beliefs_of(model(batch.keep(kept)).readouts)["mortality"][0]
            assert np.allclose(masked.numpy(), model.beliefs(gone)["belief_mortality"], **CLOSE)


# Every way of computing a belief agrees


def test_a_padded_batch_gives_what_each_stay_alone_gives():
    model, lengths = toy_model(), [9, 1, 4]
    batch = toy_batch(lengths)
    with torch.no_grad():
        together = model(batch)
        for row, length in enumerate(lengths):
            alone = model(batch.select(torch.arange(3) == row).keep(batch.present[row : row + 1]))
            assert alone.readouts.shape == (1, length, 2)
            torch.testing.assert_close(alone.readouts[0], together.readouts[row, :length], **CLOSE)


def test_streamed_beliefs_are_those_of_the_whole_timeline(prepared, beliefs, model):
    for stay in busy_stays(prepared, beliefs):
        timeline = prepared.timeline(stay)
        stream = model.stream()
        pushed = [stream.push(event) for event in timeline.events]
        whole = model.beliefs(timeline)
        for target in model.targets:
            assert np.allclose([b[target] for b in pushed], whole[f"belief_{target}"], **CLOSE)


def test_streaming_carries_state_between_events():
    """The same event means another thing after another history, streamed as in the batch."""
    model = toy_model()
    last = Event(5.0, "labs", (2,), (1.5,))
    histories = [[Event(1.0, "labs", (1, 3), (9.0, -4.0))], [Event(1.0, "labs", (1, 3), (0.1, 7.0))]]
    states = []
    for history in histories:
        stream = model.stream()
        for event in [*history, last]:
            stream.push(event)
        states.append(stream.streams._stays[0].carried["labs"].value)
        batch = model.encode_timeline(timeline_of([*history, last]))
        alone = model.encoders.encode("labs", model.timelines.inputs["labs"].event_view([last]))
        assert not torch.allclose(batch.latents[0, -1], alone[0])
    assert not np.allclose(*states)


def test_beliefs_of_a_timeline_are_those_of_the_run(prepared, beliefs, model):
    for stay in [*busy_stays(prepared, beliefs), beliefs["stay_id"][0], beliefs["stay_id"][-1]]:
        mine = model.beliefs(prepared.timeline(stay)).with_columns(pl.col("split").cast(pl.String))
        theirs = beliefs.filter(pl.col("stay_id") == stay)
        assert mine.columns == theirs.columns
        exact = ["stay_id", "event_index", "hours_since_admission", "modality"]
        assert mine.select(exact).equals(theirs.select(exact))
        assert np.allclose(mine.select(BELIEFS), theirs.select(BELIEFS), **CLOSE)
        for target in ("target_mortality", "target_length_of_stay_hours"):
            said, known = mine[target].to_list(), theirs[target].to_list()
            assert [v for v, k in zip(said, known, strict=True) if k is not None] == [k for k in known if k is not None]


def test_a_loaded_model_repeats_the_run_bit_for_bit(prepared, beliefs, model, cached):
    """In the batches that fine-tuning used, and with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for split in ("tuning", "held_out"):
            ids = beliefs.filter(pl.col("split") == split)["stay_id"].unique().sort()
            stays = np.array([prepared.position(s) for s in ids])
            stays = stays[np.argsort(np.diff(prepared.bounds)[stays], kind="stable")]
            size = cached.recipe.finetuning.batch_size
            frames = []
            for start in range(0, len(stays), size):
                some = stays[start : start + size]
                batch = cached.latents.trajectories(some, cached.targets[torch.from_numpy(some)], model.max_events)
                with torch.no_grad():
                    frames.append(model.belief_frame(batch, model(batch).readouts))
            again = pl.concat(frames).sort("stay_id", "event_index").drop("split")
            assert again.equals(beliefs.filter(pl.col("split") == split).drop("split"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_saved_model_loads_equal(tuning, tmp_path, run):
    """A LoRA model of a random trunk needs the trunk itself, not another draw of it."""
    model = toy_model(tuning, **HISTORY)
    if tuning == "lora":  # adapters start as no change at all
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    backbone, encoder = BackboneConfig(name="tiny", tuning=tuning), EncoderConfig(latent_width=WIDTH, hidden_width=16)
    save_trajectory_model(model, backbone, encoder, tmp_path)
    (tmp_path / "config.yaml").write_text(config_of(backbone, encoder))
    torch.manual_seed(99)
    loaded = load_trajectory_model(tmp_path)
    events = [Event(0.0, "age", (0,), (70.0,)), Event(2.0, "note", text="stable"), Event(3.0, "labs", (1,), (2.0,))]
    batch = model.encode_timeline(timeline_of(events))
    with torch.no_grad():
        assert torch.equal(model(batch).readouts, loaded(batch).readouts)
    assert model.beliefs(timeline_of(events)).equals(loaded.beliefs(timeline_of(events)))
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".yaml", ".md"}


def test_a_run_with_adapters_loads_to_what_it_reported(prepared, prepared_folder, encoders_run, tmp_path):
    flags = [*FINETUNING, "--backbone.tuning", "lora", "--finetuning.epochs", "1", "--finetuning.baseline_epochs", "1"]
    places = ["--data", str(prepared_folder), "--encoders", str(encoders_run), "--out", str(tmp_path / "run")]
    out = finetune(parse_recipe(recipe_parser("finetune.py", ""), [*flags, *places]))
    assert (out / "adapter/adapter_model.safetensors").exists()
    loaded, said = TrajectoryModel.from_pretrained(out), pl.read_parquet(out / "beliefs.parquet")
    adapters = {n: p for n, p in loaded.backbone.named_parameters() if "lora_B" in n}
    assert adapters
    assert all(p.abs().sum() > 0 for p in adapters.values()), "adapters were not trained or not loaded"
    for stay in (said["stay_id"][0], said["stay_id"][-1]):
        again = loaded.beliefs(prepared.timeline(stay))
        assert np.allclose(again.select(BELIEFS), said.filter(pl.col("stay_id") == stay).select(BELIEFS), **CLOSE)


def config_of(backbone: BackboneConfig, encoder: EncoderConfig) -> str:
    finetuning = FinetuningConfig(linear_readout=True, tree_readout=True)
    recipe = asdict(Recipe(backbone=backbone, encoder=encoder, finetuning=finetuning))
    return yaml.safe_dump({"stage": "finetuning", "inputs": {}, "recipe": recipe})


# Positions


def test_one_predict_position_after_every_event():
    model, batch = toy_model(), toy_batch([5, 2])
    with torch.no_grad():
        output = model(batch)
        events = model.embed(batch)
    assert output.embeddings.shape[1] == 10
    assert output.predict_positions.tolist() == [1, 3, 5, 7, 9]
    assert output.readouts.shape == (2, 5, 2)
    assert torch.equal(output.embeddings[:, output.predict_positions], model.predict.expand(2, 5, -1))
    assert torch.equal(output.embeddings[:, output.predict_positions - 1], events)


def test_beliefs_are_read_at_the_predict_positions():
    model, batch = toy_model(), toy_batch([5, 2])
    trunk = []
    model.backbone.register_forward_hook(lambda _, inputs, output: trunk.append(output.last_hidden_state))
    with torch.no_grad():
        output = model(batch)
        assert torch.equal(output.hidden, trunk[0][:, 1::2])
        model.predict += 1.0
        moved = model(batch).readouts
    assert not torch.isclose(moved[:, 0], output.readouts[:, 0]).any()


def test_interleaving_keeps_the_order_of_events():
    events, predict = torch.arange(12.0).reshape(1, 4, 3), torch.full((3,), -1.0)
    sequence, positions = interleave(events, predict)
    assert sequence[0, ::2].equal(events[0])
    assert sequence[0, 1::2].equal(predict.expand(4, 3))
    assert positions.tolist() == [1, 3, 5, 7]


def test_every_event_goes_through_the_projector_of_its_modality():
    model, batch = toy_model(time_encoding="off", context="own"), toy_batch([5, 3])
    with torch.no_grad():
        embedded = model.embed(batch)
        for row, step in batch.present.nonzero().tolist():
            name = model.encoders.modalities[int(batch.modality[row, step])]
            projected = model.projectors[name](batch.latents[row, step][None], batch.state[row, step][None])
            torch.testing.assert_close(embedded[row, step], model.mixers[name](projected)[0], **CLOSE)
    stranger = replace(batch, modality=torch.where(batch.present, 7, 0))
    with pytest.raises(ValueError, match="8 events came, 0 were embedded"):
        model.embed(stranger)


# What an event brings along


@pytest.mark.parametrize("readout", ["predict", "predict_and_event"])
@pytest.mark.parametrize("inputs", ["latent", "latent_and_state", "state"])
@pytest.mark.parametrize("context", ["own", "newest"])
def test_every_way_of_reading_events_streams_as_it_batches(context, inputs, readout):
    model = toy_model(context=context, inputs=inputs, readout=readout)
    events = [
        Event(0.0, "age", (0,), (70.0,)),
        Event(1.0, "labs", (1, 3), (9.0, -4.0)),
        Event(1.0, "note", text="worse"),
        Event(3.0, "labs", (2,), (1.5,)),
        Event(4.5, "note", text="stable"),
        Event(7.0, "labs", (1, 2), (0.5, 2.5)),
    ]
    whole, stream = model.beliefs(timeline_of(events)), model.stream()
    for row, event in enumerate(events):
        belief = stream.push(event)
        for target in model.targets:
            assert np.isclose(belief[target], whole[f"belief_{target}"][row], **CLOSE)


def test_the_newest_event_of_a_modality_stands_in_for_the_earlier_ones():
    """Embeddings after an event follow from the newest of each modality alone; without context from the event alone."""
    batch = toy_batch([7])
    batch.modality[:] = torch.tensor([[0, 1, 2, 1, 2, 2, 1]])
    for context, remembered in (("newest", {0, 5, 6}), ("own", {6})):
        model = toy_model(context=context)
        with torch.no_grad():
            embedded = model.embed(batch)[0, -1]
            for step in range(7):
                changed = replace(batch, latents=batch.latents.clone(), state=batch.state.clone())
                changed.latents[:, step] += 1.0
                changed.state[:, step] += 0.5
                assert torch.allclose(model.embed(changed)[0, -1], embedded, atol=1e-6) != (step in remembered)


def test_a_modality_not_seen_yet_is_its_missing_token():
    model, batch = toy_model(), toy_batch([3])
    batch.modality[:] = 1
    with torch.no_grad():
        before = model.embed(batch)
        model.encoders.missing_tokens[2] += 1.0
        assert not torch.isclose(model.embed(batch), before).all()
        model.encoders.missing_tokens[2] -= 1.0
        model.encoders.missing_tokens[1] += 1.0
        torch.testing.assert_close(model.embed(batch), before, **CLOSE)


def test_an_event_is_read_beside_its_predict_position_where_asked_for():
    """With the backbone silenced only the direct read-out tells one event from another."""

    def silence(_, inputs, output) -> None:
        output.last_hidden_state.zero_()

    batch = toy_batch([4])
    for readout, tells in (("predict_and_event", True), ("predict", False)):
        model = toy_model(readout=readout, linear=False, trees=False)
        model.backbone.register_forward_hook(silence)
        with torch.no_grad():
            readouts = model(batch).readouts[0]
        assert torch.allclose(readouts[0], readouts[2]) != tells


def test_an_event_is_read_as_told():
    batch = toy_batch([5, 3])
    batch.modality[:] = batch.present.long()
    state, latents = replace(batch, state=batch.state + 1.0), replace(batch, latents=batch.latents + 1.0)
    for inputs, reads in (("latent_and_state", (True, True)), ("latent", (False, True)), ("state", (True, False))):
        model = toy_model(inputs=inputs, trees=False)  # trees read the state, whatever the network is shown
        with torch.no_grad():
            before = model(batch).readouts
            changed = [not torch.equal(model(other).readouts, before) for other in (state, latents)]
        assert tuple(changed) == reads


# Long timelines


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(2, 20))
def test_a_long_timeline_keeps_static_events_and_the_earliest(static, most):
    """One event after another, knowing nothing of later ones."""
    kept, held = [], 0
    for step in range(len(static)):
        kept.append(static[step] or held < most)
        held += kept[-1]
    assert fits(np.array(static), most).tolist() == kept


def test_a_cap_on_events_leaves_static_ones_and_early_beliefs_alone(prepared, beliefs, model, cached):
    stay = busy_stays(prepared, beliefs, 1)[0]
    timeline, position = prepared.timeline(stay), prepared.position(stay)
    whole, before = model.beliefs(timeline), model.max_events
    static = [i for i, e in enumerate(timeline.events) if e.modality == "demographics"]
    assert static
    assert len(timeline.events) > 4
    try:
        model.max_events = 4
        capped = model.beliefs(timeline)
    finally:
        model.max_events = before
    assert capped.height == 4
    assert set(static) <= set(capped["event_index"])
    same = whole.filter(pl.col("event_index").is_in(capped["event_index"].implode()))
    assert capped.select("event_index", "hours_since_admission", "modality").equals(
        same.select("event_index", "hours_since_admission", "modality")
    )
    assert np.allclose(capped.select(BELIEFS), same.select(BELIEFS), **CLOSE)
    rows = cached.latents.rows(position, 4)
    assert cached.latents.event_index[rows].tolist() == capped["event_index"].to_list()


# Timelines and their mistakes


def test_a_timeline_holds_the_events_in_order(prepared, beliefs):
    order = {m.name: i for i, m in enumerate(prepared.modalities)}
    events = pl.read_parquet(prepared.folder / "events" / "*.parquet")
    for stay in beliefs["stay_id"].unique().sort().head(5):
        timeline = prepared.timeline(stay)
        keys = [(e.hours_since_admission, order[e.modality]) for e in timeline.events]
        assert keys == sorted(keys)
        assert len(keys) == events.filter(pl.col("stay_id") == stay).height
        assert timeline.split in ("tuning", "held_out")


def test_an_event_out_of_order_or_of_a_stranger_is_refused(prepared, beliefs, model):
    timeline = prepared.timeline(beliefs["stay_id"][0])
    with pytest.raises(ValueError, match="not in order of time"):
        replace(timeline, events=tuple(reversed(timeline.events)))
    stream = model.stream()
    first, later = timeline.events[0], timeline.events[-1]
    stream.push(later)
    with pytest.raises(TrajlmError, match="push events in order"):
        stream.push(first)
    with pytest.raises(TrajlmError, match="never learned 'ecg'"):
        stream.push(replace(later, modality="ecg"))
    # A refused event leaves no trace.
    steady = model.stream()
    steady.push(first)
    with pytest.raises(TrajlmError):
        steady.push(replace(later, modality="ecg", hours_since_admission=later.hours_since_admission + 1))
    untouched = model.stream()
    untouched.push(first)
    assert steady.push(later) == untouched.push(later)


def test_events_the_model_never_learned_are_left_out_aloud():
    model = toy_model()
    events = [Event(0.0, "age", (0,), (70.0,)), Event(1.0, "ecg", text="?"), Event(2.0, "labs", (1,), (2.0,))]
    with pytest.warns(UserWarning, match="never learned \\['ecg'\\]"):
        beliefs = model.beliefs(timeline_of(events))
    assert beliefs["event_index"].to_list() == [0, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TrajlmError, match="no event that the model can read"):
            model.beliefs(timeline_of([events[1]]))


def test_a_feature_of_another_modality_is_refused():
    with pytest.raises(TrajlmError, match="feature id of another modality"):
        toy_model().beliefs(timeline_of([Event(0.0, "labs", (0,), (70.0,))]))


# Training


def test_the_loss_weighs_the_read_outs_of_a_stay_as_told():
    model, batch = toy_model(), toy_batch([6, 2, 1])
    everything = SequenceObjective(model, FinetuningConfig(loss_over="all")).eval()
    rising = SequenceObjective(model, FinetuningConfig(loss_over="rising")).eval()
    last = SequenceObjective(model, FinetuningConfig(loss_over="last")).eval()
    with torch.no_grad():
        readouts = model(batch).readouts
        per_stay, per_last, by_hour = [], [], []
        for row, length in enumerate([6, 2, 1]):
            losses = [
                sum(
                    float(task.loss(readouts[row, step, k], batch.targets[row, k]))
                    for k, task in enumerate(model.fitted_tasks)
                )
                for step in range(length)
            ]
            per_stay.append(np.mean(losses))
            per_last.append(losses[-1])
            shares = np.sqrt(batch.hours[row, :length].numpy() + HOURS_BEFORE_RISE)
            by_hour.append(np.average(losses, weights=shares))
        assert float(everything(batch)) == pytest.approx(np.mean(per_stay), rel=1e-5)
        assert float(rising(batch)) == pytest.approx(np.mean(by_hour), rel=1e-5)
        assert float(last(batch)) == pytest.approx(np.mean(per_last), rel=1e-5)


def test_modality_dropout_takes_one_modality_whole_and_never_the_last():
    batch = toy_batch([9, 5, 1])
    torch.manual_seed(0)
    taken = set()
    for _ in range(60):
        gone = random_modality(batch, 1.0)
        assert not (gone & ~batch.present).any()
        for row in range(3):
            held = set(batch.modality[row][batch.present[row]].tolist())
            lost = set(batch.modality[row][gone[row]].tolist())
            if len(held) == 1:
                assert not lost
                continue
            assert len(lost) == 1
            assert torch.equal(gone[row], batch.present[row] & (batch.modality[row] == next(iter(lost))))
            taken |= {(row, *lost)}
    assert {(0, 0), (0, 1), (0, 2)} <= taken
    assert not random_modality(batch, 0.0).any()


def test_only_encoders_stay_frozen_in_training():
    model = toy_model()
    model.train()
    assert not model.encoders.training
    assert not any(p.requires_grad for p in model.encoders.parameters())
    SequenceObjective(model, FinetuningConfig(modality_dropout=0.0))(toy_batch([4, 2])).backward()
    without = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not without
    assert all(p.grad is None for p in model.encoders.parameters())
