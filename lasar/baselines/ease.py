"""EASE: the best linear map from what a user took to what the same user took (Steck 2019), in closed form.

With X the users' items and P = (X'X + l2 I)^-1, the weights are -P / diag(P), zero on the diagonal: the ridge
regression of every item on all others.

Shapes: I items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.baselines.linear import rank_by_weights, taken_items, train_counts
from lasar.baselines.ranking import Items, Ranked
from lasar.data.interactions import TrainSequence
from lasar.errors import require


class Ease:
    """Item-to-item weights of the regularised least squares problem; the order of events plays no part.

    Attributes:
        weights_II: from item (row) to item (column), float32 `[I, I]`; set by `fit`.
    """

    weights_II: NDArray[np.float32]

    def __init__(self, *, l2: float = 250.0) -> None:
        """Use `l2` as the regularisation."""
        self.l2 = l2
        self._linalg: Any = require("scipy.linalg", extra="embed")

    def fit(self, sequences: Sequence[TrainSequence], num_items: int) -> "Ease":
        """Solve; takes memory of two dense matrices `[I, I]` and time of I^3 (40 s for 12,000 items on one core)."""
        self._counts_I = train_counts(sequences, num_items)
        taken_UI = taken_items([sequence.items for sequence in sequences], num_items)
        gram_II = (taken_UI.T @ taken_UI).toarray()
        gram_II[np.diag_indices(num_items)] += self.l2
        # float32: the smallest eigenvalue is at least l2, so the matrix is far from singular.
        inverse_II = self._linalg.inv(gram_II, overwrite_a=True, assume_a="pos", check_finite=False)
        inverse_II /= -np.diag(inverse_II)
        np.fill_diagonal(inverse_II, 0.0)
        self.weights_II = np.ascontiguousarray(inverse_II)  # rows are what ranking reads
        return self

    def recommend(
        self, histories: Sequence[Items], baskets: Sequence[Items], k: int, *, exclude_seen: bool = False
    ) -> Ranked:
        """Rank the catalogue for each history; `baskets` is not used."""
        return rank_by_weights(self.weights_II, self._counts_I, histories, k, exclude_seen=exclude_seen)
