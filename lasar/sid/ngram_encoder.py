"""A text encoder that needs no download: hashed words and character trigrams.

Texts that share words or parts of words are near each other; meaning beyond that it does not see. It is for a first
look, for tests, and for machines that can fetch nothing; a sentence-transformers model is better everywhere else.
"""

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NAME = "ngrams"
WIDTH = 256
_WORD_WEIGHT = 2.0


def encode_ngrams(texts: list[str]) -> NDArray[np.float32]:
    """Vectors of length 1 (0 for a text without letters or digits), float32 [len(texts), 256].

    Every word and every trigram of a word adds or subtracts its weight in one of the 256 places; which, and the sign,
    is a hash of it, so vectors never depend on the other texts.
    """
    vectors = np.zeros((len(texts), WIDTH), dtype=np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        for part, weight in _parts(text):
            hashed = zlib.crc32(part.encode("utf-8"))
            vector[hashed % WIDTH] += weight if hashed >> 16 & 1 else -weight
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1.0), dtype=np.float32)


def _parts(text: str) -> Iterator[tuple[str, float]]:
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    for word in words:
        yield f"{word} ", _WORD_WEIGHT
        padded = f"<{word}>"
        for start in range(len(padded) - 2):
            yield padded[start : start + 3], 1.0
