"""Popularity: the same list for everyone, the items with the most training events."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lasar.baselines.ranking import Items, Ranked, top_items
from lasar.data.interactions import TrainSequence


class Popularity:
    """Rank items by their number of training events.

    Attributes:
        counts_I: training events per item, int64 `[I]`; set by `fit`.
    """

    counts_I: NDArray[np.int64]

    def fit(self, sequences: Sequence[TrainSequence], num_items: int) -> "Popularity":
        """Count training events per item."""
        events = [sequence.items for sequence in sequences] or [np.zeros(0, dtype=np.int32)]
        self.counts_I = np.bincount(np.concatenate(events), minlength=num_items).astype(np.int64)
        return self

    def recommend(
        self, histories: Sequence[Items], baskets: Sequence[Items], k: int, *, exclude_seen: bool = False
    ) -> Ranked:
        """Rank the catalogue for each history.

        Args:
            histories: per query, item indices, oldest first; used only with `exclude_seen`.
            baskets: per query, the basket number of each history event; not used.
            k: length of the lists.
            exclude_seen: leave out items of the history.

        Returns:
            Items int32 `[Q, K]` (-1 where there are none left) and scores float32 `[Q, K]` (counts).
        """
        scores_I = self.counts_I.astype(np.float64)
        if not exclude_seen:
            items_1K, scores_1K = top_items(scores_I[None], k, popularity_I=self.counts_I)
            return np.repeat(items_1K, len(histories), axis=0), np.repeat(scores_1K, len(histories), axis=0)
        # A view, so that one row of scores serves every query.
        scores_QI = np.broadcast_to(scores_I, (len(histories), len(scores_I)))
        return top_items(scores_QI, k, popularity_I=self.counts_I, excluded=histories)
