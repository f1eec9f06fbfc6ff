"""Loose tokens in and out of rectangles."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lasar.engine.forward import Arrangement


@given(rows=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_an_arrangement_gives_every_request_its_own_tokens(rows):
    present = torch.tensor(rows)
    if not present.any():
        return
    arrangement = Arrangement(present)
    tokens = torch.arange(present.numel()).view_as(present)[present]
    rectangle = arrangement.spread(tokens)
    assert rectangle.shape == (len(rows), max(sum(row) for row in rows))
    for row, own in enumerate(rows):
        expected = [4 * row + column for column in range(4) if own[column]]
        assert rectangle[row, : sum(own)].tolist() == expected
    assert torch.equal(arrangement.collect(rectangle), tokens)
    assert torch.equal(tokens // 4, arrangement.rows_n)
    assert arrangement.number_BQ[present].tolist() == list(range(len(tokens)))
