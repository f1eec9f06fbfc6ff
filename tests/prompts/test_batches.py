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


def flat_items(sequences):
    return Counter(int(item) for s in sequences for item in s.items)


@given(shops(), st.integers(0, 3))
def test_without_orders_every_event_is_a_target_exactly_once(sequences, epoch):
    vocabulary, made = batches(sequences, epoch=epoch)
    targets = Counter(int(item) for b in made for item in b.items_P)
    assert targets == Counter({item: 2 * n for item, n in flat_items(sequences).items()})
    for batch in made:
        assert batch.parents_BM.shape[1] == 0
        assert (batch.ids_BK.flatten()[batch.sources_P + 1] == batch.targets_P).all()
        check_targets_spell_items(batch, vocabulary)


@given(shops(), st.integers(0, 3))
def test_with_orders_every_event_is_a_target_of_its_opening_and_most_inside(sequences, epoch):
    vocabulary, made = batches(sequences, orders=True, epoch=epoch)
    opening = Counter()
    inside = 0
    for batch in made:
        check_targets_spell_items(batch, vocabulary)
        first_level = batch.targets_P < vocabulary.level_start(1)
        sources = batch.ids_BK.flatten()[batch.sources_P[first_level]]
        opens = sources == vocabulary.order
        opening += Counter(batch.items_P[first_level][opens].tolist())
        inside += int((~opens).sum())
    assert opening == flat_items(sequences)
    num_windowed_orders = sum(int((b.ids_BK == vocabulary.order).sum()) for b in made)
    assert inside == sum(opening.values()) - num_windowed_orders


def check_targets_spell_items(batch, vocabulary):
    tokens = vocabulary.item_tokens(CODES)
    level = (batch.targets_P - vocabulary.first_code) // vocabulary.codebook_size
    assert (tokens[batch.items_P, level] == batch.targets_P).all()
    assert (np.bincount(level, minlength=2) == len(level) // 2).all()


@given(shops(), st.booleans())
def test_a_branch_hangs_off_the_opening_of_its_own_order(sequences, orders):
    vocabulary, made = batches(sequences, orders=orders, max_history=50)
    for batch in made:
        for row in range(len(batch.ids_BK)):
            trunk = batch.ids_BK[row, : batch.lengths_B[row]]
            starts = np.append(np.flatnonzero(trunk == vocabulary.order), len(trunk))
            branch = batch.ids_BK[row, batch.trunk_width :]
            for token, parent in zip(branch, batch.parents_BM[row], strict=True):
                if token == vocabulary.pad:
                    continue
                assert trunk[parent] == vocabulary.order
                end = starts[starts > parent][0]
                assert token in trunk[parent + 1 : end]


@given(shops(), st.booleans())
def test_last_trains_only_the_newest(sequences, orders):
    _, made = batches(sequences, orders=orders, train_targets="last", max_history=50)
    found = Counter()
    for batch in made:
        found += Counter(batch.items_P.tolist())
    expected = Counter()
    for s in sequences:
        last = s.items[s.baskets == s.baskets[-1]] if orders else s.items[-1:]
        expected += Counter(last.tolist())
    assert set(found) == set(expected)
    if not orders:
        assert found == Counter({item: 2 * n for item, n in expected.items()})


@given(shops())
def test_shuffling_stays_inside_an_order(sequences):
    vocabulary, made = batches(sequences, orders=True, max_history=50, batch_tokens=1)
    orders = Counter()
    for batch in made:
        for ids, length in zip(batch.ids_BK, batch.lengths_B, strict=True):
            row = ids[:length]
            for chunk in np.split(row, np.flatnonzero(row == vocabulary.order))[1:]:
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
    assert all((a.ids_BK == b.ids_BK).all() for a, b in zip(first, again, strict=True))
    assert any(
        a.ids_BK.shape != b.ids_BK.shape or (a.ids_BK != b.ids_BK).any()
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


@given(shops(), st.integers(0, 5))
def test_splitting_orders_only_adds_openings(sequences, epoch):
    """Items keep their order's neighbours; an order becomes at most two, and only if it has two items."""
    vocabulary = Vocabulary(num_levels=2, codebook_size=4, orders=True)
    made = epoch_batches(
        sequences, vocabulary.item_tokens(CODES), vocabulary=vocabulary, batch_tokens=64, train_targets="all",
        seed=5, epoch=epoch, split_orders=1.0,
    )  # fmt: skip
    openings = sum(int((b.ids_BK == vocabulary.order).sum()) for b in made)
    sizes = [n for s in sequences for n in np.unique(s.baskets, return_counts=True)[1]]
    assert openings == sum(1 if n == 1 else 2 for n in sizes)
    first_level = Counter()
    for b in made:
        codes = b.targets_P < vocabulary.level_start(1)
        opens = b.ids_BK.flatten()[b.sources_P] == vocabulary.order
        first_level += Counter(b.items_P[codes & opens].tolist())
    assert first_level == flat_items(sequences)
