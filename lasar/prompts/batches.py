"""Training batches: whole histories, every item of them a target (multi-position loss).

One pass over a history trains every prefix of it. Histories longer than the window are cut into windows whose phase
changes each epoch. Inside an order the items are shuffled each epoch, because their sequence means nothing; and every
item of an order is a target of the moment the order opens: its codes hang off the `<order>` token as a branch that sees
the history before and nothing of the order itself.

Legend: B batch, T trunk tokens, M branch tokens, P predictions, L levels, I items.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lasar.data.interactions import TrainSequence
from lasar.prompts.vocabulary import Vocabulary, pad_right

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TreeBatch:
    """Histories of several users, each a trunk with branches, as one padded block.

    Attributes:
        ids_BK: tokens: trunks padded to T, then branches padded to M.
        lengths_B: tokens of each trunk.
        trunk_width: T.
        parents_BM: parent of each branch token: a trunk position, or T + m for branch token m of the same row.
        sources_P: which token predicts, as an index into the flattened ids.
        targets_P: the code token to be predicted.
        items_P: item index it belongs to.
    """

    ids_BK: Int64Array
    lengths_B: Int64Array
    trunk_width: int
    parents_BM: Int64Array
    sources_P: Int64Array
    targets_P: Int64Array
    items_P: Int64Array

    @property
    def num_targets(self) -> int:
        """Number of predictions."""
        return len(self.targets_P)


@dataclass(frozen=True, kw_only=True)
class _Row:
    trunk: NDArray[np.int32]
    branch: Int64Array
    parents: Int64Array  # negative: branch token -1 - m; else a trunk position
    sources: Int64Array  # likewise
    targets: Int64Array
    items: Int64Array

    @property
    def size(self) -> int:
        return len(self.trunk) + len(self.branch)


def epoch_batches(
    sequences: Sequence[TrainSequence],
    tokens_IL: NDArray[np.int32],
    *,
    vocabulary: Vocabulary,
    batch_tokens: int,
    train_targets: str,
    seed: int,
    epoch: int,
    split_orders: float = 0.0,
) -> list[TreeBatch]:
    """All batches of one epoch, in training order; a pure function of its arguments.

    Args:
        sequences: training histories.
        tokens_IL: tokens of every item.
        vocabulary: renders the histories.
        batch_tokens: tokens of a batch at most, padding included (one history may exceed it).
        train_targets: `all` items of a history or only its `last`.
        seed: of the run.
        epoch: counts from 0.
        split_orders: share of orders that are split in two at random, each epoch anew, so that what is bought
            together also teaches what to open the next order with.
    """
    rng = np.random.default_rng([seed, epoch])
    rows: list[_Row] = []
    for sequence in sequences:
        for items, baskets in windows(sequence, vocabulary.max_history, train_targets, rng):
            if vocabulary.orders:
                items = shuffle_orders(items, baskets, rng)
                baskets = split_orders_in_two(baskets, split_orders, rng)
                rows.append(_order_row(items, baskets, tokens_IL, vocabulary, train_targets))
            else:
                rows.append(_plain_row(items, baskets, tokens_IL, vocabulary, train_targets))
    groups = bucket_by_length([row.size for row in rows], batch_tokens, rng)
    return [_stack([rows[index] for index in group], vocabulary.pad) for group in groups]


def bucket_by_length(
    lengths: Sequence[int] | Sequence[Sequence[int]], batch_tokens: int, rng: np.random.Generator
) -> list[list[int]]:
    """Group rows of similar length so that each group, padded, has at most `batch_tokens` tokens.

    Rows of equal length are in random order, and so are the groups.

    Args:
        lengths: tokens of each row, or of each of its parts where every part is padded by itself.
        batch_tokens: of a group; a single row may exceed it.
        rng: orders rows and groups.
    """
    parts_RF = np.atleast_2d(np.asarray(lengths, dtype=np.int64).T).T
    order = rng.permutation(len(parts_RF))
    order = order[np.argsort(parts_RF.sum(axis=1)[order], kind="stable")]
    groups: list[list[int]] = []
    group: list[int] = []
    widest_F = np.zeros(parts_RF.shape[1], dtype=np.int64)
    for index in order.tolist():
        widest_F = np.maximum(widest_F, parts_RF[index])
        if group and (len(group) + 1) * widest_F.sum() > batch_tokens:
            groups.append(group)
            group, widest_F = [], parts_RF[index]
        group.append(index)
    if group:
        groups.append(group)
    return [groups[index] for index in rng.permutation(len(groups))]


def windows(
    sequence: TrainSequence, width: int, train_targets: str, rng: np.random.Generator
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Cut a history into pieces of at most `width` events, at a random phase; of `last` targets, the newest piece.

    Returns:
        Items and baskets of each piece, oldest first.
    """
    count = len(sequence.items)
    if train_targets == "last":
        return [(sequence.items[-width:], sequence.baskets[-width:])]
    if count <= width:
        return [(sequence.items, sequence.baskets)]
    first = int(rng.integers(1, width + 1))
    cuts = [0, *range(first, count, width), count]
    return [(sequence.items[a:b], sequence.baskets[a:b]) for a, b in itertools.pairwise(cuts)]


