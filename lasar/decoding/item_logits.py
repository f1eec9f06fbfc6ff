"""What an item's own row of the output head adds to the logit of its last code (decision 0008).

Legend: N nodes in any shape, M children, D hidden.
"""

import torch
from torch import Tensor, nn

from lasar.decoding.trie import Trie
from lasar.model.backbone import output_table
from lasar.prompts.vocabulary import Vocabulary


def with_item_logits(
    logits_NM: Tensor,
    model: nn.Module,
    hidden_ND: Tensor,
    child_NM: Tensor,
    real_NM: Tensor,
    *,
    level: int,
    vocabulary: Vocabulary,
    trie: Trie,
) -> Tensor:
    """Logits of the children of nodes; those of leaves with the items' own, where the vocabulary has them.

    Both are ordinary logits of a causal LM: that of the code's token and that of the item's token. An item that was
    added after training has none and adds nothing.

    Args:
        logits_NM: of the children's codes, `[..., M]`.
        model: owns the output head.
        hidden_ND: hidden states that predict them, `[..., D]`.
        child_NM: the children, nodes of the level below.
        real_NM: which of them exist.
        level: of the nodes.
        vocabulary: token ids, and whether items have rows in answers.
        trie: the catalogue.
    """
    if not vocabulary.item_answers or level < trie.num_levels - 1:
        return logits_NM
    known_NM = real_NM & (trie.item_of_leaf[child_NM] < vocabulary.num_items)
    # Nodes have few children and many nodes none: only pairs that exist are multiplied.
    pairs = known_NM.nonzero(as_tuple=True)
    tokens = trie.item_of_leaf[child_NM[pairs]] + vocabulary.first_item
    own = torch.linalg.vecdot(hidden_ND[pairs[:-1]], output_table(model)[tokens].to(hidden_ND.dtype))
    return logits_NM.index_put(pairs, own.to(logits_NM.dtype), accumulate=True)
