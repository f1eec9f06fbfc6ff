"""Training rows as prompts, and which of them a step takes.

Legend: B batch, T prompt tokens, R training rows, L levels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lasar.cot.rows import TrainingRow
from lasar.prompts.vocabulary import Vocabulary, pad_right

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """A batch of training rows, ready for the model.

    Attributes:
        numbers_B: which rows.
        ids_BT: rendered histories, padded on the right.
        lengths_B: tokens of each.
        histories: item indices of each history.
        targets: true items of each row, distinct.
        anchors_B: last anchor of each row, -1 where it has no rationale.
    """

    numbers_B: Int64Array
    ids_BT: Tensor
    lengths_B: Tensor
    histories: list[Int32Array]
    targets: list[Int32Array]
    anchors_B: Int64Array

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.numbers_B)


class PromptSource:
    """Training rows with a history; every pass over them is in a new random order."""

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        tokens_IL: Int32Array,
        *,
        vocabulary: Vocabulary,
        steps: Callable[[int, int], Int32Array],
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Keep the rows.

        Args:
            rows: training rows; those without a history are left out, because nothing personal can be learned there.
            tokens_IL: tokens of every item.
            vocabulary: renders the histories.
            steps: anchors of a training row; see `AnchorStore.steps`.
            seed: of the order.
            device: of the tensors.
        """
        self.rows = [row for row in rows if len(row.history)]
        self._tokens_IL, self._vocabulary, self._steps = tokens_IL, vocabulary, steps
        self._seed, self._device = seed, device
        self._orders: dict[int, Int64Array] = {}

    def draw(self, step: int, count: int) -> Int64Array:
        """Rows that a step takes, [count]; a function of seed, step and count."""
        places = np.arange(step * count, (step + 1) * count)
        passes = places // len(self.rows)
        wanted = set(passes.tolist())
        self._orders = {
            number: self._orders.get(number, self._order(number)) for number in wanted
        }  # of the passes at hand only
        return np.array(
            [
                self._orders[p][n]
                for p, n in zip(passes.tolist(), (places % len(self.rows)).tolist(), strict=True)
            ],
            np.int64,
        )

    def render(self, numbers: Int64Array, *, batch_size: int) -> list[Prompts]:
        """Prompts of these rows in batches of like lengths."""
        order = numbers[np.argsort([len(self.rows[n].history) for n in numbers], kind="stable")]
        return [
            self._prompts(order[start : start + batch_size]) for start in range(0, len(order), batch_size)
        ]

    def _order(self, number: int) -> Int64Array:
        return np.random.default_rng([self._seed, number]).permutation(len(self.rows))

    def _prompts(self, numbers: Int64Array) -> Prompts:
        rows = [self.rows[number] for number in numbers]
        ids_BT, lengths_B = pad_right(
            [
                self._vocabulary.render_history(self._tokens_IL, row.history, row.baskets, open_order=True)
                for row in rows
            ],
            self._vocabulary.pad,
        )
        found = [self._steps(row.user_index, row.basket) for row in rows]
        return Prompts(
            numbers_B=numbers,
            ids_BT=torch.from_numpy(ids_BT).to(self._device),
            lengths_B=torch.from_numpy(lengths_B).to(self._device),
            histories=[row.history for row in rows],
            targets=[np.unique(row.targets) for row in rows],
            anchors_B=np.array([steps[-1] if len(steps) else -1 for steps in found], np.int64),
        )
