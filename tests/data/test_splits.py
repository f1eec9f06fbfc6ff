import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.splits import (
    assign_splits,
    basket_numbers,
    cut_times,
    event_numbers,
    hold_out_last,
    split_by_time,
    split_warnings,
)
from lasar.errors import ConfigError, DataError

USERS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=7), min_size=1, max_size=6)


def flatten(users):
    user_index = np.array([u for u, times in enumerate(users) for _ in times], dtype=np.int32)
    timestamp = np.array([t for times in users for t in sorted(times)], dtype=np.int64)
    return user_index, timestamp


@given(USERS)
def test_baskets_number_the_distinct_times_of_a_user(users):
    user_index, timestamp = flatten(users)
    expected = [sorted(set(times)).index(t) for times in users for t in sorted(times)]
    assert basket_numbers(user_index, timestamp).tolist() == expected
    assert event_numbers(user_index).tolist() == [n for times in users for n in range(len(times))]


@given(USERS)
def test_last_unit_is_test_and_the_one_before_validation(users):
    user_index, timestamp = flatten(users)
    for numbers in (event_numbers(user_index), basket_numbers(user_index, timestamp)):
        split = hold_out_last(user_index, numbers)
        for user in range(len(users)):
            units = numbers[user_index == user]
            got = [set(split[user_index == user][units == unit].tolist()) for unit in np.unique(units)]
            expected = [{0}] * len(got)
            if len(got) >= 2:
                expected[-1] = {2}
            if len(got) >= 3:
                expected[-2] = {1}
            assert got == expected


def test_no_events():
    empty = np.array([], dtype=np.int32)
    assert event_numbers(empty).shape == (0,)
    assert hold_out_last(empty, empty).shape == (0,)


@given(
    st.lists(st.integers(0, 50), min_size=5, max_size=60).filter(lambda times: len(set(times)) > 4),
    st.floats(0.2, 0.5),
    st.floats(0.7, 0.95),
)
def test_nothing_trained_on_is_later_than_anything_held_out(times, first, second):
    timestamp = np.array(times, dtype=np.int64)
    try:
        cuts = cut_times(pl.Series(timestamp), (first, second))
    except ConfigError:
        return  # the two quantiles fall on one moment
    split = split_by_time(timestamp, *cuts)
    for earlier, later in ((0, 1), (0, 2), (1, 2)):
        if (split == earlier).any() and (split == later).any():
            assert timestamp[split == earlier].max() < timestamp[split == later].min()
    assert (split == 2).any()


def test_cuts_are_quantiles_or_dates():
    times = pl.Series(range(0, 100 * 86_400, 86_400))
    assert cut_times(times, (0.8, 0.9)) == (80 * 86_400, 90 * 86_400)
    assert cut_times(times, ("1970-01-11", "1970-01-21T12:00:00+12:00")) == (10 * 86_400, 20 * 86_400)
    for cuts, message in [
        (("soon", 0.9), "'soon' is not an ISO date"),
        ((0.8, 3), "3 is not a quantile"),
        ((0.9, 0.8), "must start before test"),
    ]:
        with pytest.raises(ConfigError, match=message):
            cut_times(times, cuts)
    for empty in (pl.Series([], dtype=pl.Int64), pl.Series([1, None])):
        with pytest.raises(DataError, match="needs events with times"):
            cut_times(empty, (0.8, 0.9))


def table(rows):
    names = ("user_index", "timestamp", "basket")
    types = {"user_index": pl.Int32, "timestamp": pl.Int64, "basket": pl.Int32}
    return pl.DataFrame(rows, schema=dict.fromkeys(names), orient="row").cast(types)


def test_kinds_of_split():
    events = table([(0, 1, 0), (0, 1, 0), (0, 5, 1), (0, 5, 1), (0, 9, 2)])
    assert assign_splits(events, "leave_one_out").tolist() == [0, 0, 0, 1, 2]
    assert assign_splits(events, "last_basket").tolist() == [0, 0, 1, 1, 2]
    assert assign_splits(events, "temporal", (5, 6)).tolist() == [0, 0, 1, 1, 2]
    given_split = events.with_columns(split=pl.Series([2, 1, 0, 0, 0], dtype=pl.Int8))
    assert assign_splits(given_split, "given").tolist() == [2, 1, 0, 0, 0]
    with pytest.raises(DataError, match="needs a source that fixes a split"):
        assign_splits(events, "given")


def test_within_order_completion_is_counted():
    events = table([(0, 1, 0), (0, 2, 1), (0, 2, 1), (1, 1, 0), (1, 2, 1), (1, 3, 2), (2, 1, 0)])
    split = pl.Series(assign_splits(events, "leave_one_out"))
    assert split_warnings(events.with_columns(split=split), "leave_one_out") == {
        "users_without_train": 0,
        "users_without_valid": 1,
        "users_without_test": 1,
        "tests_inside_a_seen_basket": 1,
    }
