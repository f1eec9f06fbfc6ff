"""From cleaned events and a raw item table to indexed events and the catalogue that they refer to."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.data.cleaning import k_core
from lasar.data.interactions import SPLIT_TEST, SPLIT_TRAIN, SPLIT_VALID
from lasar.data.splits import basket_numbers, event_numbers


def keep_core(
    events: pl.DataFrame, k: int, *, count_before: int | None = None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Keep the k-core of the counted events, and of the others those between its users and items.

    Args:
        events: `user_id`, `item_id` and more.
        k: see `lasar.data.cleaning.k_core`; 0 and 1 keep everything.
        count_before: Unix seconds; only earlier events are counted. A temporal split sets it, so that what
            happens later does not decide who is trained on. None counts all.

    Returns:
        The kept events in order, and how many users, items and events were dropped.
    """
    if k <= 1:
        return events, {}
    counted = np.ones(len(events), dtype=bool)
    if count_before is not None:
        counted = events["timestamp"].to_numpy() < count_before
    user, item = _codes(events["user_id"]), _codes(events["item_id"])
    core = k_core(user[counted], item[counted], k)
    kept = np.isin(user, user[counted][core]) & np.isin(item, item[counted][core])
    kept[counted] = core
    result = events.filter(kept)
    dropped = {
        "users_below_k": events["user_id"].n_unique() - result["user_id"].n_unique(),
        "items_below_k": events["item_id"].n_unique() - result["item_id"].n_unique(),
        "events_below_k": len(events) - len(result),
    }
    return result, dropped


def _codes(values: pl.Series) -> NDArray[np.int64]:
    return values.rank("dense").to_numpy().astype(np.int64) - 1


def catalogue_items(
    table: pl.DataFrame, events: pl.DataFrame, *, keep_unused: bool, uppercase_items: bool
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Choose and order the items: those of the item table in its order, then those that only events name.

    Args:
        table: `item_id` and text columns; ids may repeat (the first counts) or be null (dropped).
        events: the kept events.
        keep_unused: whether items without an event stay in the catalogue.
        uppercase_items: whether the events' ids were made upper case.

    Returns:
        One row per item; and counts of what was doubtful.
    """
    if uppercase_items:
        table = table.with_columns(pl.col("item_id").str.to_uppercase())
    named = table.drop_nulls("item_id")
    distinct = named.unique("item_id", keep="first", maintain_order=True)
    used = events.select("item_id").unique(maintain_order=True)
    listed = distinct if keep_unused else distinct.join(used, on="item_id", how="semi", maintain_order="left")
    unlisted = used.join(distinct, on="item_id", how="anti", maintain_order="left")
    warnings = {
        "item_rows_without_id": len(table) - len(named),
        "duplicate_item_ids": len(named) - len(distinct),
        "items_not_in_item_table": len(unlisted),
    }
    return pl.concat([listed, unlisted], how="diagonal"), warnings


def index_events(events: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Replace ids by indices, sort, number baskets.

    Args:
        events: `user_id`, `item_id`, `timestamp` (all null where the source has no times), optionally
            `split`.
        items: `item_id` in the order of the catalogue.

    Returns:
        interactions with `user_index`, `item_index`, `timestamp` (the event's number where there are no
        times), `basket` and `split` (if given), sorted by user, time, source order; and users with
        `user_index`, `user_id` in order of first appearance.
    """
    users = events.select("user_id").unique(maintain_order=True).with_row_index("user_index")
    users = users.cast({"user_index": pl.Int32})
    indices = items.select("item_id").with_row_index("item_index").cast({"item_index": pl.Int32})
    indexed = (
        events.join(users, on="user_id", how="left", maintain_order="left")
        .join(indices, on="item_id", how="left", maintain_order="left")
        .sort("user_index", "timestamp", maintain_order=True)
    )
    user_index = indexed["user_index"].to_numpy()
    columns: dict[str, Any] = {"user_index": user_index, "item_index": indexed["item_index"]}
    if indexed["timestamp"].null_count() == 0:
        timestamp = indexed["timestamp"].to_numpy()
        columns |= {"timestamp": timestamp, "basket": basket_numbers(user_index, timestamp)}
    else:
        number = event_numbers(user_index)
        columns |= {"timestamp": number.astype(np.int64), "basket": number}
    if "split" in indexed.columns:
        columns["split"] = indexed["split"]
    return pl.DataFrame(columns), users


def write_tables(
    folder: Path, *, items: pl.DataFrame, users: pl.DataFrame, interactions: pl.DataFrame
) -> dict[str, int]:
    """Write items.parquet, users.parquet and interactions.parquet.

    Returns:
        Their sizes: users, items, interactions, distinct pairs, and events per split.
    """
    items = items.drop("item_index", strict=False).with_row_index("item_index").cast({"item_index": pl.Int32})
    items.write_parquet(folder / "items.parquet", compression="zstd")
    users.write_parquet(folder / "users.parquet", compression="zstd")
    columns = ("user_index", "item_index", "timestamp", "basket", "split")
    interactions.select(columns).write_parquet(folder / "interactions.parquet", compression="zstd")
    per_split: dict[int, int] = dict(interactions["split"].value_counts().iter_rows())
    return {
        "num_users": len(users),
        "num_items": len(items),
        "num_interactions": len(interactions),
        "num_pairs": interactions.select("user_index", "item_index").n_unique(),
        "num_train": per_split.get(SPLIT_TRAIN, 0),
        "num_valid": per_split.get(SPLIT_VALID, 0),
        "num_test": per_split.get(SPLIT_TEST, 0),
    }
