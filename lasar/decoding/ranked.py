"""What ranking returns; apart from the ranker so that reading results does not load a model library."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Ranked(NamedTuple):
    """Ranked lists of Q queries.

    Attributes:
        items_QK: item indices, -1 where fewer than K items are allowed.
        scores_QK: summed log-probability of the item's codes.
        depths_Q: latent steps taken before answering.
    """

    items_QK: NDArray[np.int32]
    scores_QK: NDArray[np.float32]
    depths_Q: NDArray[np.int32]
