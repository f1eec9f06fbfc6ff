"""Batches of latent reasoning: every prefix of every history is a branch, and each branch has its own depth.

A history is the trunk. Wherever a next item, or the next order, is to be predicted, a branch leaves it:
`<s>`, N latent slots, `<e>`, and the codes of the answer, one answer for every item of the order. No prefix is encoded
twice, and step t of all branches is one forward call.

Legend: B batch, T trunk tokens, P branches per row, N latent steps at most, A answers per row, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lasar.data.interactions import TrainSequence
from lasar.prompts.batches import bucket_by_length, shuffle_orders, split_orders_in_two, windows
from lasar.prompts.vocabulary import Vocabulary, pad_right

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# (user index, basket) to the anchors of that training row's segments, one per latent step; empty: it has none.
AnchorSteps = Callable[[int, int], Int32Array]


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """Histories with their reasoning branches, padded.

    Attributes:
        ids_BT: trunks.
        lengths_B: tokens of each trunk.
        openings_BP: trunk position each branch leaves from; 0 where there is no branch.
        depths_BP: latent steps of each branch, deepest first within a row; 0 where there is no branch.
        answer_depths_BP: after how many of them its answers are given; `depths_BP` unless answers come early.
        supervised_BP: whether the branch has a rationale (anchors, and a depth to imitate).
        anchors_BPN: anchor index of every step, -1 where there is none.
        weights_BP: answers of each branch; 0 where there is no branch.
        branch_BA: the branch of each answer.
        answers_BAL: tokens of each answer.
        items_BA: its item; -1 where there is no answer.
    """

    ids_BT: Int64Array
    lengths_B: Int64Array
    openings_BP: Int64Array
    depths_BP: Int64Array
    answer_depths_BP: Int64Array
    supervised_BP: BoolArray
    anchors_BPN: Int32Array
    weights_BP: Int64Array
    branch_BA: Int64Array
    answers_BAL: Int64Array
    items_BA: Int64Array

    @property
    def num_targets(self) -> int:
        """Number of answers."""
        return int((self.items_BA >= 0).sum())

    @property
    def widths(self) -> list[int]:
        """Columns that still run at each latent step."""
        deepest = int(self.depths_BP.max(initial=0))
        return [int((self.depths_BP > step).sum(axis=1).max()) for step in range(deepest)]


@dataclass(frozen=True, kw_only=True)
class _Row:
    trunk: Int32Array
    openings: Int64Array  # [P]
    steps: list[Int32Array]  # anchors of each branch
    depths: Int64Array  # [P]
    answer_depths: Int64Array  # [P]
    branch: Int64Array  # [A]
    items: Int32Array  # [A]

    def parts(self, levels: int, max_depth: int) -> list[int]:
        """Tokens of what is padded by itself: trunk, `<s>` and `<e>`, codes, and each latent step."""
        running = (self.depths[:, None] > np.arange(max_depth)).sum(axis=0)
        return [len(self.trunk), 2 * len(self.depths), len(self.items) * (levels - 1), *running.tolist()]


def latent_batches(
    sequences: Sequence[TrainSequence],
    tokens_IL: Int32Array,
    *,
    vocabulary: Vocabulary,
    steps: AnchorSteps,
    max_depth: int,
    depth: int | None,
    fallback_depth: int,
    batch_tokens: int,
    train_targets: str,
    seed: int,
    epoch: int,
    split_orders: float = 0.0,
    early_answers: float = 0.0,
) -> list[LatentBatch]:
    """All batches of one epoch, in training order; a pure function of its arguments.

    Args:
        sequences: training histories.
        tokens_IL: tokens of every item.
        vocabulary: renders the histories.
        steps: anchors of a training row.
        max_depth: width of the anchor table, N.
        depth: latent steps of every branch, or None: as many as the row has anchors.
        fallback_depth: latent steps of a row without anchors where `depth` is None.
        batch_tokens: tokens of a batch at most, branches and padding included (one history may exceed it).
        train_targets: `all` items of a history or only its `last`.
        seed: of the run.
        epoch: counts from 0.
        split_orders: see `epoch_batches`.
        early_answers: share of branches that answer after a random number of their steps, from 1, instead of all.
    """
    rng, early = np.random.default_rng([seed, epoch]), np.random.default_rng([seed, epoch, 1])
    rows: list[_Row] = []
    for sequence in sequences:
        for number, (items, baskets) in enumerate(
            windows(sequence, vocabulary.max_history, train_targets, rng)
        ):
            orders = baskets
            if vocabulary.orders:
                items = shuffle_orders(items, baskets, rng)
                orders = split_orders_in_two(baskets, split_orders, rng)
            row = _row(
                sequence.user_index, items, baskets, orders, tokens_IL,
                vocabulary=vocabulary, steps=steps, depth=depth, fallback_depth=fallback_depth,
                last_only=train_targets == "last",
                # A later window's first answer has lost its history, on which its rationale rests.
                skip_first=number > 0 or (train_targets == "last" and len(sequence.items) > len(items)),
            )  # fmt: skip
            if early_answers:
                row = replace(row, answer_depths=_answered_early(row.depths, early_answers, early))
            if len(row.items):
                rows.append(row)
    deepest = max((int(row.depths.max()) for row in rows), default=0)
    groups = bucket_by_length([row.parts(vocabulary.num_levels, deepest) for row in rows], batch_tokens, rng)
    return [
        _stack([rows[index] for index in group], tokens_IL, pad=vocabulary.pad, max_depth=max_depth)
        for group in groups
    ]


def _row(
    user: int,
    items: Int32Array,
    baskets: Int32Array,
    orders: Int32Array,
    tokens_IL: Int32Array,
    *,
    vocabulary: Vocabulary,
    steps: AnchorSteps,
    depth: int | None,
    fallback_depth: int,
    last_only: bool,
    skip_first: bool,
) -> _Row:
    trunk = vocabulary.render_history(tokens_IL, items, orders, open_order=False)
    if vocabulary.orders:
        openings = np.flatnonzero(trunk == vocabulary.order)
        opens = np.diff(orders, prepend=-1) != 0
    else:
        openings = np.arange(len(items)) * vocabulary.num_levels
        opens = np.ones(len(items), dtype=bool)
    branch = np.cumsum(opens) - 1
    kept = np.ones(len(openings), dtype=bool)
    if skip_first:
        kept[0] = False
    if last_only:
        kept[:-1] = False
    chosen = np.flatnonzero(kept)
    found = [steps(user, int(basket)) for basket in baskets[opens][chosen]]
    depths = np.array([_depth(len(f), depth, fallback_depth) for f in found], dtype=np.int64)
    deepest_first = np.argsort(-depths, kind="stable")
    column = np.full(len(openings), -1)
    column[chosen[deepest_first]] = np.arange(len(chosen))
    answered = column[branch] >= 0
    last = int(openings[chosen[-1]]) if len(chosen) else 0
    return _Row(
        trunk=trunk[: last + 1],  # nothing looks at what comes after
        openings=openings[chosen[deepest_first]].astype(np.int64),
        steps=[found[index] for index in deepest_first],
        depths=depths[deepest_first],
        answer_depths=depths[deepest_first],
        branch=column[branch][answered].astype(np.int64),
        items=items[answered],
    )


def _answered_early(depths_P: Int64Array, share: float, rng: np.random.Generator) -> Int64Array:
    """Depths of answers: for a share of the branches that reason, uniform from 1 to the branch's own."""
    drawn_P = 1 + np.floor(rng.random(len(depths_P)) * depths_P).astype(np.int64)
    chosen_P = rng.random(len(depths_P)) < share
    return np.where(chosen_P, np.minimum(drawn_P, depths_P), depths_P)


