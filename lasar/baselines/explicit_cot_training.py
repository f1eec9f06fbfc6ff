"""What explicit chain of thought is trained on: prompt, rationale, and every right answer.

One row per training sample: the trunk is the history, `<s>`, the rationale, `<e>`; the answers (all items of an order)
are branches off `<e>`, so the text is computed once for all of them.

Legend: B batch, T trunk tokens, A answers per row, L levels, D hidden.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from lasar.decoding.trie import Trie
from lasar.model.backbone import Backbone, input_table, move, output_table
from lasar.model.prompt import encode_branched
from lasar.model.tree import chains
from lasar.prompts.batches import bucket_by_length, shuffle_orders
from lasar.prompts.text_tasks import Renderer, TextRow
from lasar.prompts.vocabulary import Vocabulary, pad_right
from lasar.training.losses import code_loss
from lasar.training.text_loss import text_logits

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CotBatch:
    """Training samples, padded.

    Attributes:
        ids_BT: trunks.
        lengths_B: tokens of each trunk; its last one is `<e>`.
        openings_B: trunk position of `<s>`; everything after it is predicted.
        answers_BAL: tokens of each answer.
        items_BA: its item; -1 where there is no answer.
    """

    ids_BT: Int64Array
    lengths_B: Int64Array
    openings_B: Int64Array
    answers_BAL: Int64Array
    items_BA: Int64Array

    @property
    def num_targets(self) -> int:
        """Number of predictions: words, `<e>`, codes."""
        words = int((self.lengths_B - 1 - self.openings_B).sum())
        answers = int((self.items_BA >= 0).sum())
        return words + answers * int(self.answers_BAL.shape[2])


def cot_batches(
    rows: Sequence[TextRow], render: Renderer, *, batch_tokens: int, seed: int, epoch: int
) -> list[CotBatch]:
    """All batches of one epoch, in training order; a pure function of its arguments.

    Args:
        rows: training samples with rationales.
        render: writes them as tokens.
        batch_tokens: tokens of a batch at most, answers and padding included (one row may exceed it).
        seed: of the run.
        epoch: counts from 0.
    """
    rng = np.random.default_rng([seed, epoch, 3])
    levels = render.vocabulary.num_levels
    trunks, openings = [], []
    for row in rows:
        if render.vocabulary.orders:  # items of an order in random sequence, as in Stage 1
            row = row._replace(history=shuffle_orders(row.history, row.baskets, rng))
        prompt = render.history(row) + render.opened
        trunks.append(np.array(prompt + render.text(row.rationale), dtype=np.int32))
        openings.append(len(prompt) - 1)
    sizes = [[len(trunk), len(row.targets) * (levels - 1)] for trunk, row in zip(trunks, rows, strict=True)]
    batches = []
    for group in bucket_by_length(sizes, batch_tokens, rng):
        ids_BT, lengths_B = pad_right([trunks[index] for index in group], render.vocabulary.pad)
        width = max(len(rows[index].targets) for index in group)
        items_BA = np.full((len(group), width), -1, dtype=np.int64)
        for number, index in enumerate(group):
            items_BA[number, : len(rows[index].targets)] = rows[index].targets
        batches.append(
            CotBatch(
                ids_BT=ids_BT,
                lengths_B=lengths_B,
                openings_B=np.array([openings[index] for index in group]),
                answers_BAL=render.tokens_IL[items_BA.clip(min=0)].astype(np.int64),
                items_BA=items_BA,
            )
        )
    return batches


def cot_loss(
    model: nn.Module, batch: CotBatch, *, vocabulary: Vocabulary, trie: Trie, text_weight: float
) -> Tensor:
    """Cross-entropy of the codes plus `text_weight` times that of the words and `<e>`, summed, scalar.

    Codes compete as in `tree_loss` and in decoding, words with words and `<e>`.

    Args:
        model: a causal LM.
        batch: the samples.
        vocabulary: where text and codes are.
        trie: the catalogue, on the model's device.
        text_weight: of a word's loss; a code's is 1.
    """
    device = trie.item_of_leaf.device
    ids_BT, lengths_B, openings_B, answers_BAL, items_BA = (
        torch.from_numpy(array).to(device)
        for array in (batch.ids_BT, batch.lengths_B, batch.openings_B, batch.answers_BAL, batch.items_BA)
    )
    _, count, levels = answers_BAL.shape
    tips_BA = (lengths_B - 1)[:, None].expand(-1, count)
    parents_BQ = chains(tips_BA, length=levels - 1, first=ids_BT.shape[1]) if levels > 1 else tips_BA[:, :0]
    prefix, hidden_BTD, grown_BQD, _ = encode_branched(
        model, ids_BT, lengths_B, parents_BQ=parents_BQ, branch_ids_BQ=answers_BAL[..., :-1].flatten(1)
    )
    place_T = torch.arange(ids_BT.shape[1] - 1, device=device)
    worded_BT = (place_T >= openings_B[:, None]) & (place_T < lengths_B[:, None] - 1)
    logits_PV = text_logits(model, hidden_BTD[:, :-1][worded_BT], vocabulary=vocabulary)
    words = functional.cross_entropy(logits_PV.float(), ids_BT[:, 1:][worded_BT], reduction="sum")

    hidden_BALD = prefix.hidden_B1D[:, :, None].expand(-1, count, -1, -1)
    if levels > 1:
        later_BALD = grown_BQD.view(len(ids_BT), count, levels - 1, -1)
        hidden_BALD = torch.cat([hidden_BALD, later_BALD], dim=2)
    real_BA = items_BA >= 0
    codes = code_loss(
        model, hidden_BALD[real_BA].flatten(0, 1), answers_BAL[real_BA].flatten(),
        items_BA[real_BA].repeat_interleave(levels), vocabulary=vocabulary, trie=trie,
    )  # fmt: skip
    return codes.total + text_weight * words


def with_text(model: PreTrainedModel, vocabulary: Vocabulary, *, text_size: int, seed: int) -> Backbone:
    """A model trained from scratch without text, with text tokens put before what it knows.

    Args:
        model: its tables have a row per token of `vocabulary`.
        vocabulary: without tokens of the backbone's own.
        text_size: text tokens to add.
        seed: of their first embeddings, which are drawn as those of a new preset.
    """
    assert vocabulary.base_size == 0
    wider = Vocabulary(**(vars(vocabulary) | {"base_size": text_size}))
    config = copy.deepcopy(model.config)
    config.vocab_size, config.pad_token_id, config.bos_token_id = wider.size, wider.pad, wider.user
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = type(model)(config)
    sizes = {name: tensor.shape for name, tensor in grown.state_dict().items()}
    known = {name: tensor for name, tensor in model.state_dict().items() if tensor.shape == sizes[name]}
    grown.load_state_dict(known, strict=False)
    with torch.no_grad():
        for table_of in (input_table, output_table):
            table_of(grown)[text_size:] = table_of(model)
    move(grown, model.device)
    return Backbone(model=grown, vocabulary=wider)
