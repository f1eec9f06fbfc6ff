"""Histories as padded rows of items, and the batches that the trained baselines learn from.

A row is a start token (the id after the last item), then the items, oldest first; rows are padded on the right, where
causal models cannot see. Every position predicts one item of the next order, drawn anew every epoch; without orders
that is the next item. So an empty history has a prediction too, and nothing is learnt from the arbitrary sequence
within an order.

Legend: B rows, T positions, P predictions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lasar.data.interactions import TrainSequence
from lasar.prompts.batches import bucket_by_length, shuffle_orders, windows

Items = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Histories:
    """Rows of items.

    Attributes:
        items_BT: start token, items, padding (start tokens again), int64.
        lengths_B: tokens of each row without padding; at least 1.
    """

    items_BT: Tensor
    lengths_B: Tensor

    def last(self, values_BTD: Tensor) -> Tensor:
        """What belongs to the last token of each row, [B, D]."""
        row = torch.arange(len(values_BTD), device=values_BTD.device)
        return values_BTD[row, self.lengths_B - 1]

    def to(self, device: torch.device | str) -> "Histories":
        """The same rows on a device."""
        return Histories(items_BT=self.items_BT.to(device), lengths_B=self.lengths_B.to(device))


@dataclass(frozen=True, kw_only=True)
class TargetBatch:
    """Histories and what is to be predicted from their positions.

    Attributes:
        histories: the rows.
        targets_BT: the item that each position predicts, -1 for none.
    """

    histories: Histories
    targets_BT: Tensor

    @property
    def num_targets(self) -> int:
        """Number of predictions."""
        return int((self.targets_BT >= 0).sum())

    def to(self, device: torch.device | str) -> "TargetBatch":
        """The same batch on a device."""
        return TargetBatch(histories=self.histories.to(device), targets_BT=self.targets_BT.to(device))


class _Row(NamedTuple):
    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]


def pad_histories(histories: Sequence[Items], *, num_items: int, max_history: int) -> Histories:
    """The newest `max_history` items of every history as rows."""
    start = np.array([num_items], dtype=np.int64)
    rows = [np.concatenate([start, history[-max_history:]]) for history in histories]
    return _histories(rows, num_items)


def target_batches(
    sequences: Sequence[TrainSequence],
    *,
    num_items: int,
    max_history: int,
    train_targets: str,
    whole_histories: bool,
    batch_tokens: int,
    seed: int,
    epoch: int,
) -> list[TargetBatch]:
    """All batches of one epoch, in training order; a pure function of its arguments.

    Args:
        sequences: training histories.
        num_items: items in the catalogue.
        max_history: items that a prediction may look back on.
        train_targets: `all` orders of a history or only its `last`.
        whole_histories: one row per history with a prediction at every position; else one row per prediction, made
            from its last position, for models that encode a history for one answer.
        batch_tokens: tokens of a batch at most, padding included (one row may exceed it).
        seed: of the run.
        epoch: counts from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    rows: list[_Row] = []
    for sequence in sequences:
        width = max_history + 1 if whole_histories else len(sequence.items)
        pieces = windows(sequence, width, train_targets, rng)
        for number, (items, baskets) in enumerate(pieces):
            # Whoever is cut out of the middle of a history does not open it: nothing is predicted from no items then.
            opens = number == 0 and (train_targets == "all" or len(items) == len(sequence.items))
            row = _row(items, baskets, num_items, opens=opens, only_last=train_targets == "last", rng=rng)
            rows.extend([row] if whole_histories else _prefixes(row, max_history))
    rows = [row for row in rows if (row.targets >= 0).any()]
    groups = bucket_by_length([len(row.tokens) for row in rows], batch_tokens, rng)
    return [_stack([rows[index] for index in group], num_items) for group in groups]


def _row(
    items: Items,
    baskets: Items,
    num_items: int,
    *,
    opens: bool,
    only_last: bool,
    rng: np.random.Generator,
) -> _Row:
    items = shuffle_orders(items, baskets, rng)
    starts = np.flatnonzero(np.diff(baskets, prepend=-1) != 0)
    sizes = np.diff(starts, append=len(items))
    order = np.cumsum(np.diff(baskets, prepend=-1) != 0) - 1
    tokens = np.concatenate([[num_items], items[: starts[-1]]]).astype(np.int64)
    following = np.concatenate([[0], order[: starts[-1]] + 1])
    drawn = starts[following] + (rng.random(len(tokens)) * sizes[following]).astype(np.int64)
    targets = items[drawn].astype(np.int64)
    if not opens:
        targets[0] = -1
    if only_last:
        targets[following != len(starts) - 1] = -1
    return _Row(tokens, targets)


def _prefixes(row: _Row, max_history: int) -> Iterator[_Row]:
    for place in np.flatnonzero(row.targets >= 0).tolist():
        newest = row.tokens[1 : place + 1][-max_history:]
        targets = np.full(len(newest) + 1, -1, dtype=np.int64)
        targets[-1] = row.targets[place]
        yield _Row(np.concatenate([row.tokens[:1], newest]), targets)


def _stack(rows: list[_Row], num_items: int) -> TargetBatch:
    histories = _histories([row.tokens for row in rows], num_items)
    targets_BT = torch.full_like(histories.items_BT, -1)
    for number, row in enumerate(rows):
        targets_BT[number, : len(row.targets)] = torch.from_numpy(row.targets)
    return TargetBatch(histories=histories, targets_BT=targets_BT)


def _histories(rows: Sequence[NDArray[np.int64]], num_items: int) -> Histories:
    lengths = [len(row) for row in rows]
    items_BT = np.full((len(rows), max(lengths)), num_items, dtype=np.int64)
    for number, row in enumerate(rows):
        items_BT[number, : len(row)] = row
    return Histories(items_BT=torch.from_numpy(items_BT), lengths_B=torch.tensor(lengths))
