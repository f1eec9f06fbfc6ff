"""Item vectors that somebody else made: read from a file, put into the order of the catalogue."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.data.tables import reading
from lasar.errors import DataError


def given_vectors(path: Path, item_ids: Sequence[str]) -> NDArray[np.float32]:
    """Read the vectors of some items.

    Args:
        path: Parquet with `item_id` and `vector`, lists or arrays of numbers, all as long; further rows are left out.
        item_ids: of the catalogue, distinct.

    Returns:
        float32 `[num_items, width]`.

    Raises:
        DataError: the file cannot be read, an item has no vector or two, or a vector is not like the others.
    """
    with reading(path):
        table = pl.scan_parquet(path)
        names = table.collect_schema().names()
    for column in ("item_id", "vector"):
        if column not in names:
            raise DataError(f"{path}: no column {column!r}; it has {', '.join(map(repr, names[:12]))}")
    wanted = pl.DataFrame({"item_id": item_ids})
    with reading(path):
        rows = (
            table.select(pl.col("item_id").cast(pl.String), pl.col("vector").cast(pl.List(pl.Float32)))
            .join(wanted.lazy(), on="item_id", how="semi")
            .collect()
        )
    if twice := rows["item_id"].filter(rows["item_id"].is_duplicated()).to_list():
        raise DataError(f"{path}: item {twice[0]!r} has more than one vector")
    if len(rows) < len(wanted):
        missing = wanted.join(rows, on="item_id", how="anti", maintain_order="left")["item_id"]
        raise DataError(f"{path}: {len(missing):,} items have no vector, the first is {missing[0]!r}")
    widths = rows["vector"].list.len()
    if widths.n_unique() != 1 or not widths[0]:
        odd = rows["item_id"][int(widths.arg_min() or 0)]
        raise DataError(f"{path}: vectors are not equally long; the shortest is that of item {odd!r}")
    ordered = wanted.join(rows, on="item_id", how="left", maintain_order="left")
    vectors = ordered["vector"].explode().to_numpy().reshape(len(wanted), -1).astype(np.float32)
    if not np.isfinite(vectors).all():
        odd = item_ids[int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])]
        raise DataError(f"{path}: the vector of item {odd!r} holds something that is not a finite number")
    return vectors
