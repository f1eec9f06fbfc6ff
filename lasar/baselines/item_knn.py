"""Item-kNN: items whose takers are the takers of the history's items (Sarwar et al. 2001; shrinkage as in Koren 2008).

The similarity of two items is the cosine of their sets of users, `n / (sqrt(a b) + shrinkage)` for n users in common
and a, b users each. Each item keeps its nearest neighbours, and a candidate's score is the sum of its similarities to
the items of the history.

Shapes: I items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.baselines.linear import rank_by_weights, taken_items, train_counts
from lasar.baselines.ranking import Items, Ranked
from lasar.data.interactions import TrainSequence


class ItemKnn:
    """Cosine neighbours; the order of events plays no part.

    Attributes:
        similar_II: from item (row) to its neighbours, sparse `[I, I]`; set by `fit`.
    """

    similar_II: Any

    def __init__(self, *, neighbours: int = 100, shrinkage: float = 10.0) -> None:
        """Keep `neighbours` per item; `shrinkage` tones down items with few users."""
        self.neighbours, self.shrinkage = neighbours, shrinkage

    def fit(self, sequences: Sequence[TrainSequence], num_items: int) -> "ItemKnn":
        """Count common users."""
        self._counts_I = train_counts(sequences, num_items)
        taken_UI = taken_items([sequence.items for sequence in sequences], num_items)
        common_II = (taken_UI.T @ taken_UI).tocsr()
        users_I = common_II.diagonal()
        common_II.setdiag(0.0)
        common_II.eliminate_zeros()
        source_E = np.repeat(np.arange(num_items), np.diff(common_II.indptr))
        common_II.data /= np.sqrt(users_I[source_E] * users_I[common_II.indices]) + self.shrinkage
        common_II.data[~_nearest(common_II.data, source_E, common_II.indptr, self.neighbours)] = 0.0
        common_II.eliminate_zeros()
        self.similar_II = common_II
        return self

    def recommend(
        self, histories: Sequence[Items], baskets: Sequence[Items], k: int, *, exclude_seen: bool = False
    ) -> Ranked:
        """Rank the catalogue for each history; `baskets` is not used."""
        return rank_by_weights(self.similar_II, self._counts_I, histories, k, exclude_seen=exclude_seen)


def _nearest(
    values_E: NDArray[np.float32], source_E: NDArray[np.int64], indptr: NDArray[np.int32], count: int
) -> NDArray[np.bool_]:
    """Which entries of a sparse matrix are among the `count` largest of their row."""
    order = np.lexsort((-values_E, source_E))
    kept = np.zeros(len(values_E), dtype=bool)
    kept[order] = np.arange(len(order)) - indptr[source_E[order]] < count
    return kept
