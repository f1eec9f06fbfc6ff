"""Loose tokens in and out of rectangles."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lasar.engine.forward import Arrangement, group_prompts, groups_of_like_length


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


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=20), in_order=st.booleans())
def test_groups_hold_requests_of_like_length(lengths, in_order):
    lengths = sorted(lengths) if in_order else lengths
    groups = groups_of_like_length(torch.tensor(lengths))
    assert [row for rows in groups for row in range(rows.start, rows.stop)] == list(range(len(lengths)))
    for rows in groups:
        own = lengths[rows]
        assert max(own) <= max(16, 2 * min(own))
    if in_order:
        assert len(groups) <= 4  # up to 16, 34, 70 and 100 tokens


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_prompts_of_a_group_lie_in_its_rectangle(lengths):
    tokens = torch.arange(sum(lengths))
    found = []
    for group in group_prompts(torch.tensor(lengths)):
        own, rows = tokens[group.tokens], group.rows.stop - group.rows.start
        places = torch.arange(len(own)) if group.places is None else group.places
        assert places.max() < rows * group.length
        for row, length in enumerate(lengths[group.rows]):
            assert (places // group.length == row).sum() == length
        found += own.tolist()
    assert found == tokens.tolist()
