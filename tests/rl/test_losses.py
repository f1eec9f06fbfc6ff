"""The losses against their definitions: policy gradient, KL, REINFORCE by finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.rl.losses import kl_to_reference, reinforce, surrogate

BATCH, GROUP, LEVELS = 3, 4, 2


def random_case(seed):
    generator = torch.Generator().manual_seed(seed)
    new = -torch.rand(BATCH, GROUP, LEVELS, generator=generator, dtype=torch.float64).mul(3)
    advantages = torch.randn(BATCH, GROUP, generator=generator, dtype=torch.float64)
    return new.requires_grad_(), advantages


@pytest.mark.parametrize("ratio", ["item", "code"])
@pytest.mark.parametrize("clip", [0.2, math.inf])
@given(seed=st.integers(0, 1000))
def test_one_update_is_the_policy_gradient(ratio, clip, seed):
    new, advantages = random_case(seed)
    loss, clipped = surrogate(new, new.detach(), advantages, clip=clip, ratio=ratio)
    (found,) = torch.autograd.grad(loss.sum(), new)
    (expected,) = torch.autograd.grad(-(advantages * new.sum(-1)).sum(), new)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not clipped.any()


@pytest.mark.parametrize(
    ("change", "advantage", "moves"),
    [(0.5, 1.0, False), (0.1, 1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.5, -1.0, True)],
)
def test_clipping_stops_profit_and_never_repair(change, advantage, moves):
    old = torch.tensor([[[-2.0]]])
    new = (old + change).requires_grad_()
    loss, clipped = surrogate(new, old, torch.tensor([[advantage]]), clip=0.2, ratio="item")
    loss.sum().backward()
    assert bool(clipped) is not moves
    assert new.grad.item() == pytest.approx(-advantage * math.exp(change) if moves else 0.0)


def test_ratios_of_codes_clip_one_code_and_leave_the_other():
    old = torch.zeros(1, 1, 2)
    new = torch.tensor([[[0.5, 0.01]]], requires_grad=True)
    loss, clipped = surrogate(new, old, torch.ones(1, 1), clip=0.2, ratio="code")
    loss.sum().backward()
    assert clipped.all()
    assert new.grad[0, 0].tolist() == pytest.approx([0.0, -math.exp(0.01)])
    assert loss.item() == pytest.approx(-(1.2 + math.exp(0.01)))


@given(seed=st.integers(0, 1000))
def test_kl_is_never_negative_and_nothing_between_equals(seed):
    new, _ = random_case(seed)
    other, _ = random_case(seed + 1)
    assert (kl_to_reference(new, other) >= 0).all()
    assert (kl_to_reference(new, new) == 0).all()


def test_kl_is_right_on_average_over_the_policys_own_draws():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.3, 0.4]).log()
    estimates = kl_to_reference(policy[:, None], reference[:, None])
    expected = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimates).sum(), expected)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), eta=st.sampled_from([0.0, 0.1]))
def test_reinforce_is_the_gradient_of_the_expected_return(seed, eta):
    """A toy of 2 prompts and 3 depths: sum over all draws against finite differences of the expectation itself."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, generator=generator)
    worth = torch.randn(2, 3, generator=generator)

    def expected_return(values):
        logprobs = values.double().log_softmax(-1)
        return (logprobs.exp() * (worth - eta * logprobs)).sum().item()

    values = logits.clone().requires_grad_()
    chances = logits.softmax(-1)
    total = torch.zeros(())
    for depth in (1, 2, 3):
        drawn = torch.full((2,), depth)
        loss = reinforce(values, drawn, worth[:, depth - 1], entropy_weight=eta)
        total = total + (chances[:, depth - 1] * loss).sum()
    (found,) = torch.autograd.grad(total, values)
    for row in range(2):
        for column in range(3):
            step = torch.zeros(2, 3, dtype=torch.float64)
            step[row, column] = 1e-4
            slope = (expected_return(logits + step) - expected_return(logits - step)) / 2e-4
            assert -found[row, column].item() == pytest.approx(slope, abs=1e-4)
