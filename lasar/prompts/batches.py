"""Training batches: whole histories, every item of them a target (multi-position loss).

One pass over a history trains every prefix of it. Histories longer than the window are cut into windows whose phase
changes each epoch; inside an order the items are shuffled each epoch, because their sequence means nothing.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lasar.data.interactions import TrainSequence
from lasar.prompts.vocabulary import Vocabulary, pad_right


@dataclass(frozen=True, kw_only=True)
class TrunkBatch:
    """Histories of several users as one padded block.

    Attributes:
        ids_BT: tokens, padded on the right.
        lengths_B: tokens of each row.
        targets_BT: token that follows each position where that is a code to be learned, else -1.
        items_BT: item index that the target belongs to, else -1.
    """

    ids_BT: NDArray[np.int64]
    lengths_B: NDArray[np.int64]
    targets_BT: NDArray[np.int64]
    items_BT: NDArray[np.int64]

    @property
    def num_targets(self) -> int:
        """Number of positions with a target."""
        return int((self.targets_BT >= 0).sum())


def epoch_batches(
    sequences: Sequence[TrainSequence],
    tokens_IL: NDArray[np.int32],
    *,
    vocabulary: Vocabulary,
    batch_tokens: int,
    train_targets: str,
    seed: int,
    epoch: int,
) -> list[TrunkBatch]:
    """All batches of one epoch, in training order; a pure function of its arguments.

    Args:
        sequences: training histories.
        tokens_IL: tokens of every item.
        vocabulary: renders the histories.
        batch_tokens: tokens of a batch at most, padding included (one history may exceed it).
        train_targets: `all` items of a history or only its `last`.
        seed: of the run.
        epoch: counts from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    rows: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    for sequence in sequences:
        for items, baskets in _windows(sequence, vocabulary.max_history, rng):
            items = _shuffle_orders(items, baskets, rng) if vocabulary.orders else items
            rows.append((vocabulary.render_history(tokens_IL, items, baskets, open_order=False), items))
    rows = [row for row in rows if len(row[0]) > 1]
    return [
        _trunk_batch([rows[index] for index in group], vocabulary, train_targets)
        for group in bucket_by_length([len(tokens) for tokens, _ in rows], batch_tokens, rng)
    ]


def bucket_by_length(lengths: Sequence[int], batch_tokens: int, rng: np.random.Generator) -> list[list[int]]:
    """Group rows of similar length so that each group, padded, has at most `batch_tokens` tokens.

    Rows of equal length are in random order, and so are the groups.
    """
    order = rng.permutation(len(lengths))
    order = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
    groups: list[list[int]] = []
    group: list[int] = []
    for index in order.tolist():
        if group and (len(group) + 1) * lengths[index] > batch_tokens:
            groups.append(group)
            group = []
        group.append(index)
    if group:
        groups.append(group)
    return [groups[index] for index in rng.permutation(len(groups))]


def _windows(
    sequence: TrainSequence, width: int, rng: np.random.Generator
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    count = len(sequence.items)
    if count <= width:
        return [(sequence.items, sequence.baskets)]
    first = int(rng.integers(1, width + 1))
    cuts = [0, *range(first, count, width), count]
    return [(sequence.items[a:b], sequence.baskets[a:b]) for a, b in itertools.pairwise(cuts)]


def _shuffle_orders(
    items: NDArray[np.int32], baskets: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.int32]:
    return items[np.lexsort((rng.random(len(items)), baskets))]


def _trunk_batch(
    rows: list[tuple[NDArray[np.int32], NDArray[np.int32]]], vocabulary: Vocabulary, train_targets: str
) -> TrunkBatch:
    ids_BT, lengths_B = pad_right([tokens for tokens, _ in rows], vocabulary.pad)
    items_BT = np.full_like(ids_BT, -1)
    for row, (tokens, items) in enumerate(rows):
        codes = np.flatnonzero(tokens >= vocabulary.first_code)
        items_BT[row, codes - 1] = np.repeat(items, vocabulary.num_levels)
    if train_targets == "last":
        positions_T = np.arange(ids_BT.shape[1])
        first_B = lengths_B - 1 - vocabulary.num_levels
        items_BT[positions_T[None, :] < first_B[:, None]] = -1
    following_BT = np.roll(ids_BT, -1, axis=1)
    targets_BT = np.where(items_BT >= 0, following_BT, -1)
    return TrunkBatch(ids_BT=ids_BT, lengths_B=lengths_B, targets_BT=targets_BT, items_BT=items_BT)
