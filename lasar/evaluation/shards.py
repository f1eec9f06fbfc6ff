"""Ranking many users in batches, keeping finished shards so that a killed evaluation continues.

Shapes: Q users, K rank positions.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lasar.data.interactions import EvalCases
from lasar.decoding.ranked import Ranked
from lasar.evaluation.metrics import Items
from lasar.progress import progress
from lasar.ranks import meet, share_of

Rank = Callable[[list[Items], list[Items]], Ranked]

_BATCHES_PER_SHARD = 8


def rank_in_shards(
    rank: Rank, cases: EvalCases, *, k: int, batch_size: int, scratch: Path, name: str
) -> Ranked:
    """Rank all cases, equally long histories together.

    Args:
        rank: called with the histories and baskets of one batch; returns items, scores (at most k columns) and depths.
        cases: the users.
        k: length of the lists.
        batch_size: users per call.
        scratch: finished shards are kept here and reused; only for the same cases, model and batch size.
        name: of the method; on the progress bar and in the shards' file names.

    Returns:
        Items int32 `[Q, K]` (-1 where there is none), scores float32 `[Q, K]` (-inf there) and depths, in the
        order of `cases`.

    Raises:
        ValueError: `rank` returned another number of rows, or more than k columns.
    """
    # Batches of one length waste no padding; a fixed order makes a resumed run equal an uninterrupted one.
    order = np.argsort([len(history) for history in cases.histories], kind="stable")
    items_QK = np.full((len(cases), k), -1, dtype=np.int32)
    scores_QK = np.full((len(cases), k), -np.inf, dtype=np.float32)
    depths_Q = np.zeros(len(cases), dtype=np.int32)
    shards = list(_slices(order, batch_size * _BATCHES_PER_SHARD))
    files = [scratch / f"{name}-{number:05d}.safetensors" for number in range(len(shards))]
    mine = share_of(len(shards))
    finished = sum(len(shards[number]) for number in mine if files[number].exists())
    total = sum(len(shards[number]) for number in mine)
    with progress(f"ranking with {name}", total=total, start=finished, unit="users") as advance:
        for number in mine:
            shard, file = shards[number], files[number]
            if file.exists():
                continue
            for batch in _slices(shard, batch_size):
                items, scores, depths = rank(
                    [cases.histories[q] for q in batch], [cases.baskets[q] for q in batch]
                )
                if items.shape[0] != len(batch) or items.shape[1] > k or items.shape != scores.shape:
                    raise ValueError(f"ranked {items.shape} items for {len(batch)} users and k = {k}")
                items_QK[batch, : items.shape[1]] = items
                scores_QK[batch, : items.shape[1]] = scores
                depths_Q[batch] = depths
                advance(len(batch))
            partial = file.with_suffix(".partial")
            save_file(
                {"items": items_QK[shard], "scores": scores_QK[shard], "depths": depths_Q[shard]}, partial
            )
            partial.replace(file)
    meet()  # whoever comes last has written its shards, too
    for shard, file in zip(shards, files, strict=True):
        stored = load_file(file)
        items_QK[shard], scores_QK[shard], depths_Q[shard] = (
            stored["items"],
            stored["scores"],
            stored["depths"],
        )
    return Ranked(items_QK, scores_QK, depths_Q)


def _slices(indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
