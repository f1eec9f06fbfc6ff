"""TIGER: an encoder-decoder that writes the next item's semantic ID (Rajput et al. 2023, arXiv 2305.05065).

A small T5 with random weights reads the codes of the history and writes the codes of one item, on the same semantic
IDs as the model it is compared with. One row is one (history, target) pair, as an encoder-decoder needs. Answers come
from a beam search inside the trie of existing IDs, so every one is an item.

Legend: B rows, T tokens, W beams, L levels, C codebook, V vocabulary, I items, M most children of a trie node.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.baselines.ranking import Items, Ranked
from lasar.baselines.sequences import Histories, TargetBatch
from lasar.decoding.trie import ItemFilter, Trie

_PAD, _START, _FIRST_CODE = 0, 1, 2


class Tiger(nn.Module):
    """T5 over codes.

    Attributes:
        codes_IL: semantic IDs of the catalogue; given, not learnt.
        beam_width: beams of the search, raised to k where smaller.
    """

    whole_histories = False
    queries_per_batch = 16
    codes_IL: Tensor

    def __init__(
        self,
        *,
        num_items: int,
        max_history: int,
        num_levels: int,
        codebook_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        head_size: int,
        feed_size: int,
        dropout: float,
        beam_width: int = 50,
    ) -> None:
        """Build with random weights and no IDs: load `codes_IL` before use."""
        from transformers import T5Config, T5ForConditionalGeneration

        super().__init__()
        self.num_items, self.max_history, self.beam_width = num_items, max_history, beam_width
        self.num_levels, self.codebook_size = num_levels, codebook_size
        config = T5Config(
            vocab_size=_FIRST_CODE + num_levels * codebook_size, d_model=hidden_size, d_kv=head_size,
            d_ff=feed_size, num_layers=num_layers, num_decoder_layers=num_layers, num_heads=num_heads,
            dropout_rate=dropout, pad_token_id=_PAD, eos_token_id=None,
        )  # fmt: skip
        self.t5 = T5ForConditionalGeneration(config)
        self.register_buffer("codes_IL", torch.zeros(num_items, num_levels, dtype=torch.int32))

    @cached_property
    def trie(self) -> Trie:
        """The catalogue, on the model's device."""
        return Trie(self.codes_IL.cpu().numpy(), device=self.codes_IL.device)

    def forward(self, batch: TargetBatch) -> Tensor:
        """Cross-entropy over all tokens, summed over the codes of every target."""
        ids_BT, seen_BT = self._prompts(batch.histories)
        answers_BL = self._tokens()[batch.histories.last(batch.targets_BT)]
        inputs_BL = torch.cat([torch.full_like(answers_BL[:, :1], _START), answers_BL[:, :-1]], dim=1)
        found = self.t5(input_ids=ids_BT, attention_mask=seen_BT, decoder_input_ids=inputs_BL)
        return functional.cross_entropy(
            found.logits.float().flatten(0, 1), answers_BL.flatten(), reduction="sum"
        )

    @torch.no_grad()
    def rank(self, histories: Histories, k: int, *, excluded: Sequence[Items] | None) -> Ranked:
        """Rank by constrained beam search; exact if no level but the last has more trie nodes than there are beams.

        Args:
            histories: what was taken.
            k: length of the lists.
            excluded: per query, items that must not appear.

        Returns:
            Items int32 `[Q, K]` (-1 where the beams found no more) and summed log-probabilities `[Q, K]`.
        """
        listed = [np.unique(items).astype(np.int64) for items in excluded] if excluded is not None else None
        allowed = ItemFilter(self.trie, items=listed, allow=False) if listed is not None else None
        nodes_BW, scores_BW = self._search(histories, max(k, self.beam_width), allowed)
        found_BW = scores_BW > -torch.inf
        leaves_BW = torch.where(found_BW, self.trie.item_of_leaf[nodes_BW], -1)
        items_BK = np.full((len(leaves_BW), k), -1, dtype=np.int32)
        scores_BK = np.full((len(leaves_BW), k), -np.inf, dtype=np.float32)
        width = min(k, leaves_BW.shape[1])
        items_BK[:, :width] = leaves_BW[:, :width].cpu().numpy()
        scores_BK[:, :width] = scores_BW[:, :width].cpu().numpy()
        return items_BK, scores_BK

    def _search(
        self, histories: Histories, beam_width: int, allowed: ItemFilter | None
    ) -> tuple[Tensor, Tensor]:
        """Leaves and scores of the best beams, [B, W], best first."""
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        ids_BT, seen_BT = self._prompts(histories)
        encoded_BTD = self.t5.encoder(input_ids=ids_BT, attention_mask=seen_BT).last_hidden_state
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
        batch, device = len(ids_BT), ids_BT.device
        row_B1 = torch.arange(batch, device=device)[:, None]
        token_BW = torch.full((batch, 1), _START, device=device)
        nodes_BW, scores_BW = torch.zeros_like(token_BW), torch.zeros(batch, 1, device=device)
        for level in range(self.num_levels):
            width = token_BW.shape[1]
            # The cache holds the encoder's keys and values from the first call on; later only its shape is read.
            found = self.t5(
                encoder_outputs=BaseModelOutput(encoded_BTD.repeat_interleave(width, 0)),
                attention_mask=seen_BT.repeat_interleave(width, 0),
                decoder_input_ids=token_BW.reshape(-1, 1), past_key_values=cache, use_cache=True,
            )  # fmt: skip
            logprobs_BWV = found.logits[:, -1].float().log_softmax(-1).view(batch, width, -1)
            nodes_BW, scores_BW, parent_BW = self._expand(
                logprobs_BWV, nodes_BW, scores_BW, level, beam_width, allowed
            )
            token_BW = self._token(level, self.trie.levels[level + 1].code[nodes_BW])
            kept = (row_B1 * width + parent_BW).flatten()
            cache.self_attention_cache.batch_select_indices(kept)
            if (
                token_BW.shape[1] != width
            ):  # else the beams of a row stay where they are, and share one history
                cache.cross_attention_cache.batch_select_indices(kept)
        return nodes_BW, scores_BW

    def _expand(
        self,
        logprobs_BWV: Tensor,
        nodes_BW: Tensor,
        scores_BW: Tensor,
        level: int,
        beam_width: int,
        allowed: ItemFilter | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Best children of all beams: nodes, scores, parent beams."""
        child_BWM, real_BWM = self.trie.children(level, nodes_BW)
        below = self.trie.levels[level + 1]
        if allowed is not None:
            real_BWM = real_BWM & allowed.alive(below, child_BWM)
        logprobs_BWM = logprobs_BWV.gather(2, self._token(level, below.code[child_BWM]))
        flat = (scores_BW[..., None] + logprobs_BWM).masked_fill(~real_BWM, -torch.inf).flatten(1)
        best_BW, chosen_BW = flat.topk(min(beam_width, flat.shape[1]), dim=1)
        return child_BWM.flatten(1).gather(1, chosen_BW), best_BW, chosen_BW // child_BWM.shape[2]

    def _token(self, level: int, codes: Tensor) -> Tensor:
        return codes + (_FIRST_CODE + level * self.codebook_size)

    def _tokens(self) -> Tensor:
        """Tokens of every item, [I, L]."""
        levels_L = torch.arange(self.num_levels, device=self.codes_IL.device) * self.codebook_size
        return self.codes_IL.long() + levels_L + _FIRST_CODE

    def _prompts(self, histories: Histories) -> tuple[Tensor, Tensor]:
        """Encoder tokens, and which of them are real: one start token, then L codes per item."""
        tokens_IL = self._tokens()
        start_1L = torch.full_like(tokens_IL[:1], _START)
        ids_BT = torch.cat([tokens_IL, start_1L])[histories.items_BT].flatten(1)[:, self.num_levels - 1 :]
        length_B1 = 1 + (histories.lengths_B[:, None] - 1) * self.num_levels
        seen_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device) < length_B1
        return ids_BT.masked_fill(~seen_BT, _PAD), seen_BT.long()
