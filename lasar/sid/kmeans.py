"""Residual k-means: every level clusters what the levels before it left over.

I items, E embedding width, L levels, C codebook size, P levels already fixed.

With `balanced`, each level carries one offset per code (the dual variables of a Sinkhorn transport of items
to equally loaded codes): code c costs ||r - center_c||^2 + offset_c. A crowded code is a little dearer, so
codes fill evenly, and because the offsets are stored, a new item is assigned by the same rule as the fitted
ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.errors import DataError, require
from lasar.progress import progress

_CHUNK = 8192
_BALANCE_SAMPLE = 65536
_BALANCE_TOLERANCE = 0.02  # of the load of a code


class ResidualKMeans:
    """Residual k-means (`rq_kmeans`).

    Attributes:
        centers_LCE: float32 codebooks.
        offsets_LC: float32 cost added per code; zeros unless balanced.
    """

    centers_LCE: NDArray[np.float32]
    offsets_LC: NDArray[np.float32]

    def __init__(
        self,
        *,
        num_levels: int,
        codebook_size: int,
        seed: int = 0,
        num_iterations: int = 25,
        balanced: bool = False,
    ) -> None:
        """Keep the arguments.

        Args:
            num_levels: L.
            codebook_size: C.
            seed: of the initial centers.
            num_iterations: k-means iterations per level.
            balanced: spread items evenly over the codes of each level.
        """
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.seed = seed
        self.num_iterations = num_iterations
        self.balanced = balanced

    def fit(self, item_embeddings_IE: NDArray[np.float32]) -> None:
        """Learn the codebooks level by level.

        Raises:
            DataError: a vector is not finite.
        """
        residual_IE = checked(item_embeddings_IE).copy()
        shape = (self.num_levels, self.codebook_size)
        self.centers_LCE = np.zeros((*shape, residual_IE.shape[1]), dtype=np.float32)
        self.offsets_LC = np.zeros(shape, dtype=np.float32)
        with progress("k-means", total=self.num_levels, unit="levels") as advance:
            for level in range(self.num_levels):
                centers = fit_kmeans(
                    residual_IE,
                    self.codebook_size,
                    seed=self.seed + level,
                    num_iterations=self.num_iterations,
                )
                if self.balanced:
                    centers, self.offsets_LC[level] = balance(residual_IE, centers, seed=self.seed + level)
                self.centers_LCE[level] = centers
                for begin in range(0, len(residual_IE), _CHUNK):
                    rows = slice(begin, begin + _CHUNK)
                    costs = _costs(residual_IE[rows], centers, self.offsets_LC[level])
                    residual_IE[rows] -= centers[costs.argmin(axis=1)]
                advance()

    def encode(self, item_embeddings_IE: NDArray[np.float32]) -> NDArray[np.int32]:
        """Codes [I, L] of least cost, level by level."""
        embeddings = checked(item_embeddings_IE)
        codes_IL = np.zeros((len(embeddings), self.num_levels), dtype=np.int32)
        for begin in range(0, len(embeddings), _CHUNK):
            rows = slice(begin, begin + _CHUNK)
            for level in range(self.num_levels):
                costs = self.level_costs(embeddings[rows], codes_IL[rows, :level])
                codes_IL[rows, level] = costs.argmin(axis=1)
        return codes_IL

    def decode(self, codes_IL: NDArray[np.integer]) -> NDArray[np.float32]:
        """Sum of the centers named by the codes: [I, E]. Fewer levels give the coarser vector."""
        codes = np.asarray(codes_IL)
        total = np.zeros((len(codes), self.centers_LCE.shape[2]), dtype=np.float32)
        for level in range(codes.shape[1]):
            total += self.centers_LCE[level, codes[:, level]]
        return total

    def level_costs(
        self, item_embeddings_IE: NDArray[np.float32], codes_IP: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Squared distance of each residual to every center of level P, plus the code's offset: [I, C]."""
        level = codes_IP.shape[1]
        residual_IE = checked(item_embeddings_IE) - self.decode(codes_IP)
        return _costs(residual_IE, self.centers_LCE[level], self.offsets_LC[level])

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Constructor arguments and fitted arrays."""
        arguments = {
            "num_levels": self.num_levels,
            "codebook_size": self.codebook_size,
            "seed": self.seed,
            "num_iterations": self.num_iterations,
            "balanced": self.balanced,
        }
        return arguments, {"centers": self.centers_LCE, "offsets": self.offsets_LC}

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take fitted arrays.

        Raises:
            ValueError: shapes that do not fit the arguments.
        """
        shape = (self.num_levels, self.codebook_size)
        if arrays["centers"].shape[:2] != shape or arrays["offsets"].shape != shape:
            raise ValueError(f"codebooks are not {shape}")
        self.centers_LCE, self.offsets_LC = arrays["centers"], arrays["offsets"]


