import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.cot import rows as rows_module
from lasar.cot.rows import reserved_baskets, rewarded_rows, training_rows
from lasar.data.interactions import SPLIT_TRAIN, Interactions, TrainSequence


def interactions(events, *, train_targets="all", num_items=50):
    """Interactions from (user, item, basket, split), in any order of users."""
    table = np.array(sorted(events, key=lambda event: (event[0], event[2])), dtype=np.int32).reshape(-1, 4)
    return Interactions(
        user_index=table[:, 0], item_index=table[:, 1], basket=table[:, 2], split=table[:, 3].astype(np.int8),
        num_users=int(table[:, 0].max(initial=-1)) + 1, num_items=num_items, split_kind="last_basket",
        train_targets=train_targets,
    )  # fmt: skip


def plain(row):
    return (row.user_index, row.basket, row.history.tolist(), row.baskets.tolist(), row.targets.tolist())


EVENTS = [
    (0, 7, 0, 0), (0, 8, 1, 0), (0, 9, 2, 1), (0, 10, 3, 2),
    (1, 1, 0, 0), (1, 2, 0, 0), (1, 3, 1, 0), (1, 1, 2, 0), (1, 4, 2, 0), (1, 5, 3, 2),
    (2, 6, 0, 1), (2, 6, 1, 2),
]  # fmt: skip


def test_one_row_per_user_and_training_basket():
    assert [plain(row) for row in training_rows(interactions(EVENTS))] == [
        (0, 0, [], [], [7]),
        (0, 1, [7], [0], [8]),
        (1, 0, [], [], [1, 2]),
        (1, 1, [1, 2], [0, 0], [3]),
        (1, 2, [1, 2, 3], [0, 0, 1], [1, 4]),
    ]


def test_last_keeps_the_last_training_basket_of_each_user():
    found = training_rows(interactions(EVENTS, train_targets="last"))
    assert [plain(row) for row in found] == [(0, 1, [7], [0], [8]), (1, 2, [1, 2, 3], [0, 0, 1], [1, 4])]


def test_rewarded_rows_are_those_that_nothing_else_is_trained_on():
    data = dataclasses.replace(interactions(EVENTS), rl_share=1.0)
    assert [plain(row) for row in rewarded_rows(data)] == [
        (0, 1, [7], [0], [8]),
        (1, 2, [1, 2, 3], [0, 0, 1], [1, 4]),
    ]
    assert reserved_baskets(data) == {(0, 1), (1, 2)}
    trained = {
        (s.user_index, basket) for s in data.train_sequences(reserved=False) for basket in s.baskets.tolist()
    }
    assert trained == {(0, 0), (1, 0), (1, 1)}
    whole = interactions(EVENTS)
    assert [plain(row) for row in rewarded_rows(whole)] == [plain(row) for row in training_rows(whole)]


def test_no_training_events_no_rows():
    assert training_rows(interactions([(0, 1, 0, 1), (0, 2, 1, 2)])) == []
    assert training_rows(interactions([])) == []


@st.composite
def histories(draw):
    """Up to five users with up to six baskets of up to three items; splits do not decrease within a user."""
    events = []
    for user in range(draw(st.integers(0, 5))):
        splits = sorted(draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
        for basket, split in enumerate(splits):
            items = draw(st.lists(st.integers(0, 19), min_size=1, max_size=3))
            events += [(user, item, basket, split) for item in items]
    return events


@given(histories(), st.sampled_from(["all", "last"]), st.randoms())
def test_held_out_events_never_reach_a_row(events, train_targets, random):
    rows = training_rows(interactions(events, train_targets=train_targets))
    for row in rows:
        mine = [event for event in events if event[0] == row.user_index and event[3] == SPLIT_TRAIN]
        assert row.targets.tolist() == [item for _, item, basket, _ in mine if basket == row.basket]
        assert row.history.tolist() == [item for _, item, basket, _ in mine if basket < row.basket]
    pairs = {(user, basket) for user, _, basket, split in events if split == SPLIT_TRAIN}
    if train_targets == "last":
        pairs = set({user: (user, basket) for user, basket in sorted(pairs)}.values())
    assert [(row.user_index, row.basket) for row in rows] == sorted(pairs)
    # Held-out items may be anything, or absent altogether.
    shuffled = [(u, i if s == SPLIT_TRAIN else random.randrange(50), b, s) for u, i, b, s in events]
    removed = [event for event in events if event[3] == SPLIT_TRAIN]
    for changed in (shuffled, removed):
        again = training_rows(interactions(changed, train_targets=train_targets))
        assert [plain(row) for row in again] == [plain(row) for row in rows]


def leaking(data):
    """Sequences that hold every event, as a careless change of `train_sequences` would give."""
    return [
        TrainSequence(user, data.item_index[data.user_index == user], data.basket[data.user_index == user])
        for user in range(data.num_users)
    ]


@pytest.mark.parametrize("train_targets", ["all", "last"])
def test_rows_that_hold_held_out_events_are_refused(monkeypatch, train_targets):
    data = interactions(EVENTS, train_targets=train_targets)
    monkeypatch.setattr(Interactions, "train_sequences", leaking)
    with pytest.raises((AssertionError, KeyError)):
        training_rows(data)


def test_a_history_that_reaches_its_target_is_refused():
    data = interactions(EVENTS)
    rows = training_rows(data)
    touching = rows[1]._replace(history=np.array([7, 8], np.int32), baskets=np.array([0, 1], np.int32))
    with pytest.raises(AssertionError, match="a history reaches its target"):
        rows_module._assert_training_only([rows[0], touching, *rows[2:]], data)
    swapped = dataclasses.replace(data, item_index=data.item_index[::-1].copy())
    with pytest.raises(AssertionError, match="held-out events among rows"):
        rows_module._assert_training_only(rows, swapped)