def shuffle_orders(
    items: NDArray[np.int32], baskets: NDArray[np.int32], rng: np.random.Generator
) -> NDArray[np.int32]:
    """Items in random sequence within each order, [n]."""
    return items[np.lexsort((rng.random(len(items)), baskets))]


def split_orders_in_two(
    baskets: NDArray[np.int32], share: float, rng: np.random.Generator
) -> NDArray[np.int32]:
    """New order numbers [n], a `share` of the orders of several items split in two at a random place."""
    opens = np.flatnonzero(np.diff(baskets, prepend=-1) != 0)
    sizes = np.diff(opens, append=len(baskets))
    cuts = opens + 1 + (rng.random(len(opens)) * (sizes - 1)).astype(np.int64)
    chosen = (sizes > 1) & (rng.random(len(opens)) < share)
    starts = np.zeros(len(baskets), dtype=np.int32)
    starts[np.concatenate([opens, cuts[chosen]])] = 1
    return np.cumsum(starts, dtype=np.int32)


def _plain_row(
    items: NDArray[np.int32],
    baskets: NDArray[np.int32],
    tokens_IL: NDArray[np.int32],
    vocabulary: Vocabulary,
    train_targets: str,
) -> _Row:
    # Every token but the last predicts the next one; there is nothing to hang off the trunk.
    trunk = vocabulary.render_history(tokens_IL, items, baskets, open_order=False)
    first = 0 if train_targets == "all" else len(trunk) - 1 - vocabulary.num_levels
    nothing = np.zeros(0, dtype=np.int64)
    return _Row(
        trunk=trunk,
        branch=nothing,
        parents=nothing,
        sources=np.arange(first, len(trunk) - 1),
        targets=trunk[first + 1 :].astype(np.int64),
        items=np.repeat(items, vocabulary.num_levels)[first:].astype(np.int64),
    )


def _order_row(
    items: NDArray[np.int32],
    baskets: NDArray[np.int32],
    tokens_IL: NDArray[np.int32],
    vocabulary: Vocabulary,
    train_targets: str,
) -> _Row:
    # Two kinds of prediction: each item from the opening of its order (a branch), and each further item of an order
    # from the items before it (the trunk itself).
    trunk = vocabulary.render_history(tokens_IL, items, baskets, open_order=False)
    levels = vocabulary.num_levels
    opening = np.flatnonzero(trunk == vocabulary.order)
    order_of_item = np.cumsum(np.diff(baskets, prepend=-1) != 0) - 1
    kept = order_of_item == order_of_item[-1] if train_targets == "last" else np.ones(len(items), dtype=bool)
    codes_IL = tokens_IL[items].astype(np.int64)

    branch_IL = codes_IL[kept, : levels - 1]
    number_IL = np.arange(branch_IL.size).reshape(branch_IL.shape)
    sources_IL = np.concatenate([opening[order_of_item[kept]][:, None], -1 - number_IL], axis=1)

    first_code_I = np.flatnonzero(trunk >= vocabulary.first_code)[::levels]
    further = kept & (np.diff(order_of_item, prepend=-1) == 0)
    inside_IL = first_code_I[further][:, None] - 1 + np.arange(levels)
    return _Row(
        trunk=trunk,
        branch=branch_IL.reshape(-1),
        parents=sources_IL[:, : levels - 1].reshape(-1),
        sources=np.concatenate([sources_IL.reshape(-1), inside_IL.reshape(-1)]),
        targets=np.concatenate([codes_IL[kept].reshape(-1), codes_IL[further].reshape(-1)]),
        items=np.repeat(np.concatenate([items[kept], items[further]]), levels).astype(np.int64),
    )


def _stack(rows: list[_Row], pad: int) -> TreeBatch:
    trunk_BT, lengths_B = pad_right([row.trunk for row in rows], pad)
    width = trunk_BT.shape[1]
    branch_width = max(len(row.branch) for row in rows)
    branch_BM = np.full((len(rows), branch_width), pad, dtype=np.int64)
    parents_BM = np.zeros((len(rows), branch_width), dtype=np.int64)
    for number, row in enumerate(rows if branch_width else ()):
        branch_BM[number, : len(row.branch)] = row.branch
        parents_BM[number, : len(row.parents)] = _columns(row.parents, width)
    starts_B = np.arange(len(rows)) * (width + branch_width)
    sources_P = _columns(np.concatenate([row.sources for row in rows]), width)
    return TreeBatch(
        ids_BK=np.concatenate([trunk_BT, branch_BM], axis=1),
        lengths_B=lengths_B,
        trunk_width=width,
        parents_BM=parents_BM,
        sources_P=sources_P + np.repeat(starts_B, [len(row.sources) for row in rows]),
        targets_P=np.concatenate([row.targets for row in rows]),
        items_P=np.concatenate([row.items for row in rows]),
    )


def _columns(places: Int64Array, trunk_width: int) -> Int64Array:
    return np.where(places < 0, trunk_width - 1 - places, places)
