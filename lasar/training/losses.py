"""Losses over semantic-ID codes.

Legend: B batch, T tokens, D hidden, L levels, C codebook, P positions with a target.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.decoding.trie import Trie
from lasar.model.backbone import head_rows, trunk
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


def trunk_loss(
    model: nn.Module,
    ids_BT: Tensor,
    targets_BT: Tensor,
    items_BT: Tensor,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    label_smoothing: float = 0.0,
) -> CodeLoss:
    """Next-code cross-entropy at every position that has a target (Stage 1, paper section 3).

    Args:
        model: a causal LM.
        ids_BT: histories, padded on the right (a causal model never looks at the padding).
        targets_BT: next token, or -1.
        items_BT: item index the target belongs to, or -1.
        vocabulary: token ids of the levels, and what a probability is normalised over.
        trie: the catalogue.
        label_smoothing: probability spread evenly over what is normalised over.
    """
    hidden_BTD = trunk(model)(input_ids=ids_BT, use_cache=False).last_hidden_state
    return code_loss(
        model, hidden_BTD.flatten(0, 1), targets_BT.flatten(), items_BT.flatten(),
        vocabulary=vocabulary, trie=trie, label_smoothing=label_smoothing,
    )  # fmt: skip


def code_loss(
    model: nn.Module,
    hidden_PD: Tensor,
    targets_P: Tensor,
    items_P: Tensor,
    *,
    vocabulary: Vocabulary,
    trie: Trie,
    label_smoothing: float = 0.0,
) -> CodeLoss:
    """Cross-entropy of code tokens given the hidden states that predict them; see `trunk_loss`."""
    sums, counts = [], []
    for level in range(vocabulary.num_levels):
        start = vocabulary.level_start(level)
        chosen_P = (targets_P >= start) & (targets_P < start + vocabulary.codebook_size)
        counts.append(int(chosen_P.sum()))
        if vocabulary.normalise == "trie":
            sums.append(
                _trie_loss(
                    model, hidden_PD, targets_P, items_P, chosen_P, level, vocabulary, trie, label_smoothing
                )
            )
            continue
        picked = chosen_P.nonzero()[:, 0]
        first, last = vocabulary.normaliser(level)
        logits_PC = hidden_PD[picked] @ head_rows(model, first, last).T
        sums.append(
            functional.cross_entropy(
                logits_PC.float(), targets_P[picked] - first, reduction="sum", label_smoothing=label_smoothing
            )
        )
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
    label_smoothing: float,
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
    if label_smoothing:
        spread_P = -logprobs_PM.masked_fill(~real_PM, 0.0).sum(1) / real_PM.sum(1)
        nll_P = (1 - label_smoothing) * nll_P + label_smoothing * spread_P
    return nll_P.sum()
