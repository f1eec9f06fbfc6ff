"""Amazon review dumps of 2014, 2018 and 2023: reviews and metadata, one record a line.

The three editions differ in field names (`reviewerID`/`asin`, or `user_id`/`parent_asin` since 2023), in the
unit of time (seconds, milliseconds since 2023) and in the metadata: the 2014 lines are Python literals, not
JSON.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from lasar.data.tables import plain_suffix, read_lines, reading, with_event_columns
from lasar.errors import DataError

_KINDS = (".json", ".jsonl")
_SCHEMA_2014 = {
    "reviewerID": pl.String, "asin": pl.String, "unixReviewTime": pl.Int64, "overall": pl.Float64,
}  # fmt: skip
_SCHEMA_2023 = {
    "user_id": pl.String, "parent_asin": pl.String, "asin": pl.String, "timestamp": pl.Int64,
    "rating": pl.Float64,
}  # fmt: skip
_ROLES_2014 = {"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime", "weight": "overall"}
_ROLES_2023 = {"user": "user_id", "item": "parent_asin", "timestamp": "timestamp", "weight": "rating"}


def read_amazon(source: Path, items: Path | None = None) -> tuple[pl.LazyFrame, pl.LazyFrame | None]:
    """Read Amazon reviews and metadata of any edition; the star rating becomes `weight`.

    Args:
        source: the reviews (`.json.gz`, `.jsonl.gz` or plain), or a folder holding them and a `meta_*` file.
        items: the metadata; None takes the `meta_*` file of the folder, or goes without texts.

    Raises:
        DataError: a file is missing, ambiguous, damaged, or in none of the three layouts.
    """
    if source.is_dir():
        source, items = _files_of(source, items)
    with reading(source):
        first = next(read_lines(source), "")
    keys = _parse(first, source, 1).keys() if first.strip() else ()
    if {"reviewerID", "asin"} <= set(keys):
        schema, roles = _SCHEMA_2014, _ROLES_2014
    elif {"user_id", "parent_asin"} <= set(keys):
        schema, roles = _SCHEMA_2023, _ROLES_2023
    else:
        raise DataError(
            f"{source}: the first line has neither 'reviewerID' and 'asin' (2014, 2018) nor 'user_id' and "
            "'parent_asin' (2023); is this an Amazon review file?"
        )
    with reading(source):
        frame = pl.scan_ndjson(source, schema=schema)
    events = with_event_columns(frame, roles, path=source)
    return events, None if items is None else read_metadata(items).lazy()


def read_metadata(path: Path) -> pl.DataFrame:
    """Read an item metadata file of any edition.

    Returns:
        Frame of strings: `item_id`, `title`, `brand`, `categories` (path, ` > `), `description`.

    Raises:
        DataError: the file is missing or damaged, or a line is neither JSON nor a Python literal.
    """
    rows = [_item(record) for record in _records(path)]
    names = ("item_id", "title", "brand", "categories", "description")
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _files_of(folder: Path, items: Path | None) -> tuple[Path, Path | None]:
    files = sorted(path for path in folder.iterdir() if plain_suffix(path) in _KINDS)
    metadata = [path for path in files if path.name.startswith("meta_")]
    reviews = [path for path in files if path not in metadata and path != items]
    if len(reviews) != 1 or (items is None and len(metadata) > 1):
        names = ", ".join(path.name for path in files) or "none"
        raise DataError(f"{folder}: expected one review file and one meta_* file, found: {names}; name them")
    return reviews[0], items or (metadata[0] if metadata else None)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield _parse(line, path, number)


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        try:
            record = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise DataError(
                f"{path}: line {number} is neither JSON nor a Python literal: {line.strip()[:60]!r}"
            ) from None
    if not isinstance(record, dict):
        raise DataError(f"{path}: line {number} is not a record: {line.strip()[:60]!r}")
    return record


def _item(record: dict[str, Any]) -> tuple[str | None, ...]:
    categories = record.get("categories") or record.get("category") or []
    if categories and isinstance(categories, list) and isinstance(categories[0], list):
        categories = categories[0]  # 2014 lists several paths; the first is the main one
    return (
        record.get("parent_asin") or record.get("asin"),
        _joined(record.get("title"), " "),
        _joined(record.get("brand") or record.get("store"), " "),
        _joined(categories, " > "),
        _joined(record.get("description"), " "),
    )


def _joined(value: Any, separator: str) -> str | None:
    if isinstance(value, list):
        return separator.join(str(part) for part in value)
    return None if value is None else str(value)
