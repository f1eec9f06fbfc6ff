import numpy as np
import pytest

from lasar.decoding.ranked import Ranked
from lasar.evaluation import depth as module
from lasar.evaluation.depth import by_chosen_depth, compare_depths, seconds_by_depth

TARGETS = [np.array([q], np.int32) for q in range(8)]


def ranked(hits, k=10):
    """User q's own item first if it is a hit, else nowhere."""
    items = 100 + np.arange(len(hits) * k).reshape(len(hits), k)
    items[:, 0] = np.where(hits, np.arange(len(hits)), items[:, 0])
    return Ranked(items.astype(np.int32), np.zeros(items.shape, np.float32), np.zeros(len(hits), np.int32))


def test_users_by_the_depth_they_got():
    depths = np.array([2, 1, 2, 4, 2], np.int32)
    values = {"hr@10": np.array([1.0, 0, 0, 1, 1]), "mrr": np.array([0.5, 0, 0, 1, 0.25])}
    assert by_chosen_depth(depths, values, metrics=("hr@10", "mrr")) == [
        {"depth": 1, "num_users": 1, "hr@10": 0, "mrr": 0},
        {"depth": 2, "num_users": 3, "hr@10": pytest.approx(2 / 3), "mrr": 0.25},
        {"depth": 4, "num_users": 1, "hr@10": 1, "mrr": 1},
    ]


def test_other_depths_are_compared_with_the_first_on_the_same_users():
    hits = {
        "auto": [True, True, False, False, False, False, False, False],
        0: [True, False, False, False, False, False, False, False],
        3: [True, True, True, True, False, False, False, False],
    }
    asked = []

    def rank(depth):
        asked.append(depth)
        return ranked(np.array(hits[depth]))

    rows = compare_depths(rank, TARGETS, ["auto", 0, 3], metrics=["hr@10", "ndcg@5"], samples=500, seed=0)
    assert asked == ["auto", 0, 3]
    assert [(row["depth"], row["num_users"]) for row in rows] == [(0, 8), (3, 8)]
    assert [row["hr@10"] for row in rows] == [1 / 8, 4 / 8]
    assert [row["ndcg@5"] for row in rows] == [1 / 8, 4 / 8]
    assert [row["hr@10_minus_chosen"][0] for row in rows] == [-1 / 8, 2 / 8]
    for row, sign in zip(rows, (-1, 1), strict=True):
        difference, low, high = row["hr@10_minus_chosen"]
        assert low <= difference <= high
        assert low < high
        assert all(sign * end >= 0 for end in (low, high))  # all users move the same way


def test_a_depth_named_twice_is_ranked_once():
    asked = []

    def rank(depth):
        asked.append(depth)
        return ranked(np.zeros(8, bool))

    assert compare_depths(rank, TARGETS, [2, 2, 0, 2], metrics=["hr@5"], samples=5, seed=0)[0]["depth"] == 0
    assert asked == [2, 0]
    assert compare_depths(rank, TARGETS, ["auto"], metrics=["hr@5"], samples=5, seed=0) == []


def test_seconds_are_medians_after_a_round_to_warm_up(monkeypatch):
    clock, cost, asked = [0.0], {"auto": [90, 1, 2, 60], 0: [90, 5, 3, 4]}, []

    def rank(depth):
        asked.append(depth)
        clock[0] += cost[depth][(len(asked) - 1) // 2]

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    assert seconds_by_depth(rank, ["auto", 0], repeats=3) == {"auto": 2, "0": 4}
    assert asked == ["auto", 0] * 4  # in turn, so that a slow minute does not hit one of them only
