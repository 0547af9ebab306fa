"""The one loop: resumed equals uninterrupted, several processes equal one, and nothing is loaded from pickle."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from alignment_example import ROWS, objective, stays_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes_example import WORLD, in_processes, join
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trajlm.alignment import masked_global_alignment_loss
from trajlm.checkpoint import Checkpoints, RunFolder, load_trainable, trainable_tensors
from trajlm.config import Recipe
from trajlm.distributed import gather_stays
from trajlm.engines import make_accelerator
from trajlm.errors import TrajlmError
from trajlm.training import (
    LoopSettings,
    Stage,
    Trainer,
    WeightAverages,
    epoch_batches,
    history,
    learning_rate_share,
    parameter_groups,
)

SETTINGS = LoopSettings(
    epochs=5, patience=9, batch_size=5, learning_rate=0.2, weight_decay=0.01, seed=7,
    warmup_fraction=0.2, cosine=True, checkpoint_seconds=-1.0,
)  # fmt: skip
STAYS = np.arange(100, 123)


@dataclass
class ToyBatch:
    stay_ids: Tensor
    inputs: Tensor

    def to(self, device: torch.device) -> ToyBatch:
        return ToyBatch(self.stay_ids.to(device), self.inputs.to(device))


def toy_batch(stays: np.ndarray, random: np.random.Generator | None) -> ToyBatch:
    """The same inputs for the same stay; in training with noise, as an augmentation would add."""
    inputs = np.stack([np.random.default_rng(int(s)).normal(size=3) for s in stays])
    if random is not None:
        inputs = inputs + 0.1 * random.normal(size=inputs.shape)
    return ToyBatch(torch.from_numpy(stays), torch.from_numpy(inputs.astype(np.float32)))


class Toy(nn.Module):
    """A small regression with dropout and a frozen weight; ``before`` runs ahead of every loss."""

    def __init__(self, dropout: float = 0.3, before: Callable[[nn.Module], None] = lambda _: None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.register_buffer("scale", torch.tensor(2.0))
        self.before = before

    def forward(self, batch: ToyBatch) -> Tensor:
        self.before(self)
        wanted = batch.inputs @ self.frozen
        return F.mse_loss(self.layers(batch.inputs)[:, 0] * self.scale, wanted)


class PowerCutError(Exception):
    """The machine went away."""


def stage_of(module: nn.Module, **options) -> Stage:
    return Stage("toy", module, STAYS[:17], STAYS[17:], options.pop("collate", toy_batch), **options)


def run_folder(path: Path) -> RunFolder:
    return RunFolder(path, "pretraining", Recipe(), {})


def fit(folder: Path, module: nn.Module, loop: LoopSettings = SETTINGS, **options) -> nn.Module:
    return Trainer(stage_of(module, **options), loop, run_folder(folder), make_accelerator()).fit()


# Resuming


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untouched") / "run"
    weights, log = fit(folder, Toy()).state_dict(), history(run_folder(folder).read_log())
    # A best epoch in the middle: what is remembered of it matters.
    assert [r["best"] for r in log] == [True, False, True, False, False]
    return weights, log


@pytest.mark.parametrize("calls", [1, 2, 4, 5, 6, 11, 21])
def test_resumed_equals_uninterrupted_bit_for_bit(calls, untouched, tmp_path):
    """Cut off after so many losses (four of an epoch train, one or two tune), more than once."""
    left = calls

    def cut(_: nn.Module) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    lives = 0
    while True:
        lives, left = lives + 1, calls + lives
        try:
            trained = fit(tmp_path / "run", Toy(before=cut))
            break
        except PowerCutError:
            assert lives < 40
    weights, log = untouched
    assert lives > 1
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.state_dict().items())
    again = history(run_folder(tmp_path / "run").read_log())
    facts = ("epoch", "train_loss", "tuning_loss", "best")
    assert [[r[f] for f in facts] for r in again] == [[r[f] for f in facts] for r in log]


def test_a_run_without_checkpoints_inside_an_epoch_resumes_at_the_epoch(untouched, tmp_path):
    seldom, left = replace(SETTINGS, checkpoint_seconds=1e9), 8

    def cut(_: nn.Module) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        fit(tmp_path / "run", Toy(before=cut), seldom)
    trained = fit(tmp_path / "run", Toy(), seldom)
    assert all(torch.equal(untouched[0][name], tensor) for name, tensor in trained.state_dict().items())


def test_a_finished_stage_trains_no_further(untouched, tmp_path):
    fit(tmp_path / "run", Toy())

    def never(_: nn.Module) -> None:
        raise AssertionError("a loss was computed")

    again = fit(tmp_path / "run", Toy(before=never))
    assert all(torch.equal(untouched[0][name], tensor) for name, tensor in again.state_dict().items())


def test_a_checkpoint_cut_short_is_passed_over(untouched, tmp_path):
    """A folder without ``state.json`` was still being written."""
    left = 7

    def cut(_: nn.Module) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        fit(tmp_path / "run", Toy(before=cut))
    torn = tmp_path / "run/checkpoints/toy/step-000000999-epoch-000009"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half a file")
    trained = fit(tmp_path / "run", Toy())
    assert all(torch.equal(untouched[0][name], tensor) for name, tensor in trained.state_dict().items())


def test_checkpoints_hold_what_is_trained_and_fit_nothing_else(tmp_path):
    module = Toy()
    saved = trainable_tensors(module)
    assert set(saved) == {"layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias", "scale"}
    with pytest.raises(TrajlmError, match=r"missing \['scale'\]"):
        load_trainable(module, {name: t for name, t in saved.items() if name != "scale"})
    with pytest.raises(TrajlmError, match=r"left over \['frozen'\]"):
        load_trainable(module, {**saved, "frozen": module.frozen})


def test_nothing_is_ever_loaded_from_pickle(run, tmp_path, monkeypatch):
    from trajlm.assemble import load_trajectory_model

    def refuse(*_, **__):
        raise AssertionError("pickle was loaded")

    left = 7

    def cut(_: nn.Module) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        fit(tmp_path / "run", Toy(before=cut))
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    fit(tmp_path / "run", Toy())
    load_trajectory_model(run)
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ".yaml"}


# Order, patience, rates


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 70), size=st.integers(1, 20), smallest=st.integers(1, 4), epoch=st.integers(0, 3),
    sized=st.booleans(),
)  # fmt: skip
def test_every_stay_once_an_epoch(count, size, smallest, epoch, sized):
    stays = np.arange(1000, 1000 + count)
    lengths = (stays * 37) % 11 if sized else None
    stage = Stage("toy", Toy(), stays, STAYS, toy_batch, lengths=lengths)
    loop = replace(SETTINGS, batch_size=size)
    batches = epoch_batches(stage, loop, epoch, smallest)
    assert sorted(np.concatenate(batches)) == stays.tolist()
    assert len(batches) == 1 or min(len(b) for b in batches) >= min(smallest, size)
    again = epoch_batches(stage, loop, epoch, smallest)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


@pytest.mark.parametrize("lengths", [None, np.arange(17) % 5])
def test_epochs_and_seeds_differ_in_order(lengths):
    orders = {
        tuple(np.concatenate(epoch_batches(stage_of(Toy(), lengths=lengths), replace(SETTINGS, seed=seed), epoch, 1)))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


@pytest.mark.parametrize("size", [16, 32])
def test_stays_of_like_length_share_a_batch(size):
    """Of skewed lengths under 5 % of positions are padding."""
    stays = np.arange(3000)
    lengths = np.ceil(np.random.default_rng(0).lognormal(4, 0.4, len(stays))).astype(int)
    stage = Stage("toy", Toy(), stays, STAYS, toy_batch, lengths=lengths)

    def padding(stage: Stage) -> float:
        batches = epoch_batches(stage, replace(SETTINGS, batch_size=size), 0, 1)
        return 1 - lengths.sum() / sum(int(lengths[b].max()) * len(b) for b in batches)

    assert padding(stage) < 0.05 < 0.3 < padding(replace(stage, lengths=None))


def test_batches_by_length_resume_bit_for_bit(tmp_path):
    lengths, left = np.arange(17) % 5, 6

    def cut(_: nn.Module) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    whole = fit(tmp_path / "whole", Toy(), lengths=lengths).state_dict()
    with pytest.raises(PowerCutError):
        fit(tmp_path / "run", Toy(before=cut), lengths=lengths)
    resumed = fit(tmp_path / "run", Toy(), lengths=lengths).state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_patience_ends_training_and_the_best_weights_come_back(tmp_path):
    """Tuning losses of a script: the second epoch is the best, two worse ones follow."""
    tuning = iter([3.0, 1.0, 2.0, 2.5, 0.0])

    class Scripted(Toy):
        def forward(self, batch: ToyBatch) -> Tensor:
            return super().forward(batch) if self.training else torch.tensor(next(tuning))

    seen: list[dict[str, Tensor]] = []

    class Watching(Trainer):
        def _epoch(self, *arguments) -> None:
            super()._epoch(*arguments)
            seen.append({name: t.clone() for name, t in self.stage.module.state_dict().items()})

    loop = replace(SETTINGS, epochs=5, patience=2, batch_size=17, cosine=False)
    stage = replace(stage_of(Scripted()), tuning=STAYS[17:20])
    trained = Watching(stage, loop, run_folder(tmp_path / "run"), make_accelerator()).fit()
    log = history(run_folder(tmp_path / "run").read_log())
    assert [r["tuning_loss"] for r in log] == [3.0, 1.0, 2.0, 2.5]
    assert [r["best"] for r in log] == [True, True, False, False]
    assert not trained.training
    assert all(torch.equal(seen[1][name], tensor) for name, tensor in trained.state_dict().items())
    assert not all(torch.equal(seen[3][name], tensor) for name, tensor in trained.state_dict().items())


def test_the_rate_rises_then_falls_as_a_cosine():
    shares = [learning_rate_share(step, 100, SETTINGS) for step in range(100)]
    assert np.allclose(np.diff(shares[:20]), 1 / 20)
    assert shares[19] == shares[20] == 1.0
    assert all(later < earlier for earlier, later in pairwise(shares[20:]))
    assert shares[60] == pytest.approx(0.5)
    flat = replace(SETTINGS, cosine=False, warmup_fraction=0.0)
    assert {learning_rate_share(step, 100, flat) for step in range(100)} == {1.0}


def test_parameters_learn_at_the_rate_of_their_prefix(tmp_path):
    module = Toy(dropout=0.0)
    stage = stage_of(module, rate_factors={"layers.0.": 0.0})
    groups = {group["factor"]: group["params"] for group in parameter_groups(stage)}
    assert {factor: len(parameters) for factor, parameters in groups.items()} == {0.0: 2, 1.0: 2}
    before = {name: t.clone() for name, t in module.state_dict().items()}
    fit(tmp_path / "run", module, rate_factors={"layers.0.": 0.0})
    changed = {name for name, t in module.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"layers.3.weight", "layers.3.bias"}


def test_a_loss_that_is_no_number_stops_and_names_the_stays(tmp_path):
    def spoiled(stays: np.ndarray, random: np.random.Generator | None) -> ToyBatch:
        batch = toy_batch(stays, random)
        batch.inputs[batch.stay_ids == 103] = float("nan")
        return batch

    with pytest.raises(TrajlmError, match=r"toy, step 2: the loss is no finite number, .* stays .*\b103\b.*rate"):
        fit(tmp_path / "run", Toy(), collate=spoiled)


def test_averages_follow_the_weights_and_step_aside():
    module = Toy()
    averages = WeightAverages(module, 0.9)
    path = []
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in module.layers.parameters():
                parameter.add_(1.0)
        averages.update(step)
        path.append({n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})
    expected = path[0]
    for step, weights in enumerate(path, 1):
        kept = min(0.9, step / (step + 9))
        # The start is one step behind the first weights.
        before = {n: w - 1.0 for n, w in weights.items()} if step == 1 else expected
        expected = {n: kept * before[n] + (1 - kept) * w for n, w in weights.items()}
    for name, mean in averages.means.items():
        torch.testing.assert_close(mean, expected[name])
    with averages.in_place():
        inside = {n: p.detach().clone() for n, p in module.named_parameters() if n in averages.means}
    assert all(torch.equal(inside[n], mean) for n, mean in averages.means.items())
    assert all(torch.equal(p, path[-1][n]) for n, p in module.named_parameters() if n in path[-1])
    assert WeightAverages(module, 0.0).means == {}


def test_a_resumed_run_keeps_its_averages(untouched, tmp_path):
    averaged, left = replace(SETTINGS, averaging=0.9), 8

    def cut(_: nn.Module) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise PowerCutError

    whole = fit(tmp_path / "whole", Toy(), averaged).state_dict()
    with pytest.raises(PowerCutError):
        fit(tmp_path / "run", Toy(before=cut), averaged)
    resumed = fit(tmp_path / "run", Toy(), averaged).state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    assert any(not torch.equal(untouched[0][name], tensor) for name, tensor in whole.items())


def test_nothing_to_tune_on_is_an_error(tmp_path):
    stage = replace(stage_of(Toy()), tuning=STAYS[:0])
    with pytest.raises(TrajlmError, match="17 training and 0 tuning stays"):
        Trainer(stage, SETTINGS, run_folder(tmp_path / "run"), make_accelerator())


def test_a_newer_checkpoint_replaces_the_older(tmp_path):
    module = Toy()
    optimiser = torch.optim.AdamW(p for p in module.parameters() if p.requires_grad)
    checkpoints = Checkpoints(tmp_path)
    for step, epoch in ((1, 0), (4, 0), (4, 1), (5, 1)):
        module(toy_batch(STAYS[:5], None)).backward()
        optimiser.step()
        checkpoints.save(module, optimiser, {"step": step, "epoch": epoch}, {"mean": torch.tensor([float(step)])})
    assert len(list(tmp_path.glob("step-*"))) == 1
    other = Toy()
    with torch.no_grad():
        for parameter in other.layers.parameters():
            parameter.zero_()
    fresh = torch.optim.AdamW(p for p in other.parameters() if p.requires_grad)
    assert checkpoints.restore(other, fresh) == ({"step": 5, "epoch": 1}, {"mean": torch.tensor([5.0])})
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    before, after = optimiser.state_dict()["state"], fresh.state_dict()["state"]
    assert before.keys() == after.keys()
    for slot in before:
        assert all(torch.equal(before[slot][name], after[slot][name]) for name in before[slot])


# Several processes


def worker(rank: int, port: int, out: str) -> None:
    """One of several processes: the latents of its share, gathered, then a whole toy training."""
    join(rank, port, ACCELERATE_USE_CPU="true")
    accelerator = make_accelerator(unused_parameters=True)
    assert accelerator.num_processes == WORLD
    module = objective()
    batch = stays_batch(ROWS[rank::WORLD])
    latents, present = gather_stays(module.encoders(batch).detach(), batch.present)
    found = {"latents": latents, "present": present.to(torch.uint8)}
    toy = Trainer(
        stage_of(Toy(dropout=0.0), collate=lambda stays, _: toy_batch(stays, None)),
        replace(SETTINGS, clip_norm=0.5), RunFolder(out + "-run", "pretraining", Recipe(), {}, rank == 0), accelerator,
    ).fit()  # fmt: skip
    found |= {f"trained.{name}": t for name, t in toy.state_dict().items()}
    save_file({name: t.contiguous() for name, t in found.items()}, f"{out}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("processes") / "rank"
    in_processes(worker, str(out))
    return [load_file(f"{out}-{rank}.safetensors") for rank in range(2)]


def test_two_processes_gather_every_stay_once(two_processes):
    module = objective()
    batch = stays_batch(ROWS)
    whole = module.encoders(batch).detach()
    for found in two_processes:
        present = found["present"].bool()
        assert len(present) == 10  # the shorter share is filled with a stay that holds nothing
        assert not present[9].any()
        order = [0, 2, 4, 6, 8, 1, 3, 5, 7]
        assert torch.equal(present[:9], batch.present[order])
        torch.testing.assert_close(found["latents"][:9], whole[order], rtol=1e-5, atol=1e-6)


def test_two_processes_train_what_one_trains(two_processes, tmp_path):
    """Seventeen stays in batches of five: shares of three and two, weighted as the stays they hold."""
    alone = fit(
        tmp_path / "run", Toy(dropout=0.0), replace(SETTINGS, clip_norm=0.5), collate=lambda s, _: toy_batch(s, None)
    )
    start = Toy(dropout=0.0).state_dict()
    assert not torch.allclose(alone.state_dict()["layers.0.weight"], start["layers.0.weight"], atol=1e-2)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(two_processes[0][f"trained.{name}"], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(two_processes[0][f"trained.{name}"], two_processes[1][f"trained.{name}"])


def test_one_process_gathers_nothing():
    latents, present = torch.randn(3, 2, 4), torch.ones(3, 2, dtype=torch.bool)
    same = gather_stays(latents, present)
    assert same[0] is latents
    assert same[1] is present
    assert masked_global_alignment_loss(*same, torch.tensor(0.1)).isfinite()


# make_accelerator


@pytest.mark.parametrize(
    "variables",
    [{"WORLD_SIZE": "2"}, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}],
)
def test_fewer_processes_than_asked_for_are_refused(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrajlmError, match="processes were asked for and 1 came up"):
        make_accelerator()


def test_a_line_of_the_log_that_was_cut_short_spoils_no_other(tmp_path):
    folder = run_folder(tmp_path / "run")
    folder.log(epoch=0)
    with (folder.path / "log.jsonl").open("a") as stream:
        stream.write('{"stage": "pretraining", "epo')  # the disk was full
    assert [line["epoch"] for line in folder.read_log()] == [0]
    again = run_folder(tmp_path / "run")
    again.log(epoch=1)
    again.log(epoch=2)
    assert [line["epoch"] for line in again.read_log()] == [0, 1, 2]
    again.finish({})
    assert (folder.path / "metrics.json").exists()


def test_the_last_weights_are_kept_where_so_set(untouched, tmp_path):
    """Every epoch is trained, whatever patience says, and what comes back is what the last tuning loss was read at."""
    seen: list[Tensor] = []

    def watch(module: nn.Module) -> None:
        seen.append(module.layers[0].weight.detach().clone())

    kept = fit(tmp_path / "run", Toy(before=watch), replace(SETTINGS, keep_last=True, patience=1, averaging=0.0))
    assert len(run_folder(tmp_path / "run").read_log()) == SETTINGS.epochs
    assert torch.equal(kept.layers[0].weight, seen[-1])
    best, _ = untouched
    assert not torch.allclose(kept.layers[0].weight, best["layers.0.weight"])
