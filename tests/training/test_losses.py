import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset, output_table
from lasar.prompts.batches import epoch_batches
from lasar.prompts.vocabulary import Normalise, Vocabulary
from lasar.training.losses import code_loss, code_nll, tree_loss

CODES = np.array([[0, 1], [0, 2], [1, 1], [3, 0], [3, 3], [3, 1]], np.int32)
VOCABULARY = Vocabulary(num_levels=2, codebook_size=4)
TRIE = Trie(CODES)
MODEL = build_preset("tiny", vocabulary=dataclasses.replace(VOCABULARY, num_items=6), seed=0).eval()
HISTORIES = ([3, 0, 5, 2], [1], [2, 2, 4])


def batch_of(*histories, vocabulary=VOCABULARY, baskets=None):
    sequences = [
        TrainSequence(u, np.array(h, np.int32), np.array(baskets[u] if baskets else range(len(h)), np.int32))
        for u, h in enumerate(histories)
    ]
    made = epoch_batches(
        sequences, vocabulary.item_tokens(CODES), vocabulary=vocabulary, batch_tokens=10_000,
        train_targets="all", seed=0, epoch=0,
    )  # fmt: skip
    (batch,) = made
    return batch


def nll_of_item(prompt: list[int], item: int, vocabulary: Vocabulary) -> torch.Tensor:
    """Loss of one item after one prompt, code by code, each code a sequence of its own."""
    total = torch.zeros(())
    codes = CODES[item].tolist()
    for level, code in enumerate(codes):
        start = vocabulary.level_start(level)
        rivals = {
            "trie": sorted({start + int(c[level]) for c in CODES if c[:level].tolist() == codes[:level]}),
            "level": list(range(start, start + 4)),
            "sid": list(range(vocabulary.first_code, vocabulary.first_item)),
            "full": list(range(vocabulary.first_item)),
        }[vocabulary.normalise]
        row = prompt + [vocabulary.level_start(i) + c for i, c in enumerate(codes[:level])]
        every = MODEL(torch.tensor([row])).logits[0, -1]
        logits = every[rivals]
        if level == len(codes) - 1 and vocabulary.item_answers:
            logits = logits + own_logits(every, codes, vocabulary)
        target = torch.tensor([rivals.index(start + code)])
        total = total + functional.cross_entropy(logits[None], target)
    return total


def own_logits(logits_V: torch.Tensor, codes: list[int], vocabulary: Vocabulary) -> torch.Tensor:
    """By the definition: the logit of the token of every item that shares all codes but the last, by last code."""
    items = sorted(
        (i for i, c in enumerate(CODES.tolist()) if c[:-1] == codes[:-1]), key=lambda i: CODES[i, -1]
    )
    known = [
        logits_V[vocabulary.first_item + i] if i < vocabulary.num_items else 0.0 * logits_V[0] for i in items
    ]
    return torch.stack(known)


def one_example_per_target(vocabulary: Vocabulary) -> torch.Tensor:
    total = torch.zeros(())
    for history in HISTORIES:
        tokens = vocabulary.item_tokens(CODES)[history]
        for place, item in enumerate(history):
            prompt = [vocabulary.user, *tokens[:place].flatten().tolist()]
            total = total + nll_of_item(prompt, item, vocabulary)
    return total


# Items with tokens of their own: with 4, items 4 and 5 were added later. In answers they count in the trie only.
@pytest.mark.parametrize(
    ("normalise", "num_items", "item_answers"),
    [
        *((normalise, count, False) for normalise in ("trie", "level", "sid", "full") for count in (0, 4, 6)),
        ("trie", 4, True), ("trie", 6, True),
    ],
)  # fmt: skip
def test_one_pass_over_a_history_equals_one_example_per_target(
    normalise: Normalise, num_items: int, item_answers: bool
):
    vocabulary = dataclasses.replace(
        VOCABULARY, normalise=normalise, num_items=num_items, item_answers=item_answers
    )
    MODEL.zero_grad()
    batch = batch_of(*HISTORIES, vocabulary=vocabulary)
    result = tree_loss(MODEL, batch, vocabulary=vocabulary, trie=TRIE)
    result.total.backward()
    gradient = {name: p.grad.clone() for name, p in MODEL.named_parameters()}
    MODEL.zero_grad()
    total = one_example_per_target(vocabulary)
    total.backward()
    torch.testing.assert_close(result.total, total, atol=1e-5, rtol=1e-5)
    for name, parameter in MODEL.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_forgotten_items_are_read_as_codes():
    items = dataclasses.replace(VOCABULARY, num_items=6)
    plain = tree_loss(MODEL, batch_of(*HISTORIES), vocabulary=VOCABULARY, trie=TRIE).total
    batch = batch_of(*HISTORIES, vocabulary=items)
    forgotten = tree_loss(MODEL, batch, vocabulary=items, trie=TRIE, forget=1.0).total
    remembered = tree_loss(MODEL, batch, vocabulary=items, trie=TRIE).total
    torch.testing.assert_close(forgotten, plain)
    assert abs(remembered - plain) > 1e-3
    torch.manual_seed(0)
    halves = [tree_loss(MODEL, batch, vocabulary=items, trie=TRIE, forget=0.5).total.item() for _ in range(5)]
    assert len({round(loss, 4) for loss in halves}) > 1  # drawn anew each time


