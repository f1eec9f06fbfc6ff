"""The tokens LASAR adds to a language model: six markers and one token per (level, code).

Layout of token ids, after `base_size` tokens of the backbone's own (0 for a model trained from scratch)::

    base_size + 0 <pad>   padding, never attended to
    base_size + 1 <user>  opens every history
    base_size + 2 <order> opens every order of a history with orders (several items at one time)
    base_size + 3 <s>     opens latent reasoning (paper section 3; its hidden state is h_0)
    base_size + 4 <t>     a latent slot; its own embedding is never read
    base_size + 5 <e>     closes latent reasoning
    then level 0's codes, level 1's codes, ...
    then, if items have tokens of their own, one for each: in histories it stands in place of the last code

A history is rendered here and nowhere else, for training, evaluation and serving alike, so that the label, the
trie and the decoder share one rendering of the target.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lasar.artifacts import read_json, write_json

Normalise = Literal["trie", "level", "sid", "full"]
MARKERS = ("<pad>", "<user>", "<order>", "<s>", "<t>", "<e>")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Token ids of markers and codes.

    Attributes:
        num_levels: codes per item.
        codebook_size: codes per level.
        base_size: tokens of the backbone's own vocabulary.
        orders: whether histories carry `<order>` markers.
        max_history: items of a history that are rendered at most; the newest are kept.
        normalise: over what a code's probability is normalised, in training and decoding alike: the `trie` children
            of its prefix (so that the probabilities of all items sum to 1), all codes of its `level`, all codes of
            every level (`sid`), or the `full` vocabulary.
        num_items: the first so many items have a token of their own that stands in place of the last code in
            histories, by which the model remembers single items (decision 0005). Answers are codes for every item,
            and items beyond these, added later, are codes in histories, too.
        item_answers: whether the logit of such an item's token is added to that of its last code in answers (decision
            0008); only where `normalise` is `trie`.
    """

    num_levels: int
    codebook_size: int
    base_size: int = 0
    orders: bool = False
    max_history: int = 50
    normalise: Normalise = "trie"
    num_items: int = 0
    item_answers: bool = False

    @property
    def pad(self) -> int:
        """Padding token."""
        return self.base_size

    @property
    def user(self) -> int:
        """Token that opens a history."""
        return self.base_size + 1

    @property
    def order(self) -> int:
        """Token that opens an order."""
        return self.base_size + 2

    @property
    def latent_start(self) -> int:
        """`<s>`."""
        return self.base_size + 3

    @property
    def latent_slot(self) -> int:
        """`<t>`."""
        return self.base_size + 4

    @property
    def latent_end(self) -> int:
        """`<e>`."""
        return self.base_size + 5

    @property
    def first_code(self) -> int:
        """Token of code 0 on level 0."""
        return self.base_size + len(MARKERS)

    @property
    def size(self) -> int:
        """Number of tokens in all."""
        return self.first_item + self.num_items

    @property
    def first_item(self) -> int:
        """Token of item 0, where items have tokens of their own."""
        return self.first_code + self.num_levels * self.codebook_size

    @property
    def max_tokens(self) -> int:
        """Longest path a model has to take: a full history, an answer, and room for `<s>`, latent steps and `<e>`."""
        return 1 + (self.max_history + 1) * (self.num_levels + int(self.orders)) + 16

    def level_start(self, level: int) -> int:
        """Token of code 0 on `level`."""
        return self.first_code + level * self.codebook_size

    def normaliser(self, level: int) -> tuple[int, int]:
        """First and one-past-last token whose logits a code of `level` competes with (before the trie's say)."""
        if self.normalise == "full":
            return 0, self.first_item
        if self.normalise == "sid":
            return self.first_code, self.first_item
        return self.level_start(level), self.level_start(level + 1)

    def item_tokens(self, codes_IL: NDArray[np.int32]) -> NDArray[np.int32]:
        """Codes [I, L] of the whole catalogue to token ids [I, L]."""
        starts_L = self.first_code + self.codebook_size * np.arange(self.num_levels, dtype=np.int32)
        tokens_IL = np.asarray(codes_IL, dtype=np.int32) + starts_L
        known = min(self.num_items, len(tokens_IL))
        tokens_IL[:known, -1] = self.first_item + np.arange(known)
        return tokens_IL

    def render_history(
        self,
        tokens_IL: NDArray[np.int32],
        items: NDArray[np.int32],
        baskets: NDArray[np.int32],
        *,
        open_order: bool,
    ) -> NDArray[np.int32]:
        """Render a history, oldest first.

        Args:
            tokens_IL: every item's tokens, as `item_tokens` gives them.
            items: item indices [n].
            baskets: basket number of each item [n], non-decreasing.
            open_order: append an `<order>` token: what follows belongs to a new order. Ignored without orders.

        Returns:
            Token ids [1 + n * L (+ orders)].
        """
        items, baskets = items[-self.max_history :], baskets[-self.max_history :]
        codes = tokens_IL[items]
        if not self.orders:
            return np.concatenate([np.array([self.user], np.int32), codes.reshape(-1)])
        opens = np.diff(baskets, prepend=-1) != 0 if len(baskets) else np.zeros(0, bool)
        rows = np.concatenate([np.full((len(items), 1), self.order, np.int32), codes], axis=1)
        keep = np.concatenate([opens[:, None], np.ones_like(codes, dtype=bool)], axis=1)
        tail = [self.order] if open_order else []
        return np.concatenate([np.array([self.user], np.int32), rows[keep], np.array(tail, np.int32)])

    def save(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "Vocabulary":
        """Read what `save` wrote."""
        values: dict[str, Any] = read_json(path)
        return Vocabulary(**values)


def pad_right(rows: Sequence[NDArray[np.int32]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stack token rows of different lengths.

    Returns:
        ids_BT padded on the right with `pad`, and lengths_B.
    """
    lengths_B = np.array([len(row) for row in rows], dtype=np.int64)
    ids_BT = np.full((len(rows), int(lengths_B.max(initial=0))), pad, dtype=np.int64)
    for row, tokens in enumerate(rows):
        ids_BT[row, : len(tokens)] = tokens
    return ids_BT, lengths_B
