"""A study's table: the same experiment with one thing changed per arm, over several seeds.

Every arm is compared with one reference arm on the same seeds and the same users. What a table may claim is
decided here, in one place: see `seeded_difference`.

Shapes: U users, S seeds, B bootstrap samples.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lasar.config import StageConfig, parse_section
from lasar.errors import ConfigError, DataError
from lasar.evaluation.significance import bootstrap_means, holm

METRICS = ("hr@10", "ndcg@10")
SAMPLES = 2000
_LEVEL = 0.95
_KINDS = ("untrained", "before", "arm")  # as they are shown

Values = NDArray[np.float64]
Users = NDArray[np.int32]
Kind = Literal["arm", "before", "untrained"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One finished arm of one seed.

    Attributes:
        arm: the arm, or the stage whose model every arm started from.
        seed: the run's seed.
        users_U: indices of the users evaluated.
        values: metric -> value of each of them, float64 `[U]`.
        depth: mean number of latent steps; None where nothing reasons.
        kind: an arm, a model from which one started, or a method without training beside them.
        seconds: wall time of training; None where it is not known.
        pipeline_seconds: that of all stages that the model needs, but `prepare`.
        parameters: trained ones; None where there are none.
        reported: further numbers by label; None where the arm has no such number.
    """

    arm: str
    seed: int
    users_U: Users
    values: Mapping[str, Values]
    depth: float | None = None
    seconds: float | None = None
    reported: Mapping[str, float | None]
    kind: Kind = "arm"
    pipeline_seconds: float | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Quantity(StageConfig):
    """A number that every seed has."""

    mean: float
    """Over the seeds."""
    sd: float | None
    """Over the seeds (n - 1); null for one seed."""
    by_seed: tuple[float, ...]
    """In the order of the row's seeds."""


@dataclass(frozen=True, kw_only=True)
class Difference(StageConfig):
    """An arm minus the reference, over common seeds and users."""

    difference: float
    """Mean over seeds of the mean over users."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the interval."""
    p_value: float
    """Two-sided, of the hypothesis that the difference is zero."""
    p_holm: float
    """Corrected over all comparisons of the table."""
    seed_sd: float | None
    """Standard deviation over seeds of the per-seed difference; null for one seed."""
    seeds: tuple[int, ...]
    """Seeds that both arms have."""
    num_users: int
    """Different users compared."""
    verdict: Literal["higher", "lower", "tie"]
    """`tie` where the interval contains 0, the difference is smaller than `seed_sd`, or `p_holm` is 0.05 or more."""


@dataclass(frozen=True, kw_only=True)
class Latency(StageConfig):
    """How long an arm's first seed takes to answer, measured in turns with the other arms."""

    milliseconds: dict[int, float]
    """Requests ranked together -> median time of the batch divided by them."""
    steps: float
    """Latent steps, or words written, before an answer; mean over the requests."""


@dataclass(frozen=True, kw_only=True)
class StudyRow(StageConfig):
    """One arm of the table."""

    arm: str
    """Its name."""
    kind: Kind
    """An arm, a model from which one started, or a method without training beside them."""
    changes: dict[str, Any]
    """What it changes in the base recipe."""
    settings: dict[str, dict[str, Any]]
    """Every value of the stages that were run for this arm."""
    seeds: tuple[int, ...]
    """Seeds finished."""
    metrics: dict[str, Quantity]
    """Mean over users of every metric."""
    depth: Quantity | None
    """Mean number of latent steps."""
    seconds: Quantity | None
    """Wall time of training."""
    pipeline_seconds: Quantity | None = None
    """Wall time of all stages that the model needs, but `prepare`."""
    parameters: int | None = None
    """Trained ones, of the first seed."""
    reported: dict[str, Quantity | None]
    """Further numbers by label."""
    latency: Latency | None = None
    """How long a request takes; null where it was not measured."""
    against_reference: dict[str, Difference] | None
    """By metric; null for the reference and for arms without a seed in common."""


