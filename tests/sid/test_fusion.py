import numpy as np
import pytest

from lasar.sid.fusion import concatenate, normalise


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(50, 4)) * [1, 5, 0.1, 2] + 3).astype(np.float32)


def test_l2_gives_length_one_and_the_mean_where_nothing_is_known(vectors):
    known = np.arange(50) % 5 > 0
    vectors[~known] = np.nan
    result = normalise(vectors, known, how="l2")
    np.testing.assert_allclose(np.linalg.norm(result[known], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(result[0], result[known].mean(axis=0), atol=1e-6)


def test_whiten_evens_out_directions_and_centres(vectors):
    known = np.arange(50) % 5 > 0
    before = np.linalg.eigvalsh(np.cov(vectors[known].T))
    result = normalise(vectors, known, how="whiten")
    after = np.linalg.eigvalsh(np.cov(result[known].T))
    assert after[-1] / after[1] < 3 < before[-1] / before[1]
    np.testing.assert_allclose(result.mean(axis=0), 0, atol=1e-6)
    assert (result[known] ** 2).sum(axis=1).mean() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(result[~known], 0, atol=1e-6)


@pytest.mark.parametrize("how", ["l2", "whiten"])
def test_degenerate_vectors_stay_finite(how):
    same = np.ones((4, 3), np.float32)
    for vectors, known in ((same, np.ones(4, bool)), (same * 0, np.ones(4, bool)), (same, np.zeros(4, bool))):
        result = normalise(vectors, known, how=how)
        assert result.dtype == np.float32
        assert np.isfinite(result).all()


def test_weights_are_shares_of_squared_distance():
    a, b = np.eye(2, dtype=np.float32), 3 * np.eye(2, dtype=np.float32)
    joined = concatenate([(4.0, a), (0.5, b)])
    assert joined.shape == (2, 4)
    assert ((joined[0] - joined[1]) ** 2).sum() == pytest.approx(4 * 2 + 0.5 * 18)
