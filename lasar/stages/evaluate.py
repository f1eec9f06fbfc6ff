"""evaluate: rank the full catalogue for every held-out user, beside the baselines, with intervals.

Reads `prepare`, `quantize` and the stage that trained the model; writes `metrics.json`, `per_user.parquet`
and `examples.json`. The model ranks in shards kept in the scratch folder, so a killed evaluation continues.

Shapes: Q users, K rank positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from rich.console import Console

from lasar.artifacts import StageContext, read_json, write_json
from lasar.baselines.tuned import Baseline, rank_with_baseline
from lasar.config import StageConfig
from lasar.data.interactions import SPLIT_TEST, SPLIT_VALID, EvalCases, Interactions, ItemTable, load_user_ids
from lasar.errors import DataError
from lasar.evaluation.depth import by_chosen_depth, compare_depths, seconds_by_depth
from lasar.evaluation.examples import choose_examples
from lasar.evaluation.metrics import CUTOFFS, Items, user_metrics
from lasar.evaluation.shards import rank_in_shards
from lasar.evaluation.slices import by_history_length, by_target_popularity
from lasar.evaluation.summary import exposure, paired_differences, per_user_table, with_intervals
from lasar.evaluation.summary_view import print_metrics
from lasar.ranks import ranks

if TYPE_CHECKING:
    from lasar.baselines.opened import Opened, Rank
    from lasar.decoding.ranked import Ranked
    from lasar.model.reasoner import Depth


Lists = tuple[Items, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Depths(StageConfig):
    """How the latent steps of a model that reasons are chosen and studied."""

    choice: Literal["auto", "sampled"] | Annotated[int, pydantic.Field(ge=0)] = "auto"
    """Depth of the main result: the most probable one, one drawn from the Policy Head, or a number for everybody."""
    forced: tuple[Annotated[int, pydantic.Field(ge=0)], ...] = ()
    """Depths to force on the same users beside it; 0 answers without reasoning."""
    users: Annotated[int, pydantic.Field(ge=1)] = 2000
    """Users (chosen by the seed) on whom depths are forced."""
    timed_users: Annotated[int, pydantic.Field(ge=0)] = 0
    """Users of the batch that is timed at every forced depth; 0 measures no time."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How the model is evaluated."""

    in_ranks = True
    model: str = "rl"
    """The stage whose model is evaluated; it names the method in every table."""
    also: tuple[str, ...] = ("sft", "latent_sft")
    """Other stages whose models are evaluated beside it, on the same users; trained baselines, too."""
    depth: Depths = field(default_factory=Depths)
    """Latent steps of a model that reasons."""
    split: Literal["valid", "test"] = "test"
    """Which held-out events are the targets."""
    k: Annotated[int, pydantic.Field(ge=5)] = 20
    """Length of the ranked lists; metrics are reported at 5, 10 and 20 as far as it reaches."""
    beam_width: Annotated[int, pydantic.Field(ge=1)] = 50
    """Beams of the model's search; at least `k`."""
    batch_size: Annotated[int, pydantic.Field(ge=1)] = 64
    """Users ranked together."""
    device: str = "auto"
    """`auto`, `cpu`, or a torch device such as `cuda:0`."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """Of a generative model's matrix products on CPUs; fp32 is the reference, `auto` bf16 where that is faster here."""
    exclude_seen: bool = False
    """Leave items of the history out of every list, the baselines' too; where nobody takes an item twice."""
    max_users: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Evaluate a random subset of this many users (chosen by the seed); null: all."""
    baselines: tuple[Baseline, ...] = ("popularity", "transitions", "cooccurrence")
    """Methods without training, on the same users; `cooccurrence` needs orders of several items."""
    tuning_users: Annotated[int, pydantic.Field(ge=1)] = 1000
    """Validation users on which these baselines choose their settings."""
    bootstrap_samples: Annotated[int, pydantic.Field(ge=1)] = 1000
    """Resamplings behind every interval and p-value."""
    num_examples: Annotated[int, pydantic.Field(ge=0)] = 8
    """Users shown with titles."""


def inputs(config: Config) -> tuple[str, ...]:
    """Artifacts read."""
    return ("prepare", "quantize", *config.also, config.model)


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Rank, measure, compare, and write the results."""
    prepare = context.inputs["prepare"]
    summary, interactions = read_json(prepare / "summary.json"), Interactions.load(prepare)
    cases = interactions.cases(SPLIT_TEST if config.split == "test" else SPLIT_VALID)
    if len(cases) == 0:
        raise DataError(f"{prepare}: no user has a {config.split} event; change prepare.split")
    if config.max_users is not None:
        cases = cases.subset(config.max_users, context.seed)

    stages, seed = (config.model, *config.also), context.seed
    opened = {stage: open_stage(stage, config, context.inputs, seed=seed) for stage in stages}
    chosen = {stage: config.depth.choice if stage == config.model else "auto" for stage in stages}
    found = {s: _ranked(opened[s].rank, cases, chosen[s], config, context, s) for s in stages}
    cutoffs = tuple(cutoff for cutoff in CUTOFFS if cutoff <= config.k)
    main_k = max(cutoff for cutoff in cutoffs if cutoff <= 10)
    main = (f"hr@{main_k}", f"ndcg@{main_k}")
    forced = _forced(opened[config.model].rank, cases, config, context, main)
    if ranks().rank:
        return  # the first process does the rest
    ranked: dict[str, Lists] = {stage: lists[:2] for stage, lists in found.items()}
    depths_Q = found[config.model].depths_Q
    settings = {}
    for name in config.baselines:
        if name == "cooccurrence" and not interactions.has_orders:
            continue  # without orders of several items it is the same counting as transitions
        ranked[name], settings[name] = rank_with_baseline(
            name, interactions, cases, k=config.k, exclude_seen=config.exclude_seen,
            tuning_users=config.tuning_users, seed=context.seed,
        )  # fmt: skip
    per_user = {
        method: user_metrics(items_QK, cases.targets, cutoffs=cutoffs)
        for method, (items_QK, _) in ranked.items()
    }
    lengths = np.array([len(history) for history in cases.histories], dtype=np.int64)
    lists = {method: items_QK for method, (items_QK, _) in ranked.items()}
    train_counts = interactions.train_counts()
    metrics = {
        "dataset": summary["dataset"],
        "split_kind": interactions.split_kind,
        "train_targets": interactions.train_targets,
        **{name: getattr(config, name) for name in ("split", "model", "k", "beam_width", "exclude_seen")},
        "engine": {stage: own.engine for stage, own in opened.items()},
        "num_users": len(cases),
        "num_items": interactions.num_items,
        "mean_targets": float(np.mean([len(target) for target in cases.targets])),
        "main_k": main_k,
        "methods": with_intervals(per_user, samples=config.bootstrap_samples, seed=context.seed),
        "settings": settings,
        "paired": paired_differences(
            per_user, config.model, metrics=main, samples=config.bootstrap_samples, seed=context.seed
        ),
        **exposure(lists, cutoffs=cutoffs, num_items=interactions.num_items),
        "depth": {
            "choice": config.depth.choice,
            "mean": float(depths_Q.mean()),
            "by_chosen": by_chosen_depth(depths_Q, per_user[config.model], metrics=main),
            "forced": forced,
        },
        "slices": {
            "history_length": by_history_length(lengths, per_user, metrics=main),
            "target_popularity": by_target_popularity(cases.targets, train_counts, lists, k=main_k),
        },
    }
    write_json(context.output / "metrics.json", metrics)
    per_user_table(cases, lists, per_user).write_parquet(
        context.output / "per_user.parquet", compression="zstd"
    )
    examples = choose_examples(
        cases, ranked[config.model], ItemTable.load(prepare), load_user_ids(prepare), count=config.num_examples,
        seed=context.seed,
    )  # fmt: skip
    write_json(context.output / "examples.json", examples)


