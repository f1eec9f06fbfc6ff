"""How good semantic IDs are: use of codes, information per level, collisions, neighbours sharing prefixes.

All numbers are over the items of a catalogue, every item counted once. I items, L levels, K neighbours.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.sid.kmeans import squared_distances

_MAX_QUERIES = 4000
_QUERY_CHUNK, _CHUNK_DISTANCES = 512, 1 << 26  # at most, of either


def code_quality(
    codes_IL: NDArray[np.integer],
    *,
    codebook_size: int,
    neighbours_QK: NDArray[np.int64],
    queries_Q: NDArray[np.int64],
) -> dict[str, Any]:
    """Numbers that need only codes and who is near whom.

    Args:
        codes_IL: IDs, unique or not.
        codebook_size: C.
        neighbours_QK: rows (of `codes_IL`) of the nearest items of each query.
        queries_Q: rows of the queries.

    Returns:
        per level: `utilisation` (share of codes used), `entropy_bits`, `conditional_bits` (information of the
        level given the levels before it), `prefix_sharing` (how often a near neighbour shares the codes up to
        and including this level); and `collision_rate` (share of items whose ID is not theirs alone).
    """
    joint_bits = [entropy_bits(codes_IL[:, : level + 1]) for level in range(codes_IL.shape[1])]
    same_QKL = codes_IL[neighbours_QK] == codes_IL[queries_Q][:, None]
    shared_L = np.logical_and.accumulate(same_QKL, axis=2).mean(axis=(0, 1)) if same_QKL.size else []
    return {
        "utilisation": [len(np.unique(column)) / codebook_size for column in codes_IL.T],
        "entropy_bits": [_rounded(entropy_bits(column[:, None])) for column in codes_IL.T],
        "conditional_bits": [_rounded(bits) for bits in np.diff(joint_bits, prepend=0.0)],
        "prefix_sharing": [_rounded(share) for share in shared_L],
        "collision_rate": _rounded(collision_rate(codes_IL)),
    }


def entropy_bits(codes_IL: NDArray[np.integer]) -> float:
    """Entropy in bits of the rows, as if an item were drawn at random."""
    _, counts = np.unique(codes_IL, axis=0, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def collision_rate(codes_IL: NDArray[np.integer]) -> float:
    """Share of items whose row is not theirs alone."""
    _, counts = np.unique(codes_IL, axis=0, return_counts=True)
    return float(counts[counts > 1].sum() / len(codes_IL))


def nearest_items(
    item_embeddings_IE: NDArray[np.float32], *, num_neighbours: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Exact nearest items (Euclidean) of all items, or of a seeded sample of 4,000.

    Returns:
        neighbours [Q, K] without the query itself, and queries [Q]; K is smaller when there are fewer items.
    """
    num_items = len(item_embeddings_IE)
    queries = np.arange(num_items)
    if num_items > _MAX_QUERIES:
        rng = np.random.default_rng(seed)
        queries = np.sort(rng.choice(num_items, size=_MAX_QUERIES, replace=False))
    num_kept = min(num_neighbours, num_items - 1)
    found = [np.zeros((0, num_kept), dtype=np.int64)]
    chunk = max(1, min(_QUERY_CHUNK, _CHUNK_DISTANCES // num_items))
    for begin in range(0, len(queries), chunk):
        rows = queries[begin : begin + chunk]
        distances = squared_distances(item_embeddings_IE[rows], item_embeddings_IE)
        distances[np.arange(len(rows)), rows] = np.inf
        near = np.sort(np.argpartition(distances, num_kept - 1, axis=1)[:, :num_kept], axis=1)
        order = np.argsort(np.take_along_axis(distances, near, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(near, order, axis=1))
    return np.concatenate(found), queries


def relative_error(squared_error: float, item_embeddings_IE: NDArray[np.float32]) -> float:
    """Mean squared error as a share of the variance of the items; 1 is what one code for all gives."""
    centred = item_embeddings_IE.astype(np.float64) - item_embeddings_IE.mean(axis=0, dtype=np.float64)
    variance = float((centred**2).sum(axis=1).mean())
    return _rounded(squared_error / variance) if variance > 0 else 0.0


def _rounded(value: float) -> float:
    return round(float(value), 6)
