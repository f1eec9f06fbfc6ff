"""The catalogue softmax equals the plain form, in value and in both gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lasar.baselines.softmax import item_loss, item_scores


def plain(hidden_PD, table_JD, targets_P, temperature):
    logits_PI = hidden_PD @ table_JD[:-1].T / temperature
    return functional.cross_entropy(logits_PI.float(), targets_P, reduction="sum")


def inputs(predictions, items, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(predictions, 6, generator=generator).requires_grad_()
    table = torch.randn(items + 1, 6, generator=generator).requires_grad_()
    return hidden, table, torch.randint(items, (predictions,), generator=generator)


@given(
    predictions=st.sampled_from([1, 2, 255, 256, 257, 600]),
    items=st.integers(1, 40),
    temperature=st.sampled_from([0.1, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_it_equals_cross_entropy_over_all_items(predictions, items, temperature, seed):
    hidden, table, targets = inputs(predictions, items, seed)
    expected = plain(hidden, table, targets, temperature)
    of_hidden, of_table = torch.autograd.grad(3 * expected, [hidden, table])
    found = item_loss(hidden, table, targets, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    got_hidden, got_table = torch.autograd.grad(3 * found, [hidden, table])
    assert (got_hidden - of_hidden).norm() <= 1e-5 * of_hidden.norm() + 1e-3
    assert (got_table - of_table).norm() <= 1e-5 * of_table.norm() + 1e-3
    assert not got_table[-1].any(), "the start token is never an answer"


def test_in_bf16_it_is_as_near_as_the_plain_form():
    hidden, table, targets = inputs(300, 50, 0)
    exact = torch.autograd.grad(plain(hidden, table, targets, 1.0), [hidden, table])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = plain(hidden, table, targets, 1.0), item_loss(hidden, table, targets)
    rough, found = (torch.autograd.grad(loss, [hidden, table]) for loss in losses)
    for index in range(2):
        assert found[index].dtype == torch.float32
        assert (found[index] - exact[index]).norm() < 1.5 * (rough[index] - exact[index]).norm()


def test_large_logits_do_not_overflow_and_nothing_is_kept_without_gradients():
    hidden, table, targets = inputs(4, 9, 1)
    with torch.no_grad():
        loss = item_loss(1e4 * hidden, table, targets)
    assert torch.isfinite(loss)
    assert not loss.requires_grad
    assert item_scores(hidden, table).shape == (4, 9)


@pytest.mark.parametrize("frozen", ["hidden", "table"])
def test_one_of_the_two_may_be_frozen(frozen):
    hidden, table, targets = inputs(5, 7, 2)
    (hidden if frozen == "hidden" else table).requires_grad_(False)
    item_loss(hidden, table, targets).backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (table.grad is None) == (frozen == "table")
