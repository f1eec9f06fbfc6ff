"""Sampling without replacement: the distribution of the definition, distinct valid items, the decoder's scores."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from lasar.decoding.beam import beam_search
from lasar.decoding.sampling import sample_items
from lasar.decoding.trie import ItemFilter, Trie
from lasar.model.backbone import build_preset
from lasar.model.prompt import encode_prompts
from lasar.prompts.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_levels=3, codebook_size=4)
# Subtrees of very different sizes: whoever samples codes evenly, or rejects repeats, is found out.
CODES = np.array([[0, 0, 0], [0, 1, 0], [0, 1, 2], [1, 3, 3], [2, 0, 1], [2, 0, 2]], np.int32)
TRIE = Trie(CODES)


@pytest.fixture(scope="module")
def model():
    model = build_preset("tiny", vocabulary=VOCABULARY, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model.eval()


def prompts(model, count):
    return encode_prompts(
        model, torch.full((count, 1), VOCABULARY.user), torch.ones(count, dtype=torch.int64)
    )


def draw(model, *, count, num_samples, seed=0, vocabulary=VOCABULARY, **filters):
    item_filter = ItemFilter(TRIE, **filters) if filters else None
    return sample_items(
        prompts(model, count), vocabulary=vocabulary, trie=TRIE, num_samples=num_samples,
        generator=torch.Generator().manual_seed(seed), item_filter=item_filter,
    )  # fmt: skip


def everything(model, vocabulary=VOCABULARY):
    """Score of every item."""
    beams = beam_search(prompts(model, 1), vocabulary=vocabulary, trie=TRIE, beam_width=6)
    return beams.scores_BW[0][beams.items_BW[0].argsort()].double().numpy()


def chance_of_sets(probabilities, size):
    """Chance of every set of `size` items, drawn one after the other without replacement."""
    chances = {}
    for sequence in itertools.permutations(range(len(probabilities)), size):
        left, chance = 1.0, 1.0
        for item in sequence:
            chance *= probabilities[item] / left
            left -= probabilities[item]
        key = frozenset(sequence)
        chances[key] = chances.get(key, 0.0) + chance
    return chances


@pytest.mark.parametrize("num_samples", [1, 3])
def test_sets_come_as_often_as_drawing_one_by_one_would_give_them(model, num_samples):
    count = 6000
    items = draw(model, count=count, num_samples=num_samples).items_BW.numpy()
    found = {}
    for row in items:
        found[frozenset(row.tolist())] = found.get(frozenset(row.tolist()), 0) + 1
    probabilities = np.exp(everything(model))
    assert probabilities.max() > 2 * probabilities.min()
    for chosen, chance in chance_of_sets(probabilities / probabilities.sum(), num_samples).items():
        deviation = np.sqrt(chance * (1 - chance) / count)
        assert abs(found.get(chosen, 0) / count - chance) < 5 * deviation + 1e-9


@pytest.mark.parametrize("normalise", ["trie", "level", "sid", "full"])
def test_items_are_distinct_and_scored_as_beams_are(model, normalise):
    vocabulary = dataclasses.replace(VOCABULARY, normalise=normalise)
    scores = everything(model, vocabulary)
    found = draw(model, count=50, num_samples=4, vocabulary=vocabulary)
    for items, values in zip(found.items_BW.numpy(), found.scores_BW.numpy(), strict=True):
        assert len(set(items.tolist())) == 4
        np.testing.assert_allclose(values, scores[items], atol=1e-5)
        assert (np.diff(values) <= 0).all()


def test_asking_for_more_than_there_is_gives_all(model):
    found = draw(model, count=3, num_samples=20)
    for items in found.items_BW.tolist():
        assert sorted(item for item in items if item >= 0) == list(range(6))


def test_filters_hold_and_the_rest_keeps_its_scores(model):
    scores = everything(model)
    listed = [np.array([0, 3, 4]), np.array([5])]
    found = draw(model, count=2, num_samples=6, items=listed, allow=False)
    for items, values, forbidden in zip(found.items_BW, found.scores_BW, listed, strict=True):
        real = items[items >= 0].numpy()
        assert sorted(real.tolist()) == sorted(set(range(6)) - set(forbidden.tolist()))
        np.testing.assert_allclose(values[items >= 0].numpy(), scores[real], atol=1e-5)


def test_a_seed_decides(model):
    first, again, other = (
        draw(model, count=20, num_samples=2, seed=seed).items_BW.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
