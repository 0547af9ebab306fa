"""The loss against plain loops, and the relations it must keep."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_alignment import loss as reference_loss

from trajlm.alignment import (
    complementary_targets,
    drop_modalities,
    global_representation,
    inject_missing_tokens,
    masked_global_alignment_loss,
    missing_token_loss,
)


@st.composite
def batches(draw):
    stays, modalities = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    density = draw(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]))
    latents = torch.randn(stays, modalities, 6, generator=generator, dtype=torch.float64)
    present = torch.rand(stays, modalities, generator=generator) < density
    return latents, present, draw(st.sampled_from([0.01, 0.07, 0.5, 1.0]))


def value_and_gradients(function, latents, present, temperature):
    latents = latents.clone().requires_grad_()
    temperature = torch.tensor(temperature, dtype=latents.dtype, requires_grad=True)
    loss = function(latents, present, temperature)
    if not loss.requires_grad:
        return loss, torch.zeros_like(latents), torch.zeros_like(temperature)
    gradients = torch.autograd.grad(loss, (latents, temperature), allow_unused=True)
    return loss, *(
        torch.zeros_like(t) if g is None else g for g, t in zip(gradients, (latents, temperature), strict=True)
    )


@settings(max_examples=120, deadline=None)
@given(batches())
def test_equals_the_plain_loops_gradients_included(batch):
    for ours, theirs in zip(
        value_and_gradients(masked_global_alignment_loss, *batch),
        value_and_gradients(reference_loss, *batch),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(batches())
def test_float32_agrees_with_float64(batch):
    latents, present, temperature = batch
    single = masked_global_alignment_loss(latents.float(), present, torch.tensor(temperature))
    double = reference_loss(latents.float().double(), present, torch.tensor(temperature, dtype=torch.float64))
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(batches(), st.sampled_from([0.0, 1e6, float("nan"), float("inf")]))
def test_absent_entries_change_nothing_and_get_no_gradient(batch, garbage):
    latents, present, temperature = batch
    polluted = latents.masked_fill(~present[..., None], garbage)
    clean_loss, clean_gradient, _ = value_and_gradients(masked_global_alignment_loss, latents, present, temperature)
    loss, gradient, _ = value_and_gradients(masked_global_alignment_loss, polluted, present, temperature)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[~present] == 0).all()


def test_without_anchors_the_loss_is_a_zero_with_a_graph():
    latents = torch.randn(4, 3, 8, requires_grad=True)
    temperature = torch.tensor(0.07, requires_grad=True)
    for present in (torch.zeros(4, 3, dtype=torch.bool), torch.eye(4, 3, dtype=torch.bool)):
        loss = masked_global_alignment_loss(latents, present, temperature)
        gradients = torch.autograd.grad(loss, (latents, temperature))
        assert loss == 0
        assert all((g == 0).all() for g in gradients)


def test_the_centroid_leaves_its_own_modality_out():
    latents, present = torch.randn(5, 3, 8), torch.ones(5, 3, dtype=torch.bool)
    before, _ = complementary_targets(latents, present)
    moved = latents.clone()
    moved[:, 1] += 1.0
    after, _ = complementary_targets(moved, present)
    assert torch.equal(before[:, 1], after[:, 1])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_a_stay_with_one_modality_is_a_negative_and_never_an_anchor():
    latents = torch.randn(3, 2, 8, dtype=torch.float64)
    present = torch.tensor([[True, True], [True, True], [True, False]])
    with_single = masked_global_alignment_loss(latents, present, torch.tensor(0.1))
    without = masked_global_alignment_loss(latents[:2], present[:2], torch.tensor(0.1))
    assert with_single > without  # one more negative in every denominator
    _, gradient, _ = value_and_gradients(masked_global_alignment_loss, latents, present, 0.1)
    assert gradient[2, 0].abs().sum() > 0


def test_tokens_learn_only_through_their_own_loss_and_converge_to_the_expected_direction():
    torch.manual_seed(0)
    latents = torch.randn(64, 3, 5, dtype=torch.float64) + 1.0
    present = torch.rand(64, 3) < 0.6
    tokens = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    injected = inject_missing_tokens(latents, present, tokens)
    aligned = masked_global_alignment_loss(injected, present, torch.tensor(0.07))
    assert (torch.autograd.grad(aligned, tokens)[0] == 0).all()

    optimiser = torch.optim.Adam([tokens], lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        missing_token_loss(tokens, latents, present).backward()
        optimiser.step()
    represented = global_representation(latents, present)
    for modality in range(3):
        lacking = ~present[:, modality] & present.any(1)
        direction = represented[lacking].mean(0)
        assert torch.cosine_similarity(tokens[modality], direction, dim=0) > 0.9999


@settings(max_examples=60, deadline=None)
@given(batches(), st.floats(0, 1))
def test_modality_dropout_masks_one_and_never_the_last(batch, probability):
    _, present, _ = batch
    dropped = drop_modalities(present, probability)
    lost = (present & ~dropped).sum(1)
    assert (dropped <= present).all()
    assert (lost <= 1).all()
    assert (dropped.any(1) == present.any(1)).all()
    always = drop_modalities(present, 1.0)
    assert ((present & ~always).sum(1) == (present.sum(1) >= 2)).all()
