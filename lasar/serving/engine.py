"""The engine thread's side: compatible queries in, ranked items out, through the ranker that everything else uses.

Legend: Q queries, W beams.
"""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lasar.cot.anchors import AnchorStore
from lasar.model.prompt import Prefix
from lasar.model.reasoner import Depth, LatentReasoner, Thought
from lasar.serving.catalogue import Snapshot
from lasar.serving.insight import Insight, look_inside

Int32Array = NDArray[np.int32]


class TimedReasoner(LatentReasoner):
    """The same model, noting when it began and when it finished thinking.

    Attributes:
        began: seconds, of the last call.
        ended: seconds, of the last call.
    """

    def __init__(self, reasoner: LatentReasoner) -> None:
        """Share everything with `reasoner`."""
        self.__dict__.update(reasoner.__dict__)  # whatever a reasoner consists of
        self.began = self.ended = 0.0

    def think(self, prefix: Prefix, *, depth: Depth = "auto", uniform_B: Tensor | None = None) -> Thought:
        """As `LatentReasoner.think`."""
        self.began = time.perf_counter()
        thought = super().think(prefix, depth=depth, uniform_B=uniform_B)
        self.ended = time.perf_counter()
        return thought


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """One request, in item indices of one snapshot.

    Attributes:
        snapshot: the catalogue version that the indices belong to.
        items: history, oldest first.
        baskets: order number of each.
        exclude: items never to return, deactivated and (if asked for) seen ones among them.
        allow: the only items to choose from; None for all.
        k: items to return.
        beam_width: beams; at least `k` are used.
        depth: latent steps.
        seed: of a `sampled` depth.
        explain: whether to look inside.
    """

    snapshot: Snapshot
    items: Int32Array
    baskets: Int32Array
    exclude: Int32Array
    allow: Int32Array | None
    k: int
    beam_width: int
    depth: Depth
    seed: int
    explain: bool

    @property
    def width(self) -> int:
        """Beams of the search."""
        return max(self.beam_width, self.k)

    @property
    def group(self) -> Hashable:
        """Queries with equal groups can share a batch; to explain takes long, so such a query is alone with it."""
        seed = self.seed if self.depth == "sampled" else 0
        return (
            self.snapshot.version,
            str(self.depth),
            self.width,
            self.allow is None,
            seed,
            id(self) if self.explain else 0,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """Items for one query, best first.

    Attributes:
        items: indices.
        scores: summed log-probabilities of their codes.
        depth: latent steps taken.
        stage_seconds: seconds of `prompt`, `think`, `search` (of the whole batch) and `explain` (of this query).
        insight: what an explanation needs.
    """

    items: list[int]
    scores: list[float]
    depth: int
    stage_seconds: dict[str, float] = field(default_factory=dict)
    insight: Insight | None = None


class Engine:
    """Answers groups of queries; used by one thread."""

    def __init__(self, reasoner: TimedReasoner, *, anchors: AnchorStore | None) -> None:
        """Use a model; `anchors` put its thoughts into words."""
        self._reasoner, self._anchors = reasoner, anchors

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer queries of one group, in order.

        Raises:
            ConfigError: the model was not trained for that depth.
        """
        first = queries[0]
        ranker = first.snapshot.recommender.ranker
        filtered = any(len(query.exclude) for query in queries) or first.allow is not None
        # To explain needs all beams; otherwise those that no list has room for need not be finished.
        longest = first.width if first.explain else max(query.k for query in queries)
        began = time.perf_counter()
        ranked = ranker.rank(
            [query.items for query in queries],
            [query.baskets for query in queries],
            k=longest,
            beam_width=first.width,
            exclude=[query.exclude for query in queries] if filtered else None,
            allow=None if first.allow is None else [q.allow for q in queries if q.allow is not None],
            depth=first.depth,
            seed=first.seed,
            batch_size=len(queries),
        )
        ended = time.perf_counter()
        stages = {
            "prompt": self._reasoner.began - began,
            "think": self._reasoner.ended - self._reasoner.began,
            "search": ended - self._reasoner.ended,
        }
        answers = []
        for query, items_W, scores_W, depth in zip(
            queries, ranked.items_QK, ranked.scores_QK, ranked.depths_Q, strict=True
        ):
            beam = items_W[items_W >= 0]
            insight, own = None, dict(stages)
            if query.explain:
                began = time.perf_counter()
                insight = look_inside(
                    query.snapshot, query.items, query.baskets, beam, depth=int(depth), anchors=self._anchors
                )
                own["explain"] = time.perf_counter() - began
            answers.append(
                Answer(
                    items=beam[: query.k].tolist(),
                    scores=scores_W[: min(query.k, len(beam))].tolist(),
                    depth=int(depth),
                    stage_seconds=own,
                    insight=insight,
                )
            )
        return answers