@dataclass(frozen=True, kw_only=True)
class StudyResult(StageConfig):
    """Everything that the table of a study says, and where it comes from."""

    name: str
    """Name of the study."""
    file: str
    """Its file in this repository."""
    base: str
    """The recipe that the arms change."""
    dataset: str
    """Name of the data set."""
    split: str
    """How events were held out."""
    evaluated_on: str
    """`test` or `valid`."""
    exclude_seen: bool
    """Whether items of the history were left out of the lists."""
    num_users: int
    """Users evaluated per seed."""
    model: str
    """The stage whose model is compared."""
    reference: str
    """The arm that all others are compared with."""
    planned_seeds: tuple[int, ...]
    """Seeds of the study file."""
    shared: dict[str, dict[str, Any]]
    """Every value of the stages that all arms share."""
    rows: tuple[StudyRow, ...]
    """The table."""
    device: str
    """Where it was trained."""
    commit: str
    """Commit of this repository when the table was made."""
    versions: tuple[dict[str, str], ...]
    """Library versions behind the compared models; more than one set where they differ."""


def seeded_difference(
    by_seed: Mapping[int, tuple[Users, Values]], *, samples: int = SAMPLES, seed: int = 0
) -> Difference:
    """Estimate a difference that would be seen again with other users and another training seed.

    The estimate is the mean over seeds of the mean over users of the per-user difference, so it equals the
    difference of the two arms' means in the table; seeds may have evaluated different users.

    Two things make it uncertain. Users: all per-seed means are resampled together by user, so that what is
    peculiar to a user is not taken for evidence once per seed. Training: the variance of the per-seed
    differences, less what the choice of users alone would give them (known from the same per-user
    values), is a variance between training runs; it is known from S - 1 degrees of freedom only, so every
    bootstrap sample draws one that is compatible with the observed variance. A bootstrap over users alone
    answers for these very checkpoints: where training runs differ as much as users do, it finds a difference
    between two identical arms in a fifth of all studies with 3 seeds, instead of in a twentieth.

    One seed says nothing about training runs: the interval is over users only.

    Args:
        by_seed: seed -> indices of the users, and the arm minus the reference for each of them.
        samples: bootstrap samples.
        seed: of the resampling.

    Returns:
        The difference; `p_holm` equals `p_value` until the table corrects it.

    Raises:
        ValueError: there is no seed.
    """
    users_U = np.unique(np.concatenate([users for users, _ in by_seed.values()]))
    means_S = np.array([values.mean() for _, values in by_seed.values()])
    share_US = np.zeros((len(users_U), len(by_seed)))  # what each user adds to the error of each seed's mean
    for column, (users, values) in enumerate(by_seed.values()):
        share_US[np.searchsorted(users_U, users), column] = (values - values.mean()) / len(values)
    observed, num_seeds = float(means_S.mean()), len(means_S)
    error_U = share_US.mean(axis=1) * len(users_U)  # its mean over users is 0
    deviation_B = bootstrap_means(error_U[:, None], samples=samples, seed=seed)[:, 0]
    if num_seeds > 1:
        covariance_SS = share_US.T @ share_US
        by_users = (np.trace(covariance_SS) - covariance_SS.sum() / num_seeds) / (num_seeds - 1)
        rng = np.random.default_rng([seed, 1])  # another stream than the users'
        variance_B = means_S.var(ddof=1) * (num_seeds - 1) / rng.chisquare(num_seeds - 1, size=samples)
        between_B = np.maximum(variance_B - by_users, 0.0)
        deviation_B = deviation_B + np.sqrt(between_B / num_seeds) * rng.standard_normal(samples)
    low, high = observed + np.quantile(deviation_B, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    # Rounding must not turn a tie (all differences equal) into a significant result.
    p_value = (int((np.abs(deviation_B) >= abs(observed) - 1e-12).sum()) + 1) / (samples + 1)
    seed_sd = float(means_S.std(ddof=1)) if num_seeds > 1 else None
    tie = low <= 0 <= high or abs(observed) < (seed_sd or 0.0)
    return Difference(
        difference=observed, low=float(low), high=float(high), p_value=p_value, p_holm=p_value, seed_sd=seed_sd,
        seeds=tuple(by_seed), num_users=len(users_U),
        verdict="tie" if tie else "higher" if observed > 0 else "lower",
    )  # fmt: skip


def compare_arms(
    cells: Sequence[Cell], reference: str, *, samples: int = SAMPLES
) -> dict[str, dict[str, Difference]]:
    """Every arm minus the reference, by arm and metric, with Holm's correction over all of them.

    An arm without a seed in common with the reference is left out.

    Raises:
        DataError: two arms of one seed share no user.
    """
    of_reference = {cell.seed: cell for cell in cells if cell.arm == reference}
    found: dict[str, dict[str, Difference]] = {}
    for arm in dict.fromkeys(cell.arm for cell in cells if cell.arm != reference):
        pairs = [(c, of_reference[c.seed]) for c in cells if c.arm == arm and c.seed in of_reference]
        pairs.sort(key=lambda pair: pair[0].seed)
        if pairs:
            found[arm] = {
                metric: seeded_difference(
                    {cell.seed: _minus(cell, other, metric) for cell, other in pairs}, samples=samples
                )
                for metric in METRICS
            }
    adjusted = iter(
        corrected([difference for by_metric in found.values() for difference in by_metric.values()])
    )
    return {arm: {metric: next(adjusted) for metric in by_metric} for arm, by_metric in found.items()}


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with `p_holm` by Holm's method over all of them, and verdicts that heed it."""
    adjusted = holm([difference.p_value for difference in differences])
    return [
        replace(found, p_holm=float(p), verdict=found.verdict if p < 1 - _LEVEL else "tie")
        for found, p in zip(differences, adjusted, strict=True)
    ]


def build_rows(
    cells: Sequence[Cell],
    reference: str,
    *,
    changes: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Mapping[str, Any]]],
    latency: Mapping[str, Latency] = MappingProxyType({}),
    samples: int = SAMPLES,
) -> tuple[StudyRow, ...]:
    """The table's rows: methods without training, what the arms started from, the arms in the order of `changes`.

    Args:
        cells: the finished ones, in any order.
        reference: the arm that every other is compared with.
        changes: by arm, what it changes in the base recipe.
        settings: by arm, every value of the stages that were run for it.
        latency: by arm, how long it takes to answer, where that was measured.
        samples: bootstrap samples of the comparisons.
    """
    compared = compare_arms(cells, reference, samples=samples)
    by_arm: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (_KINDS.index(cell.kind), cell.seed)):
        by_arm.setdefault(cell.arm, []).append(cell)
    order = [*(arm for arm in by_arm if arm not in changes), *(arm for arm in changes if arm in by_arm)]
    return tuple(
        StudyRow(
            arm=arm,
            kind=by_arm[arm][0].kind,
            changes=dict(changes.get(arm, {})),
            settings={stage: dict(values) for stage, values in settings.get(arm, {}).items()},
            seeds=tuple(cell.seed for cell in by_arm[arm]),
            metrics={
                metric: over_seeds([float(cell.values[metric].mean()) for cell in by_arm[arm]])
                for metric in METRICS
            },
            depth=_quantity([cell.depth for cell in by_arm[arm]]),
            seconds=_quantity([cell.seconds for cell in by_arm[arm]]),
            pipeline_seconds=_quantity([cell.pipeline_seconds for cell in by_arm[arm]]),
            parameters=by_arm[arm][0].parameters,
            latency=latency.get(arm),
            reported={
                label: _quantity([cell.reported[label] for cell in by_arm[arm]])
                for label in by_arm[arm][0].reported
            },
            against_reference=compared.get(arm),
        )
        for arm in order
    )


