import numpy as np
import pytest
import torch

from lasar.cot.projection import (
    ItemStates,
    fit_projection,
    item_states,
    nearest_items,
    place_by_encoder,
    place_segments,
    segment_vectors,
)
from lasar.cot.segmentation import segment_rationales, unit
from lasar.data.interactions import TrainSequence
from lasar.errors import DataError
from lasar.model.backbone import build_preset
from lasar.prompts.vocabulary import Vocabulary


def sequences_of(num_users, *, size, num_items=12):
    rng = np.random.default_rng(0)
    found = []
    for user in range(num_users):
        count = int(rng.integers(1, 6)) * size
        items = rng.permutation(num_items)[:count].astype(np.int32)
        found.append(TrainSequence(user, items, (np.arange(len(items)) // size).astype(np.int32)))
    return found


@pytest.mark.parametrize("train_targets", ["all", "last"])
@pytest.mark.parametrize("orders", [False, True])
def test_item_states_are_the_states_before_each_item(orders, train_targets):
    vocabulary = Vocabulary(num_levels=2, codebook_size=4, orders=orders, max_history=20)
    tokens_IL = vocabulary.item_tokens(np.array([[i % 4, i // 4] for i in range(12)], dtype=np.int32))
    model = build_preset("tiny", vocabulary=vocabulary, seed=0).eval()
    sequences = sequences_of(9, size=2 if orders else 1)
    states = item_states(
        model, sequences, tokens_IL, vocabulary=vocabulary, train_targets=train_targets,
        batch_tokens=60, max_users=99, seed=0,
    )  # fmt: skip
    seen = {item: [] for item in range(12)}
    for _, items, baskets in sequences:
        for item, basket in zip(items.tolist(), baskets.tolist(), strict=True):
            if train_targets == "last" and basket != baskets[-1]:
                continue
            earlier = baskets < basket
            prompt = vocabulary.render_history(tokens_IL, items[earlier], baskets[earlier], open_order=True)
            with torch.no_grad():
                output = model(torch.from_numpy(prompt)[None].long(), output_hidden_states=True)
            seen[item].append(output.hidden_states[-1][0, -1].numpy())
    assert states.counts_I.tolist() == [len(seen[item]) for item in range(12)]
    for item, vectors in seen.items():
        np.testing.assert_allclose(states.means_ID[item], np.mean(vectors, 0) if vectors else 0, atol=1e-5)
    stacked = np.concatenate([vectors for vectors in seen.values() if vectors])
    np.testing.assert_allclose(states.mean_D, stacked.mean(0), atol=1e-5)
    expected = np.sqrt(np.square(stacked - stacked.mean(0)).sum(1).mean())
    assert states.spread == pytest.approx(expected, rel=1e-4)


def planted(noise, *, num_items=300):
    """States that are a linear function of the texts' vectors, plus noise."""
    rng = np.random.default_rng(1)
    vectors = unit(rng.normal(size=(num_items, 6)).astype(np.float32))
    means = 2.0 + vectors @ rng.normal(size=(6, 10)) + noise * rng.normal(size=(num_items, 10))
    counts = rng.integers(0, 9, size=num_items)
    states = ItemStates(means_ID=means, counts_I=counts, mean_D=means.mean(0), spread=3.0)
    texts = [f" item {number}" if number % 10 else " " for number in range(num_items)]

    def encode(asked):
        return 5 * vectors[[int(text.split()[1]) for text in asked]]

    return texts, encode, states, vectors


def test_a_planted_map_is_found_and_its_held_out_quality_is_true():
    texts, encode, states, vectors = planted(0.0)
    found = fit_projection(texts, encode, states, max_items=1000, seed=0)
    used = np.array([bool(text.strip()) for text in texts]) & (states.counts_I > 0)
    assert found.num_items == used.sum()
    assert found.held_out_r2 > 0.999
    assert found.held_out_cosine > 0.999
    centred = vectors - vectors.mean(0)
    truth = states.means_ID - states.means_ID.mean(0)
    assert np.abs(centred @ found.weights_ED - truth).max() < 0.05
    assert fit_projection(texts, encode, states, max_items=50, seed=0).num_items == 50


def test_noise_calls_for_a_strong_ridge_and_promises_nothing():
    texts, encode, states, _ = planted(0.0)
    shuffled = ItemStates(
        means_ID=np.random.default_rng(2).permutation(states.means_ID), counts_I=states.counts_I,
        mean_D=states.mean_D, spread=1.0,
    )  # fmt: skip
    found = fit_projection(texts, encode, shuffled, max_items=1000, seed=0)
    clean = fit_projection(texts, encode, states, max_items=1000, seed=0)
    assert found.ridge > 100 * clean.ridge
    assert abs(found.held_out_r2) < 0.05
    assert set(found.facts()) == {"num_items", "ridge", "held_out_r2", "held_out_cosine"}


def test_too_few_items_with_text_is_an_error():
    texts, encode, states, _ = planted(0.0)
    with pytest.raises(
        DataError, match=r"anchor\.source=encoder: \d+ items have a text and a training event, 20 are"
    ):
        fit_projection(["", *texts[1:15], *[" "] * 285], encode, states, max_items=1000, seed=0)


def test_a_segment_is_the_mean_direction_of_its_sentences():
    vectors = unit(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
    found = segment_vectors([np.array([2]), np.array([0, 1, 1])], vectors)
    expected = vectors[0] + 2 * vectors[1]
    np.testing.assert_allclose(found, [vectors[2], expected / np.linalg.norm(expected)], atol=1e-6)


@pytest.mark.parametrize("spread", [None, 4.0])
def test_anchors_have_the_mean_and_the_spread_of_real_states(spread):
    texts, encode, states, _ = planted(0.5)
    projection = fit_projection(texts, encode, states, max_items=1000, seed=0)
    rng = np.random.default_rng(3)
    vectors, uses = unit(rng.normal(size=(40, 6)).astype(np.float32) + 1), rng.integers(1, 9, size=40)
    chunks = [(vectors[:15], uses[:15]), (vectors[15:], uses[15:])]
    place = place_segments(projection, chunks, mean_D=states.mean_D, spread=spread)
    anchors = np.repeat(place(vectors), uses, axis=0)
    np.testing.assert_allclose(anchors.mean(0), states.mean_D, atol=1e-5)
    if spread is None:
        assert place.scale == 1.0
    else:
        found = np.sqrt(np.square(anchors - anchors.mean(0)).sum(1).mean())
        assert found == pytest.approx(spread, rel=1e-5)


def test_every_distinct_segment_is_placed_once_by_how_often_it_is_used(monkeypatch):
    monkeypatch.setattr("lasar.cot.projection._CHUNK", 2)
    texts, encode, states, _ = planted(0.5)
    projection = fit_projection(texts, encode, states, max_items=1000, seed=0)
    vector_of = {f"S{n}.": unit(np.random.default_rng(n).normal(size=6).astype(np.float32)) for n in range(4)}
    segmentation = segment_rationales(
        ["S0. S1. S2.", "S0. S3.", "S0."], lambda asked: np.array([vector_of[s] for s in asked]),
        segments_mean=8, max_depth=8,
    )  # fmt: skip
    anchors_S = np.array([0, 1, 2, 0, 3, 0], dtype=np.int32)
    source, place = place_by_encoder(
        segmentation, anchors_S, projection=projection, mean_D=states.mean_D, spread=1.0
    )
    assert [batch.tolist() for batch in source.batches] == [[0, 1], [2, 3]]
    found = np.concatenate([source.compute(number) for number in range(2)])
    np.testing.assert_allclose(found, place(np.array([vector_of[f"S{n}."] for n in range(4)])), atol=1e-5)
    np.testing.assert_allclose(found[anchors_S].mean(0), states.mean_D, atol=1e-5)


def test_nearest_items_are_the_often_predicted_ones_in_that_direction():
    means = np.array([[1, 0], [0.9, 0.1], [0, 1], [5, 0.1]]) + 7.0
    states = ItemStates(
        means_ID=means, counts_I=np.array([5, 5, 5, 1]), mean_D=np.array([7.0, 7.0]), spread=1.0
    )
    assert nearest_items(np.array([[9.0, 7.0], [7.0, 8.0]]), states, k=2) == [[0, 1], [2, 1]]
