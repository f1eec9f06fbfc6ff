"""The catalogue as a trie in arrays.

Sorted semantic IDs make every trie node a contiguous range of items, so a whole level is four flat arrays and a
filter is a count of listed items inside a range. No node object, no hash table, no per-beam Python.

Legend: B batch, W beams, L levels, I items, K listed items of a filter, M most children of one node on a level.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lasar.errors import DataError


@dataclass(frozen=True, kw_only=True)
class TrieLevel:
    """Nodes of one depth (prefixes of `depth` codes), in sorted order.

    Attributes:
        code: last code of each node's prefix, int64 [nodes].
        child_start: first child of each node on the next level, int64 [nodes + 1]; empty on the last level.
        leaf_start: first sorted item under each node, int64 [nodes + 1].
        max_children: most children of one node; 0 on the last level.
    """

    code: Tensor
    child_start: Tensor
    leaf_start: Tensor
    max_children: int


class Trie:
    """All semantic IDs of a catalogue; level 0 is the root.

    Attributes:
        levels: `num_levels + 1` levels, the root first.
        item_of_leaf: item index of each sorted leaf, int64 [I].
        leaf_of_item: its inverse, int64 [I].
        prefix_LI: node at depth l that each item passes through (l = 0: the root), int64 [L, I].
    """

    def __init__(self, codes_IL: NDArray[np.int32], *, device: torch.device | str = "cpu") -> None:
        """Build from unique codes.

        Raises:
            DataError: no items, or two items share their codes.
        """
        num_items, num_levels = codes_IL.shape
        if num_items == 0:
            raise DataError("cannot build a trie over an empty catalogue")
        order_I = np.lexsort(codes_IL.T[::-1])
        sorted_IL = codes_IL[order_I]
        same_IL = np.ones((num_items, num_levels), dtype=bool)
        same_IL[0] = False
        same_IL[1:] = np.cumsum(sorted_IL[1:] != sorted_IL[:-1], axis=1) == 0
        if num_items > 1 and same_IL[:, -1].any():
            item = int(order_I[same_IL[:, -1]][0])
            raise DataError(
                f"item {item} shares its semantic ID with another; run the stage 'quantize' again"
            )
        starts = [np.array([0, num_items])]
        starts += [np.append(np.flatnonzero(~same_IL[:, level]), num_items) for level in range(num_levels)]
        self.levels: list[TrieLevel] = []
        for depth in range(num_levels + 1):
            firsts = starts[depth][:-1]
            code = sorted_IL[firsts, depth - 1] if depth else np.zeros(1)
            last = depth == num_levels
            child_start = np.zeros(0) if last else np.searchsorted(starts[depth + 1], starts[depth])
            self.levels.append(
                TrieLevel(
                    code=_indices(code, device),
                    child_start=_indices(child_start, device),
                    leaf_start=_indices(starts[depth], device),
                    max_children=0 if last else int(np.diff(child_start).max()),
                )
            )
        self.item_of_leaf = _indices(order_I, device)
        self.leaf_of_item = torch.empty_like(self.item_of_leaf)
        self.leaf_of_item[self.item_of_leaf] = torch.arange(num_items, device=device)
        self.prefix_LI = torch.stack(
            [
                torch.searchsorted(level.leaf_start, self.leaf_of_item, right=True) - 1
                for level in self.levels[:-1]
            ]
        )

    @property
    def num_levels(self) -> int:
        """Codes per item."""
        return len(self.levels) - 1

    @property
    def num_items(self) -> int:
        """Number of leaves."""
        return len(self.item_of_leaf)

    def node_of_item(self, depth: int, items: Tensor) -> Tensor:
        """Node at `depth` (0: the root; `num_levels`: the leaf) that each item passes through; any shape."""
        return self.leaf_of_item[items] if depth == self.num_levels else self.prefix_LI[depth][items]

    def children(self, depth: int, nodes_BW: Tensor) -> tuple[Tensor, Tensor]:
        """Children of nodes at `depth`.

        Returns:
            child nodes [B, W, M] at `depth + 1` (clamped where there are fewer than M) and a mask of real ones.
        """
        level = self.levels[depth]
        start_BW, stop_BW = level.child_start[nodes_BW], level.child_start[nodes_BW + 1]
        child_BWM = start_BW[..., None] + torch.arange(level.max_children, device=nodes_BW.device)
        real_BWM = child_BWM < stop_BW[..., None]
        return child_BWM.clamp(max=len(self.levels[depth + 1].code) - 1), real_BWM


class ItemFilter:
    """Which items each request may receive, as sorted leaf positions; applied inside the trie.

    A request has an allow-list (only these) or a deny-list (all but these). A node is alive if at least one allowed
    item lies under it: two binary searches per node, nothing per catalogue item.
    """

    def __init__(self, trie: Trie, *, items: list[NDArray[np.int64]], allow: bool) -> None:
        """Build for a batch.

        Args:
            trie: the catalogue.
            items: listed item indices of each request, distinct [B lists].
            allow: the lists name the only allowed items; otherwise the forbidden ones.
        """
        width = max((len(row) for row in items), default=0)
        device = trie.item_of_leaf.device
        leaves_BK = torch.full((len(items), width), trie.num_items, dtype=torch.int64, device=device)
        for row, listed in enumerate(items):
            leaves_BK[row, : len(listed)] = trie.leaf_of_item[torch.as_tensor(listed, device=device).long()]
        self._leaves_BK = leaves_BK.sort(dim=1).values
        self._allow = allow

    def alive(self, level: TrieLevel, nodes: Tensor) -> Tensor:
        """Whether each node [B, ...] of `level` has an allowed item under it."""
        batch = nodes.shape[0]
        start, stop = level.leaf_start[nodes], level.leaf_start[nodes + 1]
        before = torch.searchsorted(self._leaves_BK, start.reshape(batch, -1).contiguous())
        until = torch.searchsorted(self._leaves_BK, stop.reshape(batch, -1).contiguous())
        listed = (until - before).reshape(nodes.shape)
        return listed > 0 if self._allow else listed < stop - start


def _indices(values: NDArray[np.generic], device: torch.device | str) -> Tensor:
    return torch.as_tensor(values.astype(np.int64), device=device)
