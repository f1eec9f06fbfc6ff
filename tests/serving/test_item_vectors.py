"""Vectors of new items: the text by the run's own recipe, the company by the neighbours."""

import numpy as np
import pytest

from lasar.serving.item_vectors import TextVectors, company_of_neighbours, load_vectors
from lasar.sid.ngram_encoder import encode_ngrams

from .conftest import TITLES, WIDTH


def test_a_text_is_embedded_as_the_run_embedded_it(run):
    vectors, trained = TextVectors(run).vectors(TITLES[:3]), load_vectors(run)
    assert vectors.shape == (3, trained.shape[1])
    np.testing.assert_allclose(vectors[:, :-WIDTH], trained[:3, :-WIDTH], atol=1e-6)


def test_company_is_that_of_the_nearest_texts(run):
    trained = load_vectors(run).astype(np.float64)
    text = encode_ngrams(["RED TEAPOT WITH A LID"])[0].astype(np.float64)
    cosines = [text @ row[:-WIDTH] / np.linalg.norm(text) / np.linalg.norm(row[:-WIDTH]) for row in trained]
    nearest = sorted(range(len(trained)), key=lambda item: -cosines[item])[:5]
    found = TextVectors(run).vectors(["RED TEAPOT WITH A LID"])[0]
    np.testing.assert_allclose(found[-WIDTH:], trained[nearest, -WIDTH:].mean(axis=0), atol=1e-6)


def test_items_without_company_are_no_neighbours():
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(9, 4)).astype(np.float32)
    company = rng.normal(size=(9, 3)).astype(np.float32)
    company[:6] = 0
    new = texts[:2] / np.linalg.norm(texts[:2], axis=1, keepdims=True)
    found = company_of_neighbours(new, np.concatenate([3 * texts, company], axis=1))
    np.testing.assert_allclose(found, np.tile(company[6:].mean(axis=0), (2, 1)), atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("items", [0, 3])
def test_where_nobody_has_company_a_new_item_has_none(items):
    trained = np.zeros((items, 7), dtype=np.float32)
    assert not company_of_neighbours(np.ones((2, 4), dtype=np.float32), trained).any()
