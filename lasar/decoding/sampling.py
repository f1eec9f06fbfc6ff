"""Sampling distinct items without replacement: Gumbel-top-k carried down the trie.

Stochastic beam search (Kool, van Hoof and Welling, 2019): every node carries the largest of the Gumbel-perturbed
log-probabilities below it. Keeping the W largest on every level ends with exactly the W items that drawing without
replacement, one after the other, would give; no item is drawn twice, none is rejected, no list of all items is made.

Legend: B batch, W items sampled, L levels, C codebook, D hidden, M most children of a node.
"""

import torch
from torch import Tensor

from lasar.decoding.beam import Beams, score_children
from lasar.decoding.trie import ItemFilter, Trie
from lasar.model.prompt import Prefix
from lasar.prompts.vocabulary import Vocabulary


@torch.no_grad()
def sample_items(
    prefix: Prefix,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    num_samples: int,
    generator: torch.Generator,
    item_filter: ItemFilter | None = None,
) -> Beams:
    """Draw `num_samples` distinct items for each prompt; the drawn ones are returned best first.

    Without a filter and with `normalise="trie"` items are drawn from the model's own distribution over the catalogue.
    Otherwise a node's probability is divided among its permitted children.

    Args:
        prefix: the prompts, computed by a model in evaluation mode; samples are hung off it.
        vocabulary: token ids of the levels.
        trie: the catalogue.
        num_samples: W; fewer come back only where fewer items are allowed.
        generator: of random numbers; on the CPU, so that a seed means the same draws everywhere.
        item_filter: which items each request may receive; all by default.

    Returns:
        Items, and their scores as `beam_search` defines them.
    """
    hidden_BWD, tips_BW = prefix.hidden_B1D, prefix.tip_B1
    nodes_BW = torch.zeros_like(tips_BW)
    scores_BW = torch.zeros(tips_BW.shape, device=tips_BW.device)
    chances_BW, keys_BW = scores_BW.double(), scores_BW.double()
    for level in range(trie.num_levels):
        child_BWM, logprobs_BWM, real_BWM = score_children(
            prefix.model, hidden_BWD, nodes_BW, level,
            vocabulary=vocabulary, trie=trie, item_filter=item_filter,
        )  # fmt: skip
        below_BWM = (scores_BW[..., None] + logprobs_BWM).masked_fill(~real_BWM, -torch.inf)
        # In double: a difference of perturbed values is what decides, and many are close.
        local_BWM = logprobs_BWM.double().masked_fill(~real_BWM, -torch.inf).log_softmax(-1)
        chance_BWM = (chances_BW[..., None] + local_BWM).masked_fill(~real_BWM, -torch.inf)
        key_BWM = _perturbed_below(keys_BW, chance_BWM, generator)
        width = min(num_samples, key_BWM.shape[1] * key_BWM.shape[2])
        keys_BW, chosen_BW = key_BWM.flatten(1).topk(width, dim=1)
        nodes_BW, scores_BW, chances_BW = (
            values.flatten(1).gather(1, chosen_BW) for values in (child_BWM, below_BWM, chance_BWM)
        )
        if level < trie.num_levels - 1:
            codes_BW = trie.levels[level + 1].code[nodes_BW]
            hidden_BWD, grown = prefix.grow(
                tips_BW.gather(1, chosen_BW // child_BWM.shape[2]),
                input_ids=codes_BW + vocabulary.level_start(level),
            )
            tips_BW = grown.index_BQ
    scores_BW, order_BW = scores_BW.sort(dim=1, descending=True, stable=True)
    items_BW = trie.item_of_leaf[nodes_BW.gather(1, order_BW)]
    return Beams(items_BW=torch.where(scores_BW > -torch.inf, items_BW, -1), scores_BW=scores_BW)


def _perturbed_below(keys_BW: Tensor, chance_BWM: Tensor, generator: torch.Generator) -> Tensor:
    """Gumbel noise on the children, given that the largest child has its parent's value."""
    uniform_BWM = torch.rand(chance_BWM.shape, generator=generator, dtype=torch.float64)
    uniform_BWM = uniform_BWM.clamp(1e-300, 1 - 2**-53).to(chance_BWM.device)
    noisy_BWM = chance_BWM - (-uniform_BWM.log()).log()
    largest_BW1 = noisy_BWM.max(-1, keepdim=True).values
    # Of a truncated Gumbel, in the form that survives rounding (the paper's appendix B.3).
    gap_BWM = keys_BW[..., None] - noisy_BWM + torch.log1p(-(noisy_BWM - largest_BW1).exp())
    keys_BWM = keys_BW[..., None] - gap_BWM.clamp(min=0) - torch.log1p((-gap_BWM.abs()).exp())
    return torch.where(torch.isneginf(chance_BWM), -torch.inf, keys_BWM)