def write_study(path: Path, result: StudyResult) -> None:
    """Write a study's result as JSON, floats rounded to what is meaningful."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(asdict(result)), indent=1, allow_nan=False)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read_studies(folder: Path) -> list[StudyResult]:
    """Read and validate every `*.json` of a folder, by name; a missing folder has none.

    Raises:
        DataError: a file is not the result of a study; the message names the key.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(parse_section(StudyResult, values, where=str(path)))
        except (ValueError, ConfigError) as error:
            raise DataError(f"{path}: not the result of a study: {error}; run: lasar study --save") from None
    return sorted(found, key=lambda result: result.name)


def _minus(cell: Cell, other: Cell, metric: str) -> tuple[Users, Values]:
    """Per-user difference on the users that both evaluated."""
    users, own, others = np.intersect1d(cell.users_U, other.users_U, assume_unique=True, return_indices=True)
    if len(users) == 0:
        raise DataError(f"seed {cell.seed}: {cell.arm!r} and {other.arm!r} were evaluated on different users")
    return users, cell.values[metric][own] - other.values[metric][others]


def over_seeds(values: Sequence[float]) -> Quantity:
    """Mean and standard deviation over seeds."""
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Quantity(mean=float(np.mean(values)), sd=sd, by_seed=tuple(values))


def _quantity(values: Sequence[float | None]) -> Quantity | None:
    known = [value for value in values if value is not None]
    return over_seeds(known) if len(known) == len(values) else None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list | tuple) else value
