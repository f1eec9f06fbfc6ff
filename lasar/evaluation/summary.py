"""The numbers of an evaluation: means with intervals, paired differences, exposure, and the per-user table.

Shapes: Q users, K rank positions.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from lasar.data.interactions import EvalCases
from lasar.evaluation.metrics import Items, Values, coverage, first_hit_rank, gini, hit_matrix, mean_metrics
from lasar.evaluation.significance import bootstrap_intervals, holm, paired_bootstrap

PerUser = Mapping[str, Mapping[str, Values]]


def with_intervals(per_user: PerUser, *, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Method -> mean of every metric, and `ci`: metric -> 95 % bootstrap interval."""
    return {
        method: {**mean_metrics(values), "ci": bootstrap_intervals(values, samples=samples, seed=seed)}
        for method, values in per_user.items()
    }


def paired_differences(
    per_user: PerUser, model: str, *, metrics: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Model minus every other method on each of `metrics`, with Holm's correction over all comparisons."""
    paired: dict[str, dict[str, Any]] = {}
    for method in per_user:
        if method == model:
            continue
        paired[method] = {
            name: dataclasses.asdict(
                paired_bootstrap(per_user[model][name], per_user[method][name], samples=samples, seed=seed)
            )
            for name in metrics
        }
    comparisons = [value for by_metric in paired.values() for value in by_metric.values()]
    for value, adjusted in zip(comparisons, holm([value["p_value"] for value in comparisons]), strict=True):
        value["p_holm"] = float(adjusted)
    return paired


def exposure(lists: Mapping[str, Items], *, cutoffs: Sequence[int], num_items: int) -> dict[str, Any]:
    """`coverage` and `gini`: method -> cutoff (as a string, the keys are JSON) -> value."""
    measures: dict[str, Callable[..., float]] = {"coverage": coverage, "gini": gini}
    return {
        name: {
            method: {str(k): measure(items_QK, k=k, num_items=num_items) for k in cutoffs}
            for method, items_QK in lists.items()
        }
        for name, measure in measures.items()
    }


def per_user_table(cases: EvalCases, lists: Mapping[str, Items], per_user: PerUser) -> pl.DataFrame:
    """One row per method and user: history length, targets, rank of the first hit (or null), metrics."""
    frames = []
    for method, values in per_user.items():
        columns = {
            "user_index": cases.user_index,
            "method": [method] * len(cases),
            "history_length": np.array([len(history) for history in cases.histories], dtype=np.int32),
            "num_targets": np.array([len(target) for target in cases.targets], dtype=np.int32),
            "first_hit_rank": first_hit_rank(hit_matrix(lists[method], cases.targets)),
            **values,
        }
        frames.append(pl.DataFrame(columns).with_columns(pl.col("first_hit_rank").replace(0, None)))
    return pl.concat(frames)
