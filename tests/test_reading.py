"""Options of reading: which beliefs count, what tells time and modality, text before the events."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectory_example import toy_batch, toy_model

from trajlm.assemble import build_trajectory_model
from trajlm.backbones import build_backbone, prompt_tokens
from trajlm.config import BackboneConfig, FinetuningConfig
from trajlm.errors import TrajlmError
from trajlm.reading import counted_readouts
from trajlm.sequence_objective import HOURS_BEFORE_RISE, SequenceObjective

LANDMARKS = (6.0, 12.0, 24.0, 48.0)


# Which beliefs count


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60 * 4), min_size=1, max_size=12), min_size=1, max_size=4))
def test_the_last_event_up_to_every_hour_or_landmark_counts(quarters):
    """Against a plain loop: for every deadline, the last event that is not after it."""
    stays = [sorted(q / 4 for q in stay) for stay in quarters]
    longest = max(map(len, stays))
    present = torch.tensor([[i < len(s) for i in range(longest)] for s in stays])
    hours = torch.tensor([s + [0.0] * (longest - len(s)) for s in stays], dtype=torch.float64)
    deadlines = {"hour": [float(h) for h in range(61)], "landmarks": [*LANDMARKS, math.inf]}
    for at, times in deadlines.items():
        found = counted_readouts(hours, present, at, LANDMARKS)
        for row, stay in enumerate(stays):
            expected = {max((i for i, h in enumerate(stay) if h <= t), default=None) for t in times} - {None}
            assert set(found[row].nonzero().flatten().tolist()) == expected
    assert torch.equal(counted_readouts(hours, present, "event", LANDMARKS), present)


@pytest.mark.parametrize("at", ["hour", "landmarks"])
def test_tables_hold_the_beliefs_that_count_and_nothing_moves_them(at):
    every, some = toy_model(), toy_model(readout_at=at, landmarks=LANDMARKS)
    batch = toy_batch([60, 4, 1])
    with torch.no_grad():
        all_rows, rows = (m.belief_frame(batch, m(batch).readouts, counted=True) for m in (every, some))
        assert some.belief_frame(batch, some(batch).readouts).equals(all_rows)
    keys = ["stay_id", "event_index"]
    assert 3 <= rows.height < all_rows.height
    assert rows.equals(all_rows.join(rows.select(keys), on=keys, how="semi"))
    for stay in range(3):
        hours = rows.filter(rows["stay_id"] == stay)["hours_since_admission"]
        assert hours.max() == all_rows.filter(all_rows["stay_id"] == stay)["hours_since_admission"].max()


@pytest.mark.parametrize("loss_over", ["all", "rising", "last"])
def test_only_beliefs_that_count_are_learned_from(loss_over):
    model, batch = toy_model(readout_at="landmarks", landmarks=LANDMARKS), toy_batch([9, 4, 1])
    loss = SequenceObjective(model, FinetuningConfig(loss_over=loss_over)).eval()
    with torch.no_grad():
        readouts, found = model(batch).readouts, float(loss(batch))
    expected = []
    for row, length in enumerate([9, 4, 1]):
        hours = batch.hours[row, :length].tolist()
        steps = sorted({max(i for i, h in enumerate(hours) if h <= t) for t in (*LANDMARKS, math.inf)})
        steps = steps[-1:] if loss_over == "last" else steps
        weights = [math.sqrt(hours[s] + HOURS_BEFORE_RISE) if loss_over == "rising" else 1.0 for s in steps]
        losses = [
            sum(float(t.loss(readouts[row, s, k], batch.targets[row, k])) for k, t in enumerate(model.fitted_tasks))
            for s in steps
        ]
        expected.append(np.average(losses, weights=weights))
    assert found == pytest.approx(float(np.mean(expected)), rel=1e-5)


# Time and modality


def test_time_is_told_as_asked():
    """Hours move an event's embedding, or its place does, or neither."""
    batch = toy_batch([6])
    later = toy_batch([6])
    later.hours[:, 3] += 0.01
    for encoding, by_hour, by_place in (("hours", True, False), ("order", False, True), ("off", False, False)):
        model = toy_model(time_encoding=encoding, context="own", inputs="latent")
        with torch.no_grad():
            here = model.embed(batch)
            assert (not torch.equal(model.embed(later)[:, 3], here[:, 3])) == by_hour
            shifted = model.embed(batch, torch.arange(6)[None] + 1)
            assert (not torch.allclose(shifted, here)) == by_place


