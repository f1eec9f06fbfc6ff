"""Ranking metrics per user: HR, Recall, NDCG, MRR, and coverage and Gini of what is shown.

Everything compares item *indices*, never semantic IDs: two items can never be confused. Lists are the top K
of the full catalogue (no sampled negatives), `-1` where a ranker returned fewer than K items.

Shapes: Q queries (users), K rank positions, I items.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

CUTOFFS = (5, 10, 20)

Items = NDArray[np.int32]
Values = NDArray[np.float64]


def hit_matrix(items_QK: Items, targets: Sequence[Items]) -> NDArray[np.bool_]:
    """Mark which ranked items are targets of their query, bool `[Q, K]`.

    Args:
        items_QK: ranked item indices, best first, -1 where there is no item.
        targets: per query, its distinct true items; at least one each.

    Raises:
        ValueError: the counts differ, a query has no target, or a list or target set repeats an item.
    """
    num_queries = len(targets)
    if items_QK.ndim != 2 or items_QK.shape[0] != num_queries:
        raise ValueError(f"{items_QK.shape} ranked items for {num_queries} target lists")
    lengths = np.array([len(target) for target in targets], dtype=np.int64)
    if num_queries == 0:
        return np.zeros(items_QK.shape, dtype=bool)
    if lengths.min() == 0:
        raise ValueError(f"query {int(lengths.argmin())} has no target")
    flat = np.concatenate([np.asarray(target, dtype=np.int64) for target in targets])
    width = int(max(flat.max(), items_QK.max(initial=0))) + 1
    # One number per (query, item) pair turns the whole comparison into one sorted lookup.
    target_keys = np.sort(np.repeat(np.arange(num_queries), lengths) * width + flat)
    if (np.diff(target_keys) == 0).any():
        raise ValueError("a query repeats a target")
    _refuse_repeats(items_QK)
    ranked_keys = np.arange(num_queries)[:, None] * width + items_QK
    position = np.searchsorted(target_keys, ranked_keys).clip(max=len(target_keys) - 1)
    hits_QK: NDArray[np.bool_] = (target_keys[position] == ranked_keys) & (items_QK >= 0)
    return hits_QK


def first_hit_rank(hits_QK: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Rank (from 1) of the first hit of each query, 0 where there is none, int32 `[Q]`."""
    return np.where(hits_QK.any(axis=1), hits_QK.argmax(axis=1) + 1, 0).astype(np.int32)


def user_metrics(
    items_QK: Items, targets: Sequence[Items], *, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, Values]:
    """Metrics of every query, each float64 `[Q]`.

    `hr@k`: 1 if any target is in the top k. `recall@k`: share of the targets in the top k. `ndcg@k`: binary
    relevance, the ideal list holds min(k, number of targets) targets. `mrr`: 1 / rank of the first hit within
    K, else 0.

    Args:
        items_QK: ranked item indices, best first, -1 where there is no item.
        targets: per query, its distinct true items; at least one each.
        cutoffs: the values of k.

    Raises:
        ValueError: a cutoff exceeds K (a shorter list says nothing about it), or see `hit_matrix`.
    """
    if max(cutoffs) > items_QK.shape[1]:
        raise ValueError(f"cutoff {max(cutoffs)} exceeds the {items_QK.shape[1]} ranked items")
    hits_QK = hit_matrix(items_QK, targets)
    num_targets = np.array([len(target) for target in targets], dtype=np.int64)
    discount_K = 1.0 / np.log2(np.arange(2, items_QK.shape[1] + 2))
    gain_QK = np.cumsum(hits_QK * discount_K, axis=1)
    ideal_K = np.cumsum(discount_K)
    found_QK = np.cumsum(hits_QK, axis=1)
    metrics: dict[str, Values] = {}
    for k in cutoffs:
        metrics[f"hr@{k}"] = (found_QK[:, k - 1] > 0).astype(np.float64)
        metrics[f"recall@{k}"] = found_QK[:, k - 1] / num_targets
        metrics[f"ndcg@{k}"] = gain_QK[:, k - 1] / ideal_K[np.minimum(num_targets, k) - 1]
    rank = first_hit_rank(hits_QK)
    metrics["mrr"] = np.where(rank > 0, 1.0 / np.maximum(rank, 1), 0.0)
    return metrics


def mean_metrics(per_user: Mapping[str, Values]) -> dict[str, float]:
    """Mean of every metric over the users."""
    return {name: float(values.mean()) for name, values in per_user.items()}


def coverage(items_QK: Items, *, k: int, num_items: int) -> float:
    """Share of the catalogue that appears in at least one top k, 0..1."""
    shown = items_QK[:, :k]
    return len(np.unique(shown[shown >= 0])) / num_items


def gini(items_QK: Items, *, k: int, num_items: int) -> float:
    """Gini coefficient of how often each item of the catalogue is shown in a top k.

    0: every item equally often; close to 1: a few items take all places; 0 also when nothing is shown.
    """
    shown = items_QK[:, :k]
    counts = np.sort(np.bincount(shown[shown >= 0], minlength=num_items))
    total = counts.sum()
    if total == 0:
        return 0.0
    ascending = np.arange(1, num_items + 1)
    return float((2 * ascending - num_items - 1) @ counts / (num_items * total))


def _refuse_repeats(items_QK: Items) -> None:
    ordered = np.sort(items_QK, axis=1)
    repeats = ((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)).any(axis=1)
    if repeats.any():
        # A repeated item would count twice in recall and NDCG.
        raise ValueError(f"the ranked list of query {int(repeats.argmax())} repeats an item")