def test_padding_does_not_change_the_loss():
    losses = [tree_loss(MODEL, batch_of(h), vocabulary=VOCABULARY, trie=TRIE).total for h in HISTORIES]
    together = tree_loss(MODEL, batch_of(*HISTORIES), vocabulary=VOCABULARY, trie=TRIE).total
    torch.testing.assert_close(torch.stack(losses).sum(), together, atol=1e-5, rtol=1e-5)


def test_levels_add_up():
    result = tree_loss(MODEL, batch_of(*HISTORIES), vocabulary=VOCABULARY, trie=TRIE)
    torch.testing.assert_close(result.by_level.sum(), result.total.detach())
    assert result.counts.tolist() == [8, 8]


@pytest.mark.parametrize("num_items", [0, 4])
def test_every_item_of_an_order_is_predicted_from_its_opening(num_items: int):
    """Branches off `<order>` against one plain sequence per item, loss and gradient."""
    vocabulary = dataclasses.replace(VOCABULARY, orders=True, num_items=num_items)
    histories, baskets = ([0, 3, 5, 2], [4, 1]), ([0, 0, 1, 1], [0, 1])
    batch = batch_of(*histories, vocabulary=vocabulary, baskets=baskets)
    MODEL.zero_grad()
    result = tree_loss(MODEL, batch, vocabulary=vocabulary, trie=TRIE)
    result.total.backward()
    gradient = {name: p.grad.clone() for name, p in MODEL.named_parameters()}
    MODEL.zero_grad()
    tokens = vocabulary.item_tokens(CODES)
    item_of = {tuple(row): item for item, row in enumerate(tokens.tolist())}
    total = torch.zeros(())
    for ids, length in zip(batch.ids_BK, batch.lengths_B, strict=True):
        prompt: list[int] = []
        for token in ids[:length].tolist():
            prompt.append(token)
            if token == vocabulary.order:
                opening, taken = list(prompt), 0
                rest = ids[len(prompt) : length].tolist()
                order = rest[: rest.index(vocabulary.order)] if vocabulary.order in rest else rest
                items = [item_of[tuple(order[i : i + 2])] for i in range(0, len(order), 2)]
                for item in items:
                    total = total + nll_of_item(opening, item, vocabulary)
                for item in items[1:]:
                    taken += 2
                    total = total + nll_of_item(opening + order[:taken], item, vocabulary)
    total.backward()
    assert batch.num_targets == 2 * (6 + 2)
    torch.testing.assert_close(result.total, total, atol=1e-5, rtol=1e-5)
    for name, parameter in MODEL.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, atol=1e-5, rtol=1e-4)


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=8),
    st.sampled_from(["trie", "level", "sid", "full"]),
    st.sampled_from([0, 3, 6]),
    st.booleans(),
)
def test_nll_of_every_prediction_is_its_own(predictions, normalise, num_items, item_answers):
    """One row per prediction, in the order given, whatever level it is of."""
    item_answers = item_answers and normalise == "trie"
    vocabulary = dataclasses.replace(
        VOCABULARY, normalise=normalise, num_items=num_items, item_answers=item_answers
    )
    items, levels = (torch.tensor(column) for column in zip(*predictions, strict=True))
    hidden = torch.randn(len(items), 32, generator=torch.Generator().manual_seed(len(items)))
    targets = torch.from_numpy(vocabulary.item_tokens(CODES)).long()[items, levels]
    found = code_nll(MODEL, hidden, targets, items, vocabulary=vocabulary, trie=TRIE)
    logits = hidden @ output_table(MODEL).T
    for row, (item, level) in enumerate(predictions):
        codes, start = CODES[item].tolist(), vocabulary.level_start(level)
        rivals = {
            "trie": sorted({start + int(c[level]) for c in CODES if c[:level].tolist() == codes[:level]}),
            "level": list(range(start, start + 4)),
            "sid": list(range(vocabulary.first_code, vocabulary.first_item)),
            "full": list(range(vocabulary.first_item)),
        }[normalise]
        of_rivals = logits[row, rivals]
        if item_answers and level == len(codes) - 1:
            of_rivals = of_rivals + own_logits(logits[row], codes, vocabulary)
        expected = -of_rivals.log_softmax(0)[rivals.index(start + codes[level])]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)


def test_loss_of_a_batch_is_the_sum_of_its_predictions():
    items, levels = torch.tensor([0, 3, 4, 2]), torch.tensor([0, 1, 1, 0])
    hidden = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.from_numpy(VOCABULARY.item_tokens(CODES)).long()[items, levels]
    nll = code_nll(MODEL, hidden, targets, items, vocabulary=VOCABULARY, trie=TRIE)
    loss = code_loss(MODEL, hidden, targets, items, vocabulary=VOCABULARY, trie=TRIE)
    torch.testing.assert_close(loss.total, nll.sum())
    torch.testing.assert_close(loss.by_level, torch.stack([nll[[0, 3]].sum(), nll[[1, 2]].sum()]).detach())
    assert loss.counts.tolist() == [2, 2]
