"""Histories in, ranked items out: the one path that evaluation, the recommender and the server share.

Legend: Q queries, K items returned, B batch, W beams.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lasar.decoding.beam import beam_search
from lasar.decoding.counts import Counts
from lasar.decoding.ranked import Ranked
from lasar.decoding.trie import ItemFilter, Trie
from lasar.engine.memory import PromptMemory, encode_with_memory
from lasar.engine.prefix import encode
from lasar.engine.weights import FusedWeights, why_unknown
from lasar.errors import ConfigError
from lasar.model.precision import Precision
from lasar.model.prompt import Prefix, encode_prompts
from lasar.model.reasoner import Depth, LatentReasoner
from lasar.prompts.vocabulary import pad_right

Int32Array = NDArray[np.int32]


class Ranker:
    """A model that may reason, and a catalogue, ready to rank.

    Attributes:
        reasoner: the model.
        vocabulary: renders histories.
        codes_IL: semantic IDs of the catalogue.
        trie: the catalogue.
        counts: what is mixed into its lists, or None.
        memory: of prompts seen lately, or None.
    """

    def __init__(
        self,
        reasoner: LatentReasoner,
        *,
        codes_IL: Int32Array,
        fused: bool = True,
        precision: Precision = "fp32",
        counts: Counts | None = None,
        memory: PromptMemory | None = None,
    ) -> None:
        """Build the trie on the model's device.

        Args:
            reasoner: the model.
            codes_IL: codes of the catalogue's items.
            fused: take the fused path where it knows the model; False to compare with the generic one.
            precision: of the fused path's matrix products; the generic path computes as the model was loaded.
            counts: what followed what, mixed into every list.
            memory: of prompts seen lately, for the fused path.
        """
        self.reasoner = reasoner
        self.vocabulary = reasoner.vocabulary
        self.codes_IL = codes_IL
        self.tokens_IL = self.vocabulary.item_tokens(codes_IL)
        self.trie = Trie(codes_IL, device=reasoner.backbone.device)
        self.counts, self._may_fuse, self._precision = counts, fused, precision
        self.memory = memory
        self._fused: FusedWeights | None = None

    def with_codes(self, codes_IL: Int32Array) -> "Ranker":
        """The same model, ready to rank another catalogue; what was arranged for the fused path is shared."""
        ranker = Ranker(
            self.reasoner,
            codes_IL=codes_IL,
            fused=self._may_fuse,
            precision=self._precision,
            counts=self.counts,
            memory=self.memory,
        )
        ranker._fused = self._fresh_weights()  # arranged here, once, however many catalogues follow
        return ranker

    @property
    def engine(self) -> str:
        """Which path computes: `fused`, `fused, bf16`, or `generic` and why."""
        reason = why_unknown(self.reasoner.backbone) if self._may_fuse else "the fused path is not wanted"
        if reason is not None:
            return f"generic: {reason}"
        return "fused" if self._precision == "fp32" else f"fused, {self._precision}"

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
        depth: Depth = "auto",
        seed: int = 0,
        batch_size: int = 32,
        advance: Callable[[int], None] | None = None,
    ) -> Ranked:
        """Rank the catalogue for every history; the next item opens a new order.

        Args:
            histories: item indices, oldest first, one array per query; may be empty.
            baskets: basket numbers of the history's events.
            k: items to return.
            beam_width: beams, at least `k`.
            exclude_seen: forbid the items of the history.
            exclude: forbidden item indices of each query.
            allow: the only permitted item indices of each query.
            depth: latent steps before answering; see `LatentReasoner.think`.
            seed: of depths that are `sampled`; a query's draw depends on its history, not on its batch.
            batch_size: queries decoded together.
            advance: called with the number of queries done after each batch.

        Raises:
            ConfigError: `k` exceeds `beam_width`, or the model was not trained for that depth.
        """
        if k > beam_width:
            raise ConfigError(f"k={k} exceeds beam_width={beam_width}; raise the beam width or lower k")
        count = len(histories)
        items_QK = np.full((count, k), -1, dtype=np.int32)
        scores_QK = np.full((count, k), -np.inf, dtype=np.float32)
        depths_Q = np.zeros(count, dtype=np.int32)
        rows = [
            self.vocabulary.render_history(self.tokens_IL, history, basket, open_order=True)
            for history, basket in zip(histories, baskets, strict=True)
        ]
        filters = _filter_lists(histories, exclude_seen=exclude_seen, exclude=exclude, allow=allow)
        order = np.argsort([len(row) for row in rows], kind="stable")
        device = self.trie.item_of_leaf.device
        fused = self._fresh_weights()
        for start in range(0, count, batch_size):
            batch = order[start : start + batch_size]
            item_filter = None
            if filters is not None:
                listed, allowing = filters
                item_filter = ItemFilter(self.trie, items=[listed[i] for i in batch], allow=allowing)
            prompts = self._encode([rows[i] for i in batch], fused, depth)
            uniform_B = torch.tensor([_uniform(rows[i], seed) for i in batch], device=device)
            thought = self.reasoner.think(prompts, depth=depth, uniform_B=uniform_B)
            beams = beam_search(
                thought.prefix,
                vocabulary=self.vocabulary,
                trie=self.trie,
                beam_width=beam_width,
                item_filter=item_filter,
                wanted=k if self.counts is None else None,  # counts reorder all that was found
            )
            depths_Q[batch] = thought.depths_B.cpu().numpy()
            found = beams.items_BW.cpu().numpy(), beams.scores_BW.cpu().numpy()
            items_BW, scores_BW = self._blended(*found, batch, histories, baskets, filters, width=beam_width)
            width = min(k, items_BW.shape[1])
            items_QK[batch, :width] = items_BW[:, :width]
            scores_QK[batch, :width] = scores_BW[:, :width]
            if advance is not None:
                advance(len(batch))
        return Ranked(items_QK, scores_QK, depths_Q)

    def _blended(
        self,
        items_BW: Int32Array,
        scores_BW: NDArray[np.float32],
        batch: NDArray[np.int64],
        histories: Sequence[Int32Array],
        baskets: Sequence[Int32Array],
        filters: tuple[list[NDArray[np.int64]], bool] | None,
        *,
        width: int,
    ) -> tuple[Int32Array, NDArray[np.float32]]:
        if self.counts is None:
            return items_BW, scores_BW
        lists, allow = filters or ([np.zeros(0, np.int64)] * len(histories), False)
        missing = (
            (0, 0),
            (0, max(0, width - items_BW.shape[1])),
        )  # a search can end with fewer beams than wide
        return self.counts.blend(
            np.pad(items_BW.astype(np.int32), missing, constant_values=-1),
            np.pad(scores_BW, missing, constant_values=-np.inf),
            [histories[i] for i in batch], [baskets[i] for i in batch], listed=[lists[i] for i in batch], allow=allow,
        )  # fmt: skip

    def _fresh_weights(self) -> FusedWeights | None:
        """Weights for the fused path, arranged anew where they have changed; None for the generic path."""
        if self.engine.startswith("generic"):
            self._fused = None
        elif self._fused is None or not self._fused.fresh:
            self._fused = FusedWeights(self.reasoner.backbone, precision=self._precision)
            if self.memory is not None:
                self.memory.clear()  # of other weights
        return self._fused

    def _encode(self, rows: list[Int32Array], fused: FusedWeights | None, depth: Depth) -> Prefix:
        device = self.trie.item_of_leaf.device
        opened = fused is not None and self.reasoner.reasons(depth)
        if opened:
            rows = [np.append(row, np.int32(self.vocabulary.latent_start)) for row in rows]
        ids_BT, lengths_B = (
            torch.from_numpy(array).to(device) for array in pad_right(rows, self.vocabulary.pad)
        )
        if fused is None:
            return encode_prompts(self.reasoner.backbone, ids_BT, lengths_B)
        # Room for the latent steps and `<e>`.
        room = self.reasoner.settings.max_depth + 1
        if self.memory is None:
            return encode(fused, ids_BT, lengths_B, opened=opened, room=room)
        return encode_with_memory(fused, ids_BT, lengths_B, opened=opened, room=room, memory=self.memory)


def _uniform(tokens: Int32Array, seed: int) -> float:
    """A uniform random number in [0, 1) that is a function of a history and the seed."""
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=8, salt=seed.to_bytes(16, "little", signed=True))
    return int.from_bytes(digest.digest(), "little") / 2**64


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
