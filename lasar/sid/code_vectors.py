"""A vector for every code of every level, from the items that carry it.

Legend: I items, L levels, C codebook, E embedding width.
"""

import numpy as np
from numpy.typing import NDArray


def code_vectors(
    item_embeddings: NDArray[np.float32], codes_IL: NDArray[np.int32], *, codebook_size: int
) -> NDArray[np.float32]:
    """Mean residual of the items with each code, level by level, whatever quantizer chose the codes.

    Args:
        item_embeddings: [I, E].
        codes_IL: unique IDs.
        codebook_size: C.

    Returns:
        [L, C, E]; zero for codes that no item carries.
    """
    residual_IE = item_embeddings - item_embeddings.mean(0)
    levels = []
    for codes_I in codes_IL.T:
        sums_CE = np.zeros((codebook_size, residual_IE.shape[1]), dtype=np.float64)
        np.add.at(sums_CE, codes_I, residual_IE)
        counts_C = np.bincount(codes_I, minlength=codebook_size)
        means_CE = (sums_CE / np.maximum(counts_C, 1)[:, None]).astype(np.float32)
        residual_IE = residual_IE - means_CE[codes_I]
        levels.append(means_CE)
    return np.stack(levels)
