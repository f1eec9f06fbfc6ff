import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.artifacts import write_json
from lasar.data.interactions import SPLIT_TEST, SPLIT_VALID, Interactions, ItemTable, load_user_ids
from lasar.errors import ArtifactError, UnknownItemError


def make(rows, num_users=None, num_items=10):
    """rows: (user, item, basket, split)."""
    columns = list(zip(*rows, strict=True)) if rows else [[], [], [], []]
    return Interactions(
        user_index=np.array(columns[0], dtype=np.int32),
        item_index=np.array(columns[1], dtype=np.int32),
        basket=np.array(columns[2], dtype=np.int32),
        split=np.array(columns[3], dtype=np.int8),
        num_users=num_users or (max(columns[0], default=-1) + 1),
        num_items=num_items,
        split_kind="last_basket",
        train_targets="all",
    )


ROWS = [
    (0, 3, 0, 0), (0, 4, 0, 0), (0, 3, 1, 1), (0, 5, 2, 2), (0, 1, 2, 2), (0, 5, 2, 2),
    (1, 7, 0, 0),
    (2, 8, 0, 0), (2, 9, 1, 2),
]  # fmt: skip


@given(
    sizes=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=12),
    share=st.floats(0, 1),
)
def test_what_is_reserved_is_the_last_training_basket_of_a_share_of_users(sizes, share):
    rows = [
        (user, item, basket, 0)
        for user, baskets in enumerate(sizes)
        for basket, size in enumerate(baskets)
        for item in range(size)
    ]
    rows += [(user, 9, len(baskets), 1 + user % 2) for user, baskets in enumerate(sizes)]
    data = make(sorted(rows))
    reserved = dataclasses.replace(data, rl_share=share)
    assert not data.reserved().any()
    marked = reserved.reserved()
    users = set(reserved.user_index[marked].tolist())
    able = [user for user, baskets in enumerate(sizes) if len(baskets) > 1]
    assert users <= set(able)
    assert len(users) == round(share * len(able))
    for user in users:
        own = (reserved.user_index == user) & marked
        assert set(reserved.basket[own].tolist()) == {len(sizes[user]) - 1}
        assert own.sum() == sizes[user][-1]
    left = reserved.train_sequences(reserved=False)
    assert {s.user_index for s in left} == set(range(len(sizes)))
    assert sum(len(s.items) for s in left) + marked.sum() == sum(map(sum, sizes))
    for sequence in left:
        expected = len(sizes[sequence.user_index]) - (sequence.user_index in users)
        assert len(set(sequence.baskets.tolist())) == expected
    whole = [(s.user_index, s.items.tolist()) for s in data.train_sequences()]
    assert [(s.user_index, s.items.tolist()) for s in reserved.train_sequences()] == whole


def test_train_sequences_hold_training_events_only():
    sequences = make(ROWS).train_sequences()
    assert [(s.user_index, s.items.tolist(), s.baskets.tolist()) for s in sequences] == [
        (0, [3, 4], [0, 0]), (1, [7], [0]), (2, [8], [0]),
    ]  # fmt: skip


def test_test_cases_see_training_and_validation():
    cases = make(ROWS).cases(SPLIT_TEST)
    assert cases.user_index.tolist() == [0, 2]
    assert [history.tolist() for history in cases.histories] == [[3, 4, 3], [8]]
    assert [baskets.tolist() for baskets in cases.baskets] == [[0, 0, 1], [0]]
    assert [targets.tolist() for targets in cases.targets] == [[5, 1], [9]]


def test_validation_cases_see_training_only():
    cases = make(ROWS).cases(SPLIT_VALID)
    assert cases.user_index.tolist() == [0]
    assert cases.histories[0].tolist() == [3, 4]
    assert cases.targets[0].tolist() == [3]


def test_a_user_without_earlier_events_has_an_empty_history():
    cases = make([(0, 1, 0, 2)]).cases(SPLIT_TEST)
    assert cases.histories[0].shape == (0,)
    assert cases.histories[0].dtype == np.int32


def test_train_counts_cover_the_whole_catalogue():
    assert make(ROWS).train_counts().tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1, 0]


def test_no_events_is_not_an_error():
    empty = make([])
    assert empty.train_sequences() == []
    assert len(empty.cases(SPLIT_TEST)) == 0


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=8),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_cases_and_sequences_agree_with_a_plain_loop(users):
    rows = [
        (user, item, number, split)
        for user, events in enumerate(users)
        for number, (item, split) in enumerate(events)
    ]
    interactions = make(rows)
    for split in (SPLIT_VALID, SPLIT_TEST):
        expected = []
        for user, events in enumerate(users):
            targets = list(dict.fromkeys(item for item, at in events if at == split))
            if targets:
                expected.append((user, [item for item, at in events if at < split], targets))
        cases = interactions.cases(split)
        got = zip(cases.user_index.tolist(), cases.histories, cases.targets, strict=True)
        assert [(user, history.tolist(), targets.tolist()) for user, history, targets in got] == expected
    lengths = [len(sequence.items) for sequence in interactions.train_sequences()]
    assert sum(lengths) == interactions.train_counts().sum()
    assert all(lengths)


def test_subset_is_random_ordered_and_repeatable():
    cases = make([(user, user % 10, 0, 2) for user in range(50)]).cases(SPLIT_TEST)
    first, again, other = cases.subset(10, 1), cases.subset(10, 1), cases.subset(10, 2)
    assert first.user_index.tolist() == again.user_index.tolist() == sorted(set(first.user_index.tolist()))
    assert len(first) == 10
    assert first.user_index.tolist() != other.user_index.tolist()
    assert [target[0] for target in first.targets] == [user % 10 for user in first.user_index]
    assert cases.subset(50, 0) is cases


def test_loading_what_was_written(tmp_path):
    pl.DataFrame(
        {"user_index": [0], "item_index": [1], "timestamp": [5], "basket": [0], "split": [2]}
    ).write_parquet(tmp_path / "interactions.parquet")
    facts = {"num_users": 1, "num_items": 2, "split": "temporal", "train_targets": "last"}
    write_json(tmp_path / "summary.json", facts)
    loaded = Interactions.load(tmp_path)
    assert (loaded.num_users, loaded.num_items) == (1, 2)
    assert (loaded.split_kind, loaded.train_targets) == ("temporal", "last")
    assert [a.dtype for a in (loaded.user_index, loaded.item_index, loaded.basket)] == [np.int32] * 3
    assert loaded.split.dtype == np.int8


def test_a_damaged_or_missing_artifact_is_named(tmp_path):
    write_json(tmp_path / "summary.json", {})
    (tmp_path / "interactions.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ArtifactError, match=r"interactions\.parquet: not readable"):
        Interactions.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"items\.parquet: not readable"):
        ItemTable.load(tmp_path)


def test_items_and_users_are_found_by_id(tmp_path):
    items = {"item_id": ["A1", "B22"], "title": ["a", ""], "text": ["a. b", ""]}
    pl.DataFrame(items).write_parquet(tmp_path / "items.parquet")
    pl.DataFrame({"user_index": [0], "user_id": ["u"]}).write_parquet(tmp_path / "users.parquet")
    table = ItemTable.load(tmp_path)
    assert len(table) == 2
    assert table.index_of("B22") == 1
    with pytest.raises(UnknownItemError, match="no item 'B2' in the catalogue; did you mean 'B22'"):
        table.index_of("B2")
    assert load_user_ids(tmp_path) == ["u"]
