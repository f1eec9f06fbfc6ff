import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset
from lasar.prompts.batches import epoch_batches
from lasar.prompts.vocabulary import Normalise, Vocabulary
from lasar.training.losses import trunk_loss

CODES = np.array([[0, 1], [0, 2], [1, 1], [3, 0], [3, 3], [3, 1]], np.int32)
VOCABULARY = Vocabulary(num_levels=2, codebook_size=4)
TRIE = Trie(CODES)
MODEL = build_preset("tiny", vocabulary=VOCABULARY, seed=0).eval()
HISTORIES = ([3, 0, 5, 2], [1], [2, 2, 4])


def batch_of(*histories, vocabulary=VOCABULARY):
    sequences = [
        TrainSequence(u, np.array(h, np.int32), np.arange(len(h), dtype=np.int32))
        for u, h in enumerate(histories)
    ]
    made = epoch_batches(
        sequences, vocabulary.item_tokens(CODES), vocabulary=vocabulary, batch_tokens=10_000, train_targets="all",
        seed=0, epoch=0,
    )  # fmt: skip
    (batch,) = made
    return torch.tensor(batch.ids_BT), torch.tensor(batch.targets_BT), torch.tensor(batch.items_BT)


def one_example_per_target(vocabulary: Vocabulary, smoothing: float) -> torch.Tensor:
    total = torch.zeros(())
    for history in HISTORIES:
        row = [vocabulary.user, *vocabulary.item_tokens(CODES)[history].flatten().tolist()]
        for cut in range(1, len(row)):
            item, level = divmod(cut - 1, 2)
            start = vocabulary.level_start(level)
            prefix = CODES[history[item]][:level].tolist()
            rivals = {
                "trie": sorted({start + int(c[level]) for c in CODES if c[:level].tolist() == prefix}),
                "level": list(range(start, start + 4)),
                "sid": list(range(vocabulary.first_code, vocabulary.size)),
                "full": list(range(vocabulary.size)),
            }[vocabulary.normalise]
            logits = MODEL(torch.tensor([row[:cut]])).logits[0, -1, rivals]
            target = torch.tensor([rivals.index(row[cut])])
            total = total + functional.cross_entropy(logits[None], target, label_smoothing=smoothing)
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("normalise", ["trie", "level", "sid", "full"])
def test_one_pass_over_a_history_equals_one_example_per_target(normalise: Normalise, smoothing: float):
    vocabulary = dataclasses.replace(VOCABULARY, normalise=normalise)
    MODEL.zero_grad()
    result = trunk_loss(
        MODEL, *batch_of(*HISTORIES), vocabulary=vocabulary, trie=TRIE, label_smoothing=smoothing
    )
    result.total.backward()
    gradient = {name: p.grad.clone() for name, p in MODEL.named_parameters()}
    MODEL.zero_grad()
    total = one_example_per_target(vocabulary, smoothing)
    total.backward()
    torch.testing.assert_close(result.total, total, atol=1e-5, rtol=1e-5)
    for name, parameter in MODEL.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_padding_does_not_change_the_loss():
    losses = [trunk_loss(MODEL, *batch_of(h), vocabulary=VOCABULARY, trie=TRIE).total for h in HISTORIES]
    together = trunk_loss(MODEL, *batch_of(*HISTORIES), vocabulary=VOCABULARY, trie=TRIE).total
    torch.testing.assert_close(torch.stack(losses).sum(), together, atol=1e-5, rtol=1e-5)


def test_levels_add_up():
    result = trunk_loss(MODEL, *batch_of(*HISTORIES), vocabulary=VOCABULARY, trie=TRIE)
    torch.testing.assert_close(result.by_level.sum(), result.total.detach())
    assert result.counts.tolist() == [8, 8]
