"""Trie-constrained beam search in which beams are branches of one prompt (paper section 3, inference).

The prompt's keys and values are computed once per request and never copied, repeated or reordered. Each step appends
the keys of its W new beam tokens to the same cache; a beam sees the prompt and its own ancestors through a 4-D mask.

Legend: B batch, T prompt tokens, W beams, L levels, C codebook, D hidden, M most children of a node.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lasar.decoding.trie import ItemFilter, Trie
from lasar.model.backbone import head_rows, trunk
from lasar.prompts.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Beams:
    """Result of a search, best first.

    Attributes:
        items_BW: item indices, -1 where fewer than W items are allowed.
        scores_BW: summed log-probability of the item's codes, -inf at -1.
    """

    items_BW: Tensor
    scores_BW: Tensor


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    ids_BT: Tensor,
    lengths_B: Tensor,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    beam_width: int,
    item_filter: ItemFilter | None = None,
) -> Beams:
    """Search the `beam_width` most probable items of each prompt.

    A code's probability is normalised as `vocabulary.normalise` says. The search is exact whenever `beam_width` is at
    least the number of trie nodes on every level but the last.

    Args:
        model: a Hugging Face causal LM in evaluation mode that accepts 4-D masks.
        ids_BT: prompts, padded on the right.
        lengths_B: tokens of each prompt, at least 1.
        vocabulary: token ids of the levels.
        trie: the catalogue.
        beam_width: number of beams W.
        item_filter: which items each request may receive; all by default.
    """
    batch, prompt_width = ids_BT.shape
    device = ids_BT.device
    cache = DynamicCache(config=model.config)
    hidden_BTD = trunk(model)(input_ids=ids_BT, past_key_values=cache, use_cache=True).last_hidden_state
    rows_B = torch.arange(batch, device=device)
    hidden_BWD = hidden_BTD[rows_B, lengths_B - 1][:, None]
    prompt_mask_BT = torch.arange(prompt_width, device=device) < lengths_B[:, None]

    nodes_BW = torch.zeros((batch, 1), dtype=torch.int64, device=device)
    scores_BW = torch.zeros((batch, 1), device=device)
    ancestors_BWA = torch.zeros((batch, 1, 0), dtype=torch.int64, device=device)
    cached_beams = 0
    for level in range(trie.num_levels):
        nodes_BW, scores_BW, parents_BW = _expand(
            model, hidden_BWD, nodes_BW, scores_BW, level,
            vocabulary=vocabulary, trie=trie, beam_width=beam_width, item_filter=item_filter,
        )  # fmt: skip
        if level == trie.num_levels - 1:
            break
        width = nodes_BW.shape[1]
        own_W = cached_beams + torch.arange(width, device=device)
        kept_BWA = ancestors_BWA.gather(1, parents_BW[..., None].expand(-1, -1, ancestors_BWA.shape[2]))
        ancestors_BWA = torch.cat([kept_BWA, own_W.expand(batch, -1)[..., None]], dim=2)
        cached_beams += width
        tree_mask_BWA = torch.zeros((batch, width, cached_beams), dtype=torch.bool, device=device)
        tree_mask_BWA.scatter_(2, ancestors_BWA, True)
        mask_BWK = torch.cat([prompt_mask_BT[:, None].expand(-1, width, -1), tree_mask_BWA], dim=2)
        codes_BW = trie.levels[level + 1].code[nodes_BW]
        hidden_BWD = trunk(model)(
            input_ids=codes_BW + vocabulary.level_start(level),
            attention_mask=mask_BWK[:, None],
            position_ids=(lengths_B + level)[:, None].expand(-1, width),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    found_BW = scores_BW > -torch.inf
    items_BW = torch.where(found_BW, trie.item_of_leaf[nodes_BW], -1)
    return Beams(items_BW=items_BW, scores_BW=scores_BW)


def _expand(
    model: PreTrainedModel,
    hidden_BWD: Tensor,
    nodes_BW: Tensor,
    scores_BW: Tensor,
    level: int,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    beam_width: int,
    item_filter: ItemFilter | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best W children of all beams: their nodes, scores and parent beams."""
    first, last = vocabulary.normaliser(level)
    logits_BWV = (hidden_BWD @ head_rows(model, first, last).T).float()
    child_BWM, real_BWM = trie.children(level, nodes_BW)
    below = trie.levels[level + 1]
    token_BWM = below.code[child_BWM] + (vocabulary.level_start(level) - first)
    if vocabulary.normalise == "trie":
        logits_BWM = logits_BWV.gather(2, token_BWM).masked_fill(~real_BWM, -torch.inf)
        logprobs_BWM = logits_BWM.log_softmax(-1)
    else:
        logprobs_BWM = logits_BWV.log_softmax(-1).gather(2, token_BWM)
    # Filters come after normalising: leaving items out does not change the scores of the others.
    if item_filter is not None:
        real_BWM = real_BWM & item_filter.alive(below, child_BWM)
    scores_BWM = (scores_BW[..., None] + logprobs_BWM).masked_fill(~real_BWM, -torch.inf)
    flat = scores_BWM.flatten(1)
    best_BW, chosen_BW = flat.topk(min(beam_width, flat.shape[1]), dim=1)
    return child_BWM.flatten(1).gather(1, chosen_BW), best_BW, chosen_BW // child_BWM.shape[2]
