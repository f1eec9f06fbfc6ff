import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.baselines.sequences import pad_histories, target_batches
from lasar.data.interactions import TrainSequence

NUM_ITEMS = 20


def sequence(items, baskets=None, user=0):
    baskets = range(len(items)) if baskets is None else baskets
    return TrainSequence(user, np.array(items, np.int32), np.array(list(baskets), np.int32))


def rows(sequences, *, epoch=0, **options):
    """Every row of an epoch as (tokens, targets)."""
    values = {
        "max_history": 50,
        "train_targets": "all",
        "whole_histories": True,
        "batch_tokens": 30,
        "seed": 0,
    }
    batches = target_batches(sequences, num_items=NUM_ITEMS, epoch=epoch, **values | options)
    found = []
    for batch in batches:
        lengths = batch.histories.lengths_B.tolist()
        for row, length in enumerate(lengths):
            tokens = batch.histories.items_BT[row].tolist()
            assert tokens[length:] == [NUM_ITEMS] * (len(tokens) - length)
            targets = batch.targets_BT[row].tolist()
            assert targets[length:] == [-1] * (len(targets) - length)
            found.append((tokens[:length], targets[:length]))
        assert batch.num_targets == sum(target >= 0 for row in batch.targets_BT.tolist() for target in row)
    return sorted(found)


def test_every_position_predicts_the_next_item():
    assert rows([sequence([4, 7, 9])]) == [([20, 4, 7], [4, 7, 9])]


def test_one_row_per_prediction_for_encoder_decoders():
    assert rows([sequence([4, 7, 9])], whole_histories=False, max_history=1) == [
        ([20], [4]), ([20, 4], [-1, 7]), ([20, 7], [-1, 9]),
    ]  # fmt: skip


def test_only_the_last_target():
    assert rows([sequence([4, 7, 9])], train_targets="last") == [([20, 4, 7], [-1, -1, 9])]
    prefixes = rows([sequence([4, 7, 9])], train_targets="last", whole_histories=False)
    assert prefixes == [([20, 4, 7], [-1, -1, 9])]
    assert rows([sequence([4])], train_targets="last") == [([20], [4])]


def test_an_order_is_predicted_from_earlier_orders_only():
    shop = [sequence([1, 2, 3, 4, 5], [0, 0, 1, 1, 2])]
    seen = [set(), set(), set(), set(), set()]
    for epoch in range(60):
        ((tokens, targets),) = rows(shop, epoch=epoch)
        assert tokens[0] == NUM_ITEMS
        assert set(tokens[1:3]) == {1, 2}
        assert set(tokens[3:]) == {3, 4}  # the last order is only ever a target
        for place, target in enumerate(targets):
            seen[place].add(target)
    assert seen == [{1, 2}, {3, 4}, {3, 4}, {5}, {5}]


def test_nothing_is_predicted_from_the_start_of_a_piece_cut_out():
    for epoch in range(20):
        pieces = rows([sequence(range(11))], max_history=3, epoch=epoch)
        assert all(len(tokens) <= 4 for tokens, _ in pieces)
        for tokens, targets in pieces:
            if targets[0] >= 0:
                assert targets[0] == 0  # only the item that opens the history
            assert targets[1:-1] == tokens[2:]
    (short,) = rows([sequence(range(11))], max_history=3, train_targets="last")
    assert short == ([20, 7, 8, 9], [-1, -1, -1, 10])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 5), st.booleans())
def test_every_item_is_a_target_once_an_epoch(lengths, epoch, whole):
    shop = [sequence(np.arange(length) % NUM_ITEMS, user=user) for user, length in enumerate(lengths)]
    found = rows(shop, epoch=epoch, whole_histories=whole)
    targets = sorted(target for _, row in found for target in row if target >= 0)
    assert targets == sorted(np.concatenate([s.items for s in shop]).tolist())


def test_an_epoch_is_a_function_of_seed_and_number():
    shop = [sequence(np.arange(9), np.arange(9) // 3, user=user) for user in range(30)]

    def order(seed, epoch):
        batches = target_batches(
            shop, num_items=NUM_ITEMS, max_history=5, train_targets="all", whole_histories=True, batch_tokens=40,
            seed=seed, epoch=epoch,
        )  # fmt: skip
        return [batch.targets_BT.tolist() for batch in batches]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


@pytest.mark.parametrize("max_history", [1, 3])
def test_histories_keep_their_newest_items(max_history):
    padded = pad_histories(
        [np.array([1, 2, 3, 4], np.int32), np.zeros(0, np.int32)],
        num_items=NUM_ITEMS,
        max_history=max_history,
    )
    newest = [4] if max_history == 1 else [2, 3, 4]
    assert padded.items_BT.tolist() == [[20, *newest], [20] * (1 + max_history)]
    assert padded.lengths_B.tolist() == [1 + max_history, 1]
