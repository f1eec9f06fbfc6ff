"""Which events count: rules given as plain values, repeats, and the k-core. Everything dropped is counted."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.data.tables import id_text, reading
from lasar.errors import ConfigError, DataError, nearest

_BAD_TIME = "unparsable_time"


def clean_events(
    events: pl.LazyFrame,
    *,
    path: Path,
    event_types: Sequence[str] = (),
    above: Mapping[str, float] | None = None,
    drop_matching: Mapping[str, str] | None = None,
    uppercase_items: bool = False,
    texts: Sequence[str] = (),
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Apply the cleaning rules and collect the events.

    An event is dropped by the first rule it breaks: no user, no item, `event_types`, `above`,
    `drop_matching`, no time although the source has times.

    Args:
        events: as a reader returns them.
        path: the source, for messages.
        event_types: event types to keep; empty keeps all.
        above: column to bound; keeps events whose value is a number strictly above the bound.
        drop_matching: column to regular expression; drops events whose value matches it anywhere.
        uppercase_items: whether item ids are compared in upper case.
        texts: text columns of the events to keep.

    Returns:
        Frame with `user_id` and `item_id` (Categorical), `timestamp`, `split` where the source fixes one, and
        `texts`, in source order; and the number of dropped events by reason.

    Raises:
        DataError: a named column is missing, a time cannot be parsed, or the source cannot be read.
        ConfigError: a regular expression is wrong.
    """
    above, drop_matching = above or {}, drop_matching or {}
    with reading(path):
        names = events.collect_schema().names()
    _check_rules(names, path, event_types, above, drop_matching)
    rules: dict[str, pl.Expr] = {
        "missing_user": pl.col("user_id").is_null(),
        "missing_item": pl.col("item_id").is_null(),
    }
    if event_types:
        rules["event_type"] = ~pl.col("event_type").is_in(list(event_types)).fill_null(False)
    for column, bound in above.items():
        number = pl.col(column).cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)
        rules[f"{column}_not_above_{bound:g}"] = ~(number > bound).fill_null(False)
    for column, pattern in drop_matching.items():
        rules[f"{column}_matches"] = pl.col(column).cast(pl.String).str.contains(pattern).fill_null(False)
    if "timestamp_source" in names:
        rules["missing_time"] = pl.col("timestamp_source").is_null()
        rules[_BAD_TIME] = pl.col("timestamp").is_null()
    item_id = pl.col("item_id").str.to_uppercase() if uppercase_items else pl.col("item_id")
    reason = pl.coalesce(*(pl.when(broken).then(pl.lit(name)) for name, broken in rules.items()))
    marked = events.with_columns(item_id, reason.alias("_reason"))
    # A number for every id from here on: a log of a hundred million events fits in memory, its ids do not.
    ids = [pl.col(name).cast(pl.Categorical(pl.Categories.random())) for name in ("user_id", "item_id")]
    kept_columns = [*ids, "timestamp", *(["split"] if "split" in names else []), *texts]
    with reading(path):
        counts, kept, bad = pl.collect_all(
            [
                marked.group_by("_reason").len(),
                marked.filter(pl.col("_reason").is_null()).select(kept_columns),
                marked.filter(pl.col("_reason") == _BAD_TIME).select(
                    *(["timestamp_source"] if "timestamp_source" in names else [])
                ).head(1),
            ],
            engine="streaming",
        )  # fmt: skip
    dropped = {name: count for name, count in counts.iter_rows() if name is not None}
    if _BAD_TIME in dropped:
        num_rows = sum(counts["len"])
        raise DataError(
            f"{path}: {dropped[_BAD_TIME]:,} of {num_rows:,} rows have a time that cannot be parsed "
            f"(first: {bad['timestamp_source'][0]!r}); set format.time_format (a strptime pattern such as "
            "'%m/%d/%Y %H:%M', 'seconds' or 'milliseconds') or drop these rows with clean.drop_matching"
        )
    return kept, {name: dropped[name] for name in rules if name in dropped}


def _check_rules(
    names: Sequence[str],
    path: Path,
    event_types: Sequence[str],
    above: Mapping[str, float],
    drop_matching: Mapping[str, str],
) -> None:
    if event_types and "event_type" not in names:
        raise DataError(f"{path}: clean.event_types needs the column that holds them; set columns.event_type")
    for rule, columns in (("above", above), ("drop_matching", drop_matching)):
        for column in columns:
            if column not in names:
                raise DataError(f"{path}: clean.{rule}: no column {column!r}{nearest(column, names)}")
    for column, pattern in drop_matching.items():
        try:
            pl.Series([""]).str.contains(pattern)
        except pl.exceptions.ComputeError as error:
            reason = re.sub(r"\s+", " ", str(error)).split(" This error")[0]
            raise ConfigError(
                f"clean.drop_matching.{column}: {pattern!r} is not a pattern: {reason}"
            ) from None


