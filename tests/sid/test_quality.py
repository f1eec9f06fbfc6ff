import itertools

import numpy as np
import pytest

from lasar.sid.quality import code_quality, collision_rate, entropy_bits, nearest_items, relative_error


def test_a_full_code_space_has_full_information_everywhere():
    codes = np.array(list(itertools.product(range(4), repeat=3)))
    quality = code_quality(
        codes, codebook_size=8, neighbours_QK=np.zeros((64, 1), int), queries_Q=np.arange(64)
    )
    assert quality["utilisation"] == [0.5, 0.5, 0.5]
    assert quality["entropy_bits"] == [2, 2, 2]
    assert quality["conditional_bits"] == [2, 2, 2]
    assert quality["prefix_sharing"] == [16 / 64, 4 / 64, 1 / 64]
    assert quality["collision_rate"] == 0


def test_a_level_that_repeats_the_one_before_adds_nothing():
    codes = np.repeat(np.arange(8), 2)[:, None].repeat(2, axis=1)
    quality = code_quality(codes, codebook_size=8, neighbours_QK=np.array([[1, 2]]), queries_Q=np.array([0]))
    assert quality["entropy_bits"] == [3, 3]
    assert quality["conditional_bits"] == [3, 0]
    assert quality["prefix_sharing"] == [0.5, 0.5]
    assert quality["collision_rate"] == 1


def test_entropy_and_collisions_of_uneven_codes():
    codes = np.array([[0], [0], [0], [1]])
    assert entropy_bits(codes) == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))
    assert collision_rate(codes) == 0.75


def test_nearest_items_equal_brute_force_and_leave_the_item_out(monkeypatch):
    monkeypatch.setattr("lasar.sid.quality._QUERY_CHUNK", 7)
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    neighbours, queries = nearest_items(x, num_neighbours=5, seed=0)
    assert queries.tolist() == list(range(40))
    for item in range(40):
        order = sorted(set(range(40)) - {item}, key=lambda other: float(((x[item] - x[other]) ** 2).sum()))
        assert neighbours[item].tolist() == order[:5]
    monkeypatch.setattr("lasar.sid.quality._MAX_QUERIES", 10)
    sampled, queries = nearest_items(x, num_neighbours=5, seed=0)
    assert len(queries) == 10
    assert np.array_equal(sampled, neighbours[queries])
    assert nearest_items(x[:1], num_neighbours=5, seed=0)[0].shape == (1, 0)


def test_relative_error_is_one_for_the_mean():
    x = np.random.default_rng(0).normal(size=(30, 3)).astype(np.float32) + 7
    error_of_mean = float(((x - x.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert relative_error(error_of_mean, x) == pytest.approx(1, abs=1e-4)
    assert relative_error(0.0, x[:1]) == 0
