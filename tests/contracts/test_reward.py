"""One contract for every reward: one finite number for each item, whatever the group, and no state."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.rl import rewards
from lasar.rl.rewards import REWARDS

CODES = np.random.default_rng(0).integers(0, 3, (12, 4)).astype(np.int32)
GROUPS = st.tuples(
    st.lists(st.integers(0, 11), min_size=1, max_size=8, unique=True),
    st.integers(0, 3),
    st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True),
)


def called(name, group):
    items, missing, targets = group
    items = np.array([*items, *[-1] * missing], np.int32)
    return items, REWARDS[name](items, np.array(targets, np.int32), CODES)


@pytest.mark.parametrize("name", REWARDS)
@given(group=GROUPS)
def test_one_finite_number_for_each_item(name, group):
    items, values = called(name, group)
    assert values.shape == items.shape
    assert np.isfinite(values).all()
    assert (values[items < 0] == 0).all()
    assert np.abs(values).max() <= 1


@pytest.mark.parametrize("name", REWARDS)
@given(group=GROUPS)
def test_a_true_item_is_never_worth_less_than_a_wrong_one(name, group):
    items, values = called(name, group)
    hit = np.isin(items, group[2])
    if hit.any():
        assert values[hit].min() >= values[~hit & (items >= 0)].max(initial=-np.inf)


@pytest.mark.parametrize("name", REWARDS)
@given(group=GROUPS)
def test_the_sequence_of_true_items_means_nothing(name, group):
    items, missing, targets = group
    np.testing.assert_array_equal(called(name, group)[1], called(name, (items, missing, targets[::-1]))[1])


@pytest.mark.parametrize("name", REWARDS)
def test_arguments_are_left_alone(name):
    items, targets = np.array([3, 1, -1], np.int32), np.array([1, 5], np.int32)
    before = items.copy(), targets.copy(), CODES.copy()
    first, again = (REWARDS[name](items, targets, CODES) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for kept, now in zip(before, (items, targets, CODES), strict=True):
        np.testing.assert_array_equal(kept, now)


def test_the_examples_are_true():
    found = doctest.testmod(rewards, extraglobs={"np": np})
    assert found.attempted >= len(REWARDS)
    assert found.failed == 0
