"""What is fitted beside the network: which read-outs, what each weighs, and of how many stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_linear_readout import invented
from trajectory_example import RICH, toy_batch, toy_model

from trajlm import readings as module
from trajlm.readings import FITTED_AT, best_shares, most_stays, newest, readings
from trajlm.sequence_objective import readout_weights


@pytest.mark.parametrize("beside", ["linear", "trees"])
def test_read_outs_that_are_fitted(beside):
    """The last one up to each hour of the grid and the stay's last, weighing what they weigh in the network's loss."""
    model, batch = toy_model(**RICH), toy_batch([12, 4, 1])

    def rows(some, chosen):
        return model.trees.rows(some, chosen) if beside == "trees" else model.linear.rows(
            model.inputs(some), some, chosen
        )  # fmt: skip

    found = readings(
        rows, model.fitted_tasks, np.arange(3), lambda stays: batch, lambda b: readout_weights(model, b, "rising")
    )
    kept = []
    for row in range(3):
        hours = batch.hours[row][batch.present[row]].tolist()
        last = {int(np.searchsorted(FITTED_AT, h)): i for i, h in enumerate(hours)}
        kept += [(row, step) for step in sorted(last.values())]
    assert len(found.inputs) == len(kept)
    places = {place: i for i, place in enumerate(map(tuple, batch.present.nonzero().tolist()))}
    expected = rows(batch, batch.present)[[places[place] for place in kept]]
    torch.testing.assert_close(found.inputs, expected, rtol=0, atol=0, equal_nan=True)
    assert found.hours.tolist() == pytest.approx([float(batch.hours[place]) for place in kept])
    of_stay = torch.tensor([row for row, _ in kept])
    torch.testing.assert_close(torch.zeros(3).index_add(0, of_stay, found.share), torch.ones(3))


def test_shares_are_those_of_least_loss_task_by_task():
    """Where one component knows the truth, and where two are off to either side of it."""
    tasks, of = invented(400)
    truth = torch.stack([task.label(of.targets[:, k]) for k, task in enumerate(tasks)], dim=1)
    random = torch.Generator().manual_seed(0)
    noise = 0.8 * torch.randn(truth.shape, generator=random)
    logit = torch.where(truth[:, 0] > 0, 2.0, -2.0) + tasks[0].shift
    deaths = torch.stack([logit, torch.randn(len(logit), generator=random), logit * 0], dim=1)
    hours = torch.stack([0 * noise[:, 1], truth[:, 1] + noise[:, 1], truth[:, 1] - noise[:, 1]], dim=1)
    said = replace(of, inputs=torch.stack([deaths, hours], dim=2).flatten(1))
    shares = best_shares(tasks, said, 3)
    torch.testing.assert_close(shares[:, 0], torch.tensor([0.8, 0.1, 0.1]))
    torch.testing.assert_close(shares[:, 1].sort().values, torch.tensor([0.1, 0.4, 0.5]))
    assert shares[0, 1] == shares[:, 1].min()
    torch.testing.assert_close(shares.sum(dim=0), torch.ones(2))


def test_no_share_is_told_without_a_known_target():
    tasks, of = invented(40)
    of.targets[:, 1] = float("nan")
    shares = best_shares(tasks, replace(of, inputs=torch.zeros(len(of.inputs), 4)), 2)
    assert shares.isnan().tolist() == [[False, True]] * 2


def test_the_newest_event_of_a_modality():
    batch = toy_batch([9, 4])
    for index in range(3):
        at, seen, age = newest(batch, index)
        for row, length in enumerate([9, 4]):
            for step in range(length):
                own = [s for s in range(step + 1) if batch.modality[row, s] == index]
                assert bool(seen[row, step]) == bool(own)
                if own:
                    assert int(at[row, step]) == own[-1]
                    assert float(age[row, step]) == float(batch.hours[row, step] - batch.hours[row, own[-1]])


def test_more_stays_than_there_is_room_for_are_drawn_at_random(monkeypatch):
    stays = np.arange(100, 400)
    assert np.array_equal(most_stays(8, stays, 0), stays)
    monkeypatch.setattr(module, "MOST_CELLS", 50 * 8 * len(FITTED_AT))
    drawn = most_stays(8, stays, 0)
    assert len(drawn) == 50
    assert set(drawn) < set(stays)
    assert len(set(drawn)) == 50
    assert np.array_equal(drawn, most_stays(8, stays, 0))
    assert not np.array_equal(drawn, most_stays(8, stays, 1))
