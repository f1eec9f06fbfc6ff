"""Item-to-item transitions: what was taken after (or with) the items of the last baskets.

Training counts, for every ordered pair of items (i, j), how often j followed i: at a lag of `lag` baskets
it counts `decay ** (lag - 1)`, and `same_basket` when both lie in one basket. Data without orders has one
event per basket, so the same code counts steps of a sequence. A score is the sum over the history's items,
`recency ** age` each (age in baskets; 0 uses the last basket only), of counts divided by
`frequency(i) ** source_power * frequency(j) ** target_power`. Popularity breaks ties and fills lists that
transitions cannot.

Shapes: N baskets, Q queries, K rank positions, I items.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.baselines.ranking import Items, Ranked, top_items
from lasar.data.interactions import EvalCases, TrainSequence
from lasar.decoding.counts import Counts
from lasar.errors import require
from lasar.evaluation.metrics import user_metrics
from lasar.progress import progress

_CHUNK_QUERIES = 512
_OLDEST_WEIGHT = 1e-3
# Values tried one group at a time; a group's values are tried together because they act together.
_GROUPS: tuple[tuple[dict[str, float], ...], ...] = (
    ({"same_basket": 0.0}, {"same_basket": 0.3}, {"same_basket": 1.0}, {"same_basket": 3.0}),
    ({"window": 1, "decay": 1.0}, {"window": 4, "decay": 0.5}, {"window": 10, "decay": 0.8}),
    tuple(
        {"source_power": source, "target_power": target}
        for source, target in ((0.0, 0.0), (0.0, 0.3), (0.5, 0.0), (0.5, 0.3), (0.5, 0.5), (1.0, 0.5))
    ),
    ({"recency": 0.0}, {"recency": 0.5}, {"recency": 0.8}, {"recency": 1.0}),
)


@dataclass(frozen=True, kw_only=True)
class TransitionSettings:
    """What `tune_transitions` chooses on validation."""

    window: int = 4
    """Largest lag counted, in baskets."""
    decay: float = 0.5
    """Factor on a transition per further basket of lag."""
    same_basket: float = 1.0
    """Weight of two different items in one basket."""
    source_power: float = 0.5
    """How far frequent source items are toned down, 0..1."""
    target_power: float = 0.3
    """How far frequent target items are toned down, 0..1."""
    recency: float = 0.5
    """Factor on a history item per basket of age; 0 uses the last basket only."""


class Transitions:
    """Rank items by decayed, normalised transition counts from the history's items.

    Attributes:
        settings: how transitions are counted and weighed.
        counts_I: training events per item, int64 `[I]`; set by `fit`.
    """

    counts_I: NDArray[np.int64]

    def __init__(self, settings: TransitionSettings | None = None) -> None:
        """Use `settings`, or the defaults."""
        self.settings = settings or TransitionSettings()
        self._sparse = require("scipy.sparse", extra="embed")

    def fit(self, sequences: Sequence[TrainSequence], num_items: int) -> "Transitions":
        """Count transitions in training sequences."""
        return self._fit_counts(
            _count(sequences, num_items, self.settings, self._sparse), sequences, num_items
        )

    def recommend(
        self, histories: Sequence[Items], baskets: Sequence[Items], k: int, *, exclude_seen: bool = False
    ) -> Ranked:
        """Rank the catalogue for each history.

        Args:
            histories: per query, item indices, oldest first.
            baskets: per query, the basket number of each history event.
            k: length of the lists.
            exclude_seen: leave out items of the history.

        Returns:
            Items int32 `[Q, K]` (-1 where there are none left) and scores float32 `[Q, K]`.
        """
        parts = []
        for start in range(0, len(histories), _CHUNK_QUERIES):
            chunk = slice(start, start + _CHUNK_QUERIES)
            weights_QI = self._history_weights(histories[chunk], baskets[chunk])
            # The popularity term is too small to overturn any transition, so it only fills and breaks ties.
            scores_QI = (weights_QI @ self._transitions_II).toarray() + self._fallback_I
            excluded = histories[chunk] if exclude_seen else None
            parts.append(top_items(scores_QI, k, popularity_I=self.counts_I, excluded=excluded))
        if not parts:
            return np.zeros((0, k), dtype=np.int32), np.zeros((0, k), dtype=np.float32)
        return np.concatenate([items for items, _ in parts]), np.concatenate([scores for _, scores in parts])

    def counts(self, neighbours: int) -> Counts:
        """The weights, the heaviest `neighbours` of every item, to be mixed into a model's lists."""
        kept = [np.zeros(0, np.int64)]
        weights_II = self._transitions_II
        for start, stop in itertools.pairwise(weights_II.indptr):
            row = weights_II.data[start:stop]
            heaviest = np.argsort(-row, kind="stable")[:neighbours]
            kept.append(start + np.sort(heaviest[row[heaviest] > 0]))
        places_E = np.concatenate(kept)
        starts = np.cumsum([0, *(len(row) for row in kept[1:])])
        return Counts(
            starts=starts.astype(np.int64), items_E=weights_II.indices[places_E].astype(np.int32),
            weights_E=weights_II.data[places_E].astype(np.float32), recency=self.settings.recency,
        )  # fmt: skip

    def _fit_counts(
        self, counts_II: Any, sequences: Sequence[TrainSequence], num_items: int
    ) -> "Transitions":
        events = [sequence.items for sequence in sequences] or [np.zeros(0, dtype=np.int32)]
        self.counts_I = np.bincount(np.concatenate(events), minlength=num_items).astype(np.int64)
        frequency_I = np.maximum(self.counts_I, 1).astype(np.float64)
        source = self._sparse.diags_array(frequency_I**-self.settings.source_power)
        target = self._sparse.diags_array(frequency_I**-self.settings.target_power)
        self._transitions_II = (source @ counts_II @ target).tocsr()
        self._fallback_I = 1e-9 * self.counts_I / max(int(self.counts_I.max(initial=0)), 1)
        return self

    def _history_weights(self, histories: Sequence[Items], baskets: Sequence[Items]) -> Any:
        """Weight of every history item of every query, sparse `[Q, I]`."""
        queries, items, weights = [], [], []
        for query, (history, basket) in enumerate(zip(histories, baskets, strict=True)):
            if len(history) == 0:
                continue
            weight = np.power(self.settings.recency, (basket[-1] - basket).astype(np.float64))
            kept = weight > _OLDEST_WEIGHT
            queries.append(np.full(int(kept.sum()), query))
            items.append(history[kept])
            weights.append(weight[kept])
        shape = (len(histories), len(self.counts_I))
        if not queries:
            return self._sparse.csr_array(shape)
        places = (np.concatenate(queries), np.concatenate(items))
        return self._sparse.csr_array((np.concatenate(weights), places), shape=shape)


