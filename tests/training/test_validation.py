import dataclasses
import itertools

import numpy as np
import pytest
import torch

from lasar.data.interactions import EvalCases, Interactions
from lasar.decoding.ranked import Ranked
from lasar.decoding.ranker import Ranker
from lasar.model.backbone import build_preset
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.validation import answer_nll, validation_metrics


class Scripted:
    """Returns fixed lists and records how it was asked."""

    def __init__(self, items):
        self.items, self.asked = np.array(items, np.int32), {}

    def rank(self, histories, baskets, **options):
        self.asked = options
        return Ranked(self.items, np.zeros(self.items.shape, np.float32), np.array([1, 4], np.int32))


def test_means_over_users():
    cases = EvalCases(
        user_index=np.array([0, 1], np.int32),
        histories=[np.array([1], np.int32)] * 2,
        baskets=[np.array([0], np.int32)] * 2,
        targets=[np.array([7], np.int32), np.array([9], np.int32)],
    )
    ranker = Scripted([[5, 7], [5, 7]])
    metrics = validation_metrics(ranker, cases, exclude_seen=True, beam_width=4, k=2)
    assert metrics == {"hr@2": 0.5, "ndcg@2": pytest.approx(0.5 / np.log2(3)), "mean_depth": 2.5}
    assert ranker.asked["exclude_seen"] is True
    assert ranker.asked["beam_width"] == 4


@pytest.mark.parametrize(("items", "expected"), [([1, 2, 1], False), ([1, 1, 1], True)])
def test_repeats_are_per_user(items, expected):
    interactions = Interactions(
        user_index=np.array([0, 0, 1], np.int32), item_index=np.array(items, np.int32),
        basket=np.array([0, 1, 0], np.int32), split=np.zeros(3, np.int8), num_users=2, num_items=3,
        split_kind="leave_one_out", train_targets="all",
    )  # fmt: skip
    assert interactions.has_repeats is expected


CODES = np.array(list(itertools.product(range(3), repeat=2)), np.int32)[:7]


def small_ranker(orders, codes=CODES, **settings):
    vocabulary = Vocabulary(num_levels=codes.shape[1], codebook_size=8, orders=orders)
    torch.manual_seed(0)
    reasoner = LatentReasoner(
        build_preset("tiny", vocabulary=vocabulary, seed=1), vocabulary=vocabulary,
        settings=ReasoningSettings(max_depth=3, head_width=8, **settings),
    )  # fmt: skip
    return Ranker(reasoner.eval(), codes_IL=codes)


def small_cases():
    rng = np.random.default_rng(0)
    lengths, counts = [0, 4, 1, 9, 2], [1, 2, 3, 1, 2]
    return EvalCases(
        user_index=np.arange(5, dtype=np.int32),
        histories=[rng.integers(7, size=n).astype(np.int32) for n in lengths],
        baskets=[np.sort(rng.integers(3, size=n)).astype(np.int32) for n in lengths],
        targets=[rng.choice(7, size=n, replace=False).astype(np.int32) for n in counts],
    )


@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.parametrize("depth", ["auto", 0, 2])
def test_nll_is_minus_the_score_that_beam_search_gives_the_true_items(orders, depth):
    """Normalised over the trie, the sum of an item's log-probabilities is its score in a full ranking."""
    ranker, cases = small_ranker(orders), small_cases()
    ranked = ranker.rank(cases.histories, cases.baskets, k=7, beam_width=9, depth=depth)
    of_case = [
        -np.mean([ranked.scores_QK[q, ranked.items_QK[q] == item] for item in cases.targets[q]])
        for q in range(len(cases))
    ]
    for batch_size in (1, 2, 64):
        found = answer_nll(ranker, cases, depth=depth, batch_size=batch_size)
        assert found == pytest.approx(np.mean(of_case), abs=1e-4)


def test_nll_sees_the_depth():
    ranker, cases = small_ranker(orders=False, fixed_depth=2), small_cases()
    assert (
        answer_nll(ranker, cases) == answer_nll(ranker, cases, depth=2) != answer_nll(ranker, cases, depth=1)
    )


def test_nll_of_items_with_a_single_code():
    codes = np.arange(7, dtype=np.int32)[:, None]
    ranker, cases = small_ranker(orders=False, codes=codes), small_cases()
    one = dataclasses.replace(cases, targets=[target[:1] for target in cases.targets])
    ranked = ranker.rank(one.histories, one.baskets, k=7, beam_width=7)
    scores = [ranked.scores_QK[q, ranked.items_QK[q] == one.targets[q][0]] for q in range(len(one))]
    assert answer_nll(ranker, one) == pytest.approx(-np.mean(scores), abs=1e-4)
