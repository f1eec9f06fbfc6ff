"""Item vectors from who is bought with whom: truncated SVD of PPMI co-occurrence (Levy & Goldberg 2014).

R baskets, I items, E vector width.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.errors import require

# Context counts are raised to this power (Levy, Goldberg & Dagan 2015): PMI otherwise favours rare items.
_CONTEXT_POWER = 0.75
# Up to here a dense solver takes no longer than a sparse one.
_DENSE_SIZE = 500


def collaborative_vectors(
    user_index: NDArray[np.int32],
    basket: NDArray[np.int32],
    item_index: NDArray[np.int32],
    *,
    num_items: int,
    width: int,
    window: int,
) -> NDArray[np.float32]:
    """Vectors whose inner products approximate positive pointwise mutual information.

    Two items co-occur when one user took them in one basket (weight 1) or in baskets at most `window` apart
    (weight 1 / distance). Where events have no shared timestamps every event is its own basket. The result is
    the same on every run: the start vector is fixed, and each component's sign is set by its largest entry.

    Args:
        user_index: int32 [events], sorted; training events only.
        basket: int32 [events], not decreasing within a user.
        item_index: int32 [events].
        num_items: I.
        width: E; columns that the data cannot fill are zero.
        window: baskets.

    Returns:
        float32 [I, E]; rows of items without a co-occurrence are zero.
    """
    counts = _cooccurrence(user_index, basket, item_index, num_items=num_items, window=window)
    vectors = np.zeros((num_items, width), dtype=np.float32)
    ppmi = _positive_pmi(counts)
    rank = min(width, num_items - 1)
    if rank < 1 or ppmi.nnz == 0:
        return vectors
    left_IE, values_E = _left_singular(ppmi, rank)
    largest = np.abs(left_IE).argmax(axis=0)
    left_IE = left_IE * np.sign(left_IE[largest, np.arange(rank)])
    vectors[:, :rank] = left_IE * np.sqrt(values_E)
    vectors[np.asarray(ppmi.sum(axis=1)).ravel() == 0] = 0
    return vectors


def _left_singular(matrix: Any, rank: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Leading left singular vectors [I, rank] and values, largest first, bit for bit the same on every call.

    The eigenvectors of `matrix @ matrix.T`. scipy's `svds` would do the same, but it cannot be told where
    ARPACK takes the random vectors from with which it continues when it has exhausted an invariant subspace.
    """
    size = matrix.shape[0]
    if size <= _DENSE_SIZE or rank > size // 2:
        dense = matrix.toarray()
        squares, vectors = np.linalg.eigh(dense @ dense.T)
    else:
        linalg = require("scipy.sparse.linalg", extra="embed")
        transposed = matrix.T.tocsr()
        operator = linalg.LinearOperator(
            (size, size), matvec=lambda x: matrix @ (transposed @ x), dtype=np.float64
        )
        start = np.random.default_rng(0).standard_normal(size)
        squares, vectors = linalg.eigsh(operator, k=rank, v0=start, rng=np.random.default_rng(0))
    order = np.argsort(-squares, kind="stable")[:rank]
    values = np.sqrt(np.maximum(squares[order], 0))
    # Directions without weight are arbitrary: drop them.
    return vectors[:, order], np.where(values > 1e-6 * values[0], values, 0)


def _cooccurrence(
    user_index: NDArray[np.int32],
    basket: NDArray[np.int32],
    item_index: NDArray[np.int32],
    *,
    num_items: int,
    window: int,
) -> Any:
    """Symmetric weighted counts, a scipy CSR matrix [I, I] with an empty diagonal."""
    sparse = require("scipy.sparse", extra="embed")
    if len(item_index) == 0:
        return sparse.csr_matrix((num_items, num_items))
    new_basket = np.ones(len(user_index), dtype=bool)
    new_basket[1:] = (np.diff(user_index) != 0) | (np.diff(basket) != 0)
    row = np.cumsum(new_basket) - 1
    user_of_row = user_index[new_basket]
    member_RI = sparse.csr_matrix((np.ones(len(row)), (row, item_index)), shape=(len(user_of_row), num_items))
    member_RI.data[:] = 1  # an item twice in one basket counts once
    counts = member_RI.T @ member_RI
    for distance in range(1, window + 1):
        same_user = np.flatnonzero(user_of_row[:-distance] == user_of_row[distance:])
        pairs = member_RI[same_user].T @ member_RI[same_user + distance]
        counts = counts + (pairs + pairs.T) / distance
    counts = counts.tocsr()
    counts.setdiag(0)
    counts.eliminate_zeros()
    return counts


def _positive_pmi(counts: Any) -> Any:
    """max(0, log(p(i, j) / (p(i) p'(j)))) on the non-zero counts, with smoothed contexts p'."""
    sparse = require("scipy.sparse", extra="embed")
    pairs = counts.tocoo()
    totals = np.asarray(counts.sum(axis=1)).ravel()
    contexts = totals**_CONTEXT_POWER
    if contexts.sum() > 0:
        contexts /= contexts.sum()
    pmi = np.log(pairs.data / (totals[pairs.row] * contexts[pairs.col]))
    kept = pmi > 0
    ppmi = sparse.csr_matrix((pmi[kept], (pairs.row[kept], pairs.col[kept])), shape=counts.shape)
    ppmi.sort_indices()
    return ppmi