def _depth(num_steps: int, depth: int | None, fallback_depth: int) -> int:
    if depth is not None:
        return depth
    return num_steps or fallback_depth


def _stack(rows: list[_Row], tokens_IL: Int32Array, *, pad: int, max_depth: int) -> LatentBatch:
    trunk_BT, lengths_B = pad_right([row.trunk for row in rows], pad)
    branches, answers = max(len(row.openings) for row in rows), max(len(row.items) for row in rows)
    shape = (len(rows), branches)
    openings_BP, depths_BP, answer_depths_BP = (np.zeros(shape, np.int64) for _ in range(3))
    supervised_BP, weights_BP = np.zeros(shape, bool), np.zeros(shape, np.int64)
    anchors_BPN = np.full((*shape, max_depth), -1, np.int32)
    branch_BA = np.zeros((len(rows), answers), np.int64)
    items_BA = np.full((len(rows), answers), -1, np.int64)
    for number, row in enumerate(rows):
        count = len(row.openings)
        openings_BP[number, :count] = row.openings
        depths_BP[number, :count] = row.depths
        answer_depths_BP[number, :count] = row.answer_depths
        weights_BP[number, :count] = np.bincount(row.branch, minlength=count)
        for column, found in enumerate(row.steps):
            supervised_BP[number, column] = len(found) > 0
            reached = found[: min(int(row.depths[column]), max_depth)]
            anchors_BPN[number, column, : len(reached)] = reached
        branch_BA[number, : len(row.items)] = row.branch
        items_BA[number, : len(row.items)] = row.items
    answers_BAL = tokens_IL[items_BA.clip(min=0)].astype(np.int64)
    return LatentBatch(
        ids_BT=trunk_BT, lengths_B=lengths_B, openings_BP=openings_BP, depths_BP=depths_BP,
        answer_depths_BP=answer_depths_BP, supervised_BP=supervised_BP, anchors_BPN=anchors_BPN,
        weights_BP=weights_BP, branch_BA=branch_BA, answers_BAL=answers_BAL, items_BA=items_BA,
    )  # fmt: skip
