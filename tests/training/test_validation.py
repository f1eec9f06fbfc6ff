import numpy as np
import pytest

from lasar.data.interactions import EvalCases, Interactions
from lasar.decoding.ranked import Ranked
from lasar.training.validation import validation_metrics


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
