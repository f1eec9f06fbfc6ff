"""The catalogue that a server recommends from, and how it changes without a restart.

A `Snapshot` is one version, complete and immutable. A change computes the next snapshot beside the present one, writes
it to the database, and then replaces one reference; a request that has begun keeps the snapshot it began with.
Deactivated items stay in the trie, so the scores of the others do not move, and are filtered out of every answer.

Legend: I items, L levels, E embedding width.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lasar.artifacts import read_json
from lasar.data.interactions import Interactions, ItemTable
from lasar.data.text import clean_text
from lasar.decoding.ranker import Ranker
from lasar.errors import DataError
from lasar.recommender import Recommender
from lasar.serving.catalogue_store import (
    CatalogueState,
    CatalogueStore,
    NewItem,
    VersionRow,
    VersionTakenError,
)
from lasar.serving.item_finder import ItemFinder
from lasar.serving.item_vectors import Float32Array, TextVectors, load_vectors
from lasar.sid.assignment import assign_new_items
from lasar.sid.catalog import SidCatalog
from lasar.sid.quantizers import load_quantizer

COUNTS_FILE = "item_counts.json"  # written by an export, which may leave the event log out
_ATTEMPTS = 20


class ItemText(NamedTuple):
    """An item to add."""

    item_id: str
    title: str
    text: str


class KnownItemError(DataError):
    """An item to add is already in the catalogue."""


class NoSuchItemError(DataError):
    """An item to switch is not in the catalogue."""


class NoSuchVersionError(DataError):
    """A version to go back to does not exist."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """One version of the catalogue, ready to recommend from.

    Attributes:
        version: its number; 0 is the catalogue as trained.
        recommender: over all items, deactivated ones included.
        catalog: semantic IDs.
        finder: lookups by id and title.
        vectors_IE: item vectors; None where the run has none.
        inactive: indices of deactivated items, sorted.
        state: how it differs from the trained catalogue.
        num_trained: items the model was trained with; those from here on were added.
    """

    version: int
    recommender: Recommender
    catalog: SidCatalog
    finder: ItemFinder
    vectors_IE: Float32Array | None
    inactive: NDArray[np.int32]
    state: CatalogueState
    num_trained: int

    @property
    def items(self) -> ItemTable:
        """Ids, titles and texts."""
        return self.recommender.items

    def is_active(self, item: int) -> bool:
        """Whether an item may be recommended."""
        at = int(np.searchsorted(self.inactive, item))
        return at == len(self.inactive) or int(self.inactive[at]) != item

    def similar(self, item: int, *, limit: int) -> list[tuple[int, float]]:
        """Active items whose vectors point most nearly the same way, and the cosines."""
        assert self.vectors_IE is not None
        norms_I = np.maximum(np.linalg.norm(self.vectors_IE, axis=1), 1e-12)
        cosines_I = self.vectors_IE @ self.vectors_IE[item] / (norms_I * norms_I[item])
        cosines_I[[item, *self.inactive]] = -np.inf
        best = np.argsort(-cosines_I, kind="stable")[:limit]
        return [(int(i), float(cosines_I[i])) for i in best if np.isfinite(cosines_I[i])]


class LiveCatalogue:
    """Holds the present snapshot and makes the next one."""

    def __init__(self, run: Path, *, ranker: Ranker, store: CatalogueStore, texts: TextVectors) -> None:
        """Open the newest version; `ranker` is of the trained catalogue.

        Raises:
            ArtifactError: an artifact is missing or damaged.
        """
        self._run, self._ranker, self._store, self._texts = run, ranker, store, texts
        self._items = ItemTable.load(run / "prepare")
        self._catalog = SidCatalog.load(run / "quantize")
        self._vectors_IE = load_vectors(run)
        self._counts_I = _train_counts(run / "prepare", len(self._items))
        self._writing = threading.Lock()
        self.snapshot = self._build(store.state(store.head()) or CatalogueState(version=0))

    def versions(self) -> list[VersionRow]:
        """The chain of versions, oldest first."""
        return self._store.versions()

    def refresh(self) -> bool:
        """Take the newest version, if another worker made one; returns whether there was one."""
        if self._store.head() == self.snapshot.version:
            return False
        with self._writing:
            self._refresh()
        return True

    def change(
        self,
        *,
        add: Sequence[ItemText] = (),
        activate: Sequence[str] = (),
        deactivate: Sequence[str] = (),
    ) -> Snapshot:
        """Make one new version: embed, quantize and add items, and switch items on and off.

        Switching an item to what it is already changes nothing; if nothing changes, no version is made.

        Raises:
            KnownItemError: an item to add is in the catalogue already, or twice in `add`.
            NoSuchItemError: an item to switch is not in the catalogue.
            DataError: items cannot be added to this run, or the semantic IDs are used up.
            ArtifactError: an artifact that is needed for adding is missing.
        """
        cleaned = [ItemText(i.item_id, clean_text(i.title), clean_text(i.text)) for i in add]
        for item in cleaned:
            if not item.text:
                raise DataError(f"item {item.item_id!r}: no text is left after cleaning; give it a title")
        with self._writing:
            self._refresh()
            self._check(cleaned, [*activate, *deactivate])  # before the costly part
        vectors_IE = self._texts.vectors([item.text for item in cleaned]) if cleaned else None
        quantizer = load_quantizer(self._run / "quantize") if cleaned else None
        wanted = dict.fromkeys(activate, True) | dict.fromkeys(deactivate, False)
        action = ", ".join(
            f"{verb} {len(ids)}"
            for verb, ids in (("add", cleaned), ("activate", activate), ("deactivate", deactivate))
            if ids
        )
        with self._writing:
            for _ in range(_ATTEMPTS):
                self._check(cleaned, list(wanted))
                added: list[NewItem] = []
                if quantizer is not None and vectors_IE is not None:
                    codes_IL = assign_new_items(quantizer, self.snapshot.catalog, vectors_IE)
                    added = [
                        NewItem(*item, tuple(codes), vector)
                        for item, codes, vector in zip(cleaned, codes_IL.tolist(), vectors_IE, strict=True)
                    ]
                inactive = self.snapshot.state.inactive
                switched = [(i, on) for i, on in wanted.items() if on == (i in inactive)]
                if not added and not switched:
                    return self.snapshot
                if self._append(action, added=added, switched=switched):
                    return self.snapshot
        raise DataError("the catalogue keeps changing; try again")

    def rollback(self, version: int) -> Snapshot:
        """Make a new version that equals an old one.

        Raises:
            NoSuchVersionError: there is no such version.
        """
        with self._writing:
            self._refresh()
            if self._store.state(version) is None:
                raise NoSuchVersionError(str(version))
            for _ in range(_ATTEMPTS):
                if self._append(f"rollback to {version}", parent=version):
                    return self.snapshot
        raise DataError("the catalogue keeps changing; try again")

    def _append(
        self,
        action: str,
        *,
        parent: int | None = None,
        added: Sequence[NewItem] = (),
        switched: Sequence[tuple[str, bool]] = (),
    ) -> bool:
        """Write the next version and take it; False (and the newest version taken) if another writer was faster."""
        head = self._store.head()
        if head != self.snapshot.version:
            self._refresh()
            return False
        parent = head if parent is None else parent
        try:
            self._store.append(head + 1, parent=parent, action=action, added=added, switched=switched)
        except VersionTakenError:
            self._refresh()
            return False
        self._refresh()
        return True

    def _refresh(self) -> None:
        head = self._store.head()
        if head != self.snapshot.version:
            state = self._store.state(head)
            assert state is not None
            self.snapshot = self._build(state)

    def _check(self, add: Sequence[ItemText], switch: Sequence[str]) -> None:
        new: set[str] = set()
        for item in add:
            if self.snapshot.finder.index_of(item.item_id) is not None or item.item_id in new:
                raise KnownItemError(item.item_id)
            new.add(item.item_id)
        for item_id in switch:
            if self.snapshot.finder.index_of(item_id) is None and item_id not in new:
                raise NoSuchItemError(item_id)

    def _build(self, state: CatalogueState) -> Snapshot:
        added = state.added
        items, catalog, vectors_IE, counts_I = self._items, self._catalog, self._vectors_IE, self._counts_I
        if added:
            items = ItemTable(
                item_ids=[*items.item_ids, *(item.item_id for item in added)],
                titles=[*items.titles, *(item.title for item in added)],
                texts=[*items.texts, *(item.text for item in added)],
            )
            catalog = catalog.with_items(np.array([item.codes for item in added], dtype=np.int32))
            counts_I = np.concatenate([counts_I, np.zeros(len(added), dtype=np.int64)])
            if vectors_IE is not None:
                vectors_IE = np.concatenate([vectors_IE, np.stack([item.vector for item in added])])
        finder = ItemFinder(items, counts_I=counts_I)
        switched_off = [finder.index_of(item_id) for item_id in state.inactive]
        return Snapshot(
            version=state.version,
            recommender=Recommender(
                self._ranker.with_codes(catalog.codes_IL), items=items, prepare=self._run / "prepare"
            ),
            catalog=catalog,
            finder=finder,
            vectors_IE=vectors_IE,
            inactive=np.array(sorted(i for i in switched_off if i is not None), dtype=np.int32),
            state=state,
            num_trained=len(self._items),
        )


def _train_counts(prepare: Path, num_items: int) -> NDArray[np.int64]:
    if (prepare / COUNTS_FILE).is_file():
        return np.array(read_json(prepare / COUNTS_FILE), dtype=np.int64)
    if (prepare / "interactions.parquet").is_file():
        return Interactions.load(prepare).train_counts()
    return np.zeros(num_items, dtype=np.int64)
