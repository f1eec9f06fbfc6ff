"""Intervals and tests: against theory, against scipy, and that they can tell a difference from noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lasar.errors import DataError
from lasar.evaluation.significance import (
    aggregate_seeds,
    bootstrap_intervals,
    holm,
    paired_bootstrap,
    paired_by_user,
)


def test_interval_of_a_mean_is_close_to_the_normal_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = bootstrap_intervals({"x": values}, samples=4000, seed=1)["x"]
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        draws = (rng.random(150) < 0.3).astype(float)
        low, high = bootstrap_intervals({"x": draws}, samples=300, seed=trial)["x"]
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 199


def test_the_seed_decides_and_metrics_share_the_drawn_users():
    values = np.random.default_rng(0).random(50)
    first = bootstrap_intervals({"a": values, "b": 2 * values}, samples=50, seed=3)
    assert first == bootstrap_intervals({"a": values, "b": 2 * values}, samples=50, seed=3)
    assert first != bootstrap_intervals({"a": values, "b": 2 * values}, samples=50, seed=4)
    assert first["b"][0] == pytest.approx(2 * first["a"][0])


def test_paired_p_value_is_close_to_the_t_test():
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.15, 1.0, size=300), rng.normal(0.0, 1.0, size=300)
    result = paired_bootstrap(a, b, samples=5000, seed=0)
    assert result.difference == pytest.approx((a - b).mean())
    assert result.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert result.low < result.difference < result.high


def test_pairing_finds_what_user_difficulty_hides():
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 10, size=200)
    better = difficulty + 0.2 + rng.normal(0, 0.5, size=200)
    assert paired_bootstrap(better, difficulty, samples=999).p_value < 0.01
    assert stats.ttest_ind(better, difficulty).pvalue > 0.5


def test_equal_runs_do_not_differ_and_p_is_never_zero():
    values = np.random.default_rng(0).random(30)
    assert paired_bootstrap(values, values).p_value == 1.0
    assert paired_bootstrap(values + 5, values, samples=99).p_value == pytest.approx(0.01)


def test_p_values_are_uniform_when_nothing_differs():
    rng = np.random.default_rng(9)
    p = [paired_bootstrap(rng.random(60), rng.random(60), samples=199, seed=s).p_value for s in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_users_are_matched_by_id_not_by_place():
    a = {"u1": 1.0, "u2": 0.0, "u3": 0.5}
    b = {"u3": 0.5, "u2": 0.0, "u1": 1.0, "other": 9.0}
    result = paired_by_user(a, b)
    assert (result.difference, result.num_users) == (0.0, 3)
    with pytest.raises(DataError, match="share no user"):
        paired_by_user(a, {"x": 1.0})


def test_different_user_counts_and_no_users_are_refused():
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="0 users"):
        bootstrap_intervals({"x": np.ones(0)})


def test_holm_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_exactly_what_the_step_down_procedure_rejects(p_values):
    adjusted = holm(p_values)
    alpha = 0.05
    rejected = set()
    for step, index in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[index] * (len(p_values) - step) > alpha:
            break
        rejected.add(int(index))
    assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected
    assert (adjusted >= np.asarray(p_values)).all()


def test_seeds():
    result = aggregate_seeds([{"hr@10": 0.1}, {"hr@10": 0.3}, {"hr@10": 0.2}])["hr@10"]
    assert result == pytest.approx({"mean": 0.2, "sd": 0.1, "min": 0.1, "max": 0.3, "num_seeds": 3})
    assert aggregate_seeds([{"x": 0.5}])["x"]["sd"] == 0.0
    with pytest.raises(DataError, match="'x' is missing"):
        aggregate_seeds([{"x": 0.5}, {"y": 0.5}])
    with pytest.raises(DataError, match="no run"):
        aggregate_seeds([])
