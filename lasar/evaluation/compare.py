"""Two systems on the same users: any evaluated model of any run against any other, over one or more seeds.

`evaluate` stores every user's metrics; here they are matched, after checking that both sides were asked the same
question. The statistic is that of a study's table (`seeded_difference`), with Holm's correction over all metrics shown.

Shapes: U users.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from lasar.artifacts import content_hash, read_json, read_manifest
from lasar.data.interactions import SPLIT_TEST, SPLIT_VALID, EvalCases, Interactions, ItemTable, load_user_ids
from lasar.errors import ConfigError, DataError, LasarError, nearest
from lasar.evaluation.study_table import (
    SAMPLES,
    Difference,
    Quantity,
    Users,
    Values,
    corrected,
    over_seeds,
    seeded_difference,
)

AGAINST = "against"

# What must agree for two evaluations to answer the same question, and where a recipe says it.
_CONDITIONS: Mapping[str, str] = {
    "dataset": "prepare.dataset",
    "split_kind": "prepare.split",
    "num_items": "prepare",
    "split": "evaluate.split",
    "exclude_seen": "evaluate.exclude_seen",
    "num_users": "evaluate.max_users",
}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One method of one run, as `evaluate` stored it.

    Attributes:
        run: the run folder.
        method: the model or baseline.
        seed: of the run.
        facts: what `metrics.json` says about how it was evaluated.
        users_U: indices of the users, ascending.
        values: metric -> value of each of them, float64 `[U]`.
    """

    run: Path
    method: str
    seed: int
    facts: Mapping[str, Any]
    users_U: Users
    values: Mapping[str, Values]


Pairs = Sequence[tuple[Evaluation, Evaluation]]


@dataclass(frozen=True, kw_only=True)
class Percent:
    """The difference as a share of the second side's mean, in percent."""

    effect: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric.

    Attributes:
        first: mean over users, by seed, of the first side.
        second: the same of the second.
        difference: first minus second; `p_holm` is corrected over all metrics compared.
        percent: the same relative to the second side; None where either mean is 0.
        verdict: of the first side; `tie` also where the corrected p is 0.05 or more.
    """

    first: Quantity
    second: Quantity
    difference: Difference
    percent: Percent | None
    verdict: Literal["higher", "lower", "tie"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two sides, metric by metric.

    Attributes:
        first: name of the method on the first side.
        second: on the second.
        first_runs: its run folders, by seed.
        second_runs: the run that each is paired with.
        facts: how all of them were evaluated.
        num_users: different users compared.
        metrics: by name.
    """

    first: str
    second: str
    first_runs: tuple[str, ...]
    second_runs: tuple[str, ...]
    facts: Mapping[str, Any]
    num_users: int
    metrics: Mapping[str, Compared]


def compare_runs(
    arguments: Sequence[str],
    *,
    models: Sequence[str] = (),
    metrics: Sequence[str] = (),
    samples: int = SAMPLES,
) -> Comparison:
    """Compare what a command line names.

    Args:
        arguments: two run folders; or several, `against`, several; or one, for two of its models.
        models: a model or baseline of both sides, or one of each; the one that `evaluate.model` named by default.
        metrics: names of metrics; HR and NDCG at the evaluation's main cutoff by default.
        samples: bootstrap samples.

    Raises:
        ConfigError: the arguments do not name two sides.
        ArtifactError: a run has no complete evaluation.
        DataError: the two sides cannot be compared; the message says what differs.
    """
    sides = _sides(arguments)
    if len(models) > 2:
        raise ConfigError(
            f"--model is given {len(models)} times; give it once (both sides) or twice (one each)"
        )
    names: list[str | None] = [models[0], models[-1]] if models else [None, None]
    first, second = (
        [read_evaluation(Path(run), model=name) for run in side]
        for side, name in zip(sides, names, strict=True)
    )
    return compare(first, second, metrics=metrics, samples=samples)


def read_evaluation(run: Path, *, model: str | None = None) -> Evaluation:
    """Read one method of a run.

    Args:
        run: the run folder.
        model: a method it evaluated; the one that `evaluate.model` named by default.

    Raises:
        ArtifactError: there is no complete evaluation.
        DataError: the method was not evaluated.
    """
    folder = run / "evaluate"
    manifest, facts = read_manifest(folder), read_json(folder / "metrics.json")
    method = model or facts["model"]
    if method not in facts["methods"]:
        raise DataError(
            f"{run}: {method!r} was not evaluated{nearest(method, facts['methods'])}; "
            f"there are: {', '.join(facts['methods'])} (evaluate.model, evaluate.also, evaluate.baselines)"
        )
    table = pl.read_parquet(folder / "per_user.parquet").filter(pl.col("method") == method).sort("user_index")
    return Evaluation(
        run=run,
        method=method,
        seed=manifest["seed"],
        facts=facts,
        users_U=table["user_index"].to_numpy().astype(np.int32),
        values={
            name: table[name].to_numpy().astype(np.float64)
            for name in facts["methods"][method]
            if name != "ci"
        },
    )