def test_a_modality_is_told_where_asked_for():
    batch = toy_batch([6])
    plain, told = toy_model(context="own"), toy_model(context="own", modality_embedding=True)
    assert told.kinds is not None
    assert plain.kinds is None
    told.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        moved = told.embed(batch) - plain.embed(batch)
        torch.testing.assert_close(moved, told.kinds(batch.modality), rtol=1e-4, atol=1e-5)
    SequenceObjective(told.train(), FinetuningConfig(modality_dropout=0.0))(batch).backward()
    assert told.kinds.weight.grad is not None
    assert told.kinds.weight.grad.any()


# Text before the events


def test_a_prompt_stands_before_the_events_and_is_not_learned():
    model, batch = toy_model(prompt_ids=[5, 2, 5]), toy_batch([4, 2])
    with torch.no_grad():
        output = model(batch)
    vocabulary = model.backbone.get_input_embeddings().weight
    assert output.embeddings.shape[1] == 3 + 8
    assert output.predict_positions.tolist() == [4, 6, 8, 10]
    for row in range(2):
        assert torch.equal(output.embeddings[row, :3], vocabulary[[5, 2, 5]])
    assert torch.equal(output.embeddings[:, 3::2], model.embed(batch))
    assert not vocabulary.requires_grad
    with torch.no_grad():
        other = toy_model(prompt_ids=[5, 2, 6])(batch).readouts
    assert not torch.allclose(output.readouts[batch.present], other[batch.present])


@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_pads_and_packs_exactly(packed):
    model, lengths = toy_model(prompt_ids=[5, 2]), [7, 1, 4]
    batch = toy_batch(lengths)
    with torch.no_grad():
        together = model(batch, packed=packed).readouts
        for row, length in enumerate(lengths):
            alone = model(batch.select(torch.arange(3) == row).keep(batch.present[row : row + 1])).readouts
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-5, atol=1e-5)


def test_a_prompt_needs_a_tokenizer_and_visible_predicts(tmp_path):
    assert prompt_tokens(None, "tiny") == []
    with pytest.raises(TrajlmError, match="starts at random and has no tokenizer"):
        prompt_tokens("Intensive care.", "tiny")
    with pytest.raises(TrajlmError, match=r"finetuning\.prompt: not with finetuning\.predict_visible false"):
        toy_model(prompt_ids=[1], predict_visible=False)
    build_backbone(BackboneConfig(name="tiny", tuning="full")).save_pretrained(tmp_path)
    with pytest.raises(TrajlmError, match="has no tokenizer that could be read"):
        prompt_tokens("Intensive care.", str(tmp_path))


def test_a_prompt_is_tokenised_by_the_backbones_own_tokenizer(prepared, cached, model, tmp_path):
    """A local folder of weights with a tokenizer: its tokens stand first, and come back with the saved model."""
    from dataclasses import replace

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from trajlm.assemble import inputs_json

    build_backbone(BackboneConfig(name="tiny", tuning="full")).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "intensive": 3, "care": 7}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    assert prompt_tokens("intensive medical care", str(tmp_path)) == [3, 0, 7]
    recipe = replace(
        cached.recipe,
        backbone=BackboneConfig(name=str(tmp_path), tuning="full"),
        finetuning=replace(cached.recipe.finetuning, prompt="intensive care"),
    )
    built = build_trajectory_model(recipe, prepared, model.encoders, list(model.fitted_tasks), torch.device("cpu"))
    assert built.prompt_ids.tolist() == [3, 7]
    assert '"prompt_ids": [\n  3,\n  7\n ]' in inputs_json(built)
