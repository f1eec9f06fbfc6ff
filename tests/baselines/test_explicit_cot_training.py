"""The loss of explicit chain of thought against one sequence per prediction; words added to a model change no code."""

import dataclasses

import numpy as np
import pytest
import torch

from lasar.baselines.explicit_cot_training import cot_batches, cot_loss, with_text
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset, input_table, output_table, trunk
from lasar.prompts.text_tasks import Renderer, TextRow
from lasar.prompts.text_tokens import train_tokenizer
from lasar.prompts.vocabulary import Vocabulary

TOKENIZER = train_tokenizer(["likes green tools", "wants a pot"], 262)


def array(*values):
    return np.array(values, np.int32)


ROWS = [
    TextRow(array(3, 0), array(0, 1), array(4), "likes green"),
    TextRow(array(), array(), array(1, 2, 5), "wants a pot and more words"),
    TextRow(array(5, 4, 1, 0), array(0, 0, 1, 1), array(2, 3), "pot"),
]


CODES_IL = np.array([[0, 1, 0], [1, 2, 0], [2, 1, 1], [3, 0, 2], [4, 3, 0], [5, 1, 1]], np.int32)


def renderer(levels=2, **changes):
    codes = CODES_IL[:, :levels]
    vocabulary = Vocabulary(
        num_levels=levels, codebook_size=6, base_size=TOKENIZER.size, normalise="level", **changes
    )
    render = Renderer(
        vocabulary=vocabulary, tokens_IL=vocabulary.item_tokens(codes), titles=[""] * 6, tokenizer=TOKENIZER,
        max_tokens=12,
    )  # fmt: skip
    return render, Trie(codes)


def one_prediction_at_a_time(model, render, text_weight):
    """Sum over rows of the codes of every answer, and of the words of the rationale, once per row."""
    vocabulary, total = render.vocabulary, 0.0
    words = [*range(vocabulary.base_size), vocabulary.latent_end]
    for row in ROWS:
        prompt = [*render.history(row), vocabulary.latent_start]
        text = [*TOKENIZER.encode(row.rationale)[:12], vocabulary.latent_end]
        for number, word in enumerate(text):
            total += text_weight * nll(model, prompt + text[:number], word, words)
        for item in row.targets.tolist():
            plain = dataclasses.replace(vocabulary, num_items=0)  # an answer is always written in codes
            answer = plain.item_tokens(CODES_IL[:, : vocabulary.num_levels])[item].tolist()
            for level, code in enumerate(answer):
                rivals = list(range(vocabulary.level_start(level), vocabulary.level_start(level + 1)))
                total += nll(model, prompt + text + answer[:level], code, rivals)
    return total


def nll(model, tokens, target, rivals):
    with torch.no_grad():
        hidden_D = trunk(model)(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0, -1]
        return -float((output_table(model)[rivals] @ hidden_D).log_softmax(-1)[rivals.index(target)])


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("batch_tokens", [10, 10_000])
@pytest.mark.parametrize(("text_weight", "num_items"), [(1.0, 0), (0.3, 0), (1.0, 6)])
def test_the_loss_is_the_sum_of_its_predictions(levels, batch_tokens, text_weight, num_items):
    render, trie = renderer(levels, num_items=num_items)
    model = build_preset("tiny", vocabulary=render.vocabulary, seed=0).eval()
    batches = cot_batches(ROWS, render, batch_tokens=batch_tokens, seed=0, epoch=0)
    assert len(batches) == (3 if batch_tokens == 10 else 1)
    loss = sum(
        cot_loss(model, batch, vocabulary=render.vocabulary, trie=trie, text_weight=text_weight)
        for batch in batches
    )
    assert loss.item() == pytest.approx(one_prediction_at_a_time(model, render, text_weight), rel=1e-5)
    lengths = [min(12, len(TOKENIZER.encode(row.rationale))) + 1 for row in ROWS]
    answers = sum(len(row.targets) for row in ROWS)
    assert sum(batch.num_targets for batch in batches) == sum(lengths) + answers * levels
    loss.backward()
    assert input_table(model).grad[render.vocabulary.latent_end].any()


def test_an_epoch_is_a_function_of_seed_and_number():
    render, _ = renderer(2, orders=True)
    first, again, later = (
        cot_batches(ROWS, render, batch_tokens=10_000, seed=0, epoch=epoch)[0] for epoch in (1, 1, 2)
    )
    assert np.array_equal(first.ids_BT, again.ids_BT)
    orders = {
        tuple(cot_batches(ROWS[2:], render, batch_tokens=99, seed=0, epoch=n)[0].ids_BT[0].tolist())
        for n in range(20)
    }
    assert len(orders) == 4  # two orders of two items, each either way round
    assert sorted(later.items_BA.ravel().tolist()) == sorted(first.items_BA.ravel().tolist())


def test_words_added_before_the_codes_change_no_answer():
    plain = Vocabulary(num_levels=2, codebook_size=6, orders=True)
    model = build_preset("tiny", vocabulary=plain, seed=0).eval()
    grown = with_text(model, plain, text_size=30, seed=1)
    grown.model.eval()
    assert grown.vocabulary.base_size == 30
    assert grown.model.config.vocab_size == input_table(grown.model).shape[0] == plain.size + 30
    ids = torch.tensor([[plain.user, plain.order, *range(6, 10)]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = grown.model(input_ids=ids + 30).logits
    torch.testing.assert_close(after[..., 30:], before)
    fresh = input_table(grown.model)[:30]
    assert fresh.norm(dim=1).min() > 0
    # No token but <pad> is kept from learning.
    assert grown.model.get_input_embeddings().padding_idx == grown.vocabulary.pad
    same = with_text(model, plain, text_size=30, seed=1)
    assert torch.equal(input_table(same.model), input_table(grown.model))
