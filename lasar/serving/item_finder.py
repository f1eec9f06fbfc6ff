"""Finding items by what a person types: words of a title, or an id with a typo."""

import bisect
import difflib
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.data.interactions import ItemTable

_NEIGHBOURS = 200  # ids looked at on each side of a misspelt one, in each order
_MAX_ID = 64  # longer ids get no suggestion


class ItemFinder:
    """Lookups over the items of one catalogue version."""

    def __init__(self, items: ItemTable, *, counts_I: NDArray[np.int64]) -> None:
        """Index ids and titles.

        Args:
            items: of the catalogue.
            counts_I: how often each was taken in training; the better known comes first.
        """
        self._items = items
        self._index = {item_id: index for index, item_id in enumerate(items.item_ids)}
        self._forward = sorted((item_id.lower(), item_id) for item_id in items.item_ids)
        self._backward = sorted((item_id.lower()[::-1], item_id) for item_id in items.item_ids)
        shown = [f"{title} {item_id}" for title, item_id in zip(items.titles, items.item_ids, strict=True)]
        self._words = pl.Series(shown, dtype=pl.String).str.to_lowercase()
        self._counts_I = counts_I

    def index_of(self, item_id: str) -> int | None:
        """Index of an item, or None."""
        return self._index.get(item_id)

    def nearest(self, item_id: str) -> str | None:
        """The id most like a misspelt one, or None.

        A typo leaves the head or the tail of an id intact, so only the neighbours in alphabetical order and in the
        order of the reversed ids are compared: comparing with all would let a client keep the server busy.
        """
        if len(item_id) > _MAX_ID:
            return None
        lowered = item_id.lower()
        near: dict[str, str] = {}
        for ordered, wanted in ((self._forward, lowered), (self._backward, lowered[::-1])):
            at = bisect.bisect_left(ordered, (wanted, ""))
            for _, candidate in ordered[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS]:
                near.setdefault(candidate.lower(), candidate)
        found = difflib.get_close_matches(lowered, near, n=1, cutoff=0.5)
        return near[found[0]] if found else None

    def search(self, text: str, *, limit: int) -> NDArray[np.int64]:
        """Items whose title or id holds every word of `text`; titles that begin with it, then the best known first."""
        words = text.lower().split()[:16]
        hit = pl.repeat(True, len(self._words), eager=True)
        for word in words:
            hit &= self._words.str.contains(word, literal=True)
        found = np.flatnonzero(hit.to_numpy())
        begins = self._words[found].str.starts_with(" ".join(words)).to_numpy() if len(found) else found
        return found[np.lexsort((found, -self._counts_I[found], ~np.asarray(begins, dtype=bool)))][:limit]

    def best_known(self, items: Sequence[int] | NDArray[np.integer], *, limit: int) -> list[int]:
        """Those of `items` taken most often in training."""
        chosen = np.asarray(items)
        ranked: list[int] = chosen[np.argsort(-self._counts_I[chosen], kind="stable")][:limit].tolist()
        return ranked
