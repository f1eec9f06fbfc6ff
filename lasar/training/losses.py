"""Losses over semantic-ID codes.

Legend: B batch, T trunk tokens, M branch tokens, K = T + M, D hidden, L levels, C codebook, P predictions,
R rows of one level, M children.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.decoding.item_logits import with_item_logits
from lasar.decoding.trie import Trie
from lasar.model.attention import causal_mask, tree_mask
from lasar.model.backbone import trunk
from lasar.model.head import part_logits
from lasar.model.tree import Nodes, Tree
from lasar.prompts.batches import TreeBatch
from lasar.prompts.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class CodeLoss:
    """Summed cross-entropy and what it was summed over.

    Attributes:
        total: sum over all targets, scalar, differentiable.
        by_level: sum over each level's targets, [L], detached.
        counts: targets of each level, [L].
    """

    total: Tensor
    by_level: Tensor
    counts: Tensor


def tree_loss(
    model: nn.Module, batch: TreeBatch, *, vocabulary: Vocabulary, trie: Trie, forget: float = 0.0
) -> CodeLoss:
    """Cross-entropy of every prediction of a batch in one forward pass (Stage 1, paper section 3).

    Args:
        model: a causal LM.
        batch: histories and their branches.
        vocabulary: token ids of the levels, and what a probability is normalised over.
        trie: the catalogue, on the model's device.
        forget: share of the histories' item tokens that are replaced by plain codes, at random, so that the model
            also learns to read those, with which items added later are written.
    """
    device = trie.item_of_leaf.device
    ids_BK = torch.from_numpy(batch.ids_BK).to(device)
    if vocabulary.num_items and forget:
        ids_BK = _forget_items(ids_BK, trie, vocabulary=vocabulary, share=forget)
    # Without branches the plain causal path: padding lies on the right, where no real token looks.
    options: dict[str, Any] = {"attention_mask": causal_mask(model, ids_BK)}
    if batch.parents_BM.shape[1]:
        tree = Tree(torch.from_numpy(batch.lengths_B).to(device), batch.trunk_width)
        nodes = tree.grow(torch.from_numpy(batch.parents_BM).to(device))
        options = {
            "attention_mask": tree_mask(model, nodes),
            "position_ids": _positions(nodes, batch),
        }
    hidden_BKD = trunk(model)(input_ids=ids_BK, use_cache=False, **options).last_hidden_state
    sources_P, targets_P, items_P = (
        torch.from_numpy(array).to(device) for array in (batch.sources_P, batch.targets_P, batch.items_P)
    )
    return code_loss(
        model, hidden_BKD.flatten(0, 1)[sources_P], targets_P, items_P,
        vocabulary=vocabulary, trie=trie,
    )  # fmt: skip


def _forget_items(ids: Tensor, trie: Trie, *, vocabulary: Vocabulary, share: float) -> Tensor:
    item = (ids - vocabulary.first_item).clamp(min=0)
    code = trie.levels[-1].code[trie.leaf_of_item[item]] + vocabulary.level_start(vocabulary.num_levels - 1)
    forgotten = (ids >= vocabulary.first_item) & (torch.rand(ids.shape, device=ids.device) < share)
    return torch.where(forgotten, code, ids)


def _positions(nodes: Nodes, batch: TreeBatch) -> Tensor:
    trunk_T = torch.arange(batch.trunk_width, device=nodes.position_BQ.device)
    return torch.cat([trunk_T.expand(len(nodes.position_BQ), -1), nodes.position_BQ], dim=1)


def code_loss(
    model: nn.Module,
    hidden_PD: Tensor,
    targets_P: Tensor,
    items_P: Tensor,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
) -> CodeLoss:
    """Sum of `code_nll`, in all and of each level; see `tree_loss`."""
    nll_P = code_nll(model, hidden_PD, targets_P, items_P, vocabulary=vocabulary, trie=trie)
    level_P = _levels(targets_P, vocabulary)
    by_level = torch.zeros(vocabulary.num_levels, device=nll_P.device)
    by_level.index_add_(0, level_P, nll_P.detach())
    counts = torch.bincount(level_P, minlength=vocabulary.num_levels)
    return CodeLoss(total=nll_P.sum(), by_level=by_level, counts=counts.cpu())


def code_nll(
    model: nn.Module,
    hidden_PD: Tensor,
    targets_P: Tensor,
    items_P: Tensor,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
) -> Tensor:
    """Negative log-likelihood of code tokens given the hidden states that predict them, [P], fp32.

    Normalised as `vocabulary.normalise` says, the same way beam search scores.

    Args:
        model: owns the output head.
        hidden_PD: hidden states after the final norm, one row per prediction.
        targets_P: the code token to be predicted, or the token of an item in place of its last code.
        items_P: the item it belongs to; its codes before this one are the prefix in the trie.
        vocabulary: token ids of the levels.
        trie: the catalogue, on the same device.
    """
    level_P = _levels(targets_P, vocabulary)
    rows, values = [], []
    for level in range(vocabulary.num_levels):
        row = (level_P == level).nonzero()[:, 0]
        if vocabulary.normalise == "trie":
            row, nll = _trie_nll(model, hidden_PD, items_P, row, level, vocabulary, trie)
        else:
            first, last = vocabulary.normaliser(level)
            logits_PC = part_logits(model, hidden_PD[row], first, last)
            code_P = trie.levels[level + 1].code[trie.node_of_item(level + 1, items_P[row])]
            target_P = code_P + vocabulary.level_start(level) - first
            nll = functional.cross_entropy(logits_PC.float(), target_P, reduction="none")
        rows.append(row)
        values.append(nll)
    return torch.zeros(len(targets_P), device=hidden_PD.device).index_copy(
        0, torch.cat(rows), torch.cat(values)
    )


def _levels(tokens_P: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Level of each code token; tokens of items stand on the last one."""
    level_P = (tokens_P - vocabulary.first_code) // vocabulary.codebook_size
    return level_P.clamp(max=vocabulary.num_levels - 1)


def _trie_nll(
    model: nn.Module,
    hidden_PD: Tensor,
    items_P: Tensor,
    row_R: Tensor,
    level: int,
    vocabulary: Vocabulary,
    trie: Trie,
) -> tuple[Tensor, Tensor]:
    # Where the prefix leaves one choice the loss is zero: those positions are not even computed.
    nodes_P = trie.node_of_item(level, items_P.clamp(min=0))
    child_start = trie.levels[level].child_start
    num_children_R = child_start[nodes_P[row_R] + 1] - child_start[nodes_P[row_R]]
    row_R = row_R[num_children_R > 1]
    if len(row_R) == 0:
        return row_R, hidden_PD.new_zeros(0, dtype=torch.float32)
    start = vocabulary.level_start(level)
    logits_RC = part_logits(model, hidden_PD[row_R], start, start + vocabulary.codebook_size).float()
    child_RM, real_RM = (tensor[0] for tensor in trie.children(level, nodes_P[row_R][None]))
    code_RM = trie.levels[level + 1].code[child_RM]
    logits_RM = with_item_logits(
        logits_RC.gather(1, code_RM), model, hidden_PD[row_R], child_RM, real_RM,
        level=level, vocabulary=vocabulary, trie=trie,
    )  # fmt: skip
    logprobs_RM = logits_RM.masked_fill(~real_RM, -torch.inf).log_softmax(-1)
    target_R1 = trie.node_of_item(level + 1, items_P[row_R])[:, None]
    hit_RM = (child_RM == target_R1) & real_RM
    return row_R, -logprobs_RM.gather(1, hit_RM.int().argmax(1, keepdim=True))[:, 0]
