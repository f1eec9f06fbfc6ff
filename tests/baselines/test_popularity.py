"""Popularity ranks by training events, the same for everyone."""

import numpy as np

from lasar.baselines.popularity import Popularity
from lasar.data.interactions import TrainSequence


def sequence(user, items):
    return TrainSequence(user, np.array(items, dtype=np.int32), np.arange(len(items), dtype=np.int32))


EMPTY = np.zeros(0, dtype=np.int32)


def test_most_frequent_first_and_ties_by_index():
    model = Popularity().fit([sequence(0, [3, 3, 1]), sequence(1, [3, 2])], 5)
    items, scores = model.recommend([EMPTY, np.array([3], dtype=np.int32)], [EMPTY, EMPTY], 4)
    assert items.tolist() == [[3, 1, 2, 0]] * 2
    assert scores[0].tolist() == [3.0, 1.0, 1.0, 0.0]


def test_seen_items_leave_only_their_own_users_list():
    model = Popularity().fit([sequence(0, [3, 3, 1, 2])], 4)
    items, _ = model.recommend([EMPTY, np.array([3, 2], dtype=np.int32)], [EMPTY] * 2, 4, exclude_seen=True)
    assert items.tolist() == [[3, 1, 2, 0], [1, 0, -1, -1]]


def test_no_training_data():
    items, _ = Popularity().fit([], 3).recommend([EMPTY], [EMPTY], 5)
    assert items.tolist() == [[0, 1, 2, -1, -1]]
