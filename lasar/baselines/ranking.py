"""Turning a dense score matrix into ranked lists, the same way for every baseline.

Shapes: Q queries, K rank positions, I items.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from lasar.data.interactions import TrainSequence

if TYPE_CHECKING:
    from torch import Tensor

Items = NDArray[np.int32]
Ranked = tuple[NDArray[np.int32], NDArray[np.float32]]


class Baseline(Protocol):
    """What every baseline offers."""

    def fit(self, sequences: Sequence[TrainSequence], num_items: int) -> object:
        """Learn from training sequences; return self."""

    def recommend(
        self, histories: Sequence[Items], baskets: Sequence[Items], k: int, *, exclude_seen: bool = False
    ) -> Ranked:
        """Rank the catalogue for each history: items int32 `[Q, K]`, scores float32 `[Q, K]`."""


def top_items(
    scores_QI: NDArray[np.float64],
    k: int,
    *,
    popularity_I: NDArray[np.int64],
    excluded: Sequence[Items] | None = None,
) -> Ranked:
    """Return the k best items of each row; ties go to the more popular item, then to the lower index.

    Args:
        scores_QI: scores of all items; not modified.
        k: length of the lists.
        popularity_I: training events per item.
        excluded: per query, items that must not appear.

    Returns:
        Items int32 `[Q, K]`, -1 where fewer than k items are left, and scores float32 `[Q, K]`, -inf there.
    """
    num_queries, num_items = scores_QI.shape
    items_QK = np.full((num_queries, k), -1, dtype=np.int32)
    scores_QK = np.full((num_queries, k), -np.inf, dtype=np.float32)
    for query in range(num_queries):
        scores_I = scores_QI[query]
        if excluded is not None:
            scores_I = scores_I.copy()
            scores_I[excluded[query]] = -np.inf
        kept = min(k, num_items)
        threshold = np.partition(scores_I, num_items - kept)[num_items - kept]
        candidates = np.flatnonzero((scores_I >= threshold) & (scores_I > -np.inf))
        best = candidates[np.lexsort((candidates, -popularity_I[candidates], -scores_I[candidates]))][:k]
        items_QK[query, : len(best)] = best
        scores_QK[query, : len(best)] = scores_I[best]
    return items_QK, scores_QK


def rank_scores(scores_QI: "Tensor", k: int, *, excluded: Sequence[Items] | None = None) -> Ranked:
    """`top_items` of a model's scores; ties, which only untrained models have, go to the lower index."""
    scores = scores_QI.double().cpu().numpy()
    return top_items(scores, k, popularity_I=np.zeros(scores.shape[1], dtype=np.int64), excluded=excluded)
