"""The baselines without training, fitted on what the model was trained on and tuned on validation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lasar.baselines.ease import Ease
from lasar.baselines.item_knn import ItemKnn
from lasar.baselines.popularity import Popularity
from lasar.baselines.ranking import Baseline as Fitted
from lasar.baselines.ranking import Ranked
from lasar.baselines.transitions import tune_transitions
from lasar.data.interactions import SPLIT_VALID, EvalCases, Interactions
from lasar.evaluation.metrics import user_metrics
from lasar.progress import progress

Baseline = Literal["popularity", "transitions", "cooccurrence", "item_knn", "ease"]

_GRIDS: dict[str, tuple[Callable[..., Fitted], Sequence[dict[str, Any]]]] = {
    "item_knn": (
        ItemKnn, [{"neighbours": n, "shrinkage": s} for n in (20, 100, 500) for s in (0.0, 10.0, 50.0)],
    ),
    "ease": (Ease, [{"l2": l2} for l2 in (50.0, 150.0, 500.0, 1500.0)]),
}  # fmt: skip


def rank_with_baseline(
    name: Baseline,
    interactions: Interactions,
    cases: EvalCases,
    *,
    k: int,
    exclude_seen: bool,
    tuning_users: int,
    seed: int,
) -> tuple[Ranked, dict[str, Any]]:
    """Fit a baseline, rank the cases, and say with which settings.

    Args:
        name: of the baseline.
        interactions: its training events are fitted on.
        cases: users to rank for.
        k: length of the lists.
        exclude_seen: leave items of the history out.
        tuning_users: validation users on which settings are chosen.
        seed: chooses them.
    """
    sequences, num_items = interactions.train_sequences(), interactions.num_items
    if name == "popularity":
        popularity = Popularity().fit(sequences, num_items)
        return popularity.recommend(cases.histories, cases.baskets, k, exclude_seen=exclude_seen), {}
    valid = interactions.cases(SPLIT_VALID).subset(tuning_users, seed)
    if name in _GRIDS:
        return _rank_tuned(name, interactions, valid, cases, k=k, exclude_seen=exclude_seen)
    transitions = tune_transitions(
        sequences, num_items, valid, exclude_seen=exclude_seen, same_basket=name == "cooccurrence"
    )
    ranked = transitions.recommend(cases.histories, cases.baskets, k, exclude_seen=exclude_seen)
    return ranked, dataclasses.asdict(transitions.settings)


def _rank_tuned(
    name: str, interactions: Interactions, valid: EvalCases, cases: EvalCases, *, k: int, exclude_seen: bool
) -> tuple[Ranked, dict[str, Any]]:
    """Try every setting of a grid, and rank with the one of best validation NDCG@10."""
    build, grid = _GRIDS[name]
    sequences, best, ranked = interactions.train_sequences(), -1.0, None
    chosen: dict[str, Any] = {}
    with progress(f"tuning {name}", total=len(grid), unit="settings") as advance:
        for settings in grid:
            model = build(**settings)
            model.fit(sequences, interactions.num_items)
            ndcg = 0.0
            if len(valid):
                lists, _ = model.recommend(valid.histories, valid.baskets, 10, exclude_seen=exclude_seen)
                ndcg = float(user_metrics(lists, valid.targets, cutoffs=(10,))["ndcg@10"].mean())
            # Ranked at once, because a fitted model can be too large to keep a second one beside it.
            if ndcg > best:
                best, chosen = ndcg, settings
                ranked = model.recommend(cases.histories, cases.baskets, k, exclude_seen=exclude_seen)
            advance()
    assert ranked is not None
    return ranked, chosen
