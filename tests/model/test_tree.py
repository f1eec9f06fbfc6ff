"""The mask is reachability in the tree, and positions are path lengths, for any tree grown in any order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lasar.model.tree import Tree


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
