"""Losses over semantic-ID codes.

Legend: B batch, T trunk tokens, M branch tokens, K = T + M, D hidden, L levels, C codebook, P predictions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.decoding.trie import Trie
from lasar.model.backbone import head_rows, trunk
from lasar.model.tree import Nodes, Tree, with_trunk
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


def tree_loss(model: nn.Module, batch: TreeBatch, *, vocabulary: Vocabulary, trie: Trie) -> CodeLoss:
    """Cross-entropy of every prediction of a batch in one forward pass (Stage 1, paper section 3).

    Args:
        model: a causal LM.
        batch: histories and their branches.
        vocabulary: token ids of the levels, and what a probability is normalised over.
        trie: the catalogue, on the model's device.
    """
    device = trie.item_of_leaf.device
    ids_BK = torch.from_numpy(batch.ids_BK).to(device)
    options: dict[str, Tensor] = {}
    if batch.parents_BM.shape[1]:
        tree = Tree(torch.from_numpy(batch.lengths_B).to(device), batch.trunk_width)
        nodes = tree.grow(torch.from_numpy(batch.parents_BM).to(device))
        options = {
            "attention_mask": with_trunk(nodes, batch.trunk_width)[:, None],
            "position_ids": _positions(nodes, batch),
        }
    # Without branches the plain causal path is taken: padding lies on the right, where no real token looks.
    hidden_BKD = trunk(model)(input_ids=ids_BK, use_cache=False, **options).last_hidden_state
    sources_P, targets_P, items_P = (
        torch.from_numpy(array).to(device) for array in (batch.sources_P, batch.targets_P, batch.items_P)
    )
    return code_loss(
        model, hidden_BKD.flatten(0, 1)[sources_P], targets_P, items_P,
        vocabulary=vocabulary, trie=trie,
    )  # fmt: skip


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
    """Cross-entropy of code tokens given the hidden states that predict them, one row each; see `tree_loss`."""
    sums, counts = [], []
    for level in range(vocabulary.num_levels):
        start = vocabulary.level_start(level)
        chosen_P = (targets_P >= start) & (targets_P < start + vocabulary.codebook_size)
        counts.append(int(chosen_P.sum()))
        if vocabulary.normalise == "trie":
            sums.append(_trie_loss(model, hidden_PD, targets_P, items_P, chosen_P, level, vocabulary, trie))
            continue
        picked = chosen_P.nonzero()[:, 0]
        first, last = vocabulary.normaliser(level)
        logits_PC = hidden_PD[picked] @ head_rows(model, first, last).T
        sums.append(functional.cross_entropy(logits_PC.float(), targets_P[picked] - first, reduction="sum"))
    by_level = torch.stack(sums)
    return CodeLoss(total=by_level.sum(), by_level=by_level.detach(), counts=torch.tensor(counts))


def _trie_loss(
    model: nn.Module,
    hidden_PD: Tensor,
    targets_P: Tensor,
    items_P: Tensor,
    chosen_P: Tensor,
    level: int,
    vocabulary: Vocabulary,
    trie: Trie,
) -> Tensor:
    # Where the prefix leaves one choice the loss is zero: those positions are not even computed.
    nodes_P = trie.prefix_LI[level][items_P.clamp(min=0)]
    child_start = trie.levels[level].child_start
    picked = (chosen_P & (child_start[nodes_P + 1] - child_start[nodes_P] > 1)).nonzero()[:, 0]
    if len(picked) == 0:
        return hidden_PD.new_zeros((), dtype=torch.float32)
    start = vocabulary.level_start(level)
    logits_PC = (hidden_PD[picked] @ head_rows(model, start, start + vocabulary.codebook_size).T).float()
    child_PM, real_PM = trie.children(level, nodes_P[picked][None])
    code_PM, real_PM = trie.levels[level + 1].code[child_PM[0]], real_PM[0]
    logprobs_PM = logits_PC.gather(1, code_PM).masked_fill(~real_PM, -torch.inf).log_softmax(-1)
    hit_PM = (code_PM == (targets_P[picked] - start)[:, None]) & real_PM
    target_P = hit_PM.int().argmax(1)
    nll_P = -logprobs_PM.gather(1, target_P[:, None])[:, 0]
    return nll_P.sum()