def checked(item_embeddings_IE: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors as contiguous float32.

    Raises:
        DataError: not a table, or a value is not finite.
    """
    embeddings = np.ascontiguousarray(item_embeddings_IE, dtype=np.float32)
    if embeddings.ndim != 2:
        raise DataError(f"item embeddings must be [items, width], got {list(embeddings.shape)}")
    if not np.isfinite(embeddings).all():
        item = int(np.argwhere(~np.isfinite(embeddings))[0, 0])
        raise DataError(f"item embeddings: the vector of item {item} holds NaN or infinity; run embed again")
    return embeddings


def squared_distances(x_IE: NDArray[np.float32], centers_CE: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared Euclidean distances [I, C], never negative."""
    cross = x_IE @ centers_CE.T
    norms = (x_IE**2).sum(axis=1)[:, None] + (centers_CE**2).sum(axis=1)[None]
    return np.asarray(np.maximum(norms - 2 * cross, 0), dtype=np.float32)


def _costs(
    residual_IE: NDArray[np.float32], centers_CE: NDArray[np.float32], offsets_C: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The one definition of how well a code fits a residual."""
    costs_IC = squared_distances(residual_IE, centers_CE)
    costs_IC += offsets_C
    return costs_IC


def fit_kmeans(
    x_IE: NDArray[np.float32], num_centers: int, *, seed: int, num_iterations: int
) -> NDArray[np.float32]:
    """Centers [num_centers, E] by k-means (faiss), seeded.

    With no more distinct vectors than centers every vector becomes a center, and the rest stay at zero, which
    for a residual means "no correction".
    """
    faiss = require("faiss", extra="quantize")
    distinct = np.unique(x_IE, axis=0)
    if len(distinct) <= num_centers:
        centers = np.zeros((num_centers, x_IE.shape[1]), dtype=np.float32)
        centers[: len(distinct)] = distinct
        return centers
    kmeans = faiss.Kmeans(
        x_IE.shape[1],
        num_centers,
        niter=num_iterations,
        seed=seed + 1,
        min_points_per_centroid=1,
        max_points_per_centroid=max(256, -(-len(x_IE) // num_centers)),
    )
    kmeans.train(x_IE)
    return np.array(kmeans.centroids, dtype=np.float32).reshape(num_centers, -1)


def balance(
    x_IE: NDArray[np.float32], centers_CE: NDArray[np.float32], *, seed: int, num_rounds: int = 10
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Move centers and find per-code offsets so that `argmin(distance + offset)` loads codes evenly.

    Alternates a Sinkhorn transport (items of equal mass to codes of equal capacity) with moving each center
    to the mean of its items. Beyond 65,536 vectors a seeded sample of them is used.

    Returns:
        centers [C, E] and offsets [C] (mean 0, in squared distance).
    """
    if len(x_IE) > _BALANCE_SAMPLE:
        x_IE = x_IE[np.random.default_rng(seed).choice(len(x_IE), _BALANCE_SAMPLE, replace=False)]
    centers = centers_CE.copy()
    offsets = np.zeros(len(centers), dtype=np.float32)
    for _ in range(num_rounds):
        costs = squared_distances(x_IE, centers)
        offsets = sinkhorn_offsets(costs, offsets)
        codes = (costs + offsets).argmin(axis=1)
        centers = _means(x_IE, codes, centers)
    costs = squared_distances(x_IE, centers)
    return centers, sinkhorn_offsets(costs, offsets, num_iterations=30)


def _means(
    x_IE: NDArray[np.float32], codes_I: NDArray[np.integer], centers_CE: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Mean vector of every code's items; a code without items keeps its center."""
    order = np.argsort(codes_I, kind="stable")
    filled, starts, counts = np.unique(codes_I[order], return_index=True, return_counts=True)
    means = centers_CE.copy()
    means[filled] = np.add.reduceat(x_IE[order], starts, axis=0) / counts[:, None].astype(np.float32)
    return means


def sinkhorn_offsets(
    costs_IC: NDArray[np.float32],
    start_C: NDArray[np.float32],
    *,
    sharpness: float = 4,
    num_iterations: int = 8,
) -> NDArray[np.float32]:
    """Offsets that balance the codes: the dual variables of an entropic transport with equal column sums.

    Args:
        costs_IC: squared distances.
        start_C: offsets to start from.
        sharpness: the temperature is the mean gap between an item's best and second-best code, over this; the
            sharper, the closer to a hard assignment, and the more iterations it takes.
        num_iterations: of Sinkhorn.
    """
    if costs_IC.shape[1] < 2:
        return start_C
    two_best = np.partition(costs_IC, 1, axis=1)[:, :2]
    temperature = float((two_best[:, 1] - two_best[:, 0]).mean()) / sharpness
    if temperature <= 0:
        return start_C
    logits = (costs_IC.min(axis=1)[:, None] - costs_IC) / np.float32(temperature)
    dual = start_C / np.float32(temperature)
    log_target = float(np.log(costs_IC.shape[0] / costs_IC.shape[1]))
    for _ in range(num_iterations):
        excess = _log_loads(logits, dual) - log_target
        dual += excess
        if np.abs(excess).max() < _BALANCE_TOLERANCE:
            break
    dual -= dual.mean()
    return np.asarray(dual * np.float32(temperature), dtype=np.float32)


def _log_loads(logits_IC: NDArray[np.float32], dual_C: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log of how many items each code gets when every item spreads over codes by softmax(logits - dual)."""
    scores = logits_IC - dual_C
    scores -= scores.max(axis=1, keepdims=True)
    weights = np.exp(scores)
    row_sums = weights.sum(axis=1, keepdims=True)
    loads = (weights / row_sums).sum(axis=0)
    if loads.min() > 1e-20:
        return np.asarray(np.log(loads), dtype=np.float32)
    # Some code is so far from every item that its weights underflow: the same in logarithms.
    scores -= np.log(row_sums)
    top = scores.max(axis=0)
    return np.asarray(top + np.log(np.exp(scores - top).sum(axis=0)), dtype=np.float32)
