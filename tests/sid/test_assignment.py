import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.errors import DataError
from lasar.sid.assignment import assign_items, assign_new_items
from lasar.sid.catalog import SidCatalog
from lasar.sid.kmeans import ResidualKMeans


def quantizer_of(centers_LCE):
    centers = np.array(centers_LCE, dtype=np.float32)
    quantizer = ResidualKMeans(num_levels=centers.shape[0], codebook_size=centers.shape[1])
    quantizer.restore({"centers": centers, "offsets": np.zeros(centers.shape[:2], np.float32)})
    return quantizer


def random_quantizer(rng, num_levels, codebook_size, width=3):
    scales = 0.4 ** np.arange(num_levels)[:, None, None]
    return quantizer_of(rng.normal(size=(num_levels, codebook_size, width)) * scales)


def vectors(*values):
    return np.array(values, dtype=np.float32)[:, None]


# Level 0: 0 or 10. Level 1: -1, 0, 1, 2.
LINE = [[[0.0], [10.0], [100.0], [200.0]], [[-1.0], [0.0], [1.0], [2.0]]]


def test_items_without_collision_keep_their_codes():
    result = assign_items(quantizer_of(LINE), vectors(0.1, 1.1, 9.2))
    assert result.codes_IL.tolist() == [[0, 1], [0, 2], [1, 0]]
    assert (result.colliding, result.moved) == (0, (0, 0))
    assert result.squared_error_after == result.squared_error_before


def test_best_fitting_item_stays_and_the_other_takes_the_nearest_free_code():
    # Both want (0, 1), center 0. 0.05 fits better; 0.3 moves to center 1.
    result = assign_items(quantizer_of(LINE), vectors(0.3, 0.05))
    assert result.codes_IL.tolist() == [[0, 2], [0, 1]]
    assert (result.colliding, result.moved) == (2, (0, 1))
    assert result.squared_error_before == pytest.approx((0.3**2 + 0.05**2) / 2, rel=1e-5)
    assert result.squared_error_after == pytest.approx((0.7**2 + 0.05**2) / 2, rel=1e-5)


def test_free_code_means_free_of_settled_items_too():
    # 1.0 sits on center 1, so 0.4 must pass over it: -1 (1.96) is nearer than 2 (2.56).
    result = assign_items(quantizer_of(LINE), vectors(0.4, 0.0, 1.0))
    assert result.codes_IL.tolist() == [[0, 0], [0, 1], [0, 2]]


def test_a_full_prefix_overflows_to_the_next_best_code_one_level_up():
    # Five items want prefix 0, which has four IDs; the one that loses least by moving to 10 goes.
    result = assign_items(quantizer_of(LINE), vectors(-1, 0, 1, 2, 4.0))
    assert result.codes_IL.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]
    assert result.moved == (1, 0)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 4), st.booleans(), st.data())
def test_always_unique_up_to_a_full_catalogue(seed, num_levels, codebook_size, extra_level, data):
    rng = np.random.default_rng(seed)
    quantizer = random_quantizer(rng, num_levels, codebook_size)
    capacity = codebook_size ** (num_levels + extra_level)
    num_items = data.draw(st.integers(1, capacity))
    # Few distinct vectors: many items are equal and collide on every level.
    embeddings = rng.normal(size=(3, 3)).astype(np.float32)[rng.integers(0, 3, num_items)]
    num_old = data.draw(st.integers(0, num_items))

    result = assign_items(quantizer, embeddings[:num_old], extra_level=extra_level)
    catalog = SidCatalog(result.codes_IL, codebook_size)  # refuses duplicates
    new = assign_new_items(quantizer, catalog, embeddings[num_old:])
    assert catalog.with_items(new).num_items == num_items


def test_moves_cost_no_more_than_twice_the_best_possible():
    # Greedy is not optimal; brute force over all assignments of one prefix says how far off it is.
    rng = np.random.default_rng(1)
    for _ in range(20):
        quantizer = random_quantizer(rng, 1, 5)
        embeddings = rng.normal(size=(5, 3)).astype(np.float32) * 0.5
        costs = quantizer.level_costs(embeddings, np.zeros((5, 0), int))
        best = min(costs[range(5), list(order)].mean() for order in itertools.permutations(range(5)))
        result = assign_items(quantizer, embeddings)
        assert best * 0.999 <= result.squared_error_after <= 2 * best


def test_extra_level_numbers_items_with_equal_codes():
    result = assign_items(quantizer_of(LINE), vectors(0.0, 10.1, 0.1, 0.2), extra_level=True)
    assert result.codes_IL.tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert (result.colliding, result.moved) == (3, (0, 0, 2))
    assert result.squared_error_after == result.squared_error_before


def test_too_many_items_is_an_error_that_says_what_to_raise():
    quantizer = random_quantizer(np.random.default_rng(0), 2, 3)
    with pytest.raises(DataError, match=r"10 items do not fit into 3 \*\* 2 = 9 .*raise codebook_size"):
        assign_items(quantizer, np.zeros((10, 3), np.float32))
    catalog = SidCatalog(assign_items(quantizer, np.zeros((9, 3), np.float32)).codes_IL, 3)
    with pytest.raises(DataError, match="10 items do not fit"):
        assign_new_items(quantizer, catalog, np.zeros((1, 3), np.float32))


def test_new_items_take_their_own_code_when_it_is_free_and_the_nearest_free_one_when_not():
    catalog = SidCatalog([[0, 1], [0, 2]], 4)
    new = assign_new_items(quantizer_of(LINE), catalog, vectors(-0.9, 0.1, 10.0))
    assert new.tolist() == [[0, 0], [0, 3], [1, 1]]


def test_new_items_and_a_catalogue_of_another_quantizer():
    with pytest.raises(DataError, match="different quantize artifacts"):
        assign_new_items(quantizer_of(LINE), SidCatalog([[0, 1]], 5), vectors(0.0))


def test_nine_levels_of_256_do_not_overflow():
    quantizer = random_quantizer(np.random.default_rng(0), 9, 256)
    result = assign_items(quantizer, np.zeros((3, 3), np.float32))
    assert result.moved == (0,) * 8 + (2,)
