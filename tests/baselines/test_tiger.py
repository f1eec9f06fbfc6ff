"""TIGER's beams against scoring every item by itself."""

import numpy as np
import pytest
import torch

from lasar.baselines.sequences import Histories, TargetBatch, pad_histories
from lasar.baselines.tiger import Tiger

NUM_ITEMS = 11
# Two items below some prefixes, one below others, none below most.
CODES_IL = np.array(
    [[0, 0, 0], [0, 0, 2], [0, 1, 0], [1, 2, 1], [1, 2, 2], [1, 0, 0], [2, 2, 2], [3, 0, 1], [3, 1, 1], [3, 2, 1],
     [2, 0, 0]], np.int32
)  # fmt: skip
HISTORIES = [np.array(items, np.int32) for items in ([], [3], [3, 7, 7, 1], [10, 2], [0, 1, 2, 3, 4, 5])]


@pytest.fixture(scope="module")
def tiger():
    torch.manual_seed(0)
    network = Tiger(
        num_items=NUM_ITEMS, max_history=4, num_levels=3, codebook_size=4, hidden_size=16, num_layers=2,
        num_heads=2, head_size=8, feed_size=32, dropout=0.1, beam_width=12,
    )  # fmt: skip
    network.load_state_dict({"codes_IL": torch.from_numpy(CODES_IL)}, strict=False)
    return network.eval()


def brute_force(tiger, history):
    """Log-probability of every item, from the loss of one (history, item) pair at a time."""
    rows = pad_histories([history], num_items=NUM_ITEMS, max_history=tiger.max_history)
    scores = []
    for item in range(NUM_ITEMS):
        targets_BT = torch.full_like(rows.items_BT, -1)
        targets_BT[0, -1] = item
        with torch.no_grad():
            scores.append(-tiger(TargetBatch(histories=rows, targets_BT=targets_BT)).item())
    return np.array(scores)


def rank(tiger, histories, k, **options):
    rows = pad_histories(histories, num_items=NUM_ITEMS, max_history=tiger.max_history)
    return tiger.rank(rows, k, excluded=options.get("excluded"))


def test_beams_equal_brute_force(tiger):
    items, scores = rank(tiger, HISTORIES, NUM_ITEMS)
    for row, history in enumerate(HISTORIES):
        expected = brute_force(tiger, history)
        assert items[row].tolist() == np.argsort(-expected).tolist()
        np.testing.assert_allclose(scores[row], -np.sort(-expected), atol=1e-4)


def test_narrow_beams_return_items_with_their_own_scores(tiger):
    tiger.beam_width = 3
    items, scores = rank(tiger, HISTORIES, 3)
    tiger.beam_width = 12
    for row, history in enumerate(HISTORIES):
        expected = brute_force(tiger, history)
        np.testing.assert_allclose(scores[row], expected[items[row]], atol=1e-4)
        assert len(set(items[row].tolist())) == 3


def test_excluded_items_leave_the_scores_of_the_others(tiger):
    excluded = [np.array([0, 0, 6], np.int32)] * len(HISTORIES)
    items, scores = rank(tiger, HISTORIES, NUM_ITEMS, excluded=excluded)
    everything, all_scores = rank(tiger, HISTORIES, NUM_ITEMS)
    for row in range(len(HISTORIES)):
        kept = ~np.isin(everything[row], [0, 6])
        assert items[row].tolist() == [*everything[row][kept].tolist(), -1, -1]
        np.testing.assert_allclose(scores[row][:-2], all_scores[row][kept], atol=1e-5)


def test_the_loss_does_not_see_padding(tiger):
    rows = pad_histories(HISTORIES, num_items=NUM_ITEMS, max_history=4)
    targets_BT = torch.full_like(rows.items_BT, -1)
    for row, length in enumerate(rows.lengths_B.tolist()):
        targets_BT[row, length - 1] = 5
    together = tiger(TargetBatch(histories=rows, targets_BT=targets_BT)).item()
    assert together == pytest.approx(-sum(brute_force(tiger, history)[5] for history in HISTORIES), rel=1e-5)


def test_codes_of_two_levels_are_two_tokens(tiger):
    tokens = tiger._tokens()
    assert tokens.min() >= 2
    assert all(
        not set(tokens[:, a].tolist()) & set(tokens[:, b].tolist()) for a, b in ((0, 1), (0, 2), (1, 2))
    )
    ids, seen = tiger._prompts(
        Histories(
            items_BT=torch.tensor([[NUM_ITEMS, 4], [NUM_ITEMS, NUM_ITEMS]]), lengths_B=torch.tensor([2, 1])
        )
    )
    assert ids.tolist() == [[1, 3, 8, 12], [1, 0, 0, 0]]
    assert seen.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
