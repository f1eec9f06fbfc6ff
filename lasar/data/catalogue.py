"""From cleaned events and a raw item table to indexed events and the catalogue that they refer to."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.data.cleaning import distinct_sorted, id_codes, k_core
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
    user, item = id_codes(events["user_id"]), id_codes(events["item_id"])
    core = k_core(user[counted], item[counted], k)
    kept = _among(user, user[counted][core]) & _among(item, item[counted][core])
    result = events.filter(kept)
    dropped = {
        "users_below_k": events["user_id"].n_unique() - result["user_id"].n_unique(),
        "items_below_k": events["item_id"].n_unique() - result["item_id"].n_unique(),
        "events_below_k": len(events) - len(result),
    }
    return result, dropped


def _among(codes: NDArray[np.int64], some: NDArray[np.int64]) -> NDArray[np.bool_]:
    found = np.zeros(int(codes.max(initial=0)) + 1, dtype=bool)
    found[some] = True
    return found[codes]


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
    used = events.select("item_id").unique(maintain_order=True).cast(pl.String)
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
    users, user_index = _numbered(events["user_id"])
    _, item_index = _numbered(events["item_id"], items["item_id"])
    dated = events["timestamp"].null_count() == 0
    timestamp = events["timestamp"].to_numpy() if dated else np.zeros(len(events), dtype=np.int64)
    order = np.lexsort((timestamp, user_index))  # stable: equal times stay in source order
    user_index, timestamp = user_index[order], timestamp[order]
    columns: dict[str, Any] = {"user_index": user_index, "item_index": item_index[order]}
    if dated:
        columns |= {"timestamp": timestamp, "basket": basket_numbers(user_index, timestamp)}
    else:
        number = event_numbers(user_index)
        columns |= {"timestamp": number.astype(np.int64), "basket": number}
    if "split" in events.columns:
        columns["split"] = events["split"].gather(order)
    table = pl.DataFrame({"user_index": pl.arange(len(users), dtype=pl.Int32, eager=True), "user_id": users})
    return pl.DataFrame(columns), table


def _numbered(ids: pl.Series, known: pl.Series | None = None) -> tuple[pl.Series, NDArray[np.int32]]:
    """Distinct ids (those that are known, or all in order of first appearance), and each id's number among them."""
    if not isinstance(ids.dtype, pl.Categorical):
        ids = ids.cast(pl.Categorical(pl.Categories.random()))
    distinct = (ids.unique(maintain_order=True) if known is None else known).cast(pl.String)
    codes, wanted = ids.to_physical().to_numpy(), distinct.cast(ids.dtype).to_physical().to_numpy()
    number = np.empty(int(max(codes.max(initial=0), wanted.max(initial=0))) + 1, dtype=np.int32)
    number[wanted] = np.arange(len(wanted), dtype=np.int32)
    return distinct, number[codes]


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
        "num_pairs": _num_pairs(interactions, len(items)),
        "num_train": per_split.get(SPLIT_TRAIN, 0),
        "num_valid": per_split.get(SPLIT_VALID, 0),
        "num_test": per_split.get(SPLIT_TEST, 0),
    }


def _num_pairs(interactions: pl.DataFrame, num_items: int) -> int:
    pair = interactions["user_index"].to_numpy().astype(np.int64) * num_items
    pair += interactions["item_index"].to_numpy()
    return len(distinct_sorted(pair))
