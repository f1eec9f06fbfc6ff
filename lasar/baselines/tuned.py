"""The counting baselines, fitted on what the model was trained on and tuned on validation."""

import dataclasses
from typing import Any, Literal

from lasar.baselines.popularity import Popularity
from lasar.baselines.ranking import Ranked
from lasar.baselines.transitions import tune_transitions
from lasar.data.interactions import SPLIT_VALID, EvalCases, Interactions

Baseline = Literal["popularity", "transitions", "cooccurrence"]


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
    transitions = tune_transitions(
        sequences, num_items, valid, exclude_seen=exclude_seen, same_basket=name == "cooccurrence"
    )
    ranked = transitions.recommend(cases.histories, cases.baskets, k, exclude_seen=exclude_seen)
    return ranked, dataclasses.asdict(transitions.settings)
