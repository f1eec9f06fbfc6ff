"""evaluate: rank the full catalogue for every held-out user, beside the baselines, with intervals.

Reads `prepare`, `quantize` and the stage that trained the model; writes `metrics.json`, `per_user.parquet`
and `examples.json`. The model ranks in shards kept in the scratch folder, so a killed evaluation continues.

Shapes: Q users, K rank positions.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.data.interactions import SPLIT_TEST, SPLIT_VALID, EvalCases, Interactions, ItemTable, load_user_ids
from lasar.errors import DataError
from lasar.evaluation.examples import choose_examples
from lasar.evaluation.metrics import CUTOFFS, Items, user_metrics
from lasar.evaluation.shards import Rank, Ranked, rank_in_shards
from lasar.evaluation.slices import by_history_length, by_target_popularity
from lasar.evaluation.summary import exposure, paired_differences, per_user_table, with_intervals

Baseline = Literal["popularity", "transitions", "cooccurrence"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How the model is evaluated."""

    model: str = "sft"
    """The stage whose model is evaluated; it names the method in every table."""
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
    exclude_seen: bool = False
    """Leave items of the history out of every list, the baselines' too; where nobody takes an item twice."""
    max_users: Annotated[int, pydantic.Field(ge=1)] | None = None
    """Evaluate a random subset of this many users (chosen by the seed); null: all."""
    baselines: tuple[Baseline, ...] = ("popularity", "transitions", "cooccurrence")
    """Methods evaluated beside the model, on the same users; `cooccurrence` needs orders of several items."""
    tuning_users: Annotated[int, pydantic.Field(ge=1)] = 1000
    """Validation users on which the counting baselines choose their settings."""
    bootstrap_samples: Annotated[int, pydantic.Field(ge=1)] = 1000
    """Resamplings behind every interval and p-value."""
    num_examples: Annotated[int, pydantic.Field(ge=0)] = 8
    """Users shown with titles."""


def inputs(config: Config) -> tuple[str, ...]:
    """Artifacts read."""
    return ("prepare", "quantize", config.model)


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Rank, measure, compare, and write the results."""
    summary = read_json(context.inputs["prepare"] / "summary.json")
    interactions = Interactions.load(context.inputs["prepare"])
    cases = interactions.cases(SPLIT_TEST if config.split == "test" else SPLIT_VALID)
    if len(cases) == 0:
        raise DataError(
            f"{context.inputs['prepare']}: no user has a {config.split} event; change prepare.split"
        )
    if config.max_users is not None:
        cases = cases.subset(config.max_users, context.seed)

    ranker = _model_ranker(config, context)
    ranked = {
        config.model: rank_in_shards(
            ranker,
            cases,
            k=config.k,
            batch_size=config.batch_size,
            scratch=context.scratch,
            description=f"ranking with {config.model}",
        )
    }
    settings = {}
    for name in config.baselines:
        if name == "cooccurrence" and not interactions.has_orders:
            continue  # without orders of several items it is the same counting as transitions
        ranked[name], settings[name] = _rank_baseline(name, interactions, cases, config, context.seed)

    cutoffs = tuple(cutoff for cutoff in CUTOFFS if cutoff <= config.k)
    main_k = max(cutoff for cutoff in cutoffs if cutoff <= 10)
    main = (f"hr@{main_k}", f"ndcg@{main_k}")
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
        "split": config.split,
        "num_users": len(cases),
        "num_items": interactions.num_items,
        "mean_targets": float(np.mean([len(target) for target in cases.targets])),
        "model": config.model,
        "k": config.k,
        "main_k": main_k,
        "beam_width": config.beam_width,
        "exclude_seen": config.exclude_seen,
        "methods": with_intervals(per_user, samples=config.bootstrap_samples, seed=context.seed),
        "settings": settings,
        "paired": paired_differences(
            per_user, config.model, metrics=main, samples=config.bootstrap_samples, seed=context.seed
        ),
        **exposure(lists, cutoffs=cutoffs, num_items=interactions.num_items),
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
        cases,
        ranked[config.model],
        ItemTable.load(context.inputs["prepare"]),
        load_user_ids(context.inputs["prepare"]),
        count=config.num_examples,
        seed=context.seed,
    )
    write_json(context.output / "examples.json", examples)


def show(folder: Path, console: Console) -> None:
    """Print the metrics with their intervals, and the model against each baseline."""
    metrics = read_json(folder / "metrics.json")
    k = metrics["main_k"]
    several = metrics["split_kind"] in ("last_basket", "temporal")
    hit = "any-hit HR" if several else "HR"
    table = Table(
        title=f"{metrics['dataset']}, {metrics['split']} split ({metrics['split_kind']}), "
        f"{metrics['num_users']:,} users, {metrics['num_items']:,} items, 95 % intervals",
        title_justify="left",
    )
    names = {f"hr@{k}": f"{hit}@{k}", f"ndcg@{k}": f"NDCG@{k}", "mrr": "MRR"}
    if several:
        names[f"recall@{k}"] = f"Recall@{k}"
    table.add_column("method", no_wrap=True)
    for title in names.values():
        table.add_column(title, justify="right", no_wrap=True)
    for method, values in metrics["methods"].items():
        ends = {name: values["ci"][name] for name in names}
        table.add_row(method, *(f"{values[name]:.4f}" for name in names))
        table.add_row("", *(f"{low:.4f}-{high:.4f}" for low, high in ends.values()), style="dim")
    console.print(table)
    if "cooccurrence" in metrics["methods"]:
        console.print("transitions: what followed in later orders; cooccurrence: also what shared an order")
    for baseline, comparison in metrics["paired"].items():
        for name, value in comparison.items():
            console.print(
                f"{metrics['model']} - {baseline}: {names.get(name, name)} {value['difference']:+.4f} "
                f"[{value['low']:+.4f}, {value['high']:+.4f}], p = {value['p_holm']:.3g} (Holm)",
                highlight=False,
            )


def _model_ranker(config: Config, context: StageContext) -> Rank:
    from lasar.recommender import Recommender

    recommender = Recommender.from_artifacts(
        prepare=context.inputs["prepare"],
        quantize=context.inputs["quantize"],
        model=context.inputs[config.model],
        device=config.device,
    )

    def rank(histories: list[Items], baskets: list[Items]) -> Ranked:
        return recommender.rank(
            histories, baskets, k=config.k, beam_width=config.beam_width, exclude_seen=config.exclude_seen
        )

    return rank


def _rank_baseline(
    name: str, interactions: Interactions, cases: EvalCases, config: Config, seed: int
) -> tuple[Ranked, dict[str, Any]]:
    """Fit a baseline on the events the model was trained on, rank, and say with which settings."""
    from lasar.baselines.popularity import Popularity
    from lasar.baselines.transitions import tune_transitions

    sequences, num_items = interactions.train_sequences(), interactions.num_items
    if name == "popularity":
        popularity = Popularity().fit(sequences, num_items)
        return popularity.recommend(
            cases.histories, cases.baskets, config.k, exclude_seen=config.exclude_seen
        ), {}
    valid = interactions.cases(SPLIT_VALID).subset(config.tuning_users, seed)
    transitions = tune_transitions(
        sequences, num_items, valid, exclude_seen=config.exclude_seen, same_basket=name == "cooccurrence"
    )
    ranked = transitions.recommend(cases.histories, cases.baskets, config.k, exclude_seen=config.exclude_seen)
    return ranked, dataclasses.asdict(transitions.settings)
