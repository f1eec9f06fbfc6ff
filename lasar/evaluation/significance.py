"""How sure a number is: bootstrap intervals over users, paired differences, Holm's correction, seeds.

A user is the unit of resampling. Intervals are percentile intervals; a paired test resamples the per-user
differences, so that what makes a user easy or hard for both methods cancels.

Shapes: U users, M metrics, S bootstrap samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lasar.errors import DataError

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of `a - b` over the same users.

    Attributes:
        difference: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
        p_value: two-sided, of the hypothesis that the mean is zero.
        num_users: users compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_users: int


def bootstrap_means(values_UM: Values, *, samples: int, seed: int) -> Values:
    """Means of `samples` resamplings of the users, float64 `[S, M]`.

    Raises:
        ValueError: there is no user or no sample.
    """
    num_users = len(values_UM)
    if num_users == 0 or samples < 1:
        raise ValueError(f"cannot draw {samples} bootstrap samples from {num_users} users")
    rng = np.random.default_rng(seed)
    means_SM = np.empty((samples, values_UM.shape[1]))
    for sample in range(samples):
        # How often each user was drawn weighs all metrics at once; the values are never copied.
        drawn = np.bincount(rng.integers(num_users, size=num_users), minlength=num_users)
        means_SM[sample] = drawn @ values_UM / num_users
    return means_SM


def bootstrap_intervals(
    per_user: Mapping[str, Values], *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile interval of the mean of every metric.

    Args:
        per_user: metric name -> value of each user; all of one length.
        samples: bootstrap samples.
        seed: of the resampling; the same users are drawn for every metric.
        level: coverage of the intervals.
    """
    means_SM = bootstrap_means(np.column_stack(list(per_user.values())), samples=samples, seed=seed)
    low_M, high_M = np.quantile(means_SM, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: (float(low), float(high)) for name, low, high in zip(per_user, low_M, high_M, strict=True)}


def paired_bootstrap(
    a_U: Values, b_U: Values, *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> PairedDifference:
    """Compare two methods on the same users, in the same order.

    The p-value is the share of bootstrap differences, centred on zero, that are at least as large as the
    observed one; it is never below 1 / (samples + 1).

    Raises:
        ValueError: the lengths differ.
    """
    if len(a_U) != len(b_U):
        raise ValueError(f"{len(a_U)} users against {len(b_U)}: a paired test needs the same users")
    difference_U = np.asarray(a_U, dtype=np.float64) - np.asarray(b_U, dtype=np.float64)
    observed = float(difference_U.mean())
    drawn_S = bootstrap_means(difference_U[:, None], samples=samples, seed=seed)[:, 0]
    low, high = np.quantile(drawn_S, [(1 - level) / 2, (1 + level) / 2])
    # Rounding must not turn a tie (all differences equal) into a significant result.
    extreme = int((np.abs(drawn_S - observed) >= abs(observed) - 1e-12).sum())
    return PairedDifference(
        difference=observed,
        low=float(low),
        high=float(high),
        p_value=(extreme + 1) / (samples + 1),
        num_users=len(difference_U),
    )


def paired_by_user(
    a: Mapping[str, float], b: Mapping[str, float], *, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> PairedDifference:
    """Compare two runs on the users that both evaluated.

    Args:
        a: user id -> metric of the first run.
        b: user id -> metric of the second run.
        samples: bootstrap samples.
        seed: of the resampling.
        level: coverage of the interval.

    Raises:
        DataError: the runs share no user.
    """
    common = sorted(a.keys() & b.keys())
    if not common:
        raise DataError("the two runs share no user id, so they cannot be compared user by user")
    a_U = np.array([a[user] for user in common])
    b_U = np.array([b[user] for user in common])
    return paired_bootstrap(a_U, b_U, samples=samples, seed=seed, level=level)


def holm(p_values: ArrayLike) -> Values:
    """Holm's step-down adjustment of a family of p-values, in the order given, each at most 1."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def aggregate_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) over the seeds of one method.

    Args:
        runs: metrics of each seed; the same names in all.

    Returns:
        metric name -> `mean`, `sd` (0 for one seed), `min`, `max`, `num_seeds`.

    Raises:
        DataError: no run, or the runs do not report the same metrics.
    """
    if not runs:
        raise DataError("no run to aggregate")
    for run in runs:
        if run.keys() != runs[0].keys():
            odd = sorted(run.keys() ^ runs[0].keys())
            raise DataError(f"the seeds do not report the same metrics: {odd[0]!r} is missing in some")
    aggregated = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        aggregated[name] = {
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
            "min": float(values.min()),
            "max": float(values.max()),
            "num_seeds": len(values),
        }
    return aggregated
