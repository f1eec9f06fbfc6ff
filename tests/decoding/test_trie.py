import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.decoding.trie import ItemFilter, Trie
from lasar.errors import DataError


@st.composite
def catalogues(draw):
    levels, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    total = size**levels
    chosen = draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=min(total, 80), unique=True))
    return np.array([[c // size**level % size for level in range(levels)] for c in chosen], dtype=np.int32)


@settings(max_examples=60, deadline=None)
@given(catalogues())
def test_walking_the_trie_spells_exactly_the_catalogue(codes):
    trie = Trie(codes)
    paths = {(): 0}
    for depth in range(trie.num_levels):
        grown = {}
        for path, node in paths.items():
            child, real = trie.children(depth, torch.tensor([[node]]))
            kept = child[0, 0][real[0, 0]].tolist()
            assert kept
            for node_below in kept:
                grown[(*path, int(trie.levels[depth + 1].code[node_below]))] = node_below
        paths = grown
    spelled = {path: int(trie.item_of_leaf[leaf]) for path, leaf in paths.items()}
    assert spelled == {tuple(row): item for item, row in enumerate(codes.tolist())}
    assert (trie.item_of_leaf[trie.leaf_of_item] == torch.arange(len(codes))).all()


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.data())
def test_a_node_is_alive_iff_an_allowed_item_lies_under_it(codes, data):
    trie = Trie(codes)
    listed = data.draw(st.lists(st.integers(0, len(codes) - 1), unique=True))
    allow = data.draw(st.booleans())
    item_filter = ItemFilter(trie, items=[np.array(listed, np.int64), np.zeros(0, np.int64)], allow=allow)
    for depth, level in enumerate(trie.levels):
        nodes = torch.arange(len(level.code)).expand(2, -1)
        alive = item_filter.alive(level, nodes)
        for row, names in enumerate((set(listed), set())):
            for node in range(len(level.code)):
                leaves = trie.item_of_leaf[level.leaf_start[node] : level.leaf_start[node + 1]].tolist()
                under = {item for item in leaves if (item in names) == allow}
                assert bool(alive[row, node]) == bool(under), (depth, node)


def test_shared_semantic_id_is_refused():
    with pytest.raises(DataError, match="shares its semantic ID"):
        Trie(np.array([[1, 2], [0, 0], [1, 2]], np.int32))


def test_empty_catalogue_is_refused():
    with pytest.raises(DataError, match="empty catalogue"):
        Trie(np.zeros((0, 3), np.int32))


@pytest.mark.parametrize("num_items", [1, 2, 1000])
def test_counts(num_items):
    codes = np.stack([np.arange(num_items) // 32, np.arange(num_items) % 32], axis=1).astype(np.int32)
    trie = Trie(codes)
    assert (trie.num_items, trie.num_levels) == (num_items, 2)
