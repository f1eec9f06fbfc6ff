"""blend: mix counts of what followed what into a trained model's lists.

Not in the paper. Item-to-item counts tie with trained models or beat them on several data sets, and err on other
users; so the two are interpolated, with a temperature and a share chosen on validation users. The artifact is a copy
of the model with the counts beside it, so whatever opens a model opens this. It runs where a recipe lists it.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import MANIFEST, StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.data.interactions import SPLIT_VALID, Interactions
from lasar.errors import DataError
from lasar.ranks import ranks

TEMPERATURES = (1.0, 0.7, 0.5, 0.3)  # of equal mixtures the first is taken
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_LEFT_OUT = (MANIFEST, "curve*.jsonl", "metrics.json")


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """What is mixed, and on whom the mixture is chosen."""

    by_default = False
    in_ranks = True

    model: str = "rl"
    """The stage whose model is mixed with counts; a trained baseline, too."""
    neighbours: Annotated[int, pydantic.Field(ge=1)] = 500
    """Items that counts keep for each item, the heaviest."""
    users: Annotated[int, pydantic.Field(ge=1)] = 2000
    """Validation users on which counts and mixture are chosen."""
    beam_width: Annotated[int, pydantic.Field(ge=10)] = 50
    """Items of the model's list that are mixed."""


def inputs(config: Config) -> tuple[str, ...]:
    """Artifacts read."""
    return ("prepare", "quantize", config.model)


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Tune the counts, rank validation users with the model, choose the mixture, write model and counts."""
    from lasar.baselines.opened import open_ranker
    from lasar.baselines.transitions import tune_transitions
    from lasar.evaluation.metrics import user_metrics
    from lasar.evaluation.shards import rank_in_shards

    prepare, model = context.inputs["prepare"], context.inputs[config.model]
    interactions = Interactions.load(prepare)
    valid = interactions.cases(SPLIT_VALID).subset(config.users, context.seed)
    if not len(valid):
        raise DataError(f"{prepare}: no user has a valid event to choose a mixture on; change prepare.split")
    exclude_seen = not interactions.has_repeats
    transitions = tune_transitions(
        interactions.train_sequences(), interactions.num_items, valid, exclude_seen=exclude_seen,
        same_basket=interactions.has_orders,
    )  # fmt: skip
    counts = transitions.counts(config.neighbours)
    rank = open_ranker(
        model, prepare=prepare, quantize=context.inputs["quantize"], device="auto", k=config.beam_width,
        beam_width=config.beam_width, exclude_seen=exclude_seen, seed=context.seed,
    ).rank  # fmt: skip
    ranked = rank_in_shards(
        lambda histories, baskets: rank(histories, baskets, "auto"),
        valid, k=config.beam_width, batch_size=64, scratch=context.scratch, name="blend",
    )  # fmt: skip
    if ranks().rank:
        return  # the first process does the rest
    seen = [np.unique(history) if exclude_seen else history[:0] for history in valid.histories]
    followed = [
        counts.follow(history, basket, listed=forbidden.astype(np.int64), allow=False)
        for history, basket, forbidden in zip(valid.histories, valid.baskets, seen, strict=True)
    ]

    def ndcg(temperature: float, share: float) -> float:
        mixture = counts.mixed(temperature=temperature, share=share)
        rows = zip(ranked.items_QK, ranked.scores_QK, followed, strict=True)
        mixed_QK = np.stack([mixture.mix(items, scores, *named)[0][:10] for items, scores, named in rows])
        return float(user_metrics(mixed_QK, valid.targets, cutoffs=(10,))["ndcg@10"].mean())

    tried = {
        (temperature, share): ndcg(temperature, share) for temperature in TEMPERATURES for share in SHARES
    }
    temperature, share = max(tried, key=lambda at: tried[at])
    shutil.copytree(model, context.output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    counts.mixed(temperature=temperature, share=share).save(context.output)
    facts = {
        "model": config.model, "validation_users": len(valid), "temperature": temperature, "share": share,
        "valid_ndcg@10": tried[temperature, share], "valid_ndcg@10_model": tried[1.0, 0.0],
        "pairs": len(counts.items_E), "counts": asdict(transitions.settings),
        "tried": [{"temperature": t, "share": s, "valid_ndcg@10": value} for (t, s), value in tried.items()],
    }  # fmt: skip
    write_json(context.output / "metrics.json", facts)


def show(folder: Path, console: Console) -> None:
    """Print what was chosen and what it gave on validation users."""
    facts = read_json(folder / "metrics.json")
    table = Table(title=f"blend: counts beside {facts['model']}", show_header=False)
    table.add_row("share of counts", f"{facts['share']:.0%}")
    table.add_row("temperature of the model", f"{facts['temperature']:g}")
    label = f"N@10 of {facts['validation_users']:,} validation users"
    table.add_row(f"{label}: model", f"{facts['valid_ndcg@10_model']:.4f}")
    table.add_row(f"{label}: mixed (chosen on them)", f"{facts['valid_ndcg@10']:.4f}")
    console.print(table)