def compare(
    first: Sequence[Evaluation],
    second: Sequence[Evaluation],
    *,
    metrics: Sequence[str] = (),
    samples: int = SAMPLES,
) -> Comparison:
    """Compare two sides, seed by seed, on the same users.

    Args:
        first: one evaluation per seed.
        second: the same seeds; a single run may be compared with one of another seed.
        metrics: see `compare_runs`.
        samples: bootstrap samples.

    Raises:
        DataError: seeds, conditions, data or users differ, or a metric is unknown; the message says which.
    """
    pairs = _paired(first, second)
    reference = pairs[0][0]
    for one in (evaluation for pair in pairs for evaluation in pair):
        _refuse_other_conditions(reference, one)
    for a, b in pairs:
        if a.run.resolve() == b.run.resolve() and a.method == b.method:
            raise DataError(
                f"{a.run}: {a.method!r} on both sides; name two with --model, or give another run"
            )
        _refuse_other_users(a, b)
    names = _chosen_metrics(metrics, [evaluation for pair in pairs for evaluation in pair])
    differences = corrected([seeded_difference(_minus(pairs, name), samples=samples) for name in names])
    return Comparison(
        first=pairs[0][0].method,
        second=pairs[0][1].method,
        first_runs=tuple(str(a.run) for a, _ in pairs),
        second_runs=tuple(str(b.run) for _, b in pairs),
        facts={name: reference.facts[name] for name in _CONDITIONS},
        num_users=differences[0].num_users,
        metrics={
            name: Compared(
                first=over_seeds([float(a.values[name].mean()) for a, _ in pairs]),
                second=over_seeds([float(b.values[name].mean()) for _, b in pairs]),
                difference=found,
                percent=_percent(pairs, name, samples=samples),
                verdict=found.verdict,
            )
            for name, found in zip(names, differences, strict=True)
        },
    )


def _minus(pairs: Pairs, metric: str) -> dict[int, tuple[Users, Values]]:
    return {a.seed: (a.users_U, a.values[metric] - b.values[metric]) for a, b in pairs}


def _percent(pairs: Pairs, metric: str, *, samples: int) -> Percent | None:
    """The relative effect, mean(first) / mean(second) - 1, whose denominator is as uncertain as its numerator.

    To first order, what a user adds to the error of the logarithm of the ratio is a / mean(first) - b / mean(second).
    The mean of these is 0, so the logarithm plus each of them is a per-user value with the right mean, and the
    statistic of the difference applies. The logarithm, because it is closer to linear than the ratio itself.
    """
    means = [float(np.mean([pair[side].values[metric].mean() for pair in pairs])) for side in (0, 1)]
    if min(means) <= 0:
        return None
    log_ratio = float(np.log(means[0] / means[1]))
    found = seeded_difference(
        {
            a.seed: (a.users_U, log_ratio + a.values[metric] / means[0] - b.values[metric] / means[1])
            for a, b in pairs
        },
        samples=samples,
    )
    effect, low, high = (100 * float(np.expm1(end)) for end in (log_ratio, found.low, found.high))
    return Percent(effect=effect, low=low, high=high)


def _sides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    runs = list(arguments)
    if AGAINST in runs:
        place = runs.index(AGAINST)
        sides = runs[:place], runs[place + 1 :]
    elif len(runs) > 2:
        raise ConfigError(
            f"{len(runs)} runs without '{AGAINST}'; say which side each is on: RUN... {AGAINST} RUN..."
        )
    else:
        sides = runs[:1], runs[-1:]
    if not all(sides) or AGAINST in sides[1]:
        raise ConfigError(f"{' '.join(runs)}: give runs on both sides of one '{AGAINST}'")
    return sides


