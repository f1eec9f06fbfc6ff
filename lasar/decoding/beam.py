"""Trie-constrained beam search in which beams are branches of one prompt (paper section 3, inference).

The prompt's keys and values are computed once per request and never copied, repeated or reordered. Each step appends
the keys of its W new beam tokens to the same cache; a beam sees the prompt and its own ancestors, because that is what
its parent sees (`lasar.model.tree`).

Legend: B batch, W beams, L levels, C codebook, D hidden, M most children of a node.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lasar.decoding.item_logits import with_item_logits
from lasar.decoding.trie import ItemFilter, Trie
from lasar.model.backbone import head_rows
from lasar.model.prompt import Prefix
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
    prefix: Prefix,
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
        prefix: the prompts, computed by a model in evaluation mode; beams are hung off it.
        vocabulary: token ids of the levels.
        trie: the catalogue.
        beam_width: number of beams W.
        item_filter: which items each request may receive; all by default.
    """
    hidden_BWD, tips_BW = prefix.hidden_B1D, prefix.tip_B1
    nodes_BW = torch.zeros_like(tips_BW)
    scores_BW = torch.zeros(tips_BW.shape, device=tips_BW.device)
    for level in range(trie.num_levels):
        nodes_BW, scores_BW, parents_BW = _expand(
            prefix.model, hidden_BWD, nodes_BW, scores_BW, level,
            vocabulary=vocabulary, trie=trie, beam_width=beam_width, item_filter=item_filter,
        )  # fmt: skip
        if level < trie.num_levels - 1:
            below = trie.levels[level + 1]
            # Where one item is left, its other codes are certain: no hidden state can change that.
            needed_BW = None
            if vocabulary.normalise == "trie":
                many_BW = below.leaf_start[nodes_BW + 1] - below.leaf_start[nodes_BW] > 1
                needed_BW = many_BW & (scores_BW > -torch.inf)
            hidden_BWD, grown = prefix.grow(
                tips_BW.gather(1, parents_BW), needed_BQ=needed_BW,
                input_ids=below.code[nodes_BW] + vocabulary.level_start(level),
            )  # fmt: skip
            tips_BW = grown.index_BQ
    found_BW = scores_BW > -torch.inf
    items_BW = torch.where(found_BW, trie.item_of_leaf[nodes_BW], -1)
    return Beams(items_BW=items_BW, scores_BW=scores_BW)


def _expand(
    model: nn.Module,
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
    child_BWM, logprobs_BWM, real_BWM = score_children(
        model, hidden_BWD, nodes_BW, level, vocabulary=vocabulary, trie=trie, item_filter=item_filter
    )
    scores_BWM = (scores_BW[..., None] + logprobs_BWM).masked_fill(~real_BWM, -torch.inf)
    flat = scores_BWM.flatten(1)
    best_BW, chosen_BW = flat.topk(min(beam_width, flat.shape[1]), dim=1)
    return child_BWM.flatten(1).gather(1, chosen_BW), best_BW, chosen_BW // child_BWM.shape[2]


def score_children(
    model: nn.Module,
    hidden_BWD: Tensor,
    nodes_BW: Tensor,
    level: int,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    item_filter: ItemFilter | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step down the trie, for whatever chooses among the children.

    Args:
        model: owns the output head.
        hidden_BWD: hidden states that predict the next code.
        nodes_BW: node each stands at.
        level: its depth.
        vocabulary: token ids of the levels, and what a probability is normalised over.
        trie: the catalogue.
        item_filter: which items each request may receive.

    Returns:
        Children of all nodes, the log-probability of each code, and which of them exist and are permitted, each
        [B, W, M]; where a child doesn't exist its log-probability means nothing.
    """
    first, last = vocabulary.normaliser(level)
    logits_BWV = (hidden_BWD @ head_rows(model, first, last).T).float()
    child_BWM, real_BWM = trie.children(level, nodes_BW)
    below = trie.levels[level + 1]
    token_BWM = below.code[child_BWM] + (vocabulary.level_start(level) - first)
    if vocabulary.normalise == "trie":
        logits_BWM = with_item_logits(
            logits_BWV.gather(2, token_BWM), model, hidden_BWD, child_BWM, real_BWM,
            level=level, vocabulary=vocabulary, trie=trie,
        )  # fmt: skip
        logprobs_BWM = logits_BWM.masked_fill(~real_BWM, -torch.inf).log_softmax(-1)
    else:
        logprobs_BWM = logits_BWV.log_softmax(-1).gather(2, token_BWM)
    # Filters come after normalising: leaving items out does not change the scores of the others.
    if item_filter is not None:
        real_BWM = real_BWM & item_filter.alive(below, child_BWM)
    return child_BWM, logprobs_BWM, real_BWM
