"""Every alignment loss against plain loops; chunks and processes against one plain step, gradients included."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from alignment_example import PRESENT, ROWS, gradients, objective, stays_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes_example import WORLD, in_processes, join
from reference_alignment import loss as masked_global_reference
from reference_alignment import unit
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from trajlm.config import EncoderConfig, PretrainingConfig
from trajlm.encoders.aligned import AlignedEncoders
from trajlm.engines import make_accelerator
from trajlm.errors import TrajlmError
from trajlm.objectives import OBJECTIVES
from trajlm.pretraining import AlignmentObjective
from trajlm.schema import FittedFeature, Modality


def pairwise_reference(latents, present, temperature):
    """Both directions of every pair, stay by stay."""
    stays, modalities, _ = latents.shape
    by_pair: dict[tuple[int, ...], list] = {}
    for query, gallery in permutations(range(modalities), 2):
        both = [i for i in range(stays) if present[i, query] and present[i, gallery]]
        terms = []
        for i in both:
            scores = torch.stack([unit(latents[i, query]) @ unit(latents[j, gallery]) / temperature for j in both])
            terms.append(torch.logsumexp(scores, 0) - scores[both.index(i)])
        if terms:
            by_pair.setdefault(tuple(sorted((query, gallery))), []).append(torch.stack(terms).mean())
    pairs = [torch.stack(directions).mean() for directions in by_pair.values()]
    return torch.stack(pairs).mean() if pairs else latents.new_zeros(())


def one_versus_others_reference(latents, present, temperature):
    """Every modality of the complete stays against the mean of the stay's others."""
    complete = [i for i in range(len(latents)) if present[i].all()]
    modalities = latents.shape[1]
    if not complete or modalities < 2:
        return latents.new_zeros(())
    per_modality = []
    for m in range(modalities):
        targets = [unit(sum(unit(latents[j, k]) for k in range(modalities) if k != m)) for j in complete]
        terms = []
        for place, i in enumerate(complete):
            scores = torch.stack([unit(latents[i, m]) @ target / temperature for target in targets])
            terms.append(torch.logsumexp(scores, 0) - scores[place])
        per_modality.append(torch.stack(terms).mean())
    return torch.stack(per_modality).mean()


REFERENCES = {
    "masked_global": masked_global_reference,
    "pairwise": pairwise_reference,
    "one_versus_others": one_versus_others_reference,
}


@st.composite
def batches(draw):
    stays, modalities = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    latents = torch.randn(stays, modalities, 5, generator=generator, dtype=torch.float64)
    present = torch.rand(stays, modalities, generator=generator) < draw(st.sampled_from([0.0, 0.4, 0.8, 1.0]))
    return latents, present, draw(st.sampled_from([0.01, 0.07, 1.0]))


def with_gradients(function, latents, present, temperature):
    latents = latents.clone().requires_grad_()
    temperature = torch.tensor(temperature, dtype=latents.dtype, requires_grad=True)
    loss = function(latents, present, temperature)
    (loss + 0.0 * (latents.sum() + temperature)).backward()  # a reference without a term has no graph of its own
    return loss.detach(), latents.grad, temperature.grad


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=50, deadline=None)
@given(batch=batches())
def test_every_loss_equals_plain_loops_gradients_included(name, batch):
    ours = with_gradients(OBJECTIVES[name], *batch)
    theirs = with_gradients(REFERENCES[name], *batch)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=30, deadline=None)
@given(batch=batches())
def test_absent_entries_are_never_read(name, batch):
    latents, present, temperature = batch
    polluted = latents.masked_fill(~present[..., None], float("nan"))
    clean = with_gradients(OBJECTIVES[name], latents, present, temperature)
    loss = OBJECTIVES[name](polluted, present, torch.tensor(temperature, dtype=latents.dtype))
    assert torch.equal(loss, clean[0])
    assert (clean[1][~present] == 0).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_to_align_is_a_zero_with_a_graph(name):
    latents = torch.randn(4, 3, 8, requires_grad=True)
    temperature = torch.tensor(0.07, requires_grad=True)
    for present in (torch.zeros(4, 3, dtype=torch.bool), torch.eye(4, 3, dtype=torch.bool)):
        loss = OBJECTIVES[name](latents, present, temperature)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (latents, temperature)))


def test_on_complete_stays_one_versus_others_is_masked_global_alignment():
    latents, present = torch.randn(6, 3, 8), torch.ones(6, 3, dtype=torch.bool)
    temperature = torch.tensor(0.1)
    whole = OBJECTIVES["masked_global"](latents, present, temperature)
    assert torch.equal(OBJECTIVES["one_versus_others"](latents, present, temperature), whole)
    present[0, 0] = False
    held = OBJECTIVES["one_versus_others"](latents[1:], present[1:], temperature)
    torch.testing.assert_close(OBJECTIVES["one_versus_others"](latents, present, temperature), held)


@pytest.mark.parametrize(("start", "bound"), [(9.0, 1.0), (-9.0, 0.01)])
def test_the_temperature_stays_in_its_bounds_and_can_come_back(start, bound):
    module = objective()
    with torch.no_grad():
        module.log_temperature.fill_(start)
    module(stays_batch(ROWS)).backward()
    assert module.temperature.item() == pytest.approx(bound)
    assert module.log_temperature.grad.abs() > 1e-6


