"""The teachers benchmark measures what it says: planted vectors, and sentences that are their own."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lasar.cot.rows import TrainingRow

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import teachers

VECTORS = np.eye(4, dtype=np.float32)


def row(history, targets):
    ids = [np.array(numbers, dtype=np.int32) for numbers in (history, np.zeros(len(history)), targets)]
    return TrainingRow(0, 1, *ids)


@pytest.mark.parametrize(
    ("query", "history", "targets", "share"),
    [
        ([0.0, 0.1, 0.2, 0.9], [0], [3], 0.0),
        ([0.0, 0.1, 0.2, 0.9], [0], [1], 0.5),
        ([0.9, 0.1, 0.2, 0.3], [0], [1], 0.5),  # what was bought before does not count
        ([0.0, 0.1, 0.2, 0.9], [0], [1, 3], 0.0),  # the nearest of several
    ],
)
def test_the_share_of_items_that_are_nearer(query, history, targets, share):
    found = teachers.shares(np.array([query], dtype=np.float32), [row(history, targets)], VECTORS)
    assert found.tolist() == [share]


def test_a_rationale_lies_in_the_middle_of_its_sentences():
    place = {"One.": VECTORS[0], "Two.": VECTORS[1]}
    spoken = teachers.spoken(
        ["One. Two.", "Two."], lambda texts: np.stack([2 * place[text] for text in texts])
    )
    np.testing.assert_allclose(spoken, [[0.5, 0.5, 0, 0], [0, 1, 0, 0]])


def test_the_interval_holds_the_mean():
    low, high = teachers.interval(np.random.default_rng(1).normal(0.3, 1.0, 400))
    assert low < 0.3 < high
    assert high - low < 0.3
