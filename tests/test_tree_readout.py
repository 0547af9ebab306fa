"""Trees beside the network: read as plain loops read them, reached as LightGBM reaches them, nothing later."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_linear_readout import invented
from trajectory_example import RICH, random_tree, toy_batch, toy_model

from trajlm import tree_readout as module
from trajlm.errors import TrajlmError
from trajlm.readings import Readings
from trajlm.tasks import build_tasks
from trajlm.tree_readout import DRAWS, TreeReadout, as_tensors, fit_trees

LENGTHS = [7, 1, 5, 3]


@pytest.fixture
def model():
    return toy_model(**RICH)


def read_by_hand(model, batch, row: int, step: int) -> np.ndarray:
    """float64[I]: one number at a time; toy timelines hold age (1 feature), labs (3) and notes (latents)."""
    now = float(batch.hours[row, step])
    read = [now]
    for index, features in enumerate((1, 3, 0)):
        own = [s for s in range(step + 1) if batch.modality[row, s] == index]
        width = 3 * features or batch.latents.shape[-1]
        if not own:
            read += [np.nan] * (1 + width)
            continue
        age = now - float(batch.hours[row, own[-1]])
        read.append(age)
        if not features:
            read += batch.latents[row, own[-1]].tolist()
            continue
        value, ever, since, mean = batch.state[row, own[-1], : 4 * features].double().numpy().reshape(4, features)
        for numbers in (value, mean, np.log1p(np.expm1(np.abs(since)) + age)):
            read += np.where(ever > 0, numbers, np.nan).tolist()
    return np.array(read)


def test_inputs_are_those_of_a_plain_loop(model):
    batch = toy_batch(LENGTHS)
    batch.state = batch.state.abs() * torch.randn(batch.state.shape).sign().clamp_min(0)  # some never measured
    found = model.trees.rows(batch, batch.present)
    assert found.shape[1] == model.trees.width
    expected = [read_by_hand(model, batch, row, step) for row, step in batch.present.nonzero().tolist()]
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-5, atol=1e-6)


def reached(tree: dict, row: np.ndarray) -> float:
    """The leaf that a walk from the root comes to."""
    while "leaf_value" not in tree:
        number = row[tree["split_feature"]]
        left = tree["default_left"] if np.isnan(number) else number <= tree["threshold"]
        tree = tree["left_child" if left else "right_child"]
    return tree["leaf_value"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 3))
def test_all_splits_at_once_reach_the_leaf_that_a_walk_reaches(seed, trees, depth):
    torch.manual_seed(seed)
    grown = [random_tree(4, depth) for _ in range(trees)]
    owners = [int(torch.randint(2, ())) for _ in range(trees)]
    readout = TreeReadout([1], 1, 2)
    for name, tensor in as_tensors(grown, owners).items():
        readout.set(name, tensor)
    rows = torch.randn(20, 4)
    rows[torch.rand(rows.shape) < 0.3] = float("nan")
    rows[0, 0] = grown[0].get("threshold", 0.0)
    expected = np.zeros((20, 2))
    for tree, owner in zip(grown, owners, strict=True):
        expected[:, owner] += [reached(tree, row) for row in rows.numpy()]
    np.testing.assert_allclose(readout.readouts(rows).numpy(), expected, rtol=1e-12, atol=1e-12)


def some_missing(of: Readings, seed: int) -> Readings:
    """The same with gaps in all inputs but the last."""
    random = np.random.default_rng(seed)
    of.inputs[:, :-1][torch.from_numpy(random.random((len(of.inputs), of.inputs.shape[1] - 1)) < 0.3)] = float("nan")
    return of


def test_fitted_trees_say_what_lightgbm_says(monkeypatch):
    tasks, train = invented(300)
    train, tuning = some_missing(train, 0), some_missing(invented(200, seed=1)[1], 1)
    boosters = []
    told = module._told
    monkeypatch.setattr(module, "_told", lambda booster: boosters.append(booster) or told(booster))
    trees = TreeReadout([1], 1, 2)
    found = fit_trees(trees, tasks, train, tuning, 0)
    rows = invented(100, seed=2)[1].inputs
    rows[::3, ::2] = float("nan")
    rows[1::3] = float("nan")  # the last input too, of which no training read-out missed a value
    mine = trees.readouts(rows).numpy()
    assert len(boosters) == 2 * DRAWS
    for k, task in enumerate(tasks):
        own = boosters[k * DRAWS : (k + 1) * DRAWS]
        each = [b.predict(rows.numpy(), raw_score=True, num_iteration=b.best_iteration) for b in own]
        assert not np.allclose(each[0], each[1])
        np.testing.assert_allclose(mine[:, k], np.mean(each, axis=0) + float(task.shift), rtol=1e-9, atol=1e-9)
        count = sum(b.best_iteration for b in own)
        assert found["targets"][task.target]["trees"] == count == int((trees.task == k).sum())
    assert (mine.std(axis=0) > 0.01).all()


def by_time(stays: int, seed: int = 0) -> Readings:
    """The first read-out of a stay at 2 hours, the second, which knows no more of it, at 20; inputs begin with them."""
    of = invented(stays, seed=seed)[1]
    hours = torch.tensor([2.0, 20.0]).repeat(stays)
    return replace(of, inputs=torch.cat([hours[:, None], of.inputs], dim=1), hours=hours)


def test_a_later_group_is_of_later_read_outs_and_joins_there():
    """Before the hour as if there were none; after it the mean with forests grown on nothing but what is later."""
    tasks = invented(40)[0]
    train, tuning, fresh = by_time(300), by_time(200, seed=1), by_time(50, seed=2).inputs
    early, late = fresh[::2], fresh[1::2]
    groups = TreeReadout([1], 1, 2)
    told = fit_trees(groups, tasks, train, tuning, 0, [8.0])["targets"]["mortality"]
    plain, alone = TreeReadout([1], 1, 2), TreeReadout([1], 1, 2)
    of_all = fit_trees(plain, tasks, train, tuning, 0)["targets"]["mortality"]
    later = [replace(of, inputs=of.inputs[1::2], hours=of.hours[1::2], targets=of.targets[1::2], share=of.share[1::2])
             for of in (train, tuning)]  # fmt: skip
    of_later = fit_trees(alone, tasks, *later, 0)["targets"]["mortality"]
    torch.testing.assert_close(groups.readouts(early), plain.readouts(early), rtol=1e-12, atol=1e-12)
    mean = (plain.readouts(late) + alone.readouts(late)) / 2
    torch.testing.assert_close(groups.readouts(late), mean, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(mean, plain.readouts(late), atol=1e-3)
    assert told == of_all | {"after": {"8": of_later}}
    loaded = TreeReadout([1], 1, 2)
    loaded.load_state_dict(groups.state_dict())
    assert torch.equal(loaded.readouts(fresh), groups.readouts(fresh))
    at_the_hour = late.clone()
    at_the_hour[:, 0] = 8.0
    torch.testing.assert_close(groups.readouts(at_the_hour), plain.readouts(at_the_hour), rtol=1e-12, atol=1e-12)


def test_a_task_of_one_outcome_later_goes_without_a_later_group():
    tasks, train, tuning = invented(40)[0], by_time(200), by_time(100, seed=1)
    train.targets[1::2, 0] = 0.0
    groups, plain = TreeReadout([1], 1, 2), TreeReadout([1], 1, 2)
    told = fit_trees(groups, tasks, train, tuning, 0, [8.0])["targets"]
    fit_trees(plain, tasks, train, tuning, 0)
    assert told["mortality"]["after"] == {"8": {"trees": 0, "tuning_loss": None}}
    assert told["length_of_stay_hours"]["after"]["8"]["trees"] > 0
    rows = by_time(30, seed=2).inputs
    torch.testing.assert_close(groups.readouts(rows)[:, 0], plain.readouts(rows)[:, 0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(groups.readouts(rows)[1::2, 1], plain.readouts(rows)[1::2, 1], atol=1e-4)


def test_what_is_planted_is_found(monkeypatch):
    monkeypatch.setattr(module, "FEATURE_SHARE", 1.0)
    tasks, train = invented(1000)
    tuning, fresh = invented(300, seed=1)[1], invented(500, seed=2)[1]
    trees = TreeReadout([1], 1, 2)
    fit_trees(trees, tasks, train, tuning, 0)
    said, targets = trees.readouts(fresh.inputs)[::2], fresh.targets[::2]  # the second read-out of a stay is noise
    assert np.corrcoef(said[:, 1].numpy(), np.log(targets[:, 1].numpy()))[0, 1] > 0.8
    died = targets[:, 0] > 0
    ranked, planted = (
        (score[died, None] > score[~died]).float().mean() for score in (said[:, 0], fresh.inputs[::2, 0])
    )
    assert planted > 0.65
    assert ranked > planted - 0.15


def test_one_outcome_alone_is_believed_as_often_as_it_was_seen():
    tasks, train = invented(40)
    train.targets[:, 0] = 0.0
    trees = TreeReadout([1], 1, 2)
    told = fit_trees(trees, tasks, train, invented(40, seed=1)[1], 0)
    assert told["targets"]["mortality"] == {"trees": 0, "tuning_loss": None}
    belief = tasks[0].belief(trees.readouts(train.inputs[:3])[:, 0])
    np.testing.assert_allclose(belief.numpy(), 1 / 42, rtol=1e-5)


def test_nothing_later_is_read(model):
    batch = toy_batch([9])
    early = model.trees(batch)
    noise = torch.zeros_like(batch.latents)
    noise[:, 5:] = 3.0
    other = replace(batch, latents=batch.latents + noise, state=batch.state + noise[..., :1])
    late = model.trees(other)
    assert torch.equal(early[:, :5], late[:, :5])
    assert not torch.allclose(early[:, 5:], late[:, 5:])


def test_beliefs_are_the_mean_of_all_three_and_training_sees_the_network_alone(model):
    batch = toy_batch(LENGTHS)
    model.shares.copy_(torch.tensor([[0.2, 0.5], [0.3, 0.0], [0.5, 0.5]]))
    network, linear, trees = model.apart(batch).unbind(dim=2)
    assert torch.equal(trees, model.trees(batch))
    assert torch.equal(linear, model.linear(model.inputs(batch), batch))
    weighed = sum(share * said for share, said in zip(model.shares, (network, linear, trees), strict=True))
    torch.testing.assert_close(model(batch).readouts, weighed, rtol=1e-4, atol=1e-5)
    model.dropout.p = 0.0
    for head in [*model.heads.values(), *model.event_heads.values()]:
        head[1].p = 0.0
    alone = model.train()(batch).readouts
    model.eval()
    torch.testing.assert_close(alone[batch.present], network[batch.present], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("beside", "expected"), [({}, [0.25, 0.25, 0.5]), ({"trees": False}, [0.5, 0.5]), ({"linear": False}, [0.5, 0.5])]
)
def test_until_shares_are_chosen_all_of_them_count(beside, expected):
    model = toy_model(**RICH | beside)
    assert model.shares[:, 0].tolist() == expected
    assert len(model.components) == len(expected)


def test_another_number_of_trees_is_loaded(model):
    empty = TreeReadout(model.trees.features, model.trees.latent_width, 2)
    batch = toy_batch(LENGTHS)
    assert not torch.equal(empty(batch), model.trees(batch))
    empty.load_state_dict(model.trees.state_dict())
    assert torch.equal(empty(batch), model.trees(batch))


def test_no_read_out_and_no_tree():
    trees = TreeReadout([2], 4, 3)
    assert trees.readouts(torch.zeros(0, trees.width)).shape == (0, 3)
    assert torch.equal(trees.readouts(torch.zeros(5, trees.width)), torch.zeros(5, 3, dtype=torch.float64))


def test_a_missing_lightgbm_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    tasks, train = invented(40)
    with pytest.raises(TrajlmError, match=r"finetuning\.tree_readout needs LightGBM.*pip install lightgbm"):
        fit_trees(TreeReadout([1], 1, 2), tasks, train, train, 0)


def test_phenotypes_have_trees_of_their_own():
    tasks = build_tasks(["phenotyping"])
    assert TreeReadout([1], 1, len(tasks)).base.shape == (25,)