# Cached gradients

CASES = [(name, size) for name in OBJECTIVES for size in (1, 4, 100)]


def step(module: AlignmentObjective, *, cached: bool, seed: int = 5) -> torch.Tensor:
    """One training step's loss, its gradients left behind, in float64."""
    torch.manual_seed(seed)
    module.double().zero_grad(set_to_none=True)
    batch = stays_batch(ROWS, torch.float64)
    if cached:
        return module.backward(batch)
    loss = module(batch)
    loss.backward()
    return loss.detach()


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert {"encoders.missing_tokens", "log_temperature"} <= set(theirs)
    assert any(grad.abs().max() > 1e-3 for name, grad in theirs.items() if ".encoders." in name)
    for name in set(ours) | set(theirs):
        # A parameter that only one of two ways leaves out has no gradient in the other either.
        mine, other = (found.get(name, torch.zeros((), dtype=torch.float64)) for found in (ours, theirs))
        torch.testing.assert_close(mine + 0 * other, other + 0 * mine, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "size"), CASES)
def test_chunks_give_the_loss_and_gradients_of_a_plain_step(name, size):
    """Modality dropout on; the encoders' own is off, for a plain step draws it in another order than chunks do."""
    # With two complete stays, modality dropout would leave One-Versus-Others nothing to align.
    settings = {"objective": name, "modality_dropout": 0.0 if name == "one_versus_others" else 0.6}
    plain, chunked = objective(**settings), objective(chunk_size=size, **settings)
    torch.testing.assert_close(step(chunked, cached=True), step(plain, cached=False), rtol=1e-9, atol=1e-9)
    assert_same(gradients(chunked), gradients(plain))


class KeepsGraph(AlignmentObjective):
    """Encodes in the same chunks, the whole graph in memory: what cached gradients must equal with dropout on."""

    def backward(self, batch):
        batch = self._dropped(batch)
        latents = torch.cat([self.encoders(chunk) for chunk in batch.chunks(self.chunk_size)])
        loss = self._training_loss(latents, batch.present)
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_second_pass_draws_the_dropout_of_the_first(size):
    cached = objective(dropout=0.5, chunk_size=size, modality_dropout=0.6)
    whole = objective(dropout=0.5, chunk_size=size, modality_dropout=0.6)
    whole.__class__ = KeepsGraph
    torch.testing.assert_close(step(cached, cached=True), step(whole, cached=True), rtol=1e-12, atol=1e-12)
    after_cached = torch.rand(3)
    step(whole, cached=True)
    assert torch.equal(after_cached, torch.rand(3))  # what comes next draws the same, too
    assert_same(gradients(cached), gradients(whole))
    other = objective(dropout=0.5, chunk_size=size, modality_dropout=0.6)
    assert not torch.isclose(step(other, cached=True, seed=6), step(cached, cached=True, seed=5))


def test_an_encoder_that_normalises_over_the_batch_refuses_chunks():
    modalities = [Modality("age", "numeric", static=True), Modality("labs", "numeric")]
    features = [FittedFeature("age", "age", feature_id=0), FittedFeature("labs", "lab", feature_id=1)]
    encoders = AlignedEncoders(modalities, features, EncoderConfig(latent_width=6, hidden_width=8))
    encoders.encoders["labs"].project.append(torch.nn.BatchNorm1d(6))
    AlignmentObjective(encoders, PretrainingConfig())
    with pytest.raises(TrajlmError, match=r"chunk_size: encoders.labs.project.3 normalises over the batch"):
        AlignmentObjective(encoders, PretrainingConfig(chunk_size=2))


# Several processes


def worker(rank: int, port: int, out: str) -> None:
    join(rank, port, ACCELERATE_USE_CPU="true")
    make_accelerator(unused_parameters=True)
    batch = stays_batch(ROWS[rank::WORLD], torch.float64)
    for name in OBJECTIVES:
        plain = objective(objective=name).double()
        replica = DistributedDataParallel(plain, find_unused_parameters=True)
        loss = replica(batch)
        loss.backward()
        chunked = objective(objective=name, chunk_size=2).double()
        for how, module, value in (("plain", plain, loss), ("chunked", chunked, chunked.backward(batch))):
            found = {"loss": value.detach()} | gradients(module)
            save_file({n: t.contiguous() for n, t in found.items()}, f"{out}-{name}-{how}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("processes") / "rank")
    in_processes(worker, out)
    return out


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("how", ["plain", "chunked"])
def test_two_processes_give_the_loss_and_gradients_of_one(name, how, two_processes):
    """Also with a stay that holds nothing and some that hold one modality; the shares are of five and four stays."""
    assert {sum(held) for held in PRESENT} == {0, 1, 2, 3}
    alone = objective(objective=name)
    loss = step(alone, cached=False)
    halves = [objective(objective=name).double()(stays_batch(ROWS[r::2], torch.float64)) for r in range(2)]
    assert abs(sum(float(h.detach()) for h in halves) / 2 - float(loss)) > 1e-2  # they know fewer negatives
    for rank in range(2):
        found = load_file(f"{two_processes}-{name}-{how}-{rank}.safetensors")
        torch.testing.assert_close(found.pop("loss"), loss, rtol=1e-9, atol=1e-9)
        assert_same(found, gradients(alone))
