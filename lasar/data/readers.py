"""Dataset readers: the seam where a new source format is added.

A reader is a function `(source, items, **options) -> (events, items)` of lazy frames.

events: `user_id`, `item_id` (String), `timestamp` (Int64 Unix seconds or null), optionally `event_type`
(String), `weight` (Float64), `timestamp_source` (String, as written), `split` (Int8, a split the source
fixes), and any further columns of the source, which cleaning rules may name. Row order is the order within
equal times.

items: `item_id` and any text columns, all String, or None when the texts (if any) are columns of the events.
Row order is the order of the catalogue; ids may repeat, the first one counts.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lasar.data.amazon import read_amazon
from lasar.data.minionerec import read_minionerec
from lasar.data.tables import (
    as_text_columns,
    id_text,
    read_text,
    require_column,
    scan_table,
    with_event_columns,
)
from lasar.errors import ConfigError, DataError

RawData = tuple[pl.LazyFrame, pl.LazyFrame | None]

_DEFAULT_COLUMNS = {"user": "user_id", "item": "item_id"}
_OPTIONAL_COLUMNS = {"timestamp": "timestamp"}


def read_table(
    source: Path,
    items: Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    texts: Sequence[str] = (),
    encoding: str = "utf-8",
    separator: str | None = None,
    time_format: str | None = None,
) -> RawData:
    """Read an event table, CSV, TSV, Parquet or JSON lines (each also `.gz`), and an item table.

    Args:
        source: the event table.
        items: the item table; None (or `source` itself) takes the texts from the event table.
        columns: source column of a role: `user`, `item`, `timestamp`, `event_type`, `weight`, `title`, and
            `item_key` (the id column of the item table, `item` when absent). `user_id`, `item_id` and, where
            they exist, `timestamp` and `title` need not be named.
        texts: further text columns to keep; empty keeps every column of a separate item table and none of the
            event table.
        encoding: of both tables, when they are CSV.
        separator: of both tables, when they are CSV; None chooses by the suffix.
        time_format: see `lasar.data.tables.epoch_seconds`.

    Raises:
        DataError: a file is missing, damaged, or lacks a named column.
        ConfigError: the encoding or the separator cannot be used.
    """
    columns = dict(columns or {})
    item_columns = {role: columns.pop(role) for role in ("title", "item_key") if role in columns}
    frame = scan_table(source, encoding=encoding, separator=separator)
    roles = _with_defaults(frame, columns)
    events = with_event_columns(frame, roles, path=source, time_format=time_format)
    if items is None or items == source:
        return _with_texts(events, item_columns.get("title"), texts, path=source), None
    table = scan_table(items, encoding=encoding, separator=separator)
    key = item_columns.get("item_key", roles["item"])
    return events, _item_table(table, key, item_columns.get("title"), texts, path=items)


def read_recbole(
    source: Path,
    items: Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    texts: Sequence[str] = (),
    encoding: str = "utf-8",
) -> RawData:
    """Read RecBole atomic files: tab-separated, headers `name:type`.

    Args:
        source: the `.inter` file, or a folder holding exactly one; also `.gz`.
        items: the `.item` file; None takes the one of the folder, or goes without.
        columns: as in `read_table`; names without `:type`.
        texts: as in `read_table`.
        encoding: of both files.

    Raises:
        DataError: a file is missing, ambiguous, damaged, or lacks a column.
    """
    if source.is_dir():
        items = items or optional_file(source, "*.item", "*.item.gz")
        source = only_file(source, "*.inter", "*.inter.gz")
    columns = dict(columns or {})
    title = columns.pop("title", None)
    key = columns.pop("item_key", "item_id")
    frame = _without_types(scan_table(source, encoding=encoding, separator="\t", quote=None))
    events = with_event_columns(frame, _with_defaults(frame, columns), path=source)
    if items is None:
        return _with_texts(events, title, texts, path=source), None
    table = _without_types(scan_table(items, encoding=encoding, separator="\t", quote=None))
    return events, _item_table(table, key, title, texts, path=items)


def read_s3rec(source: Path, items: Path | None = None) -> RawData:
    """Read S3Rec sequences: one user a line, `user item item ...`, oldest first, no times.

    Args:
        source: a folder with `sequences.txt` (or `.txt.gz`), or the file itself.
        items: JSON lines with `item_id` and `index`, the number that the sequences use; None takes the
            folder's `items.jsonl` (or `.gz`). Without one, the numbers are the item ids.

    Raises:
        DataError: a file is missing or damaged, or a sequence holds a number that is no item's `index`.
    """
    if source.is_dir():
        items = items or optional_file(source, "items.jsonl", "items.jsonl.gz")
        source = only_file(source, "sequences.txt", "sequences.txt.gz")
    users, numbers = [], []
    for line in read_text(source).splitlines():
        user, *sequence = line.split() or [""]
        users += [user] * len(sequence)
        numbers += sequence
    if not numbers:
        raise DataError(f"{source}: no user has an item; expected lines 'user item item ...'")
    events = pl.DataFrame({"user_id": users, "number": numbers}).with_columns(
        pl.lit(None, dtype=pl.Int64).alias("timestamp")
    )
    if items is None:
        number = pl.col("item_id").cast(pl.Int64, strict=False)
        catalogue = events.select(item_id="number").unique().sort(number, "item_id")
        return events.rename({"number": "item_id"}).lazy(), catalogue.lazy()
    table = scan_table(items)
    for column in ("item_id", "index"):
        require_column(table, column, path=items, role="item_key")
    names = table.select("item_id", number=pl.col("index").cast(pl.String)).collect()
    joined = events.join(names.unique("number", keep="first"), on="number", how="left", maintain_order="left")
    unknown = joined.filter(pl.col("item_id").is_null())
    if len(unknown) > 0:
        raise DataError(
            f"{source}: {len(unknown):,} events have a number that is no 'index' in {items.name} "
            f"(first: {unknown['number'][0]!r}); these two files do not belong together"
        )
    return joined.drop("number").lazy(), _item_table(table.sort("index"), "item_id", None, (), path=items)


def _with_defaults(frame: pl.LazyFrame, columns: Mapping[str, str]) -> dict[str, str]:
    names = frame.collect_schema().names()
    present = {role: name for role, name in _OPTIONAL_COLUMNS.items() if name in names}
    return {**_DEFAULT_COLUMNS, **present, **columns}


def _with_texts(frame: pl.LazyFrame, title: str | None, texts: Sequence[str], *, path: Path) -> pl.LazyFrame:
    """Name the title column; refuse text columns that do not exist."""
    for column in texts:
        require_column(frame, column, path=path, role="texts")
    if title is not None:
        require_column(frame, title, path=path, role="title")
        frame = frame.with_columns(pl.col(title).cast(pl.String).alias("title"))
    return frame


def _item_table(
    table: pl.LazyFrame, key: str, title: str | None, texts: Sequence[str], *, path: Path
) -> pl.LazyFrame:
    """Bring an item table into the reader's form: `item_id`, `title` where named, then the kept columns."""
    require_column(table, key, path=path, role="item_key")
    table = _with_texts(table, title, texts, path=path)
    dropped = {key, title} - {"title"}  # a title column of another name stands in `title` by now
    names = [name for name in table.collect_schema().names() if name not in dropped]
    keep = [name for name in names if not texts or name in texts or name == "title"]
    keep.sort(key=lambda name: name != "title")
    table = as_text_columns(table, [key, *(name for name in keep if name != "item_id")])
    return table.with_columns(id_text(key).alias("item_id")).select("item_id", pl.exclude("item_id", key))


