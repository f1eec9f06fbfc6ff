"""One contract for everything that ranks: shapes, padding, no repeats, filters, order, no state."""

from functools import partial

import numpy as np
import pytest
import torch

from lasar.baselines.ease import Ease
from lasar.baselines.item_knn import ItemKnn
from lasar.baselines.popularity import Popularity
from lasar.baselines.trained import Trained
from lasar.baselines.transitions import Transitions
from lasar.data.interactions import TrainSequence
from lasar.decoding.ranker import Ranker
from lasar.model.backbone import build_preset
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.fit import FitPlan

NUM_ITEMS, K = 15, 10


def training():
    rng = np.random.default_rng(0)
    return [
        TrainSequence(
            user, rng.integers(NUM_ITEMS, size=7).astype(np.int32), np.array([0, 0, 1, 1, 2, 3, 3], np.int32)
        )
        for user in range(30)
    ]


def queries():
    rng = np.random.default_rng(1)
    lengths = [0, 1, 3, 9]
    histories = [rng.integers(NUM_ITEMS, size=length).astype(np.int32) for length in lengths]
    return histories, [np.sort(rng.integers(3, size=length)).astype(np.int32) for length in lengths]


class Model:
    """The language model behind the baselines' interface; untrained, which the contract does not mind."""

    settings = ReasoningSettings(max_depth=0, fixed_depth=0)

    def fit(self, sequences, num_items):
        vocabulary = Vocabulary(num_levels=2, codebook_size=8, orders=True)
        codes = np.stack([np.arange(num_items) // 8, np.arange(num_items) % 8], axis=1).astype(np.int32)
        model = build_preset("tiny", vocabulary=vocabulary, seed=0).eval()
        self.ranker = Ranker(
            LatentReasoner(model, vocabulary=vocabulary, settings=self.settings).eval(), codes_IL=codes
        )
        return self

    def recommend(self, histories, baskets, k, **options):
        return self.ranker.rank(histories, baskets, k=k, beam_width=max(k, 20), **options)[:2]


class ReasoningModel(Model):
    """The same model, thinking as long as an untrained Policy Head says."""

    settings = ReasoningSettings(max_depth=3, head_width=8)


def trained(method, **settings):
    """A trained baseline after one epoch."""
    codes = np.stack([np.arange(NUM_ITEMS) // 4, np.arange(NUM_ITEMS) % 4], axis=1).astype(np.int32)
    return Trained(
        method, settings={"max_history": 5, "hidden_size": 16, "num_layers": 1, "dropout": 0.1} | settings,
        plan=FitPlan(epochs=1, learning_rate=1e-2, precision="fp32"),
        given={"codes_IL": torch.from_numpy(codes)} if method == "tiger" else None,
    )  # fmt: skip


REASONING = {
    "temperature": 0.5, "num_steps": 2, "diversity_weight": 0.1, "temperature_scale": 2.0,
    "contrastive_weight": 0.1, "noise": 0.01,
}  # fmt: skip
TIGER = {"num_levels": 2, "codebook_size": 4, "head_size": 8, "feed_size": 32}

RANKERS = {
    "popularity": Popularity, "transitions": Transitions, "model": Model, "reasoning": ReasoningModel,
    "item_knn": ItemKnn, "ease": Ease, "gru4rec": partial(trained, "gru4rec"),
    "sasrec": partial(trained, "sasrec", num_heads=2),
    "rearec_erl": partial(trained, "rearec", num_heads=2, learning="erl", **REASONING),
    "rearec_prl": partial(trained, "rearec", num_heads=2, learning="prl", **REASONING),
    "tiger": partial(trained, "tiger", num_heads=2, **TIGER),
}  # fmt: skip


@pytest.fixture(params=sorted(RANKERS))
def ranker(request):
    return RANKERS[request.param]().fit(training(), NUM_ITEMS)


def test_shapes_types_and_order(ranker):
    histories, baskets = queries()
    items, scores = ranker.recommend(histories, baskets, K)
    assert items.shape == scores.shape == (len(histories), K)
    assert items.dtype == np.int32
    assert scores.dtype == np.float32
    assert (np.diff(scores, axis=1) <= 0).all()
    for row in items:
        assert len(set(row.tolist())) == K
        assert (row >= 0).all()
        assert (row < NUM_ITEMS).all()


def test_lists_longer_than_the_catalogue_are_padded(ranker):
    histories, baskets = queries()
    items, scores = ranker.recommend(histories, baskets, NUM_ITEMS + 4)
    assert all(sorted(row[:NUM_ITEMS].tolist()) == list(range(NUM_ITEMS)) for row in items)
    assert (items[:, NUM_ITEMS:] == -1).all()
    assert np.isneginf(scores[:, NUM_ITEMS:]).all()


def test_seen_items_never_come_back_and_the_rest_keeps_its_order(ranker):
    histories, baskets = queries()
    every, _ = ranker.recommend(histories, baskets, NUM_ITEMS)
    unseen, _ = ranker.recommend(histories, baskets, NUM_ITEMS, exclude_seen=True)
    for history, all_items, left in zip(histories, every, unseen, strict=True):
        expected = [item for item in all_items.tolist() if item not in history.tolist()]
        assert left[left >= 0].tolist() == expected


def test_a_query_does_not_depend_on_its_batch_or_on_earlier_calls(ranker):
    histories, baskets = queries()
    together, _ = ranker.recommend(histories, baskets, K)
    for query in reversed(range(len(histories))):
        alone, _ = ranker.recommend([histories[query]], [baskets[query]], K)
        assert (alone[0] == together[query]).all()


def test_no_query_gives_no_list(ranker):
    items, scores = ranker.recommend([], [], K)
    assert items.shape == scores.shape == (0, K)


def test_a_sampled_depth_does_not_depend_on_its_batch():
    model = ReasoningModel().fit(training(), NUM_ITEMS)
    rng = np.random.default_rng(2)
    histories = [rng.integers(NUM_ITEMS, size=n % 7 + 1).astype(np.int32) for n in range(40)]
    baskets = [np.arange(len(history), dtype=np.int32) for history in histories]

    def draw(seed, batch_size, order=slice(None)):
        ranked = model.ranker.rank(
            histories[order], baskets[order], k=3, beam_width=5, depth="sampled", seed=seed, batch_size=batch_size
        )  # fmt: skip
        return ranked.depths_Q.tolist(), ranked.items_QK.tolist()

    together = draw(0, 32)
    assert draw(0, 7) == draw(0, 1) == together
    assert draw(0, 5, slice(None, None, -1)) == (together[0][::-1], together[1][::-1])
    assert draw(1, 32) != together
    assert set(together[0]) == {1, 2, 3}
