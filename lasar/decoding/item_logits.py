"""What an item's own row of the output head adds to the logit of its last code (decision 0008).

Legend: N nodes in any shape, M children, D hidden.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from lasar.decoding.trie import Trie
from lasar.model.backbone import output_table
from lasar.model.head import as_logits
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
    items_NM = trie.item_of_leaf[child_NM]
    known_NM = real_NM & (items_NM < vocabulary.num_items)
    rows_ID = output_table(model)[vocabulary.first_item : vocabulary.first_item + vocabulary.num_items]
    items_P = items_NM[known_NM]
    own_P = _products(hidden_ND.flatten(0, -2), rows_ID, known_NM.flatten(0, -2), items_P)
    own_P = as_logits(model, own_P, vocabulary.first_item + items_P)
    return logits_NM + torch.zeros_like(logits_NM).masked_scatter(known_NM, own_P.to(logits_NM.dtype))


def _products(hidden_nD: Tensor, rows_ID: Tensor, known_nM: Tensor, items_P: Tensor) -> Tensor:
    """Dot products of hidden states and rows for the P pairs that `known_nM` marks, row by row.

    Most nodes have far fewer children than the one with the most. On CPUs without gradients, a sampled matrix product
    reads rows where they lie; gathering them first takes four times as long for 50 nodes and ten times for 1,600 (128
    wide, 20 children on average, one thread).
    """
    counts_n = known_nM.sum(-1)
    if hidden_nD.device.type == "cpu" and not torch.is_grad_enabled() and hidden_nD.dtype == rows_ID.dtype:
        _accept_beta()
        starts = torch.cat([counts_n.new_zeros(1), counts_n.cumsum(0)])
        size = (len(counts_n), len(rows_ID))
        pattern = torch.sparse_csr_tensor(
            starts, items_P, rows_ID.new_zeros(len(items_P)), size=size, check_invariants=False
        )
        sampled: Tensor = torch.sparse.sampled_addmm(pattern, hidden_nD, rows_ID.T, beta=0.0).values()
        return sampled
    node_P = torch.repeat_interleave(torch.arange(len(counts_n), device=counts_n.device), counts_n)
    gathered: Tensor = torch.linalg.vecdot(hidden_nD[node_P], rows_ID[items_P].to(hidden_nD.dtype))
    return gathered


@functools.cache
def _accept_beta() -> None:
    """PyTorch says once per process that such matrices are in beta; here it says it to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        none = torch.zeros(0, dtype=torch.int64)
        torch.sparse_csr_tensor(none.new_zeros(2), none, torch.zeros(0), size=(1, 1), check_invariants=False)
