import numpy as np
import pytest
import torch

from lasar.cot.anchor_sources import read_by_backbone, rows_alone, rows_in_context, states_at, text_row
from lasar.cot.rows import TrainingRow
from lasar.cot.segmentation import segment_rationales
from lasar.errors import ConfigError, DataError
from lasar.model.backbone import build_preset
from lasar.prompts.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_levels=2, codebook_size=4, base_size=128, orders=True, max_history=5)
TOKENS_IL = VOCABULARY.item_tokens(np.array([[i % 4, i // 4] for i in range(12)], dtype=np.int32))


def encode(text):
    return [ord(character) for character in text]


@pytest.fixture(scope="module")
def model():
    built = build_preset("tiny", vocabulary=VOCABULARY, seed=0).eval()
    with torch.no_grad():  # fresh weights hardly tell one token from another
        for parameter in built.parameters():
            parameter.mul_(3.0)
    return built


def plain_state(model, ids):
    """One sequence through Hugging Face's own call; the state at its last token."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[-1][0, -1].numpy()


def collect(source):
    vectors = {}
    for number, batch in enumerate(source.batches):
        vectors.update(zip(batch.tolist(), source.compute(number), strict=True))
    return np.stack([vectors[anchor] for anchor in range(len(vectors))])


def test_alone_batched_is_one_by_one(model):
    texts = ["soap.", "a rather longer thing about combs", "x", "towels and soap", "soap?"]
    tokens, ends = rows_alone(texts, encode, vocabulary=VOCABULARY)
    source = read_by_backbone(model, tokens, ends, pad=VOCABULARY.pad, batch_tokens=40)
    assert len(source.batches) > 1
    expected = [plain_state(model, [VOCABULARY.latent_start, *encode(text)]) for text in texts]
    np.testing.assert_allclose(collect(source), expected, atol=1e-5)


def test_all_segments_of_a_row_in_one_pass_are_each_prefix_by_itself(model):
    rng = np.random.default_rng(0)
    rows, texts = [], []
    for number in range(7):
        history = rng.integers(0, 12, size=number).astype(np.int32)
        baskets = np.sort(rng.integers(0, 4, size=number)).astype(np.int32)
        rows.append(TrainingRow(number, 9, history, baskets, history[:1]))
        texts.append(" ".join(["Soap now.", "Comb then.", "Towel."][: number % 4]))
    vectors = {text: rng.normal(size=3) for text in ["Soap now.", "Comb then.", "Towel."]}
    segmentation = segment_rationales(
        texts, lambda s: np.array([vectors[t] for t in s], np.float32), segments_mean=8, max_depth=8
    )
    tokens, ends = rows_in_context(rows, segmentation, encode, vocabulary=VOCABULARY, tokens_IL=TOKENS_IL)
    found = collect(read_by_backbone(model, tokens, ends, pad=VOCABULARY.pad, batch_tokens=120))
    expected = []
    for row, text in zip(rows, texts, strict=True):
        prompt = VOCABULARY.render_history(TOKENS_IL, row.history, row.baskets, open_order=True).tolist()
        stops = [index + 1 for index, character in enumerate(text) if character == "."]
        expected += [
            plain_state(model, [*prompt, VOCABULARY.latent_start, *encode(text[:stop])]) for stop in stops
        ]
    assert found.shape == (len(segmentation.texts_S), 32)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - found[0]).max() > 0.1


def test_states_come_row_after_row_and_padding_is_never_seen(model):
    rows = [np.array([130, 7, 9], np.int32), np.array([131, 5, 6, 7, 8], np.int32)]
    found = states_at(model, rows, [np.array([2, 0]), np.array([1])], pad=VOCABULARY.pad)
    expected = [plain_state(model, ids) for ids in ([130, 7, 9], [130], [131, 5])]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(DataError, match=r"'x' has no tokens; use anchor\.source=encoder"):
        text_row(np.array([1], np.int32), ["x"], lambda text: [])


def test_a_row_longer_than_the_backbone_reads_is_refused(model):
    tokens, ends = rows_alone(["x" * 4096], encode, vocabulary=VOCABULARY)
    with pytest.raises(ConfigError, match="a row has 4097 tokens, the backbone reads at most 4096"):
        read_by_backbone(model, tokens, ends, pad=VOCABULARY.pad, batch_tokens=64)
