"""The loss of text tasks: words compete with words, codes with codes.

Legend: B batch, T tokens, D hidden, V text tokens and `<e>`, P predictions, Q those of them that are text.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lasar.decoding.trie import Trie
from lasar.model.attention import causal_mask
from lasar.model.backbone import trunk
from lasar.model.head import part_logits
from lasar.prompts.text_tasks import TextBatch
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.losses import code_loss


def text_loss(model: nn.Module, batch: TextBatch, *, vocabulary: Vocabulary, trie: Trie) -> Tensor:
    """Summed cross-entropy of every prediction of a batch, scalar, differentiable.

    Codes are scored as in `tree_loss`, so that an answer after text has the probabilities that decoding uses. Text and
    its closing `<e>` are normalised over each other.

    Args:
        model: a causal LM.
        batch: prompts and targets.
        vocabulary: where text and codes are, and what a code's probability is normalised over.
        trie: the catalogue, on the model's device.
    """
    device = trie.item_of_leaf.device
    ids_BT, sources_P, targets_P, items_P = (
        torch.from_numpy(array).to(device)
        for array in (batch.ids_BT, batch.sources_P, batch.targets_P, batch.items_P)
    )
    # Padding lies on the right, where no real token looks.
    hidden_BTD = trunk(model)(
        input_ids=ids_BT, attention_mask=causal_mask(model, ids_BT), use_cache=False
    ).last_hidden_state
    hidden_PD = hidden_BTD.flatten(0, 1)[sources_P]
    coded_P = (items_P >= 0).nonzero()[:, 0]
    codes = code_loss(
        model, hidden_PD[coded_P], targets_P[coded_P], items_P[coded_P], vocabulary=vocabulary, trie=trie
    )
    worded_P = (items_P < 0).nonzero()[:, 0]
    logits_QV = text_logits(model, hidden_PD[worded_P], vocabulary=vocabulary)
    return codes.total + functional.cross_entropy(logits_QV.float(), targets_P[worded_P], reduction="sum")


def text_logits(model: nn.Module, hidden_QD: Tensor, *, vocabulary: Vocabulary) -> Tensor:
    """Logits over text tokens and `<e>`, [Q, `<e>` + 1]; the other markers between them have -inf."""
    logits_QV = part_logits(model, hidden_QD, 0, vocabulary.latent_end + 1)
    logits_QV[:, vocabulary.base_size : vocabulary.latent_end] = -torch.inf
    return logits_QV
