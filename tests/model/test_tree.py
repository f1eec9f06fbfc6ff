"""The mask is reachability in the tree, and positions are path lengths, for any tree grown in any order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lasar.model.tree import Tree, chains, with_trunk


@st.composite
def growths(draw):
    """Trunk lengths and, call by call, each row's parents: trunk tokens, earlier calls' tokens or this call's."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    lengths = [draw(st.integers(1, width)) for _ in range(batch)]
    calls, size = [], width
    for _ in range(draw(st.integers(0, 4))):
        count = draw(st.integers(0, 5))
        rows = []
        for length in lengths:
            row = []
            for q in range(count):
                hung = list(range(width, size + q))
                row.append(draw(st.sampled_from([*range(length), *hung])))
            rows.append(row)
        calls.append(rows)
        size += count
    return lengths, width, calls


@given(growths())
def test_mask_is_reachability(growth):
    lengths, width, calls = growth
    tree = Tree(torch.tensor(lengths), width)
    parents = [{t: t - 1 for t in range(length)} for length in lengths]
    for rows in calls:
        first = tree.num_keys
        nodes = tree.grow(torch.tensor(rows, dtype=torch.int64).reshape(len(lengths), -1))
        assert nodes.mask_BQK.shape == (len(lengths), len(rows[0]), first + len(rows[0]))
        for b, row in enumerate(rows):
            for q, parent in enumerate(row):
                parents[b][first + q] = parent
                path, node = set(), first + q
                while node >= 0:
                    path.add(node)
                    node = parents[b][node]
                assert nodes.index_BQ[b, q] == first + q
                assert set(nodes.mask_BQK[b, q].nonzero()[:, 0].tolist()) == path
                assert nodes.position_BQ[b, q] == len(path) - 1


def test_trunk_ends_are_the_parents_of_what_continues_the_trunk():
    tree = Tree(torch.tensor([3, 1]), 3)
    nodes = tree.grow(tree.trunk_ends_B1)
    assert nodes.position_BQ.tolist() == [[3], [1]]
    assert nodes.mask_BQK[:, 0].tolist() == [[True, True, True, True], [True, False, False, True]]


@given(growths(), st.integers(1, 4), st.data())
def test_chains_are_paths_that_share_nothing(growth, length, data):
    """Every chain is its start's path and its own tokens, in order; another chain's tokens are never seen."""
    lengths, width, calls = growth
    tree = Tree(torch.tensor(lengths), width)
    for rows in calls:
        tree.grow(torch.tensor(rows, dtype=torch.int64).reshape(len(lengths), -1))
    first, count = tree.num_keys, data.draw(st.integers(1, 4))
    starts = [
        [data.draw(st.sampled_from([*range(size), *range(width, first)])) for _ in range(count)]
        for size in lengths
    ]
    parents = chains(torch.tensor(starts), length=length, first=first)
    before = tree.grow(torch.tensor(starts))  # what one token behind each start sees: the start's own path
    shift = tree.num_keys - first
    nodes = tree.grow(torch.where(parents >= first, parents + shift, parents))
    assert parents.shape == (len(lengths), count * length)
    for b in range(len(lengths)):
        for a in range(count):
            path = before.mask_BQK[b, a].nonzero()[:, 0].tolist()[:-1]
            for n in range(length):
                q = a * length + n
                own = [tree.num_keys - count * length + a * length + m for m in range(n + 1)]
                assert nodes.mask_BQK[b, q].nonzero()[:, 0].tolist() == path + own
                assert nodes.position_BQ[b, q] == before.position_BQ[b, a] + n


@given(growths())
def test_with_trunk_is_a_causal_trunk_above_the_branches(growth):
    lengths, width, calls = growth
    rows = calls[0] if calls else [[] for _ in lengths]
    tree = Tree(torch.tensor(lengths), width)
    nodes = tree.grow(torch.tensor(rows, dtype=torch.int64).reshape(len(lengths), -1))
    mask = with_trunk(nodes, width)
    assert mask.shape == (len(lengths), width + len(rows[0]), width + len(rows[0]))
    for b in range(len(lengths)):
        for t in range(width):
            assert mask[b, t].nonzero()[:, 0].tolist() == list(range(t + 1))
        assert torch.equal(mask[b, width:], nodes.mask_BQK[b])
