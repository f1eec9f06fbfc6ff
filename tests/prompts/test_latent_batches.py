"""Every item is answered once, from the opening of its own basket, with that row's anchors and depth."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.interactions import TrainSequence
from lasar.prompts.batches import shuffle_orders, split_orders_in_two, windows
from lasar.prompts.latent_batches import LatentBatch, _answered_early, latent_batches
from lasar.prompts.vocabulary import Vocabulary

CODES = np.array([[i // 4, i % 4] for i in range(16)], np.int32)
DEEPEST, FALLBACK, KEY = 4, 2, 10  # a row's anchors are 1000 * user + KEY * basket + step


def num_steps(user, basket):
    return (3 * user + 2 * basket) % (DEEPEST + 1)


def steps(user, basket):
    return (1000 * user + KEY * basket + np.arange(num_steps(user, basket))).astype(np.int32)


def always(user, basket):
    return (1000 * user + KEY * basket + np.arange(1 + (user + basket) % DEEPEST)).astype(np.int32)


@st.composite
def shops(draw):
    sequences = []
    for user in range(draw(st.integers(1, 5))):
        items = draw(st.lists(st.integers(0, 15), min_size=1, max_size=25))
        opens = draw(st.lists(st.integers(0, 1), min_size=len(items), max_size=len(items)))
        baskets = np.cumsum([0, *opens[1:]])
        sequences.append(TrainSequence(user, np.array(items, np.int32), baskets.astype(np.int32)))
    return sequences


def without_orders(sequences):
    return [TrainSequence(s.user_index, s.items, np.arange(len(s.items), dtype=np.int32)) for s in sequences]


def made(sequences, *, orders=False, max_history=50, steps=always, **options):
    vocabulary = Vocabulary(num_levels=2, codebook_size=4, orders=orders, max_history=max_history)
    defaults = {
        "max_depth": DEEPEST, "depth": None, "fallback_depth": FALLBACK, "batch_tokens": 90,
        "train_targets": "all", "seed": 5, "epoch": 0,
    }  # fmt: skip
    return vocabulary, latent_batches(
        sequences,
        vocabulary.item_tokens(CODES),
        vocabulary=vocabulary,
        steps=steps,
        **{**defaults, **options},
    )


@dataclasses.dataclass
class Branch:
    prompt: list
    depth: int
    anchors: list
    supervised: bool
    items: list

    @property
    def row(self):
        """User and basket, as the first anchor names them."""
        return divmod(self.anchors[0], 1000)[0], self.anchors[0] % 1000 // KEY


def branches(batches):
    for batch in batches:
        for b, count in enumerate((batch.weights_BP > 0).sum(1)):
            for p in range(count):
                answers = (batch.branch_BA[b] == p) & (batch.items_BA[b] >= 0)
                anchors = batch.anchors_BPN[b, p]
                yield Branch(
                    prompt=batch.ids_BT[b, : batch.openings_BP[b, p] + 1].tolist(),
                    depth=int(batch.depths_BP[b, p]),
                    anchors=anchors[anchors >= 0].tolist(),
                    supervised=bool(batch.supervised_BP[b, p]),
                    items=batch.items_BA[b, answers].tolist(),
                )


def answered(batches):
    return Counter((*branch.row, item) for branch in branches(batches) for item in branch.items)


def events(sequences):
    return Counter(
        (s.user_index, basket, item)
        for s in sequences
        for basket, item in zip(s.baskets.tolist(), s.items.tolist(), strict=True)
    )


@given(shops(), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 3))
def test_every_item_is_answered_exactly_once_an_epoch(sequences, orders, split, epoch):
    sequences = sequences if orders else without_orders(sequences)
    _, batches = made(sequences, orders=orders, split_orders=split, epoch=epoch)
    assert answered(batches) == events(sequences)
    assert sum(batch.num_targets for batch in batches) == events(sequences).total()


@given(shops(), st.integers(1, 6), st.integers(0, 3))
def test_only_the_first_answer_of_a_later_window_is_left_out(sequences, width, epoch):
    sequences = without_orders(sequences)
    _, batches = made(sequences, max_history=width, epoch=epoch)
    left_out = events(sequences) - answered(batches)
    assert not answered(batches) - events(sequences)
    for s in sequences:
        places, count = sorted(basket for user, basket, _ in left_out if user == s.user_index), len(s.items)
        if count <= width:
            assert places == []
        else:
            assert 1 <= places[0] <= width
            assert places == list(range(places[0], count, width))


@given(shops(), st.integers(2, 6))
def test_of_a_later_window_only_one_order_is_left_out(sequences, width):
    _, batches = made(sequences, orders=True, max_history=width)
    left_out = events(sequences) - answered(batches)
    assert not answered(batches) - events(sequences)
    for s in sequences:
        baskets = {basket for user, basket, _ in left_out if user == s.user_index}
        later = math.ceil((len(s.items) - 1) / width) if len(s.items) > width else 0
        assert len(baskets) <= later


@given(shops(), st.booleans(), st.integers(1, 30))
def test_last_answers_only_the_newest_basket(sequences, orders, width):
    sequences = sequences if orders else without_orders(sequences)
    _, batches = made(sequences, orders=orders, max_history=width, train_targets="last")
    expected = Counter()
    for s in sequences:
        newest = s.items[s.baskets == s.baskets[-1]]
        if len(newest) < width or len(s.items) <= width:  # else nothing is left of what came before
            expected += Counter((s.user_index, int(s.baskets[-1]), int(item)) for item in newest)
    assert answered(batches) == expected


@given(shops(), st.booleans())
def test_a_branch_leaves_from_where_its_basket_opens(sequences, orders):
    """What it has seen is the rendering of all earlier baskets; items of a basket have no order."""
    sequences = sequences if orders else without_orders(sequences)
    vocabulary, batches = made(sequences, orders=orders)
    tokens = vocabulary.item_tokens(CODES)
    for branch in branches(batches):
        user, basket = branch.row
        before = sequences[user].baskets < basket
        expected = vocabulary.render_history(
            tokens, sequences[user].items[before], sequences[user].baskets[before], open_order=True
        ).tolist()
        assert len(branch.prompt) == len(expected)
        if orders:
            markers = [t for t in range(len(expected)) if expected[t] == vocabulary.order]
            assert markers == [t for t in range(len(expected)) if branch.prompt[t] == vocabulary.order]
            for a, b in zip(markers, [*markers[1:], len(expected)], strict=True):
                assert Counter(branch.prompt[a:b]) == Counter(expected[a:b])
        else:
            assert branch.prompt == expected


@given(shops(), st.booleans(), st.integers(0, 3))
def test_a_split_order_is_two_branches_of_one_row(sequences, orders, epoch):
    sequences = sequences if orders else without_orders(sequences)
    _, batches = made(sequences, orders=orders, split_orders=1.0, epoch=epoch)
    found = Counter(branch.row for branch in branches(batches))
    for s in sequences:
        for basket, size in zip(*np.unique(s.baskets, return_counts=True), strict=True):
            assert found[s.user_index, int(basket)] == (2 if size > 1 else 1)


@given(shops(), st.sampled_from([None, 0, 1, 3, DEEPEST]), st.booleans())
def test_depth_and_anchors_are_those_of_the_row(sequences, depth, orders):
    sequences = sequences if orders else without_orders(sequences)
    _, batches = made(sequences, orders=orders, depth=depth, steps=steps)
    found = list(branches(batches))
    rows = Counter(num_steps(s.user_index, int(b)) for s in sequences for b in np.unique(s.baskets))
    assert sum(not branch.supervised for branch in found) == rows[0]
    for branch in found:
        if not branch.supervised:
            assert branch.anchors == []
            assert branch.depth == (FALLBACK if depth is None else depth)
            continue
        if depth == 0:
            assert branch.anchors == []
            continue
        own = steps(*branch.row).tolist()
        assert branch.depth == (len(own) if depth is None else depth)
        assert branch.anchors == own[: branch.depth]  # a step past the rationale's end has none


@given(shops(), st.booleans())
def test_branches_lie_deepest_first_and_padding_is_empty(sequences, orders):
    sequences = sequences if orders else without_orders(sequences)
    _, batches = made(sequences, orders=orders, steps=steps, fallback_depth=0)
    for batch in batches:
        real = batch.weights_BP > 0
        assert (np.diff(batch.depths_BP, axis=1) <= 0).all()
        assert (real[:, :-1] >= real[:, 1:]).all()
        assert (batch.openings_BP < batch.lengths_B[:, None]).all()
        for name in ("depths_BP", "openings_BP", "supervised_BP"):
            assert not getattr(batch, name)[~real].any()
        assert (batch.anchors_BPN[~real] == -1).all()
        assert batch.widths == [
            max(sum(depth > step for depth in row) for row in batch.depths_BP.tolist())
            for step in range(int(batch.depths_BP.max()))
        ]
        counted = np.zeros_like(batch.weights_BP)
        real_answers = batch.items_BA >= 0
        np.add.at(counted, (np.nonzero(real_answers)[0], batch.branch_BA[real_answers]), 1)
        assert (counted == batch.weights_BP).all()


@given(shops(), st.booleans())
def test_answers_spell_their_items_and_the_trunk_ends_at_the_last_opening(sequences, orders):
    sequences = sequences if orders else without_orders(sequences)
    vocabulary, batches = made(sequences, orders=orders)
    for batch in batches:
        real = batch.items_BA >= 0
        assert (batch.answers_BAL[real] == vocabulary.item_tokens(CODES)[batch.items_BA[real]]).all()
        assert (batch.openings_BP.max(1) == batch.lengths_B - 1).all()
        assert (batch.ids_BT[np.arange(len(batch.ids_BT)), batch.lengths_B - 1] != vocabulary.pad).all()


def same(a: LatentBatch, b: LatentBatch) -> bool:
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)
    )


@given(shops(), st.booleans(), st.integers(0, 3))
def test_batches_are_a_function_of_seed_and_epoch(sequences, orders, epoch):
    options = {"orders": orders, "max_history": 5, "epoch": epoch, "split_orders": 0.5, "steps": steps}
    sequences = sequences if orders else without_orders(sequences)
    _, first = made(sequences, **options)
    np.random.seed(epoch)  # the global state must not matter
    _, again = made(sequences, **options)
    assert len(first) == len(again)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("other", [{"epoch": 1}, {"seed": 6}])
def test_epochs_and_seeds_differ(other):
    sequences = [TrainSequence(0, np.arange(16, dtype=np.int32), np.zeros(16, np.int32))]
    _, (first,) = made(sequences, orders=True, batch_tokens=10_000)
    _, (second,) = made(sequences, orders=True, batch_tokens=10_000, **other)
    assert not same(first, second)


def test_depths_mix_in_one_batch():
    sequences = without_orders([TrainSequence(u, np.arange(6, dtype=np.int32), None) for u in range(4)])
    _, (batch,) = made(sequences, steps=steps, fallback_depth=0, batch_tokens=10_000)
    assert set(batch.depths_BP[batch.weights_BP > 0].tolist()) == {0, 1, 2, 3, 4}
    assert batch.widths == sorted(batch.widths, reverse=True)


def test_the_share_of_answers_that_come_early():
    depths = np.repeat([0, 1, 4], 4000)
    rng = np.random.default_rng(0)
    found = _answered_early(depths, 0.5, rng)
    assert (found[:4000] == 0).all()
    assert (found[4000:8000] == 1).all()
    shares = np.bincount(found[8000:], minlength=5) / 4000
    np.testing.assert_allclose(shares, [0, 0.125, 0.125, 0.125, 0.625], atol=0.03)


def test_nobody_with_an_answer_gives_no_batch():
    order = TrainSequence(0, np.arange(4, dtype=np.int32), np.zeros(4, np.int32))
    assert made([], orders=True)[1] == []
    assert made([order], orders=True, max_history=3, train_targets="last")[1] == []


def size_of(batch):
    """Tokens of one row that the model computes: trunk, `<s>`, slots, `<e>`, and codes but the last."""
    answers, levels = batch.answers_BAL.shape[1:]
    return batch.ids_BT.shape[1] + 2 * batch.weights_BP.shape[1] + sum(batch.widths) + answers * (levels - 1)


@given(shops(), st.integers(30, 200), st.booleans())
def test_a_batch_keeps_its_budget(sequences, budget, orders):
    sequences = sequences if orders else without_orders(sequences)
    _, batches = made(sequences, orders=orders, steps=steps, batch_tokens=budget)
    for batch in batches:
        assert len(batch.ids_BT) == 1 or len(batch.ids_BT) * size_of(batch) <= budget


@given(shops(), st.integers(1, 30), st.integers(0, 99))
def test_windows_are_a_partition_into_pieces_of_at_most_the_width(sequences, width, seed):
    for s in sequences:
        pieces = windows(s, width, "all", np.random.default_rng(seed))
        assert np.concatenate([items for items, _ in pieces]).tolist() == s.items.tolist()
        assert np.concatenate([baskets for _, baskets in pieces]).tolist() == s.baskets.tolist()
        assert all(1 <= len(items) <= width for items, _ in pieces)
        assert len(pieces) == 1 or all(len(items) == width for items, _ in pieces[1:-1])
        ((items, baskets),) = windows(s, width, "last", np.random.default_rng(seed))
        assert items.tolist() == s.items.tolist()[-width:]
        assert baskets.tolist() == s.baskets.tolist()[-width:]


def test_every_place_of_a_long_history_is_a_cut_sometimes():
    s = TrainSequence(0, np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32))
    first = {len(windows(s, 4, "all", np.random.default_rng(seed))[0][0]) for seed in range(60)}
    assert first == {1, 2, 3, 4}


@given(shops(), st.integers(0, 99))
def test_shuffling_keeps_every_order_s_items(sequences, seed):
    for s in sequences:
        shuffled = shuffle_orders(s.items, s.baskets, np.random.default_rng(seed))
        for basket in np.unique(s.baskets):
            assert sorted(shuffled[s.baskets == basket]) == sorted(s.items[s.baskets == basket])


@given(shops(), st.floats(0, 1), st.integers(0, 99))
def test_splitting_refines_orders(sequences, share, seed):
    for s in sequences:
        split = split_orders_in_two(s.baskets, share, np.random.default_rng(seed))
        assert set(np.diff(split).tolist()) <= {0, 1}
        assert (np.diff(split)[np.diff(s.baskets) > 0] == 1).all()  # no order grows
        for basket, size in zip(*np.unique(s.baskets, return_counts=True), strict=True):
            parts = len(np.unique(split[s.baskets == basket]))
            assert parts == 1 if size == 1 or share == 0 else parts <= 2
            assert parts == 2 or size == 1 or share < 1


def test_the_share_of_orders_split_and_where():
    baskets = np.repeat(np.arange(4000), 3).astype(np.int32)
    split = split_orders_in_two(baskets, 0.3, np.random.default_rng(0)).reshape(-1, 3)
    cut_1, cut_2 = (np.diff(split, axis=1) == 1).mean(0)
    assert cut_1 + cut_2 == pytest.approx(0.3, abs=0.03)
    assert cut_1 == pytest.approx(cut_2, abs=0.03)
