"""From codes that items may share to IDs that are unique: collision resolution, and IDs for new items.

I items, E embedding width, L levels, C codebook size.

One rule at every level, from the first to the last: the items below one prefix may take a code at most as
often as there are free IDs under it (codebook_size ** levels below, minus the IDs that are taken). Where more
want it, those it fits best stay and the others move, cheapest move first, to the next-best code with room;
their later codes are chosen anew. On the last level a code has room for one item: that is the usual
collision. On the levels above it the rule only acts where a whole prefix is full. There is always a solution,
because a prefix is never given more items than it has free IDs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lasar.errors import DataError
from lasar.sid.catalog import SidCatalog
from lasar.sid.quantizers import Quantizer

_COST_CHUNK = 4096
_MAX_ROOM = 2**62  # fits int64; more room than any catalogue needs


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Unique codes, and what making them unique took.

    Attributes:
        codes_IL: int32 [num_items, num_levels], all different.
        colliding: items whose first codes were shared with another item.
        moved: per level, how many items had to take another code there.
        squared_error_before: mean squared distance of an item's vector to its decoded first codes.
        squared_error_after: the same for the final codes.
    """

    codes_IL: NDArray[np.int32]
    colliding: int
    moved: tuple[int, ...]
    squared_error_before: float
    squared_error_after: float


def assign_items(
    quantizer: Quantizer,
    item_embeddings_IE: NDArray[np.float32],
    *,
    extra_level: bool = False,
    taken: SidCatalog | None = None,
) -> Assignment:
    """Unique codes for items.

    Args:
        quantizer: fitted.
        item_embeddings_IE: float32 [I, E].
        extra_level: append a level whose code only tells apart items with equal codes (0, 1, 2, ... in item
            order; as TIGER does). Without it, items that collide move to the nearest free code of the last
            level.
        taken: IDs that are in use already and stay as they are.

    Raises:
        DataError: more items than there are IDs.
    """
    space = _CodeSpace(quantizer, extra_level)
    num_taken = 0 if taken is None else taken.num_items
    capacity = space.codebook_size**space.num_levels
    if num_taken + len(item_embeddings_IE) > capacity:
        raise DataError(
            f"{num_taken + len(item_embeddings_IE):,} items do not fit into {space.codebook_size} ** "
            f"{space.num_levels} = {capacity:,} semantic IDs; raise codebook_size or num_levels of quantize"
        )
    codes = space.first_choice(item_embeddings_IE)
    first_codes = codes.copy()
    taken_IL = np.zeros((0, space.num_levels), np.int32) if taken is None else taken.codes_IL
    moved = tuple(
        _settle_level(space, item_embeddings_IE, codes, level, taken_IL) for level in range(space.num_levels)
    )
    _, inverse, counts = np.unique(
        first_codes[:, : quantizer.num_levels], axis=0, return_inverse=True, return_counts=True
    )
    return Assignment(
        codes_IL=codes,
        colliding=int((counts[inverse.reshape(-1)] > 1).sum()),
        moved=moved,
        squared_error_before=squared_error(quantizer, item_embeddings_IE, first_codes),
        squared_error_after=squared_error(quantizer, item_embeddings_IE, codes),
    )


def assign_new_items(
    quantizer: Quantizer, catalog: SidCatalog, item_embeddings_IE: NDArray[np.float32]
) -> NDArray[np.int32]:
    """IDs for items that came after the fit: all different, none taken; the catalogue keeps its own.

    Returns:
        int32 [new items, num_levels], for `catalog.with_items`.

    Raises:
        DataError: the catalogue is not this quantizer's, or there are not enough free IDs.
    """
    extra = catalog.num_levels - quantizer.num_levels
    if extra not in (0, 1) or catalog.codebook_size != quantizer.codebook_size:
        raise DataError(
            f"the catalogue has {catalog.num_levels} levels of {catalog.codebook_size} codes, the quantizer "
            f"{quantizer.num_levels} of {quantizer.codebook_size}: they are from different quantize artifacts"
        )
    return assign_items(quantizer, item_embeddings_IE, extra_level=bool(extra), taken=catalog).codes_IL


def squared_error(
    quantizer: Quantizer, item_embeddings_IE: NDArray[np.float32], codes_IL: NDArray[np.int32]
) -> float:
    """Mean squared distance of vectors to their decoded codes (an extra level is ignored)."""
    total = 0.0
    for begin in range(0, len(codes_IL), _COST_CHUNK):
        rows = slice(begin, begin + _COST_CHUNK)
        decoded = quantizer.decode(codes_IL[rows, : quantizer.num_levels])
        total += float(((item_embeddings_IE[rows] - decoded) ** 2).sum(dtype=np.float64))
    return total / max(len(codes_IL), 1)


