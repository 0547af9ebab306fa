"""The regression beside the network: read as plain loops read it, fitted as scikit-learn fits it, nothing later."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from trajectory_example import RICH, toy_batch, toy_model

from trajlm import finetuning
from trajlm import linear_readout as module
from trajlm.linear_readout import LinearReadout, clock, fit_linear
from trajlm.reading import Projector
from trajlm.readings import Readings
from trajlm.tasks import build_tasks

LENGTHS = [7, 1, 5, 3]


@pytest.fixture
def model():
    return toy_model(**RICH)


def read_by_hand(model, batch, row: int, step: int) -> np.ndarray:
    """float64[K]: newest event of every modality, one number at a time."""
    hours = batch.hours[row].numpy()
    now = float(hours[step])
    tick = [1.0, min(2 * np.log1p(now) / np.log1p(48.0) - 1, 1.0)]
    total = model.linear.bias.double().numpy().copy()
    for index, name in enumerate(model.encoders.modalities):
        mine = [s for s in range(step + 1) if batch.present[row, s] and batch.modality[row, s] == index]
        if not mine:
            continue
        at = mine[-1]
        projector = model.projectors[name]
        read = projector.inputs(batch.latents[row, at][None], batch.state[row, at][None])[0].double().numpy()
        read = np.concatenate([read, [np.log1p(now - hours[at]), 1.0, float(at == step)]])
        weight = getattr(model.linear, f"weight_{index}").double().numpy()
        for i, number in enumerate(read):
            total += number * weight[i]
    return tick[0] * total[0] + tick[1] * total[1]


def test_read_outs_are_those_of_a_plain_loop(model):
    batch = toy_batch(LENGTHS)
    found = model.linear(model.inputs(batch), batch)
    for row, length in enumerate(LENGTHS):
        for step in range(length):
            expected = read_by_hand(model, batch, row, step)
            np.testing.assert_allclose(found[row, step].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_rows_times_weights_are_the_read_outs(model):
    """What is fitted is what is read."""
    batch = toy_batch(LENGTHS)
    inputs = model.inputs(batch)
    rows = model.linear.rows(inputs, batch, batch.present)
    weight = torch.cat([getattr(model.linear, f"weight_{i}") for i in range(3)])
    said = torch.einsum("ri,ick->rck", rows, weight) + model.linear.bias
    by_row = (said * clock(batch.hours[batch.present].float())[..., None]).sum(1)
    torch.testing.assert_close(by_row, model.linear(inputs, batch)[batch.present], rtol=1e-4, atol=1e-5)


def test_nothing_later_is_read(model):
    batch = toy_batch([9])
    early = model.linear(model.inputs(batch), batch)
    noise = torch.zeros_like(batch.latents)
    noise[:, 5:] = 3.0
    other = replace(batch, latents=batch.latents + noise)
    late = model.linear(model.inputs(other), other)
    assert torch.equal(early[:, :5], late[:, :5])
    assert not torch.allclose(early[:, 5:], late[:, 5:])


def invented(stays: int = 300, seed: int = 0) -> tuple[list, Readings]:
    """Two read-outs of each of many stays, of six numbers: one of them decides on death, another on hours."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(2 * stays, 6)) * [1, 1, 1, 5, 0.1, 1] + [0, 2, 0, 0, 0, 0]
    stay = np.repeat(np.arange(stays), 2)
    dead = (random.random(stays) < 1 / (1 + np.exp(1.5 - rows[::2, 0]))).astype(float)
    hours = np.exp(4 + 0.3 * rows[::2, 3] / 5 + 0.1 * random.normal(size=stays)).clip(13, 700)
    targets = torch.tensor(np.stack([dead, hours], 1))
    tasks = build_tasks(["mortality", "length_of_stay"])
    for k, task in enumerate(tasks):
        task.fit(targets[:, k])
    middle = torch.full((2 * stays,), 6.0)  # hours at which the part of the weights that grows is 0
    share = torch.tensor([0.3, 0.7]).repeat(stays)
    return tasks, Readings(torch.tensor(rows).float(), middle, targets[torch.from_numpy(stay)].float(), share, stays)


@pytest.mark.parametrize("strength", [2.0, 0.05])
def test_fitted_as_scikit_learn_fits(strength, monkeypatch):
    monkeypatch.setattr(module, "STRENGTHS", (strength,))
    monkeypatch.setattr(module, "STEPS", 400)
    tasks, train = invented()
    raw, labels, weights = train.inputs.double().numpy().copy(), train.targets.numpy(), train.share.numpy()
    scaled = (raw - raw.mean(0)) / raw.std(0, ddof=1)
    linear = LinearReadout([3], 2)
    told = fit_linear(linear, tasks, train, invented(seed=1)[1])
    assert told["targets"]["mortality"]["strength"] == strength
    mine = (raw @ linear.weight_0[:, 0].double().numpy()) + linear.bias[0].double().numpy()

    logistic = LogisticRegression(C=1 / (strength * train.stays), tol=1e-10, max_iter=10_000)
    theirs = logistic.fit(scaled, labels[:, 0], sample_weight=weights).decision_function(scaled)
    shift = float(tasks[0].positive_weight.log())
    np.testing.assert_allclose(mine[:, 0] - shift, theirs, atol=2e-3)

    told_hours = (np.log1p(labels[:, 1]) - float(tasks[1].mean)) / float(tasks[1].std)
    ridge = Ridge(alpha=strength * train.stays / 2).fit(scaled, told_hours, sample_weight=weights)
    np.testing.assert_allclose(mine[:, 1], ridge.predict(scaled), atol=2e-3)


def test_the_strength_is_that_of_the_least_tuning_loss_task_by_task():
    tasks, train = invented(60)
    told = fit_linear(LinearReadout([3], 2), tasks, train, invented(60, seed=1)[1])
    for target in told["targets"].values():
        losses = target["tuning_losses"]
        assert len(losses) == len(told["strengths"])
        assert target["strength"] == told["strengths"][int(np.argmin(losses))]


def test_it_is_fitted_once_a_run_and_read_by_every_process(tmp_path, monkeypatch):
    fitted = []

    def fit(work, model, linear):
        fitted.append(model)
        for weight in linear.buffers():
            weight.normal_()
        return {"stays": 3}

    monkeypatch.setattr(finetuning, "_fitted_beside", fit)
    accelerator = SimpleNamespace(device=torch.device("cpu"), wait_for_everyone=lambda: None)
    models = [toy_model(linear=True) for _ in range(3)]
    for model, main in zip(models, (True, False, True), strict=True):
        for weight in model.linear.buffers():
            weight.zero_()
        work = SimpleNamespace(run=SimpleNamespace(path=tmp_path, main=main), accelerator=accelerator)
        finetuning._fit_beside(work, model, "linear_readout", model.linear)
    assert fitted == models[:1]
    assert json.loads((tmp_path / "linear_readout.json").read_text()) == {"stays": 3}
    for model in models[1:]:
        for name, weight in models[0].linear.named_buffers():
            assert weight.any()
            assert torch.equal(model.linear.get_buffer(name), weight)


def test_events_are_coded_once_for_projectors_and_regression(model, monkeypatch):
    coded = []
    inputs = Projector.inputs
    monkeypatch.setattr(Projector, "inputs", lambda self, *read: coded.append(self) or inputs(self, *read))
    model(toy_batch(LENGTHS))
    events = [own for own in coded if own in model.projectors.values()]
    # Once for the events, and once for the missing tokens that stand where a modality was not seen yet.
    assert len(events) == 2 * len(model.encoders.modalities)
