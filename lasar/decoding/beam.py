"""Trie-constrained beam search in which beams are branches of one prompt (paper section 3, inference).

The prompt's keys and values are computed once per request and never copied, repeated or reordered. Each step appends
the keys of its W new beam tokens to the same cache; a beam sees the prompt and its own ancestors, because that is what
its parent sees (`lasar.model.tree`).

Where fewer items are wanted than there are beams, the last step goes in two parts. An item is at most as probable as
the beam that it ends, so once the best beams are done, only those of the others have to be computed that stand above
the worst item that is wanted. The list is the same. Two parts have the fixed costs of two, so this is for where there
is much to compute: many requests on a CPU.

Legend: B batch, W beams, K wanted items, L levels, C codebook, D hidden, M most children of a node.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasar.decoding.item_logits import with_item_logits
from lasar.decoding.trie import ItemFilter, Trie
from lasar.model.head import part_logits
from lasar.model.prompt import Prefix
from lasar.prompts.vocabulary import Vocabulary

_FIRST = 12  # beams of the last step's first part, at least
# Beams of a batch times width squared, from which on a CPU arithmetic outweighs the fixed costs of a part.
_WORTH = 20_000_000


@dataclass(frozen=True, kw_only=True)
class Beams:
    """Result of a search, best first.

    Attributes:
        items_BW: item indices, -1 where fewer items are allowed; W columns, or the K that were wanted.
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
    wanted: int | None = None,
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
        wanted: how many of the best to return, all W by default; fewer cost less.
    """
    hidden_BWD, tips_BW = prefix.hidden_B1D, prefix.tip_B1
    nodes_BW = torch.zeros_like(tips_BW)
    scores_BW = torch.zeros(tips_BW.shape, device=tips_BW.device)
    expand = partial(_expand, prefix.model, vocabulary=vocabulary, trie=trie, item_filter=item_filter)
    best = min(wanted or beam_width, beam_width)
    for level in range(trie.num_levels - 1):
        nodes_BW, scores_BW, parents_BW = expand(hidden_BWD, nodes_BW, scores_BW, level, width=beam_width)
        tips_BW = tips_BW.gather(1, parents_BW)
        below = trie.levels[level + 1]
        # Where one item is left, its other codes are certain: no hidden state can change that.
        needed_BW = scores_BW > -torch.inf
        if vocabulary.normalise == "trie":
            needed_BW &= below.leaf_start[nodes_BW + 1] - below.leaf_start[nodes_BW] > 1
        ids_BW = below.code[nodes_BW] + vocabulary.level_start(level)
        if level < trie.num_levels - 2:
            hidden_BWD, grown = prefix.grow(tips_BW, needed_BQ=needed_BW, input_ids=ids_BW)
            tips_BW = grown.index_BQ
        else:
            ends = _Ends(tips_BW, ids_BW, needed_BW, nodes_BW, scores_BW)
            nodes_BW, scores_BW = _last_step(prefix, ends, partial(expand, level=level + 1, width=best), best)
    if trie.num_levels == 1:
        nodes_BW, scores_BW, _ = expand(hidden_BWD, nodes_BW, scores_BW, 0, width=best)
    found_BW = scores_BW > -torch.inf
    items_BW = torch.where(found_BW, trie.item_of_leaf[nodes_BW], -1)
    return Beams(items_BW=items_BW, scores_BW=scores_BW)


class _Ends(NamedTuple):
    """What the last step begins with, best first: each [B, W]; `needed` ones have more than one child."""

    tips: Tensor
    ids: Tensor
    needed: Tensor
    nodes: Tensor
    scores: Tensor


def _last_step(
    prefix: Prefix, ends: _Ends, expand: Callable[..., tuple[Tensor, Tensor, Tensor]], best: int
) -> tuple[Tensor, Tensor]:
    """Leaves [B, K] and their scores, best first."""

    def finish(ends: _Ends) -> tuple[Tensor, Tensor]:
        hidden_BQD, _ = prefix.grow(ends.tips, needed_BQ=ends.needed, input_ids=ends.ids, final=True)
        leaves_BK, scores_BK, _ = expand(hidden_BQD, ends.nodes, ends.scores)
        return leaves_BK, scores_BK

    batch, beams = ends.nodes.shape
    arithmetic = batch * beams * prefix.hidden_B1D.shape[-1] ** 2
    worth = best < beams and arithmetic >= _WORTH and ends.nodes.device.type == "cpu"
    first = max(best, _FIRST) if worth else beams
    leaves_BK, scores_BK = finish(_Ends(*(x_BW[:, :first] for x_BW in ends)))
    if first >= beams:
        return leaves_BK, scores_BK
    rest = _Ends(*(x_BW[:, first:] for x_BW in ends))
    # Items that are certain count at once; the K-th best of all that is known is what the others have to reach.
    certain_BQ = rest.scores.masked_fill(rest.needed, -torch.inf)
    known_BX = torch.cat([scores_BK, certain_BQ], dim=1)
    floor_B1 = known_BX.topk(best, dim=1).values[:, -1:]
    open_BQ = (rest.scores >= floor_B1) & (rest.scores > -torch.inf)
    width = int(open_BQ.sum(1).max())
    if not width:
        return leaves_BK, scores_BK
    rest = _Ends(*(x_BQ[:, :width] for x_BQ in rest))
    # Of the others a hidden state of 0 makes something, too, below the floor as all that they could lead to.
    more_BK, more_scores_BK = finish(rest._replace(needed=rest.needed & open_BQ[:, :width]))
    scores_BX = torch.cat([scores_BK, more_scores_BK], dim=1)
    scores_BK, chosen_BK = scores_BX.topk(min(best, scores_BX.shape[1]), dim=1)
    return torch.cat([leaves_BK, more_BK], dim=1).gather(1, chosen_BK), scores_BK


def _expand(
    model: nn.Module,
    hidden_BWD: Tensor,
    nodes_BW: Tensor,
    scores_BW: Tensor,
    level: int,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    width: int,
    item_filter: ItemFilter | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Best W children of all beams: their nodes, scores and parent beams."""
    child_BWM, logprobs_BWM, real_BWM = score_children(
        model, hidden_BWD, nodes_BW, level, vocabulary=vocabulary, trie=trie, item_filter=item_filter
    )
    scores_BWM = (scores_BW[..., None] + logprobs_BWM).masked_fill(~real_BWM, -torch.inf)
    flat = scores_BWM.flatten(1)
    best_BW, chosen_BW = flat.topk(min(width, flat.shape[1]), dim=1)
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
    logits_BWV = part_logits(model, hidden_BWD, first, last).float()
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