class _CodeSpace:
    """The quantizer's levels, and with `extra_level` one more whose codes cost their own number."""

    def __init__(self, quantizer: Quantizer, extra_level: bool) -> None:
        self.quantizer = quantizer
        self.codebook_size = quantizer.codebook_size
        self.num_levels = quantizer.num_levels + extra_level

    def first_choice(self, item_embeddings_IE: NDArray[np.float32]) -> NDArray[np.int32]:
        """The quantizer's codes; 0 on the extra level."""
        codes = np.zeros((len(item_embeddings_IE), self.num_levels), dtype=np.int32)
        codes[:, : self.quantizer.num_levels] = self.quantizer.encode(item_embeddings_IE)
        return codes

    def costs(
        self, item_embeddings_IE: NDArray[np.float32], codes_IP: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Cost [I, C] of every code of the level after the prefix."""
        if codes_IP.shape[1] < self.quantizer.num_levels:
            return self.quantizer.level_costs(item_embeddings_IE, codes_IP)
        codes = np.arange(self.codebook_size, dtype=np.float32)
        return np.broadcast_to(codes, (len(codes_IP), self.codebook_size))

    def choose_after(
        self, item_embeddings_IE: NDArray[np.float32], codes_IL: NDArray[np.int32], level: int
    ) -> None:
        """Choose the codes after `level` anew, in place."""
        for later in range(level + 1, self.num_levels):
            codes_IL[:, later] = self.costs(item_embeddings_IE, codes_IL[:, :later]).argmin(axis=1)


def _settle_level(
    space: _CodeSpace,
    item_embeddings_IE: NDArray[np.float32],
    codes_IL: NDArray[np.int32],
    level: int,
    taken_IL: NDArray[np.int32],
) -> int:
    """Give no code of this level more items than it has IDs; changes `codes_IL`, counts the moves."""
    room_below = min(space.codebook_size ** (space.num_levels - level - 1), _MAX_ROOM)
    num_taken = len(taken_IL)
    both = np.concatenate([taken_IL[:, : level + 1], codes_IL[:, : level + 1]])
    _, path, load = np.unique(both, axis=0, return_inverse=True, return_counts=True)
    path = path.reshape(-1)
    crowded = (load > room_below)[path[num_taken:]]
    if not crowded.any():
        return 0
    _, parent = np.unique(both[:, :level], axis=0, return_inverse=True)
    parent = parent.reshape(-1)
    num_moved = 0
    for group in np.unique(parent[num_taken:][crowded]):
        items = np.flatnonzero(parent[num_taken:] == group)
        used = np.bincount(taken_IL[parent[:num_taken] == group, level], minlength=space.codebook_size)
        free = np.minimum(room_below - used, len(items)).astype(np.int64)
        costs = space.costs(item_embeddings_IE[items], codes_IL[items, :level])
        codes = _settle_group(costs, codes_IL[items, level], free)
        moved = items[codes != codes_IL[items, level]]
        codes_IL[items, level] = codes
        tail = codes_IL[moved]
        space.choose_after(item_embeddings_IE[moved], tail, level)
        codes_IL[moved] = tail
        num_moved += len(moved)
    return num_moved


def _settle_group(
    costs_IC: NDArray[np.float32], wanted_I: NDArray[np.int32], free_C: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Codes within one prefix: at most `free_C` items per code, best-fitting items stay."""
    codes = wanted_I.copy()
    free = free_C.copy()
    own_cost = np.take_along_axis(costs_IC, wanted_I[:, None], axis=1)[:, 0]
    waiting: list[int] = []
    for item in np.argsort(own_cost, kind="stable"):
        if free[codes[item]] > 0:
            free[codes[item]] -= 1
        else:
            waiting.append(int(item))
    pairs = costs_IC[waiting] - own_cost[waiting, None]
    settled = np.zeros(len(waiting), dtype=bool)
    for pair in np.argsort(pairs, axis=None, kind="stable"):
        row, code = divmod(int(pair), costs_IC.shape[1])
        if not settled[row] and free[code] > 0:
            codes[waiting[row]] = code
            free[code] -= 1
            settled[row] = True
            if settled.all():
                break
    return codes
