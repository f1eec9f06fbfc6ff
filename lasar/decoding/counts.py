"""What followed what in training, mixed into a model's lists: a memory of counts beside one of weights.

A model's answers as probabilities over the items it found, sharpened by a temperature, and the decayed counts of what
followed the history's items, as probabilities over the items they name, make one list:
`(1 - share) * softmax(temperature * score) + share * counts / sum(counts)`. So a language model is interpolated with
a cache. An item that the model's search did not find has its counts alone.

Legend: B queries, W items of a list, I items, E counted pairs, N items that counts name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lasar.artifacts import read_json, write_json
from lasar.errors import ArtifactError

COUNTS_FILE = "counts.safetensors"
_FACTS_FILE = "counts.json"
_OLDEST_WEIGHT = 1e-3

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Weights from item to item, and how they are mixed in.

    Attributes:
        starts: where each item's pairs begin, int64 [I + 1].
        items_E: the item that followed.
        weights_E: how much it counts.
        recency: factor on a history item per basket of age; 0 uses the last basket only.
        temperature: factor on the model's scores before their softmax.
        share: of the counts in the mixture, 0..1.
    """

    starts: NDArray[np.int64]
    items_E: Int32Array
    weights_E: Float32Array
    recency: float
    temperature: float = 1.0
    share: float = 0.0

    def mixed(self, *, temperature: float, share: float) -> "Counts":
        """The same counts, mixed in another way."""
        return replace(self, temperature=temperature, share=share)

    def follow(
        self, history: Int32Array, baskets: Int32Array, *, listed: NDArray[np.int64], allow: bool
    ) -> tuple[NDArray[np.int64], Float64Array]:
        """Items that followed those of a history, ascending, and their shares of all counts.

        Args:
            history: item indices, oldest first; items that are newer than the counts have none.
            baskets: the basket number of each.
            listed: items that may not be named, sorted; or the only ones that may.
            allow: which of the two.

        Returns:
            Items [N] and probabilities [N] that sum to 1, both empty where nothing is known.
        """
        if not len(history):
            return np.zeros(0, np.int64), np.zeros(0)
        weights = np.power(self.recency, (baskets[-1] - baskets).astype(np.float64))
        kept = (weights > _OLDEST_WEIGHT) & (history < len(self.starts) - 1)
        spans = [slice(self.starts[item], self.starts[item + 1]) for item in history[kept]]
        if not spans:
            return np.zeros(0, np.int64), np.zeros(0)
        named = np.concatenate([self.items_E[span] for span in spans]).astype(np.int64)
        counts = np.concatenate(
            [self.weights_E[span] * weight for span, weight in zip(spans, weights[kept], strict=True)]
        )
        items_N, place = np.unique(named, return_inverse=True)
        counts_N = np.bincount(place, weights=counts, minlength=len(items_N))
        permitted_N = np.isin(items_N, listed) == allow
        items_N, counts_N = items_N[permitted_N], counts_N[permitted_N]
        total = counts_N.sum()
        return (items_N, counts_N / total) if total > 0 else (np.zeros(0, np.int64), np.zeros(0))

    def mix(
        self, items_W: Int32Array, scores_W: Float32Array, named_N: NDArray[np.int64], shares_N: Float64Array
    ) -> tuple[Int32Array, Float32Array]:
        """One list of at most W items from a model's list and what `follow` names.

        Args:
            items_W: the model's items, -1 where there are none.
            scores_W: log-probabilities, or whatever a softmax makes probabilities of.
            named_N: items that followed, ascending.
            shares_N: their shares.

        Returns:
            Items, best first, and the logarithms of their mixed probabilities; -1 and -inf where there are none.
        """
        found = items_W >= 0
        scores = self.temperature * scores_W[found].astype(np.float64)
        own = np.exp(scores - scores.max(initial=-np.inf))
        share = (self.share if found.any() else 1.0) if len(named_N) else 0.0
        both = np.concatenate([items_W[found].astype(np.int64), named_N])
        parts = np.concatenate([(1 - share) * own / max(own.sum(), 1e-300), share * shares_N])
        items, first, place = np.unique(both, return_index=True, return_inverse=True)
        chances = np.bincount(place, weights=parts, minlength=len(items))
        # Ties keep the model's order, then the catalogue's.
        best = np.lexsort((first, -chances))[: len(items_W)]
        best = best[chances[best] > 0]
        out_items, out_scores = (
            np.full(len(items_W), -1, np.int32),
            np.full(len(items_W), -np.inf, np.float32),
        )
        out_items[: len(best)] = items[best]
        out_scores[: len(best)] = np.log(chances[best])
        return out_items, out_scores

    def blend(
        self,
        items_BW: Int32Array,
        scores_BW: Float32Array,
        histories: Sequence[Int32Array],
        baskets: Sequence[Int32Array],
        *,
        listed: Sequence[NDArray[np.int64]],
        allow: bool,
    ) -> tuple[Int32Array, Float32Array]:
        """`follow` and `mix` for a batch of lists."""
        rows = [
            self.mix(items, scores, *self.follow(history, basket, listed=forbidden, allow=allow))
            for items, scores, history, basket, forbidden in zip(
                items_BW, scores_BW, histories, baskets, listed, strict=True
            )
        ]
        if not rows:
            return items_BW, scores_BW
        return np.stack([items for items, _ in rows]), np.stack([scores for _, scores in rows])

    def save(self, folder: Path) -> None:
        """Write `counts.safetensors` and `counts.json`."""
        save_file(
            {"starts": self.starts, "items": self.items_E, "weights": self.weights_E}, folder / COUNTS_FILE
        )
        facts = {"recency": self.recency, "temperature": self.temperature, "share": self.share}
        write_json(folder / _FACTS_FILE, facts)

    @classmethod
    def load(cls, folder: Path) -> "Counts":
        """Read what `save` wrote.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        try:
            arrays = load_file(folder / COUNTS_FILE)
        except (OSError, SafetensorError) as error:
            reason = str(error).partition("\n")[0]
            raise ArtifactError(
                f"{folder / COUNTS_FILE}: damaged ({reason}); run the stage 'blend' again"
            ) from None
        return cls(
            starts=arrays["starts"], items_E=arrays["items"], weights_E=arrays["weights"],
            **read_json(folder / _FACTS_FILE),
        )  # fmt: skip
