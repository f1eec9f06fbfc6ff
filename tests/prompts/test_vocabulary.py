import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lasar.prompts.vocabulary import Vocabulary, pad_right

PLAIN = Vocabulary(num_levels=2, codebook_size=4, base_size=100)
ORDERS = Vocabulary(num_levels=2, codebook_size=4, orders=True)
CODES = np.array([[0, 1], [3, 2], [1, 1]], np.int32)


def history(*items: int) -> np.ndarray:
    return np.array(items, np.int32)


def test_tokens_do_not_overlap():
    tokens = [PLAIN.pad, PLAIN.user, PLAIN.order, PLAIN.latent_start, PLAIN.latent_slot, PLAIN.latent_end]
    tokens += PLAIN.item_tokens(np.array([[c, c] for c in range(4)], np.int32)).flatten().tolist()
    assert sorted(tokens) == list(range(100, PLAIN.size))


def test_history_without_orders():
    tokens = PLAIN.item_tokens(CODES)
    rendered = PLAIN.render_history(tokens, history(1, 0), history(0, 1), open_order=True)
    assert rendered.tolist() == [101, 109, 112, 106, 111]


def test_history_with_orders():
    tokens = ORDERS.item_tokens(CODES)
    rendered = ORDERS.render_history(tokens, history(1, 0, 2), history(4, 4, 7), open_order=True)
    assert rendered.tolist() == [1, 2, 9, 12, 6, 11, 2, 7, 11, 2]
    closed = ORDERS.render_history(tokens, history(1, 0, 2), history(4, 4, 7), open_order=False)
    assert closed.tolist() == rendered.tolist()[:-1]


def test_empty_history():
    tokens = ORDERS.item_tokens(CODES)
    assert ORDERS.render_history(tokens, history(), history(), open_order=True).tolist() == [1, 2]
    assert PLAIN.render_history(tokens, history(), history(), open_order=True).tolist() == [101]


def test_items_may_have_tokens_of_their_own_in_histories():
    vocabulary = Vocabulary(num_levels=2, codebook_size=4, base_size=100, num_items=2)
    tokens = vocabulary.item_tokens(CODES)
    assert tokens.tolist() == [[106, 114], [109, 115], [107, 111]]  # item 2 was added later: codes
    assert vocabulary.size == 116
    assert [vocabulary.normaliser(1), PLAIN.normaliser(1)] == [(110, 114)] * 2
    assert CODES[0].tolist() == [0, 1]


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(1, 6))
def test_only_the_newest_items_are_rendered(items, max_history):
    vocabulary = Vocabulary(num_levels=2, codebook_size=4, max_history=max_history)
    tokens = vocabulary.item_tokens(CODES)
    rendered = vocabulary.render_history(tokens, history(*items), np.arange(len(items)), open_order=True)
    expected = [vocabulary.user, *(t for item in items[-max_history:] for t in tokens[item].tolist())]
    assert rendered.tolist() == expected


def test_round_trip(tmp_path):
    ORDERS.save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == ORDERS


@given(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5))
def test_padding_changes_nothing(rows):
    ids, lengths = pad_right([np.array(row, np.int32) for row in rows], 99)
    assert [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)] == rows
    assert all((row[n:] == 99).all() for row, n in zip(ids, lengths, strict=True))