def _without_types(frame: pl.LazyFrame) -> pl.LazyFrame:
    names = frame.collect_schema().names()
    return frame.rename({name: name.split(":")[0] for name in names})


def only_file(folder: Path, *patterns: str) -> Path:
    """The single file of a folder that matches one of the patterns.

    Raises:
        DataError: none, or more than one.
    """
    found = optional_file(folder, *patterns)
    if found is None:
        raise DataError(f"{folder}: no file {' or '.join(patterns)}")
    return found


def optional_file(folder: Path, *patterns: str) -> Path | None:
    """As `only_file`, but None where there is no such file."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: several files match: {names}; name the one to read")
    return found[0] if found else None


READERS: dict[str, Callable[..., RawData]] = {
    "table": read_table,
    "s3rec": read_s3rec,
    "amazon": read_amazon,
    "recbole": read_recbole,
    "minionerec": read_minionerec,
}


def read_dataset(reader: str, source: Path, items: Path | None, options: Mapping[str, Any]) -> RawData:
    """Call a reader with the options that were given.

    Args:
        reader: a key of `READERS`.
        source: file or folder with the events.
        items: file with the items, where the reader does not find it itself.
        options: only those that differ from their default.

    Raises:
        ConfigError: the reader does not take one of the options, because its format fixes it.
        DataError: the source cannot be used.
    """
    read = READERS[reader]
    taken = inspect.signature(read).parameters
    for name in options:
        if name not in taken:
            raise ConfigError(f"reader {reader!r} fixes {name!r} itself; remove it, or use reader 'table'")
    return read(source, items, **options)
