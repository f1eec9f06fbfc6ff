import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lasar.sid.code_vectors import code_vectors


def test_sums_of_code_vectors_rebuild_additive_items():
    rng = np.random.default_rng(0)
    books = rng.normal(size=(2, 4, 6))
    codes = np.array([[a, b] for a in range(4) for b in range(4)], np.int32)
    items = (books[0][codes[:, 0]] + books[1][codes[:, 1]]).astype(np.float32)
    vectors = code_vectors(items, codes, codebook_size=4)
    rebuilt = items.mean(0) + vectors[0][codes[:, 0]] + vectors[1][codes[:, 1]]
    np.testing.assert_allclose(rebuilt, items, atol=1e-5)


@given(st.integers(0, 100))
def test_each_level_leaves_less(seed):
    rng = np.random.default_rng(seed)
    items = rng.normal(size=(30, 5)).astype(np.float32)
    codes = rng.integers(0, 4, size=(30, 3)).astype(np.int32)
    vectors = code_vectors(items, codes, codebook_size=6)
    residual = items - items.mean(0)
    for level in range(3):
        smaller = residual - vectors[level][codes[:, level]]
        assert (smaller**2).sum() <= (residual**2).sum() + 1e-4
        residual = smaller
    assert (vectors[:, 4:] == 0).all()
