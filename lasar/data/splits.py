"""Order, baskets and splits: which events are trained on, which are held out."""

import datetime

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.data.interactions import SPLIT_TEST, SPLIT_TRAIN, SPLIT_VALID
from lasar.errors import ConfigError, DataError

Cut = float | str


def assign_splits(
    interactions: pl.DataFrame, kind: str, cut: tuple[int, int] | None = None
) -> NDArray[np.int8]:
    """Split of every event.

    Args:
        interactions: `user_index`, `timestamp`, `basket` and, for `given`, `split`; sorted by user, then
            time.
        kind: `leave_one_out`, `last_basket`, `temporal` or `given`.
        cut: first second of validation and of test, for `temporal`.

    Returns:
        int8 `[num_events]`.

    Raises:
        DataError: `given`, but the source does not fix a split.
    """
    user_index = interactions["user_index"].to_numpy()
    if kind == "given":
        if "split" not in interactions.columns:
            raise DataError("split 'given' needs a source that fixes a split (reader minionerec)")
        return interactions["split"].to_numpy().astype(np.int8)
    if kind == "temporal" and cut is not None:
        return split_by_time(interactions["timestamp"].to_numpy(), *cut)
    if kind == "last_basket":
        return hold_out_last(user_index, interactions["basket"].to_numpy())
    return hold_out_last(user_index, event_numbers(user_index))


def split_warnings(interactions: pl.DataFrame, kind: str) -> dict[str, int]:
    """Count users that miss a split, and test events whose basket is partly in the history.

    The last makes leave-one-out a within-order completion: an easier task than the next order.
    """
    user, split = interactions["user_index"].to_numpy(), interactions["split"].to_numpy()
    num_users = int(np.count_nonzero(np.bincount(user)))
    warnings = {}
    for name, kept in (("train", SPLIT_TRAIN), ("valid", SPLIT_VALID), ("test", SPLIT_TEST)):
        having = int(np.count_nonzero(np.bincount(user[split == kept])))
        warnings[f"users_without_{name}"] = num_users - having
    if kind == "leave_one_out":
        basket = interactions["basket"].to_numpy()
        same = (np.diff(user) == 0) & (np.diff(basket) == 0)  # as the event before
        inside = same & (split[1:] == SPLIT_TEST) & (split[:-1] < SPLIT_TEST)
        warnings["tests_inside_a_seen_basket"] = int(np.count_nonzero(inside))
    return warnings


def basket_numbers(user_index: NDArray[np.int32], timestamp: NDArray[np.int64]) -> NDArray[np.int32]:
    """Number the baskets of every user 0, 1, ...: a user's events with one timestamp are one basket.

    Args:
        user_index: int32 `[num_events]`, sorted.
        timestamp: int64 `[num_events]`, sorted within a user.

    Returns:
        int32 `[num_events]`.
    """
    new_user = np.diff(user_index, prepend=-1) != 0
    new_basket = new_user | (np.diff(timestamp, prepend=timestamp[:1]) != 0)
    return _counted_from_user(new_user, np.cumsum(new_basket) - 1)


def event_numbers(user_index: NDArray[np.int32]) -> NDArray[np.int32]:
    """Number the events of every user 0, 1, ...; `user_index` is sorted, int32 `[num_events]`."""
    return _counted_from_user(np.diff(user_index, prepend=-1) != 0, np.arange(len(user_index)))


def _counted_from_user(new_user: NDArray[np.bool_], count: NDArray[np.int64]) -> NDArray[np.int32]:
    start = np.flatnonzero(new_user)
    within: NDArray[np.int32] = (count - count[start][np.cumsum(new_user) - 1]).astype(np.int32)
    return within


def hold_out_last(user_index: NDArray[np.int32], number: NDArray[np.int32]) -> NDArray[np.int8]:
    """Hold out each user's last unit for test and the second to last for validation.

    A unit is an event (`leave_one_out`) or a basket (`last_basket`). Training keeps the first unit: a user
    with two has no validation, a user with one is only trained on.

    Args:
        user_index: int32 `[num_events]`, sorted.
        number: number of each event's unit, 0, 1, ... within a user, not decreasing; int32 `[num_events]`.

    Returns:
        int8 `[num_events]`.
    """
    last = np.zeros(int(user_index[-1]) + 1 if len(user_index) else 0, dtype=np.int32)
    np.maximum.at(last, user_index, number)
    last_number = last[user_index]
    split = np.full(len(user_index), SPLIT_TRAIN, dtype=np.int8)
    split[(number == last_number - 1) & (number > 0)] = SPLIT_VALID
    split[(number == last_number) & (number > 0)] = SPLIT_TEST
    return split


def cut_times(times: pl.Series, cuts: tuple[Cut, Cut]) -> tuple[int, int]:
    """Resolve the two cuts of a temporal split to Unix seconds.

    Args:
        times: Unix seconds of all events.
        cuts: start of validation and of test; a number in (0, 1) is a quantile of all events' times, text is
            an ISO date or time (UTC where no zone is given).

    Raises:
        ConfigError: a cut is neither, or they are not in order.
        DataError: the source has no times.
    """
    if len(times) == 0 or times.null_count() > 0:
        raise DataError("split 'temporal' needs events with times; choose another split")
    valid_from, test_from = (_cut_time(times.to_numpy(), cut) for cut in cuts)
    if valid_from >= test_from:
        raise ConfigError(f"cuts: validation ({cuts[0]}) must start before test ({cuts[1]})")
    return valid_from, test_from


def _cut_time(timestamp: NDArray[np.int64], cut: Cut) -> int:
    if isinstance(cut, str):
        try:
            time = datetime.datetime.fromisoformat(cut)
        except ValueError:
            raise ConfigError(f"cuts: {cut!r} is not an ISO date such as 2018-10-01") from None
        return int((time if time.tzinfo else time.replace(tzinfo=datetime.UTC)).timestamp())
    if not 0 < cut < 1:
        raise ConfigError(f"cuts: {cut!r} is not a quantile between 0 and 1; write a date as text")
    return int(np.quantile(timestamp, cut, method="higher"))


def split_by_time(timestamp: NDArray[np.int64], valid_from: int, test_from: int) -> NDArray[np.int8]:
    """Split at two moments, the same for all users: nothing trained on is later than anything held out.

    Args:
        timestamp: int64 `[num_events]`, Unix seconds.
        valid_from: first second of validation.
        test_from: first second of test.

    Returns:
        int8 `[num_events]`.
    """
    split = np.full(len(timestamp), SPLIT_TRAIN, dtype=np.int8)
    split[timestamp >= valid_from] = SPLIT_VALID
    split[timestamp >= test_from] = SPLIT_TEST
    return split
