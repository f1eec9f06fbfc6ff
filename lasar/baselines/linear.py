"""Baselines whose scores are a history times a matrix of item-to-item weights.

Shapes: Q queries, I items, U users.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.baselines.ranking import Items, Ranked, top_items
from lasar.data.interactions import TrainSequence
from lasar.errors import require

_CHUNK_QUERIES = 512


def taken_items(histories: Sequence[Items], num_items: int) -> Any:
    """Which items each history holds, sparse 0/1 float32 `[Q, I]`."""
    sparse = require("scipy.sparse", extra="embed")
    distinct = [np.unique(history) for history in histories]
    ends = np.cumsum([0, *(len(items) for items in distinct)])
    columns = np.concatenate([np.zeros(0, dtype=np.int32), *distinct])
    ones = np.ones(len(columns), dtype=np.float32)
    return sparse.csr_array((ones, columns, ends), shape=(len(histories), num_items))


def train_counts(sequences: Sequence[TrainSequence], num_items: int) -> NDArray[np.int64]:
    """Training events per item, int64 `[I]`."""
    events = [sequence.items for sequence in sequences] or [np.zeros(0, dtype=np.int32)]
    return np.bincount(np.concatenate(events), minlength=num_items).astype(np.int64)


def rank_by_weights(
    weights_II: Any, counts_I: NDArray[np.int64], histories: Sequence[Items], k: int, *, exclude_seen: bool
) -> Ranked:
    """Rank the catalogue by the summed weights from a history's items; popularity breaks ties and fills up.

    Args:
        weights_II: dense or sparse, row = item of the history, column = item to be ranked.
        counts_I: training events per item.
        histories: per query, item indices.
        k: length of the lists.
        exclude_seen: leave out items of the history.
    """
    parts = [(np.zeros((0, k), dtype=np.int32), np.zeros((0, k), dtype=np.float32))]
    for chunk in _chunks(histories):
        scores_QI = taken_items(chunk, len(counts_I)) @ weights_II
        if not isinstance(scores_QI, np.ndarray):
            scores_QI = scores_QI.toarray()
        # Too small to overturn a weight; without it, most of the catalogue would tie at zero and be sorted.
        scores_QI = scores_QI + 1e-9 * counts_I / max(int(counts_I.max(initial=0)), 1)
        excluded = chunk if exclude_seen else None
        parts.append(top_items(scores_QI, k, popularity_I=counts_I, excluded=excluded))
    return np.concatenate([items for items, _ in parts]), np.concatenate([scores for _, scores in parts])


def _chunks(histories: Sequence[Items]) -> Iterator[Sequence[Items]]:
    for start in range(0, len(histories), _CHUNK_QUERIES):
        yield histories[start : start + _CHUNK_QUERIES]
