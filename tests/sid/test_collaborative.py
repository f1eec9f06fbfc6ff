import math

import numpy as np
import pytest

from lasar.sid.collaborative import _cooccurrence, _positive_pmi, collaborative_vectors


def events(*users):
    """Users as lists of baskets of items -> arrays."""
    rows = [
        (u, b, item) for u, baskets in enumerate(users) for b, items in enumerate(baskets) for item in items
    ]
    return tuple(np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))


def brute_force(users, num_items, window):
    counts = np.zeros((num_items, num_items))
    for baskets in users:
        for a, first in enumerate(baskets):
            for b, second in enumerate(baskets):
                if abs(a - b) <= window:
                    for i in set(first):
                        for j in set(second):
                            counts[i, j] += (i != j) / max(abs(a - b), 1)
    return counts


@pytest.mark.parametrize("window", [0, 1, 3])
def test_counts_equal_a_loop_over_pairs(window):
    rng = np.random.default_rng(0)
    users = [
        [rng.integers(0, 6, rng.integers(1, 4)).tolist() for _ in range(rng.integers(1, 6))]
        for _ in range(12)
    ]
    counts = _cooccurrence(*events(*users), num_items=6, window=window)
    np.testing.assert_allclose(counts.toarray(), brute_force(users, 6, window), atol=1e-12)


def test_positive_pmi_by_hand():
    counts = _cooccurrence(*events([[0], [1]], [[0], [1]], [[0], [2]]), num_items=4, window=1)
    ppmi = _positive_pmi(counts).toarray()
    smoothed = np.array([3, 2, 1, 0]) ** 0.75
    smoothed /= smoothed.sum()
    assert ppmi[1, 0] == pytest.approx(math.log(1 / smoothed[0]))
    assert ppmi[0, 1] == pytest.approx(math.log(2 / 3 / smoothed[1]))
    assert ppmi[1, 2] == 0
    assert not ppmi[3].any()


def two_taste_groups():
    rng = np.random.default_rng(1)
    users = []
    for user in range(60):
        items = rng.permutation(5) + 5 * (user % 2)
        users.append([[int(item)] for item in items])
    return events(*users)


def test_planted_groups_are_near_in_vector_space():
    vectors = collaborative_vectors(*two_taste_groups(), num_items=11, width=2, window=3)
    assert vectors.dtype == np.float32
    unit = vectors[:10] / np.linalg.norm(vectors[:10], axis=1, keepdims=True)
    similar = unit @ unit.T
    same = np.arange(10)[:, None] // 5 == np.arange(10) // 5
    assert similar[same].min() > 0.9
    assert similar[~same].max() < 0.1
    assert not vectors[10].any()  # nobody took it


def test_inner_products_approximate_ppmi_and_order_of_events_of_users_does_not_matter():
    arrays = two_taste_groups()
    vectors = collaborative_vectors(*arrays, num_items=10, width=9, window=3)
    again = collaborative_vectors(*arrays, num_items=10, width=9, window=3)
    assert np.array_equal(vectors, again)
    ppmi = _positive_pmi(_cooccurrence(*arrays, num_items=10, window=3)).toarray()
    left, values, _ = np.linalg.svd(ppmi)
    np.testing.assert_allclose(vectors @ vectors.T, (left * np.append(values[:9], 0)) @ left.T, atol=1e-4)
    largest = np.abs(vectors).argmax(axis=0)
    assert (vectors[largest, np.arange(9)] >= 0).all()


@pytest.mark.parametrize("dense_size", [0, 500])
def test_sparse_and_dense_solvers_agree_and_repeat_themselves(monkeypatch, dense_size):
    """The sparse one exhausts an invariant subspace here, which is where ARPACK draws random numbers."""
    monkeypatch.setattr("lasar.sid.collaborative._DENSE_SIZE", dense_size)
    arrays = two_taste_groups()
    runs = [collaborative_vectors(*arrays, num_items=40, width=20, window=3) for _ in range(4)]
    assert all(np.array_equal(runs[0], vectors) for vectors in runs)
    ppmi = _positive_pmi(_cooccurrence(*arrays, num_items=40, window=3)).toarray()
    left, values, _ = np.linalg.svd(ppmi)
    np.testing.assert_allclose(runs[0] @ runs[0].T, (left * values) @ left.T, atol=1e-4)


@pytest.mark.parametrize(
    ("users", "num_items"),
    [([[[0]]], 1), ([[[0]], [[1]]], 2), ([[[0], [1]]], 2), ([[[0], [1], [2]]], 3)],
)
def test_tiny_catalogues(users, num_items):
    vectors = collaborative_vectors(*events(*users), num_items=num_items, width=8, window=2)
    assert vectors.shape == (num_items, 8)
    assert np.isfinite(vectors).all()


def test_no_events_at_all():
    empty = np.zeros(0, np.int32)
    assert not collaborative_vectors(empty, empty, empty, num_items=3, width=2, window=2).any()