def _paired(first: Sequence[Evaluation], second: Sequence[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
    """By seed; each side is one method."""
    by_seed = [{evaluation.seed: evaluation for evaluation in side} for side in (first, second)]
    for side, found in zip((first, second), by_seed, strict=True):
        for evaluation in side:
            if found[evaluation.seed] is not evaluation:
                other = found[evaluation.seed].run
                raise DataError(
                    f"{evaluation.run} and {other}: both have seed {evaluation.seed}; give one of them"
                )
            if evaluation.method != side[0].method:
                raise DataError(
                    f"{evaluation.run}: its model is {evaluation.method!r}, that of {side[0].run} is "
                    f"{side[0].method!r}; name one with --model"
                )
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    if by_seed[0].keys() != by_seed[1].keys():
        shown = [", ".join(map(str, sorted(found))) for found in by_seed]
        raise DataError(
            f"seeds {shown[0]} against seeds {shown[1]}: give runs of the same seeds on both sides"
        )
    return [(by_seed[0][seed], by_seed[1][seed]) for seed in sorted(by_seed[0])]


def _refuse_other_conditions(a: Evaluation, b: Evaluation) -> None:
    different = [
        f"{name} is {b.facts[name]} but {a.facts[name]} ({key})"
        for name, key in _CONDITIONS.items()
        if a.facts[name] != b.facts[name]
    ]
    if different:
        raise DataError(
            f"{b.run} and {a.run} cannot be compared, they were evaluated differently: {'; '.join(different)}"
        )
    prepared = [read_manifest(e.run / "evaluate")["inputs"].get("prepare") for e in (a, b)]
    if prepared[0] != prepared[1]:
        _refuse_other_data(a, b)


def _refuse_other_data(a: Evaluation, b: Evaluation) -> None:
    """Different `prepare` artifacts may still ask the same question (other texts, other training targets): look."""
    for evaluation in (a, b):
        try:
            made = content_hash(evaluation.run / "prepare")
        except LasarError:
            made = ""
        if made != read_manifest(evaluation.run / "evaluate")["inputs"].get("prepare"):
            raise DataError(
                f"{b.run} and {a.run} were evaluated on different 'prepare' artifacts, and the one of "
                f"{evaluation.run} is no longer there to look at; run its stages again"
            )
    questions: dict[str, Callable[[Path], Any]] = {
        "items (the candidates)": lambda folder: ItemTable.load(folder).item_ids,
        "user ids": load_user_ids,
    }
    for what, read in questions.items():
        if read(a.run / "prepare") != read(b.run / "prepare"):
            raise DataError(f"{b.run} and {a.run} cannot be compared: their {what} differ")
    cases = [_cases(evaluation) for evaluation in (a, b)]
    for what, field in (("held-out items", "targets"), ("histories", "histories"), ("orders", "baskets")):
        one, other = (getattr(found, field) for found in cases)
        for user, mine, theirs in zip(cases[0].user_index, one, other, strict=True):
            if not np.array_equal(mine, theirs):
                raise DataError(
                    f"{b.run} and {a.run} cannot be compared: {what} differ, first of user {user} "
                    f"({len(theirs)} and {len(mine)} items)"
                )


def _cases(evaluation: Evaluation) -> EvalCases:
    split = SPLIT_TEST if evaluation.facts["split"] == "test" else SPLIT_VALID
    return Interactions.load(evaluation.run / "prepare").cases(split)


def _refuse_other_users(a: Evaluation, b: Evaluation) -> None:
    if not np.array_equal(a.users_U, b.users_U):
        only = len(np.setdiff1d(a.users_U, b.users_U)), len(np.setdiff1d(b.users_U, a.users_U))
        raise DataError(
            f"{a.run} and {b.run} were evaluated on different users ({only[0]:,} are only in the first, {only[1]:,} "
            f"only in the second); evaluate.max_users draws them by the seed: use one seed, or null for all users"
        )


def _chosen_metrics(metrics: Sequence[str], evaluations: Sequence[Evaluation]) -> list[str]:
    """What was asked for, checked; or the main metrics."""
    facts = evaluations[0].facts
    names = list(dict.fromkeys(metrics)) or [f"hr@{facts['main_k']}", f"ndcg@{facts['main_k']}"]
    for evaluation in evaluations:
        for name in names:
            if name not in evaluation.values:
                raise DataError(
                    f"{evaluation.run}: no metric {name!r}{nearest(name, evaluation.values)}; "
                    f"there are: {', '.join(evaluation.values)} (evaluate.k)"
                )
        if "mrr" in names and evaluation.facts["k"] != facts["k"]:
            raise DataError(
                f"{evaluation.run}: mrr is cut off at {evaluation.facts['k']}, in {evaluations[0].run} at "
                f"{facts['k']}; evaluate both with one evaluate.k, or compare other metrics"
            )
    return names
