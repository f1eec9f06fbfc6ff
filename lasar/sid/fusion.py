"""Putting item vectors of different origin on one scale and side by side.

I items, E vector width.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Added to every variance, as a part of their mean: directions that are noise are not blown up.
_WHITEN_SHRINKAGE = 0.1


def normalise(
    vectors_IE: NDArray[np.float32], known_I: NDArray[np.bool_], *, how: str
) -> NDArray[np.float32]:
    """Bring vectors to one scale: a mean squared norm of 1.

    Args:
        vectors_IE: rows that are not known are ignored.
        known_I: which items have a vector.
        how: `l2` (every row to length 1), or `whiten` (centred, equal variance in every direction).

    Returns:
        float32 [I, E]; an unknown item gets the mean of the known ones.
    """
    known = vectors_IE[known_I].astype(np.float64)
    result = np.zeros(vectors_IE.shape, dtype=np.float64)
    if len(known) == 0:
        return result.astype(np.float32)
    if how == "l2":
        known /= np.maximum(np.linalg.norm(known, axis=1, keepdims=True), 1e-12)
    else:
        known -= known.mean(axis=0)
        variances, directions = np.linalg.eigh(known.T @ known / len(known))
        floor = _WHITEN_SHRINKAGE * max(float(variances.mean()), 1e-12)
        # Rotated back (ZCA), so that the sign and order of the eigenvectors do not matter.
        known = known @ (directions / np.sqrt(np.maximum(variances, 0) + floor)) @ directions.T
        known /= np.sqrt(max(float((known**2).sum(axis=1).mean()), 1e-12))
    result[known_I] = known
    result[~known_I] = known.mean(axis=0)
    return result.astype(np.float32)


def concatenate(parts: Sequence[tuple[float, NDArray[np.float32]]]) -> NDArray[np.float32]:
    """Weighted parts side by side. A weight scales a part's share of the squared distance between items."""
    return np.concatenate([np.float32(np.sqrt(weight)) * vectors for weight, vectors in parts], axis=1)