def tune_transitions(
    sequences: Sequence[TrainSequence],
    num_items: int,
    cases: EvalCases,
    *,
    exclude_seen: bool = False,
    same_basket: bool = True,
) -> Transitions:
    """Choose the settings with the best validation NDCG@10, one group after the other, and fit them.

    Args:
        sequences: training sequences.
        num_items: items in the catalogue.
        cases: validation cases; with none, the default settings are kept.
        exclude_seen: as in the evaluation to come.
        same_basket: also count items of one basket (an item-kNN); otherwise only what followed in later baskets.
    """
    sparse = require("scipy.sparse", extra="embed")
    start = TransitionSettings() if same_basket else TransitionSettings(same_basket=0.0)
    if len(cases) == 0:
        return Transitions(start).fit(sequences, num_items)
    groups = _GROUPS if same_basket else _GROUPS[1:]
    quality: dict[TransitionSettings, float] = {}
    counted: dict[tuple[float, ...], Any] = {}

    def ndcg(settings: TransitionSettings) -> float:
        if settings not in quality:
            key = (settings.window, settings.decay, settings.same_basket)
            if key not in counted:
                # Count matrices are large and neighbouring settings share them: keep only the last one.
                counted.clear()
                counted[key] = _count(sequences, num_items, settings, sparse)
            model = Transitions(settings)._fit_counts(counted[key], sequences, num_items)
            items_QK, _ = model.recommend(cases.histories, cases.baskets, 10, exclude_seen=exclude_seen)
            quality[settings] = float(user_metrics(items_QK, cases.targets, cutoffs=(10,))["ndcg@10"].mean())
        advance()
        return quality[settings]

    best = start
    description = "tuning cooccurrence" if same_basket else "tuning transitions"
    with progress(description, total=sum(len(group) for group in groups), unit="settings") as advance:
        for group in groups:
            candidates = [dataclasses.replace(best, **values) for values in group]  # type: ignore[arg-type]
            best = max(candidates, key=ndcg)
    return Transitions(best).fit(sequences, num_items)


def _count(
    sequences: Sequence[TrainSequence], num_items: int, settings: TransitionSettings, sparse: Any
) -> Any:
    """Decayed transition counts, sparse float64 `[I, I]`: row = source, column = target."""
    baskets_NI, user_N = _basket_matrix(sequences, num_items, sparse)
    counts_II = sparse.csr_array((num_items, num_items))
    if settings.same_basket > 0 and (baskets_NI.sum(axis=1) > 1).any():
        together_II = (baskets_NI.T @ baskets_NI).tocsr()
        together_II = together_II - sparse.diags_array(together_II.diagonal())
        counts_II = counts_II + settings.same_basket * together_II
    for lag in range(1, settings.window + 1):
        earlier = np.flatnonzero(user_N[lag:] == user_N[: len(user_N) - lag])
        if len(earlier) == 0:
            break
        followed_II = baskets_NI[earlier].T @ baskets_NI[earlier + lag]
        counts_II = counts_II + settings.decay ** (lag - 1) * followed_II
    return counts_II.tocsr()


def _basket_matrix(
    sequences: Sequence[TrainSequence], num_items: int, sparse: Any
) -> tuple[Any, NDArray[np.int64]]:
    """What each training basket holds, sparse 0/1 `[N, I]`, and the sequence that each basket belongs to."""
    rows, columns, owners = [], [], []
    num_baskets = 0
    for owner, (_, items, baskets) in enumerate(sequences):
        if len(items) == 0:
            continue
        number = np.cumsum(np.diff(baskets, prepend=baskets[0]) != 0)
        rows.append(number + num_baskets)
        columns.append(items)
        owners.append(np.full(int(number[-1]) + 1, owner))
        num_baskets += int(number[-1]) + 1
    if not rows:
        return sparse.csr_array((0, num_items)), np.zeros(0, dtype=np.int64)
    places = (np.concatenate(rows), np.concatenate(columns))
    baskets_NI = sparse.csr_array((np.ones(len(places[0])), places), shape=(num_baskets, num_items))
    baskets_NI.sum_duplicates()
    baskets_NI.data[:] = 1.0
    return baskets_NI, np.concatenate(owners)
