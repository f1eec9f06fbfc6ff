"""Writing before answering, against one sequence at a time without cache or mask."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.baselines import explicit_cot
from lasar.baselines.explicit_cot import WordReasoner, load_writing, save_writing, write, write_texts
from lasar.baselines.opened import open_ranker
from lasar.decoding.ranker import Ranker
from lasar.engine.prefix import encode
from lasar.engine.weights import FusedWeights
from lasar.errors import ArtifactError, ConfigError
from lasar.model.backbone import Backbone, build_preset, output_table, save_backbone, trunk
from lasar.model.prompt import encode_prompts
from lasar.prompts.vocabulary import Vocabulary, pad_right

VOCABULARY = Vocabulary(num_levels=2, codebook_size=6, base_size=9)
CODES_IL = np.array([[0, 0], [0, 3], [1, 2], [1, 5], [4, 4], [5, 0], [5, 1], [5, 2]], np.int32)
END = VOCABULARY.latent_end
HISTORIES = [
    np.array(items, np.int32) for items in ([], [3], [0, 7, 2], [6, 5, 4, 3, 2, 1, 0], [1, 1], [4, 6, 2, 2])
]
BASKETS = [np.arange(len(history), dtype=np.int32) for history in HISTORIES]


def talkative(seed=0, ending=0.0):
    """A model with sharp preferences among words, and a preference for `<e>` that decides how soon it stops."""
    model = build_preset("tiny", vocabulary=VOCABULARY, seed=seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
        output_table(model)[END] *= 1 + ending
    return model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def last_state(model, tokens):
    with torch.no_grad():
        return trunk(model)(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0, -1]


def alone(model, prompt, max_tokens):
    """Text of one prompt, the whole sequence again for every word."""
    tokens, text = [*prompt, VOCABULARY.latent_start], []
    words = [*range(VOCABULARY.base_size), END]
    while len(text) < max_tokens:
        logits = output_table(model)[words] @ last_state(model, tokens + text)
        word = words[int(logits.argmax())]
        if word == END:
            break
        text.append(word)
    return text, last_state(model, [*tokens, *text, END])


def prompts_of(histories=HISTORIES, baskets=BASKETS):
    tokens_IL = VOCABULARY.item_tokens(CODES_IL)
    return [
        VOCABULARY.render_history(tokens_IL, history, basket, open_order=True)
        for history, basket in zip(histories, baskets, strict=True)
    ]


def encoded(model, rows, way="generic"):
    """Computed prompts: the generic way, or the fused one without and with `<s>` in them."""
    if way == "opened":
        rows = [np.append(row, np.int32(VOCABULARY.latent_start)) for row in rows]
    ids, lengths = (torch.tensor(array) for array in pad_right(rows, VOCABULARY.pad))
    if way == "generic":
        return encode_prompts(model, ids, lengths)
    return encode(FusedWeights(model), ids, lengths, opened=way == "opened", room=1)


WAYS = ("generic", "fused", "opened")


@given(
    seed=st.integers(0, 30), ending=st.floats(-1, 3), max_tokens=st.integers(0, 12),
    rows=st.lists(st.sampled_from(prompts_of()), min_size=1, max_size=6), way=st.sampled_from(WAYS),
)  # fmt: skip
@settings(max_examples=40)
def test_every_row_writes_what_it_would_write_alone(seed, ending, max_tokens, rows, way):
    with torch.no_grad():
        model = talkative(seed, ending)
        written = write(encoded(model, rows, way), vocabulary=VOCABULARY, max_tokens=max_tokens)
        for number, row in enumerate(rows):
            text, state_D = alone(model, row.tolist(), max_tokens)
            assert written.texts[number] == text
            torch.testing.assert_close(written.prefix.hidden_B1D[number, 0], state_D, atol=2e-4, rtol=2e-4)
            assert written.prefix.tip_B1[number, 0] == len(row) + len(text) + 1


def test_rows_do_stop_at_different_times():
    """What the test above is worth."""
    lengths = set()
    for seed in range(6):
        written = write(encoded(talkative(seed, 0.6), prompts_of()), vocabulary=VOCABULARY, max_tokens=10)
        lengths.add(tuple(len(text) for text in written.texts))
    assert any(len(set(row)) > 2 for row in lengths)
    assert any(10 in row for row in lengths)


@pytest.mark.parametrize("way", WAYS)
def test_finished_rows_leave_the_batch(way, monkeypatch):
    kind = explicit_cot._CachedRows if way == "generic" else explicit_cot._ChainRows
    sizes = []
    feed = kind.feed
    monkeypatch.setattr(kind, "feed", lambda self, tokens: sizes.append(len(tokens)) or feed(self, tokens))
    written = write(encoded(talkative(3, 0.6), prompts_of(), way), vocabulary=VOCABULARY, max_tokens=10)
    # The words and `<e>` of a text are fed (the generic way also `<s>`), and nothing else.
    opening = way == "generic"
    assert sum(sizes) == sum(len(text) + 1 + opening for text in written.texts)
    assert len(sizes) == max(len(text) for text in written.texts) + 1 + opening


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_what_hangs_off_a_text_sees_all_of_it_and_nothing_else(seed, way):
    model = talkative(seed, 0.6)
    written = write(encoded(model, prompts_of(), way), vocabulary=VOCABULARY, max_tokens=8)
    first = torch.tensor([[VOCABULARY.first_code, VOCABULARY.first_code + 3]] * len(HISTORIES))
    grown_BQD, _ = written.prefix.grow(written.prefix.tip_B1.expand(-1, 2), input_ids=first)
    for row, (prompt, text) in enumerate(zip(prompts_of(), written.texts, strict=True)):
        for column in (0, 1):
            whole = [*prompt.tolist(), VOCABULARY.latent_start, *text, END, int(first[row, column])]
            torch.testing.assert_close(grown_BQD[row, column], last_state(model, whole), atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_the_whole_sequence(seed):
    model = talkative(seed, 0.6)
    reasoner = WordReasoner(model, vocabulary=VOCABULARY, max_tokens=8).eval()
    ranked = Ranker(reasoner, codes_IL=CODES_IL).rank(HISTORIES, BASKETS, k=8, beam_width=8)
    tokens_IL = VOCABULARY.item_tokens(CODES_IL)
    for row, prompt in enumerate(prompts_of()):
        text, _ = alone(model, prompt.tolist(), 8)
        sequence = [*prompt.tolist(), VOCABULARY.latent_start, *text, END]
        scores = []
        for item, (first, second) in enumerate(CODES_IL.tolist()):
            siblings = sorted({int(code) for code in CODES_IL[:, 0]})
            below = sorted(int(code) for code in CODES_IL[CODES_IL[:, 0] == first, 1])
            score = 0.0
            for tokens, level, code, rivals in (
                (sequence, 0, first, siblings),
                ([*sequence, int(tokens_IL[item, 0])], 1, second, below),
            ):
                table = output_table(model)[[VOCABULARY.level_start(level) + rival for rival in rivals]]
                score += float((table @ last_state(model, tokens)).log_softmax(-1)[rivals.index(code)])
            scores.append(score)
        order = np.argsort(-np.array(scores))
        assert ranked.items_QK[row].tolist() == order.tolist()
        np.testing.assert_allclose(ranked.scores_QK[row], np.array(scores)[order], atol=1e-3)
    assert not ranked.depths_Q.any()


def test_without_a_word_it_is_the_plain_model_and_it_has_no_latent_steps():
    reasoner = WordReasoner(talkative(), vocabulary=VOCABULARY, max_tokens=8).eval()
    prompts = encoded(reasoner.backbone, prompts_of())
    thought = reasoner.think(prompts, depth=0)
    assert thought.prefix is prompts
    with pytest.raises(ConfigError, match="in words, not in latent steps"):
        reasoner.think(prompts, depth=2)


def test_texts_come_in_the_order_of_the_histories():
    reasoner = WordReasoner(talkative(3, 0.6), vocabulary=VOCABULARY, max_tokens=8).eval()
    tokens_IL = VOCABULARY.item_tokens(CODES_IL)
    texts = write_texts(reasoner, tokens_IL, HISTORIES, BASKETS, batch_size=2)
    expected = [alone(reasoner.backbone, prompt.tolist(), 8)[0] for prompt in prompts_of()]
    assert texts == expected


def test_what_is_saved_is_what_is_opened(tmp_path, monkeypatch):
    from lasar.data.interactions import ItemTable
    from lasar.sid.catalog import SidCatalog

    model = talkative(1, 0.6)
    folder, quantize = tmp_path / "explicit_cot", tmp_path / "quantize"
    for made in (folder, quantize):
        made.mkdir()
    save_backbone(Backbone(model=model, vocabulary=VOCABULARY), folder)
    SidCatalog(CODES_IL, 6).save(quantize)
    names = [str(item) for item in range(len(CODES_IL))]
    monkeypatch.setattr(ItemTable, "load", lambda _: ItemTable(item_ids=names, titles=names, texts=names))
    options = {"prepare": tmp_path, "quantize": quantize, "device": "cpu", "k": 5, "beam_width": 8}
    save_writing(folder, max_tokens=6)
    rank = open_ranker(folder, exclude_seen=True, seed=0, **options).rank
    direct = Ranker(WordReasoner(model, vocabulary=VOCABULARY, max_tokens=6).eval(), codes_IL=CODES_IL)
    own = rank(HISTORIES, BASKETS, "auto")
    expected = direct.rank(HISTORIES, BASKETS, k=5, beam_width=8, exclude_seen=True)
    assert own.items_QK.tolist() == expected.items_QK.tolist()
    plain = direct.rank(HISTORIES, BASKETS, k=5, beam_width=8, exclude_seen=True, depth=0)
    # Opened models are frozen and take the fused path.
    np.testing.assert_allclose(rank(HISTORIES, BASKETS, 0).scores_QK, plain.scores_QK, atol=1e-5)
    assert not np.allclose(plain.scores_QK, own.scores_QK)
    (folder / "explicit_cot.json").write_text("{}")
    with pytest.raises(ArtifactError, match="run the stage 'explicit_cot' again"):
        load_writing(folder, model)
