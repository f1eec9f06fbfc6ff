"""Reading the `prepare` artifact: who took what, in which order, in which split.

Everything downstream works with item and user *indices*; ids appear again only when something is printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.artifacts import read_json
from lasar.errors import ArtifactError, UnknownItemError, nearest

SPLIT_TRAIN, SPLIT_VALID, SPLIT_TEST = 0, 1, 2

Int32Array = NDArray[np.int32]


class TrainSequence(NamedTuple):
    """Training events of one user, oldest first.

    Attributes:
        user_index: the user.
        items: item indices, int32 `[num_events]`.
        baskets: basket number of each event, int32 `[num_events]`, not decreasing.
    """

    user_index: int
    items: Int32Array
    baskets: Int32Array


@dataclass(frozen=True, kw_only=True)
class EvalCases:
    """One prediction task per user: a history and the items that truly followed.

    Attributes:
        user_index: int32 `[num_cases]`.
        histories: per case, item indices of the earlier splits, oldest first.
        baskets: per case, the basket number of each history event.
        targets: per case, distinct items of the held-out split in order of first appearance; never empty.
    """

    user_index: Int32Array
    histories: list[Int32Array]
    baskets: list[Int32Array]
    targets: list[Int32Array]

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.user_index)

    def subset(self, n: int, seed: int) -> "EvalCases":
        """Return `n` random cases in their original order, or all when there are no more than `n`."""
        if n >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), size=n, replace=False))
        return EvalCases(
            user_index=self.user_index[chosen],
            histories=[self.histories[i] for i in chosen],
            baskets=[self.baskets[i] for i in chosen],
            targets=[self.targets[i] for i in chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """All events of a data set, sorted by user, then time, then source order.

    Attributes:
        user_index: int32 `[num_events]`.
        item_index: int32 `[num_events]`.
        basket: int32 `[num_events]`; 0, 1, ... within a user.
        split: int8 `[num_events]`; one of `SPLIT_TRAIN`, `SPLIT_VALID`, `SPLIT_TEST`.
        num_users: number of users.
        num_items: number of items in the catalogue (some may have no event).
        split_kind: `leave_one_out`, `last_basket`, `temporal` or `given`.
        train_targets: `all` (every prefix of a training history is a sample) or `last` (one per user).
        rl_share: share of users whose last training basket only reinforcement learning asks about.
    """

    user_index: Int32Array
    item_index: Int32Array
    basket: Int32Array
    split: NDArray[np.int8]
    num_users: int
    num_items: int
    split_kind: str
    train_targets: str
    rl_share: float = 0.0

    @classmethod
    def load(cls, folder: Path) -> "Interactions":
        """Read the `prepare` artifact.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        summary = read_json(folder / "summary.json")
        events = _read_parquet(folder / "interactions.parquet")
        return cls(
            user_index=events["user_index"].to_numpy().astype(np.int32),
            item_index=events["item_index"].to_numpy().astype(np.int32),
            basket=events["basket"].to_numpy().astype(np.int32),
            split=events["split"].to_numpy().astype(np.int8),
            num_users=summary["num_users"],
            num_items=summary["num_items"],
            split_kind=summary["split"],
            train_targets=summary["train_targets"],
            rl_share=summary.get("rl_share", 0.0),
        )

    def reserved(self) -> NDArray[np.bool_]:
        """Which events are kept for reinforcement learning, bool `[num_events]`.

        The last training basket of `rl_share` of the users with at least two; the same ones whatever the seed.
        """
        trained = self.split == SPLIT_TRAIN
        last_U, first_U = np.full(self.num_users, -1), np.full(self.num_users, np.iinfo(np.int32).max)
        np.maximum.at(last_U, self.user_index[trained], self.basket[trained])
        np.minimum.at(first_U, self.user_index[trained], self.basket[trained])
        users = np.random.default_rng(0).permutation(np.flatnonzero(first_U < last_U))
        chosen_U = np.zeros(self.num_users, dtype=bool)
        chosen_U[users[: round(self.rl_share * len(users))]] = True
        reserved: NDArray[np.bool_] = (
            trained & chosen_U[self.user_index] & (self.basket == last_U[self.user_index])
        )
        return reserved

    def train_sequences(self, *, reserved: bool = True) -> list[TrainSequence]:
        """Training events per user, for every user that has at least one.

        Args:
            reserved: with those that are kept for reinforcement learning.
        """
        kept = self.split == SPLIT_TRAIN
        if not reserved:
            kept &= ~self.reserved()
        users, items, baskets = self.user_index[kept], self.item_index[kept], self.basket[kept]
        return [
            TrainSequence(int(users[start]), items[start:end], baskets[start:end])
            for start, end in _runs(users)
        ]

    def cases(self, split: int) -> EvalCases:
        """Prediction tasks of the users with at least one event in `split`.

        A history holds all events of that user in earlier splits (validation: training; test: training and
        validation), so it is empty for a user without any.
        """
        user_index, histories, baskets, targets = [], [], [], []
        for start, end in _runs(self.user_index):
            splits, items = self.split[start:end], self.item_index[start:end]
            held_out = items[splits == split]
            if len(held_out) == 0:
                continue
            earlier = splits < split
            _, first = np.unique(held_out, return_index=True)
            user_index.append(self.user_index[start])
            histories.append(items[earlier])
            baskets.append(self.basket[start:end][earlier])
            targets.append(held_out[np.sort(first)])
        return EvalCases(
            user_index=np.array(user_index, dtype=np.int32),
            histories=histories,
            baskets=baskets,
            targets=targets,
        )

    @property
    def has_orders(self) -> bool:
        """Whether any basket holds several items."""
        same_user = np.diff(self.user_index) == 0
        return bool((same_user & (np.diff(self.basket) == 0)).any())

    @property
    def has_repeats(self) -> bool:
        """Whether any user takes an item in more than one event; without repeats, seen items are never targets."""
        pairs = self.user_index.astype(np.int64) * self.num_items + self.item_index
        return len(np.unique(pairs)) < len(pairs)

    def train_counts(self) -> NDArray[np.int64]:
        """Training events per item, int64 `[num_items]`."""
        trained = self.item_index[self.split == SPLIT_TRAIN]
        return np.bincount(trained, minlength=self.num_items).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """Names of the items, by item index.

    Attributes:
        item_ids: id of each item in the source.
        titles: cleaned title, "" where none.
        texts: text the item is embedded by, "" where none.
    """

    item_ids: list[str]
    titles: list[str]
    texts: list[str]
    _index: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Build the id lookup."""
        object.__setattr__(self, "_index", {item_id: index for index, item_id in enumerate(self.item_ids)})

    @classmethod
    def load(cls, folder: Path) -> "ItemTable":
        """Read the `prepare` artifact's items.

        Raises:
            ArtifactError: the file is missing or damaged.
        """
        items = _read_parquet(folder / "items.parquet")
        return cls(
            item_ids=items["item_id"].to_list(),
            titles=items["title"].to_list(),
            texts=items["text"].to_list(),
        )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.item_ids)

    def index_of(self, item_id: str) -> int:
        """Index of an item.

        Raises:
            UnknownItemError: no such item; the message names the closest id.
        """
        if item_id not in self._index:
            raise UnknownItemError(f"no item {item_id!r} in the catalogue{nearest(item_id, self.item_ids)}")
        return self._index[item_id]


def load_user_ids(folder: Path) -> list[str]:
    """Ids of the users, by user index, from the `prepare` artifact."""
    ids: list[str] = _read_parquet(folder / "users.parquet")["user_id"].to_list()
    return ids


def _read_parquet(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); run the stage 'prepare' again") from None


def _runs(sorted_values: Int32Array) -> list[tuple[int, int]]:
    """Start and end of every run of equal values."""
    if len(sorted_values) == 0:
        return []
    edges = np.flatnonzero(np.diff(sorted_values)) + 1
    starts = [0, *edges.tolist()]
    return list(zip(starts, [*edges.tolist(), len(sorted_values)], strict=True))
