"""The rows that rationales, anchors and Stage 2 share: one per user and basket of the training split.

A row is what a latent chain is supervised on: what the user had taken before, and what the user took then. Rows are
made of training events alone. That is not left to callers: `training_rows` compares what it made with the split column.
"""

from typing import NamedTuple

import numpy as np

from lasar.data.interactions import SPLIT_TRAIN, Int32Array, Interactions


class TrainingRow(NamedTuple):
    """One training sample.

    Attributes:
        user_index: the user.
        basket: number of the basket that is to be predicted.
        history: training items of the user's earlier baskets, oldest first, int32 `[num_events]`; may be empty.
        baskets: basket number of each history item, int32 `[num_events]`, not decreasing.
        targets: training items of `basket`, int32 `[num_targets]`, at least one; exactly one in data without orders.
    """

    user_index: int
    basket: int
    history: Int32Array
    baskets: Int32Array
    targets: Int32Array


def training_rows(interactions: Interactions) -> list[TrainingRow]:
    """All training rows, sorted by `user_index`, then `basket`.

    With `train_targets == "last"` a user's only row is the one of the last training basket. Histories are views of one
    array per user, so rows cost little memory.

    Raises:
        AssertionError: a row holds anything but training events (a defect of ours).
    """
    rows = []
    for user_index, items, baskets in interactions.train_sequences():
        edges = [0, *(np.flatnonzero(np.diff(baskets)) + 1).tolist(), len(items)]
        first = len(edges) - 2 if interactions.train_targets == "last" else 0
        for start, end in zip(edges[first:-1], edges[first + 1 :], strict=True):
            rows.append(
                TrainingRow(user_index, int(baskets[start]), items[:start], baskets[:start], items[start:end])
            )
    _assert_training_only(rows, interactions)
    return rows


def rewarded_rows(interactions: Interactions) -> list[TrainingRow]:
    """The training rows that reinforcement learning asks about: those reserved for it, or all where none are."""
    reserved, rows = reserved_baskets(interactions), training_rows(interactions)
    return [row for row in rows if (row.user_index, row.basket) in reserved] if reserved else rows


def reserved_baskets(interactions: Interactions) -> set[tuple[int, int]]:
    """User and basket of the training rows that nothing else is trained to predict; see `Interactions.reserved`."""
    reserved = interactions.reserved()
    return set(
        zip(interactions.user_index[reserved].tolist(), interactions.basket[reserved].tolist(), strict=True)
    )


def _assert_training_only(rows: list[TrainingRow], interactions: Interactions) -> None:
    """Compare with the split column, which the rows were not cut by: the targets are its training events.

    A history ends where the targets begin in the same array, so histories hold what earlier targets hold.
    """
    trained = interactions.split == SPLIT_TRAIN
    users, items = interactions.user_index[trained], interactions.item_index[trained]
    baskets = interactions.basket[trained]
    if interactions.train_targets == "last":
        last = {row.user_index: row.basket for row in rows}
        kept = np.array([last[user] for user in users.tolist()], dtype=np.int32) == baskets
        users, items, baskets = users[kept], items[kept], baskets[kept]
    sizes = [len(row.targets) for row in rows]
    columns = (
        (users, np.repeat([row.user_index for row in rows], sizes)),
        (baskets, np.repeat([row.basket for row in rows], sizes)),
        (items, np.concatenate([row.targets for row in rows]) if rows else items[:0]),
    )
    assert all(np.array_equal(expected, found) for expected, found in columns), "held-out events among rows"
    assert all(row.baskets[-1] < row.basket for row in rows if len(row.baskets)), (
        "a history reaches its target"
    )
