"""EASE and item-kNN against their definitions, computed another way."""

import numpy as np
import pytest

from lasar.baselines.ease import Ease
from lasar.baselines.item_knn import ItemKnn
from lasar.baselines.linear import taken_items
from lasar.data.interactions import TrainSequence

NUM_ITEMS = 9


@pytest.fixture
def shop():
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        items = rng.choice(
            NUM_ITEMS - 1, size=rng.integers(1, 7)
        )  # with repeats; the last item is never taken
        rows.append(TrainSequence(user, items.astype(np.int32), np.arange(len(items), dtype=np.int32)))
    return rows


def taken(shop):
    matrix = np.zeros((len(shop), NUM_ITEMS))
    for row, sequence in enumerate(shop):
        matrix[row, sequence.items] = 1
    return matrix


def test_a_repeated_item_counts_once(shop):
    np.testing.assert_array_equal(taken_items([s.items for s in shop], NUM_ITEMS).toarray(), taken(shop))
    assert taken_items([], NUM_ITEMS).shape == (0, NUM_ITEMS)


def test_ease_is_the_ridge_regression_of_every_item_on_the_others(shop):
    x, l2 = taken(shop), 3.0
    weights = Ease(l2=l2).fit(shop, NUM_ITEMS).weights_II
    for item in range(NUM_ITEMS):
        others = [other for other in range(NUM_ITEMS) if other != item]
        a = x[:, others]
        solved = np.linalg.solve(a.T @ a + l2 * np.eye(len(others)), a.T @ x[:, item])
        np.testing.assert_allclose(weights[others, item], solved, atol=1e-5)
        assert weights[item, item] == 0


def test_item_knn_is_the_shrunk_cosine_of_the_nearest(shop):
    x = taken(shop)
    users = x.sum(0)
    expected = x.T @ x / (np.sqrt(np.outer(users, users)) + 2.0)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(
        ItemKnn(neighbours=100, shrinkage=2.0).fit(shop, NUM_ITEMS).similar_II.toarray(), expected, atol=1e-6
    )
    nearest = ItemKnn(neighbours=2, shrinkage=2.0).fit(shop, NUM_ITEMS).similar_II.toarray()
    for item in range(NUM_ITEMS - 1):
        kept = np.flatnonzero(nearest[item])
        assert len(kept) == 2
        np.testing.assert_allclose(nearest[item, kept], expected[item, kept], atol=1e-6)
        assert sorted(expected[item, kept]) == pytest.approx(sorted(np.sort(expected[item])[-2:]))


@pytest.mark.parametrize("model", [Ease(l2=3.0), ItemKnn(shrinkage=2.0)], ids=["ease", "item_knn"])
def test_scores_are_summed_over_the_history(shop, model):
    model.fit(shop, NUM_ITEMS)
    weights = model.weights_II if isinstance(model, Ease) else model.similar_II.toarray()
    history = np.array([2, 5, 2], np.int32)
    items, scores = model.recommend([history], [history], NUM_ITEMS)
    summed = weights[2] + weights[5]
    np.testing.assert_allclose(scores[0], summed[items[0]], atol=1e-6)
    assert (np.diff(scores[0]) <= 0).all()