def show(folder: Path, console: Console) -> None:
    """Print the metrics with their intervals, and the model against each of the others."""
    print_metrics(read_json(folder / "metrics.json"), console)


def open_stage(stage: str, config: Config, inputs: Mapping[str, Path], *, seed: int) -> "Opened":
    """One trained model, ready to rank."""
    from lasar.baselines.opened import open_ranker

    return open_ranker(
        inputs[stage], prepare=inputs["prepare"], quantize=inputs["quantize"], device=config.device,
        precision=config.precision, k=config.k, beam_width=config.beam_width,
        exclude_seen=config.exclude_seen, seed=seed,
    )  # fmt: skip


def _ranked(
    rank: "Rank", cases: EvalCases, depth: "Depth", config: Config, context: StageContext, name: str
) -> "Ranked":
    return rank_in_shards(
        lambda histories, baskets: rank(histories, baskets, depth),
        cases, k=config.k, batch_size=config.batch_size, scratch=context.scratch, name=name,
    )  # fmt: skip


def _forced(
    rank: "Rank", cases: EvalCases, config: Config, context: StageContext, metrics: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Forced depths against the chosen one on a subset of the users; times go to a file of their own."""
    study = config.depth
    if not study.forced:
        return []
    subset, depths = cases.subset(study.users, context.seed), (study.choice, *study.forced)
    if study.timed_users and ranks().size == 1:  # others at work would be timed, too
        timed = cases.subset(study.timed_users, context.seed)
        seconds = seconds_by_depth(lambda depth: rank(timed.histories, timed.baskets, depth), depths)
        write_json(context.output / "latency.json", {"users": len(timed), "seconds": seconds})
    return compare_depths(
        lambda depth: _ranked(rank, subset, depth, config, context, f"{config.model} at depth {depth}"),
        subset.targets, depths, metrics=metrics, samples=config.bootstrap_samples, seed=context.seed,
    )  # fmt: skip
