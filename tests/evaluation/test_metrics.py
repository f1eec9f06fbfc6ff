"""Metrics against an independent library, against brute force, and by their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from lasar.evaluation.metrics import (
    CUTOFFS,
    coverage,
    first_hit_rank,
    gini,
    hit_matrix,
    mean_metrics,
    user_metrics,
)

K = 20


@st.composite
def cases(draw):
    """Ranked lists (some too short) and targets over a small catalogue, so that hits are common."""
    num_items = draw(st.integers(21, 40))
    num_queries = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items_QK = np.full((num_queries, K), -1, dtype=np.int32)
    targets = []
    for query in range(num_queries):
        length = int(rng.integers(0, K + 1))
        items_QK[query, :length] = rng.permutation(num_items)[:length]
        targets.append(
            rng.permutation(num_items)[: rng.integers(1, 26 if num_items > 26 else 5)].astype(np.int32)
        )
    return num_items, items_QK, targets


def brute_force(ranked, target, k):
    top = [item for item in ranked[:k].tolist() if item >= 0]
    wanted = set(target.tolist())
    gain = sum(1 / math.log2(place + 2) for place, item in enumerate(top) if item in wanted)
    ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(wanted))))
    return {
        f"hr@{k}": float(bool(wanted & set(top))),
        f"recall@{k}": len(wanted & set(top)) / len(wanted),
        f"ndcg@{k}": gain / ideal,
    }


@settings(max_examples=60, deadline=None)
@given(cases())
def test_user_metrics_equal_brute_force(case):
    _, items_QK, targets = case
    metrics = user_metrics(items_QK, targets)
    for query, target in enumerate(targets):
        for k in CUTOFFS:
            for name, value in brute_force(items_QK[query], target, k).items():
                assert metrics[name][query] == pytest.approx(value, abs=1e-12)
        places = [place for place, item in enumerate(items_QK[query].tolist()) if item in target.tolist()]
        assert metrics["mrr"][query] == pytest.approx(1 / (places[0] + 1) if places else 0.0)


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(CUTOFFS))
def test_ndcg_equals_scikit_learn(case, k):
    num_items, items_QK, targets = case
    ndcg = user_metrics(items_QK, targets)[f"ndcg@{k}"]
    for query, target in enumerate(targets):
        # Dummy documents, relevant to nothing, stand between the list and the items that were not returned.
        relevance = np.zeros(num_items + K)
        relevance[target] = 1.0
        scores = np.zeros(num_items + K)
        scores[:num_items] = -1.0 - np.arange(num_items)
        scores[num_items:] = 1.0 - np.arange(K) / (2 * K)
        returned = items_QK[query][items_QK[query] >= 0]
        scores[returned] = 100.0 - np.arange(len(returned))
        assert ndcg[query] == pytest.approx(ndcg_score([relevance], [scores], k=k), abs=1e-12)


# Slow: ranx compiles itself for a minute and a half. numba, which it uses, warns about a cast inside ranx.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unsafe cast from uint64 to int64")
def test_all_metrics_equal_ranx():
    ranx = pytest.importorskip("ranx")
    rng = np.random.default_rng(7)
    items_QK = np.stack([rng.permutation(60)[:K] for _ in range(50)]).astype(np.int32)
    targets = [rng.permutation(60)[: rng.integers(1, 30)].astype(np.int32) for _ in range(50)]
    qrels = ranx.Qrels({f"q{q:02}": {f"i{item}": 1 for item in target} for q, target in enumerate(targets)})
    run = ranx.Run(
        {f"q{q:02}": {f"i{item}": float(K - p) for p, item in enumerate(r)} for q, r in enumerate(items_QK)}
    )
    names = {"hr": "hit_rate", "recall": "recall", "ndcg": "ndcg"}
    theirs = {f"{ours}@{k}": f"{name}@{k}" for k in CUTOFFS for ours, name in names.items()}
    theirs["mrr"] = f"mrr@{K}"
    expected = ranx.evaluate(qrels, run, list(theirs.values()))
    for ours, value in mean_metrics(user_metrics(items_QK, targets)).items():
        assert value == pytest.approx(expected[theirs[ours]], abs=1e-9), ours


def test_known_values():
    items_QK = np.array([[3, 1, 2, -1, -1], [9, 8, 7, 6, 5]], dtype=np.int32)
    targets = [np.array([1], dtype=np.int32), np.array([4], dtype=np.int32)]
    metrics = user_metrics(items_QK, targets, cutoffs=(1, 5))
    assert metrics["hr@1"].tolist() == [0, 0]
    assert metrics["hr@5"].tolist() == [1, 0]
    assert metrics["ndcg@5"][0] == pytest.approx(1 / math.log2(3))
    assert metrics["mrr"].tolist() == [0.5, 0.0]
    assert first_hit_rank(hit_matrix(items_QK, targets)).tolist() == [2, 0]


def test_padding_is_never_a_hit_and_no_query_is_fine():
    padded = np.full((2, 5), -1, dtype=np.int32)
    assert not hit_matrix(padded, [np.array([0], dtype=np.int32)] * 2).any()
    assert hit_matrix(np.zeros((0, 5), dtype=np.int32), []).shape == (0, 5)


@pytest.mark.parametrize(
    ("items", "targets", "message"),
    [
        ([[1, 1, 2, 3, 4]], [[1]], "repeats an item"),
        ([[1, 2, 3, 4, 5]], [[1, 1]], "repeats a target"),
        ([[1, 2, 3, 4, 5]], [[]], "no target"),
        ([[1, 2, 3, 4, 5]], [[1], [2]], "2 target lists"),
    ],
)
def test_what_would_inflate_a_metric_is_refused(items, targets, message):
    with pytest.raises(ValueError, match=message):
        user_metrics(
            np.array(items, dtype=np.int32), [np.array(t, dtype=np.int32) for t in targets], cutoffs=(5,)
        )


def test_a_cutoff_beyond_the_list_is_refused():
    with pytest.raises(ValueError, match="cutoff 20 exceeds the 5"):
        user_metrics(np.zeros((1, 5), dtype=np.int32), [np.array([0], dtype=np.int32)])


def test_coverage_counts_distinct_items_of_the_top_k():
    items_QK = np.array([[0, 1, 5], [0, 2, -1]], dtype=np.int32)
    assert coverage(items_QK, k=2, num_items=10) == pytest.approx(0.3)
    assert coverage(items_QK, k=3, num_items=10) == pytest.approx(0.4)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_gini_equals_mean_absolute_difference(shown):
    counts = np.bincount(shown, minlength=10)
    expected = np.abs(counts[:, None] - counts[None]).sum() / (2 * 10 * counts.sum())
    assert gini(np.array(shown, dtype=np.int32)[:, None], k=1, num_items=10) == pytest.approx(expected)


def test_gini_of_equal_and_of_concentrated_exposure():
    assert gini(np.arange(10, dtype=np.int32)[:, None], k=1, num_items=10) == pytest.approx(0.0)
    assert gini(np.zeros((9, 1), dtype=np.int32), k=1, num_items=10) == pytest.approx(0.9)
    assert gini(np.full((3, 2), -1, dtype=np.int32), k=2, num_items=10) == 0.0