def drop_repeats(events: pl.DataFrame, *, first_only: bool = False) -> tuple[pl.DataFrame, int]:
    """Keep the first of equal (user, item, time) events, or of equal (user, item) events.

    Args:
        events: in time order of each user.
        first_only: keep only the first time a user takes an item; otherwise later repeats stay, and events
            without a time are never repeats.

    Returns:
        The kept events in order, and the number dropped.
    """
    if not first_only and events["timestamp"].null_count() == len(events):
        return events, 0
    user, item = id_codes(events["user_id"]), id_codes(events["item_id"])
    pair = user * (int(item.max(initial=0)) + 1) + item
    time = events["timestamp"].fill_null(0).to_numpy()
    order = np.lexsort((time, pair))  # stable: of equal ones, the first in the source
    del user, item
    again = np.diff(pair[order], prepend=-1) == 0
    if not first_only:
        again &= np.diff(time[order], prepend=time[order[:1]] - 1) == 0
    kept = np.ones(len(events), dtype=bool)
    kept[order[again]] = False
    distinct = events.filter(kept)
    if first_only:
        distinct = distinct.sort("timestamp", maintain_order=True)
    return distinct, len(events) - len(distinct)


def id_codes(ids: pl.Series) -> NDArray[np.int64]:
    """Numbers from 0 on that are equal where ids are; int64 `[num_events]`."""
    if not isinstance(ids.dtype, pl.Categorical):
        ids = ids.cast(pl.Categorical(pl.Categories.random()))
    return ids.to_physical().to_numpy().astype(np.int64)


def slice_users(events: pl.DataFrame, num_users: int) -> tuple[pl.DataFrame, int]:
    """Keep all events of some users: a draw that depends on nothing but their ids.

    Args:
        events: with `user_id`.
        num_users: how many to keep; all, where there are no more.

    Returns:
        The kept events in order, and the number dropped.
    """
    users = events["user_id"].unique().cast(pl.String).sort()
    chosen = users[np.sort(np.random.default_rng(0).permutation(len(users))[:num_users])]
    kept = events.filter(pl.col("user_id").is_in(chosen.cast(events["user_id"].dtype).implode()))
    return kept, len(events) - len(kept)


def refuse_empty(events: pl.DataFrame, dropped: Mapping[str, int], *, path: Path) -> None:
    """Refuse to go on without events.

    Raises:
        DataError: there is none; the message says which rule dropped how many.
    """
    if len(events) > 0:
        return
    counts = ", ".join(f"{name} {count:,}" for name, count in dropped.items() if count)
    raise DataError(f"{path}: no event is left (dropped: {counts or 'nothing, the source has none'})")


def most_frequent_texts(events: pl.DataFrame, columns: Sequence[str]) -> tuple[pl.DataFrame, int]:
    """Make an item table from texts repeated on every event.

    Returns:
        `item_id` in order of first appearance with, per column, its most frequent text (the first of equals);
        and the number of items that had several texts in some column.
    """
    texts = events.select(
        pl.col("item_id").cast(pl.String), *(id_text(column).alias(column) for column in columns)
    )
    grouped = texts.group_by("item_id", maintain_order=True)
    values = [pl.col(column).drop_nulls() for column in columns]
    table = grouped.agg(value.mode(maintain_order=True).first() for value in values)
    if not columns:
        return table, 0
    several = grouped.agg(value.n_unique() > 1 for value in values)
    return table, int(several.select(pl.any_horizontal(columns).sum()).item())


def distinct_sorted(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """As `numpy.unique`, by sorting (in place), which takes a tenth of the time where most values are distinct."""
    values.sort()
    return values[np.diff(values, prepend=values[:1] - 1) > 0]


def k_core(user_index: NDArray[np.int64], item_index: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """Find the events of the k-core: users with k distinct items, items with k distinct users, repeatedly.

    Repeats of a pair count once, so that one buyer of 5 copies does not make an item popular.

    Args:
        user_index: int64 `[num_events]`, from 0.
        item_index: int64 `[num_events]`, from 0.
        k: smallest number kept; 0 and 1 keep everything.

    Returns:
        Mask `[num_events]` of the events that stay.
    """
    if k <= 1 or len(user_index) == 0:
        return np.ones(len(user_index), dtype=bool)
    num_items = int(item_index.max()) + 1
    pairs = distinct_sorted(user_index * num_items + item_index)
    users, items = (pairs // num_items).astype(np.int32), (pairs % num_items).astype(np.int32)
    del pairs
    enough_users, enough_items = np.bincount(users) >= k, np.bincount(items, minlength=num_items) >= k
    while not (kept := enough_users[users] & enough_items[items]).all():
        users, items = users[kept], items[kept]
        enough_users = np.bincount(users, minlength=len(enough_users)) >= k
        enough_items = np.bincount(items, minlength=num_items) >= k
    core: NDArray[np.bool_] = enough_users[user_index] & enough_items[item_index]
    return core
