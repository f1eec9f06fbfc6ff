"""Histories in, ranked items out: the one path that evaluation, the recommender and the server share.

Legend: Q queries, K items returned, B batch, W beams.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lasar.decoding.beam import beam_search
from lasar.decoding.trie import ItemFilter, Trie
from lasar.errors import ConfigError
from lasar.model.prompt import encode_prompts
from lasar.prompts.vocabulary import Vocabulary, pad_right

Int32Array = NDArray[np.int32]


class Ranker:
    """A model, its vocabulary and a catalogue, ready to rank.

    Attributes:
        model: the causal LM.
        vocabulary: renders histories.
        trie: the catalogue.
    """

    def __init__(self, model: PreTrainedModel, *, vocabulary: Vocabulary, codes_IL: Int32Array) -> None:
        """Build the trie on the model's device."""
        self.model = model
        self.vocabulary = vocabulary
        self.tokens_IL = vocabulary.item_tokens(codes_IL)
        self.trie = Trie(codes_IL, device=model.device)

    @torch.no_grad()
    def rank(
        self,
        histories: Sequence[Int32Array],
        baskets: Sequence[Int32Array],
        *,
        k: int,
        beam_width: int,
        exclude_seen: bool = False,
        exclude: Sequence[Int32Array] | None = None,
        allow: Sequence[Int32Array] | None = None,
        batch_size: int = 32,
        advance: Callable[[int], None] | None = None,
    ) -> tuple[Int32Array, NDArray[np.float32]]:
        """Rank the catalogue for every history; the next item opens a new order.

        Args:
            histories: item indices, oldest first, one array per query; may be empty.
            baskets: basket numbers of the history's events.
            k: items to return.
            beam_width: beams, at least `k`.
            exclude_seen: forbid the items of the history.
            exclude: forbidden item indices of each query.
            allow: the only permitted item indices of each query.
            batch_size: queries decoded together.
            advance: called with the number of queries done after each batch.

        Returns:
            items [Q, K] (-1 where fewer than K items are allowed) and scores [Q, K] (summed log-probabilities).

        Raises:
            ConfigError: `k` exceeds `beam_width`.
        """
        if k > beam_width:
            raise ConfigError(f"k={k} exceeds beam_width={beam_width}; raise the beam width or lower k")
        count = len(histories)
        items_QK = np.full((count, k), -1, dtype=np.int32)
        scores_QK = np.full((count, k), -np.inf, dtype=np.float32)
        rows = [
            self.vocabulary.render_history(self.tokens_IL, history, basket, open_order=True)
            for history, basket in zip(histories, baskets, strict=True)
        ]
        filters = _filter_lists(histories, exclude_seen=exclude_seen, exclude=exclude, allow=allow)
        order = np.argsort([len(row) for row in rows], kind="stable")
        device = self.model.device
        for start in range(0, count, batch_size):
            batch = order[start : start + batch_size]
            ids_BT, lengths_B = pad_right([rows[i] for i in batch], self.vocabulary.pad)
            item_filter = None
            if filters is not None:
                listed, allowing = filters
                item_filter = ItemFilter(self.trie, items=[listed[i] for i in batch], allow=allowing)
            beams = beam_search(
                encode_prompts(
                    self.model, torch.from_numpy(ids_BT).to(device), torch.from_numpy(lengths_B).to(device)
                ),
                vocabulary=self.vocabulary,
                trie=self.trie,
                beam_width=beam_width,
                item_filter=item_filter,
            )
            width = min(k, beams.items_BW.shape[1])
            items_QK[batch, :width] = beams.items_BW[:, :width].cpu().numpy()
            scores_QK[batch, :width] = beams.scores_BW[:, :width].cpu().numpy()
            if advance is not None:
                advance(len(batch))
        return items_QK, scores_QK


def _filter_lists(
    histories: Sequence[Int32Array],
    *,
    exclude_seen: bool,
    exclude: Sequence[Int32Array] | None,
    allow: Sequence[Int32Array] | None,
) -> tuple[list[NDArray[np.int64]], bool] | None:
    # One list per query suffices: allowed minus forbidden, or, without an allow-list, forbidden.
    if not exclude_seen and exclude is None and allow is None:
        return None
    none = np.zeros(0, dtype=np.int32)
    lists = []
    for query, history in enumerate(histories):
        forbidden = np.union1d(
            history if exclude_seen else none, exclude[query] if exclude is not None else none
        )
        listed = np.unique(forbidden) if allow is None else np.setdiff1d(allow[query], forbidden)
        lists.append(listed.astype(np.int64))
    return lists, allow is not None
