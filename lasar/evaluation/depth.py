"""Depth in the evaluation: quality by the depth chosen, quality and latency by the depth forced.

Shapes: Q users.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lasar.decoding.ranked import Ranked
from lasar.evaluation.metrics import Items, Values, user_metrics
from lasar.evaluation.significance import paired_bootstrap

if TYPE_CHECKING:
    from lasar.model.reasoner import Depth


def by_chosen_depth(
    depths_Q: NDArray[np.int32], per_user: Mapping[str, Values], *, metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Mean metrics of the users that got each depth: `depth`, `num_users`, and the metrics.

    Users differ between depths, so the rows say who gets how much thought, not what thought is worth; for that see
    `compare_depths`.
    """
    rows = []
    for depth in np.unique(depths_Q):
        chosen = depths_Q == depth
        means = {name: float(per_user[name][chosen].mean()) for name in metrics}
        rows.append({"depth": int(depth), "num_users": int(chosen.sum()), **means})
    return rows


def compare_depths(
    rank: Callable[["Depth"], Ranked],
    targets: Sequence[Items],
    depths: Sequence["Depth"],
    *,
    metrics: Sequence[str],
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Every other depth beside the first, same users: means of the metrics and paired differences.

    Args:
        rank: ranks those users at a depth.
        targets: their true items.
        depths: how the main result chooses depths, then the depths to compare with it.
        metrics: metrics to report, such as `ndcg@10`.
        samples: bootstrap resamplings.
        seed: of the bootstrap.
    """
    cutoffs = tuple(sorted({int(name.partition("@")[2]) for name in metrics}))
    first, *others = (
        user_metrics(rank(depth).items_QK, targets, cutoffs=cutoffs) for depth in dict.fromkeys(depths)
    )
    rows = []
    for depth, per_user in zip(list(dict.fromkeys(depths))[1:], others, strict=True):
        row: dict[str, Any] = {"depth": depth, "num_users": len(targets)}
        for name in metrics:
            comparison = paired_bootstrap(per_user[name], first[name], samples=samples, seed=seed)
            row[name] = float(per_user[name].mean())
            row[f"{name}_minus_chosen"] = [comparison.difference, comparison.low, comparison.high]
        rows.append(row)
    return rows


def seconds_by_depth(
    rank: Callable[["Depth"], Ranked], depths: Sequence["Depth"], *, repeats: int = 5
) -> dict[str, float]:
    """Median seconds of ranking one batch at each depth, the depths taken in turn.

    Args:
        rank: ranks the batch at a depth.
        depths: depths to time.
        repeats: rounds; one more goes before them to warm up.
    """
    taken: dict[Depth, list[float]] = {depth: [] for depth in depths}
    for number in range(repeats + 1):
        for depth in taken:
            began = time.perf_counter()
            rank(depth)
            if number:
                taken[depth].append(time.perf_counter() - began)
    return {str(depth): float(np.median(values)) for depth, values in taken.items()}
