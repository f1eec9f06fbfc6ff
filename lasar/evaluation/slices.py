"""Where a method is good and where it is not: by history length, and by popularity of the true item.

A history belongs to a user, so its slices average user metrics. Popularity belongs to an item, so its slices
are over (user, target) pairs: how many of the true items with this many training events were found.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.evaluation.metrics import Items, Values

# Fixed edges, not quantiles: the same bucket means the same thing on every data set.
HISTORY_EDGES = (0, 1, 4, 6, 11, 21, 51)
POPULARITY_EDGES = (0, 1, 6, 21, 101, 501)


def bucket_labels(edges: Sequence[int]) -> list[str]:
    """Names of the buckets that start at each edge; the last one is open: `0`, `1-3`, ..., `51+`."""
    labels = []
    for start, following in itertools.pairwise(edges):
        labels.append(str(start) if following == start + 1 else f"{start}-{following - 1}")
    return [*labels, f"{edges[-1]}+"]


def bucket_of(values: NDArray[np.int64], edges: Sequence[int]) -> NDArray[np.int64]:
    """Index of the bucket of each value (edges ascending, the first at most the smallest value)."""
    return np.searchsorted(np.asarray(edges), values, side="right") - 1


def by_history_length(
    lengths: NDArray[np.int64], methods: Mapping[str, Mapping[str, Values]], *, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Mean metrics of the users of each history length.

    Args:
        lengths: events in each user's history.
        methods: method -> metric name -> value of each user.
        metrics: the metrics to report.

    Returns:
        One row per non-empty bucket: `bucket`, `num_users`, and `methods`: method -> metric name -> mean.
    """
    bucket = bucket_of(lengths, HISTORY_EDGES)
    rows = []
    for index, label in enumerate(bucket_labels(HISTORY_EDGES)):
        chosen = bucket == index
        if chosen.any():
            means = {
                method: {name: float(per_user[name][chosen].mean()) for name in metrics}
                for method, per_user in methods.items()
            }
            rows.append({"bucket": label, "num_users": int(chosen.sum()), "methods": means})
    return rows


def by_target_popularity(
    targets: Sequence[Items], train_counts: NDArray[np.int64], ranked: Mapping[str, Items], *, k: int
) -> list[dict[str, Any]]:
    """Share of the true items found in the top k, by their training events (bucket `0`: cold items).

    Args:
        targets: per user, its distinct true items.
        train_counts: training events per item.
        ranked: method -> items_QK.
        k: length of the lists.

    Returns:
        One row per non-empty bucket: `bucket`, `num_targets`, and `methods`: method -> `recall@k`.
    """
    owner = np.repeat(np.arange(len(targets)), [len(target) for target in targets])
    flat = np.concatenate([np.zeros(0, dtype=np.int32), *targets])
    found = {
        method: (items_QK[owner, :k] == flat[:, None]).any(axis=1) for method, items_QK in ranked.items()
    }
    bucket = bucket_of(train_counts[flat], POPULARITY_EDGES)
    rows = []
    for index, label in enumerate(bucket_labels(POPULARITY_EDGES)):
        chosen = bucket == index
        if chosen.any():
            means = {method: {f"recall@{k}": float(hit[chosen].mean())} for method, hit in found.items()}
            rows.append({"bucket": label, "num_targets": int(chosen.sum()), "methods": means})
    return rows
