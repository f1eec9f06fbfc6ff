"""The encoder that needs no model."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lasar.sid.ngram_encoder import WIDTH, encode_ngrams
from lasar.sid.text_encoder import load_text_encoder

TEXTS = st.lists(st.text(max_size=40), min_size=1, max_size=5)


@given(TEXTS)
def test_vectors_have_length_one_and_do_not_depend_on_company(texts):
    vectors = encode_ngrams(texts)
    assert vectors.shape == (len(texts), WIDTH)
    lengths = np.linalg.norm(vectors, axis=1)
    has_word = np.array([any(letter.isalnum() for letter in text.lower()) for text in texts])
    # Opposite signs may cancel, but only for texts of very few parts.
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))
    assert np.all(lengths[~has_word] == 0)
    np.testing.assert_array_equal(vectors[-1:], encode_ngrams(texts[-1:]))


def test_shared_words_are_near_and_spelling_counts_a_little():
    lamp, lamps, same, other = encode_ngrams(["red lamp", "red lamps", "Lamp, RED!", "green teapot"])
    np.testing.assert_allclose(lamp, same)
    assert lamp @ lamps > 0.5 > abs(lamp @ other)


def test_it_is_a_text_model_by_name():
    encode = load_text_encoder("ngrams", batch_size=8, max_tokens=8)
    np.testing.assert_array_equal(encode(["a b"]), encode_ngrams(["a b"]))
