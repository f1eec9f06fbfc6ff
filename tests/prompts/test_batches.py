from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.interactions import TrainSequence
from lasar.prompts.batches import bucket_by_length, epoch_batches
from lasar.prompts.vocabulary import Vocabulary

CODES = np.array([[i // 4, i % 4] for i in range(16)], np.int32)


@st.composite
def shops(draw):
    users = draw(st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=30), min_size=1, max_size=6))
    sequences = []
    for user, items in enumerate(users):
        steps = draw(st.lists(st.integers(0, 1), min_size=len(items), max_size=len(items)))
        sequences.append(TrainSequence(user, np.array(items, np.int32), np.cumsum(steps).astype(np.int32)))
    return sequences


def batches(sequences, *, orders=False, max_history=7, train_targets="all", epoch=0, batch_tokens=64):
    vocabulary = Vocabulary(num_levels=2, codebook_size=4, orders=orders, max_history=max_history)
    return vocabulary, epoch_batches(
        sequences,
        vocabulary.item_tokens(CODES),
        vocabulary=vocabulary,
        batch_tokens=batch_tokens,
        train_targets=train_targets,
        seed=5,
        epoch=epoch,
    )


@given(shops(), st.booleans(), st.integers(0, 3))
def test_every_event_is_a_target_exactly_once_an_epoch(sequences, orders, epoch):
    vocabulary, made = batches(sequences, orders=orders, epoch=epoch)
    tokens = vocabulary.item_tokens(CODES)
    expected = Counter(int(t) for s in sequences for item in s.items for t in tokens[item])
    assert Counter(int(t) for b in made for t in b.targets_BT[b.targets_BT >= 0]) == expected
    assert sum(b.num_targets for b in made) == sum(expected.values())


@given(shops(), st.booleans())
def test_a_target_is_the_token_that_follows(sequences, orders):
    _, made = batches(sequences, orders=orders)
    for batch in made:
        rows, columns = np.nonzero(batch.targets_BT >= 0)
        assert (batch.ids_BT[rows, columns + 1] == batch.targets_BT[rows, columns]).all()
        assert (columns + 1 < batch.lengths_B[rows]).all()


@given(shops(), st.booleans())
def test_last_trains_one_item_per_window(sequences, orders):
    vocabulary, made = batches(sequences, orders=orders, train_targets="last", max_history=50)
    for batch in made:
        assert ((batch.targets_BT >= 0).sum(axis=1) == vocabulary.num_levels).all()
        rows = np.arange(len(batch.ids_BT))
        last = batch.lengths_B - 1
        assert (batch.targets_BT[rows, last - 1] == batch.ids_BT[rows, last]).all()


@given(shops())
def test_shuffling_stays_inside_an_order(sequences):
    vocabulary, made = batches(sequences, orders=True, max_history=50, batch_tokens=1)
    orders = Counter()
    for batch in made:
        for row, length in zip(batch.ids_BT, batch.lengths_B, strict=True):
            starts = np.flatnonzero(row[:length] == vocabulary.order)
            for chunk in np.split(row[:length], starts)[1:]:
                codes = chunk[1:].reshape(-1, 2) - [vocabulary.level_start(0), vocabulary.level_start(1)]
                orders[tuple(sorted((codes[:, 0] * 4 + codes[:, 1]).tolist()))] += 1
    expected = Counter()
    for s in sequences:
        for basket in np.unique(s.baskets):
            expected[tuple(sorted(s.items[s.baskets == basket].tolist()))] += 1
    assert orders == expected


def test_epochs_differ_and_repeat():
    sequence = [TrainSequence(0, np.arange(16, dtype=np.int32), np.zeros(16, np.int32))]
    first = batches(sequence, orders=True, epoch=0)[1]
    again = batches(sequence, orders=True, epoch=0)[1]
    other = batches(sequence, orders=True, epoch=1)[1]
    assert all((a.ids_BT == b.ids_BT).all() for a, b in zip(first, again, strict=True))
    assert any(
        a.ids_BT.shape != b.ids_BT.shape or (a.ids_BT != b.ids_BT).any()
        for a, b in zip(first, other, strict=False)
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 100))
def test_buckets_hold_every_row_once_within_budget(lengths, budget):
    groups = bucket_by_length(lengths, budget, np.random.default_rng(0))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= budget for g in groups)


def test_padding_is_rare():
    lengths = np.random.default_rng(0).integers(2, 200, 5000).tolist()
    groups = bucket_by_length(lengths, 4096, np.random.default_rng(0))
    padded = sum(len(g) * max(lengths[i] for i in g) for g in groups)
    assert padded / sum(lengths) == pytest.approx(1.0, abs=0.03)
