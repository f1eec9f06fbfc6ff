import numpy as np
import pytest
from sklearn.cluster import KMeans

from lasar.errors import DataError
from lasar.sid.kmeans import ResidualKMeans, balance, fit_kmeans, sinkhorn_offsets, squared_distances
from lasar.sid.quality import entropy_bits


@pytest.fixture(scope="module")
def clustered():
    """Vectors = one of 6 far centers + one of 5 near shifts + small noise, and which."""
    rng = np.random.default_rng(0)
    coarse, fine = rng.normal(size=(6, 8)) * 10, rng.normal(size=(5, 8))
    first, second = np.repeat(np.arange(6), 50), np.tile(np.arange(5), 60)
    noise = rng.normal(size=(300, 8)) * 0.01
    return (coarse[first] + fine[second] + noise).astype(np.float32), first, second


def same_partition(a, b):
    return len({*zip(a.tolist(), b.tolist(), strict=True)}) == len({*a.tolist()}) == len({*b.tolist()})


def test_planted_levels_are_recovered(clustered):
    x, first, second = clustered
    quantizer = ResidualKMeans(num_levels=2, codebook_size=6, num_iterations=50)
    best = None
    for seed in range(5):
        quantizer = ResidualKMeans(num_levels=2, codebook_size=6, seed=seed, num_iterations=50)
        quantizer.fit(x)
        codes = quantizer.encode(x)
        error = float(((x - quantizer.decode(codes)) ** 2).mean())
        best = min(best or (error, codes), (error, codes), key=lambda pair: pair[0])
    assert best[0] < 0.01
    assert same_partition(best[1][:, 0], first)
    joint = best[1][:, 0] * 10 + best[1][:, 1]
    assert len(np.unique(joint)) == 30 or len(np.unique(joint)) == 36
    for code in np.unique(joint):
        assert len(np.unique(second[joint == code])) == 1


def test_error_is_that_of_an_independent_k_means():
    x = np.random.default_rng(1).normal(size=(400, 6)).astype(np.float32)
    ours = squared_distances(x, fit_kmeans(x, 16, seed=0, num_iterations=50)).min(axis=1).sum()
    theirs = KMeans(16, n_init=1, random_state=0).fit(x).inertia_
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("balanced", [False, True])
def test_encode_takes_the_least_cost_and_decode_adds_centers(balanced):
    x = np.random.default_rng(2).normal(size=(200, 5)).astype(np.float32)
    quantizer = ResidualKMeans(num_levels=3, codebook_size=8, balanced=balanced)
    quantizer.fit(x)
    codes = quantizer.encode(x)
    assert codes.dtype == np.int32
    for row, vector in zip(codes, x, strict=True):
        residual = vector.astype(np.float64)
        for level, code in enumerate(row):
            costs = ((residual - quantizer.centers_LCE[level]) ** 2).sum(axis=1) + quantizer.offsets_LC[level]
            assert costs[code] <= costs.min() + 1e-5
            residual = residual - quantizer.centers_LCE[level, code]
    expected = sum(quantizer.centers_LCE[level][codes[:, level]] for level in range(3))
    np.testing.assert_allclose(quantizer.decode(codes), expected, atol=1e-6)


def test_every_level_lowers_the_error():
    x = np.random.default_rng(3).normal(size=(300, 5)).astype(np.float32)
    quantizer = ResidualKMeans(num_levels=4, codebook_size=8)
    quantizer.fit(x)
    codes = quantizer.encode(x)
    errors = [((x - quantizer.decode(codes[:, :level])) ** 2).sum() for level in range(5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[4] < 0.5 * errors[1]


def test_balanced_fills_codes_evenly_where_plain_does_not():
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(1024, 4)) ** 3).astype(np.float32)  # most near the middle, a few far out
    bits = {}
    for balanced in (False, True):
        quantizer = ResidualKMeans(num_levels=2, codebook_size=16, balanced=balanced)
        quantizer.fit(x)
        bits[balanced] = [entropy_bits(column[:, None]) for column in quantizer.encode(x).T]
    assert min(bits[True]) > 3.8  # of 4
    assert bits[True][0] > bits[False][0] + 0.5


def test_sinkhorn_offsets_solve_a_transport_with_a_known_answer():
    # Nine items nearer to code 0, three to code 1; each must get six: the three cheapest movers go.
    costs = np.array([[0, 1 + 0.1 * n] for n in range(9)] + [[5, 0]] * 3, dtype=np.float32)
    offsets = sinkhorn_offsets(costs, np.zeros(2, np.float32), sharpness=40, num_iterations=300)
    assert (costs + offsets).argmin(axis=1).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert offsets.mean() == pytest.approx(0, abs=1e-6)


def test_balance_uses_a_seeded_sample_of_many_vectors(monkeypatch):
    monkeypatch.setattr("lasar.sid.kmeans._BALANCE_SAMPLE", 100)
    x = np.random.default_rng(5).normal(size=(300, 3)).astype(np.float32)
    results = [balance(x, x[:4], seed=seed)[0] for seed in (1, 1, 2)]
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])


@pytest.mark.parametrize("balanced", [False, True])
def test_one_seed_one_result_and_chunks_do_not_matter(monkeypatch, balanced):
    x = np.random.default_rng(6).normal(size=(120, 4)).astype(np.float32)
    states = []
    for seed in (0, 0, 1):
        quantizer = ResidualKMeans(num_levels=2, codebook_size=8, balanced=balanced, seed=seed)
        quantizer.fit(x)
        states.append(quantizer.centers_LCE)
    assert np.array_equal(states[0], states[1])
    assert not np.array_equal(states[0], states[2])
    whole = quantizer.encode(x)
    monkeypatch.setattr("lasar.sid.kmeans._CHUNK", 7)
    assert np.array_equal(quantizer.encode(x), whole)


@pytest.mark.parametrize("balanced", [False, True])
def test_fewer_distinct_items_than_codes(balanced):
    x = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)
    quantizer = ResidualKMeans(num_levels=2, codebook_size=8, balanced=balanced)
    quantizer.fit(x)
    np.testing.assert_allclose(quantizer.decode(quantizer.encode(x)), x, atol=1e-6)


def test_vectors_that_are_not_finite_are_refused():
    x = np.zeros((4, 2), np.float32)
    x[2, 1] = np.nan
    with pytest.raises(DataError, match="item 2 holds NaN"):
        ResidualKMeans(num_levels=1, codebook_size=2).fit(x)
    with pytest.raises(DataError, match="must be"):
        ResidualKMeans(num_levels=1, codebook_size=2).fit(x[0])
