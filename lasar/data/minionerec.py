"""LC-Rec and MiniOneRec folders: `*.item.json`, `*.index.json`, and sequences as JSON or as CSV rows.

MiniOneRec writes one CSV row per target, with at most the last ten items before it, already split by time
into train, valid and test. A user's rows together give the whole sequence back: the first row's history, then
every target. What precedes the first row was split as training by MiniOneRec.
"""

import ast
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from lasar.data.interactions import SPLIT_TEST, SPLIT_TRAIN, SPLIT_VALID
from lasar.data.tables import read_text
from lasar.errors import DataError

_SPLITS = {"train": SPLIT_TRAIN, "valid": SPLIT_VALID, "test": SPLIT_TEST}
_COLUMNS = ("user_id", "history_item_id", "item_id")

Row = tuple[list[str], str, int]


def read_minionerec(source: Path, items: Path | None = None) -> tuple[pl.LazyFrame, pl.LazyFrame | None]:
    """Read an LC-Rec or MiniOneRec folder; all files may be `.gz`.

    Args:
        source: the folder, with `*.item.json` and either `*.inter.json` (LC-Rec: user to list of items) or
            CSVs in `train/`, `valid/`, `test/` (or named `*.train.csv`, ...; those present are used).
        items: the `*.item.json`; None takes the one of the folder.

    Returns:
        Events without times; from CSVs with the `split` that the source fixes. Items with the texts given.

    Raises:
        DataError: a file is missing, ambiguous or damaged, or the rows of a user contradict each other.
    """
    items = items or _find(source, "*.item.json")
    interactions = _find(source, "*.inter.json")
    events = _events_of_rows(source) if interactions is None else _events_of_lists(interactions)
    return events.lazy(), None if items is None else _items(items).lazy()


def _find(folder: Path, pattern: str) -> Path | None:
    found = sorted([*folder.glob(pattern), *folder.glob(pattern + ".gz")])
    if len(found) > 1:
        raise DataError(f"{folder}: several files match {pattern}: {', '.join(path.name for path in found)}")
    return found[0] if found else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object keyed by id")
    return value


def _items(path: Path) -> pl.DataFrame:
    """Items in the order of their numbers, texts as strings."""
    records = _read_object(path)
    if not all(isinstance(record, dict) for record in records.values()):
        raise DataError(f"{path}: expected every item to be an object with 'title', 'brand', ...")
    names = list(dict.fromkeys(name for record in records.values() for name in record))
    rows = [
        {"item_id": item_id, **{name: _plain(record.get(name)) for name in names}}
        for item_id, record in sorted(records.items(), key=lambda pair: _number(pair[0]))
    ]
    schema: dict[str, pl.DataType] = {name: pl.String() for name in ("item_id", *names)}
    return pl.DataFrame(rows, schema=schema)


def _number(item_id: str) -> tuple[bool, int, str]:
    return (not item_id.isdigit(), int(item_id) if item_id.isdigit() else 0, item_id)


def _plain(value: Any) -> str | None:
    """Text of a field; lists, also those written as a Python literal, are joined."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return str(value)
    if isinstance(value, list):
        return " ".join(str(part) for part in value)
    return None if value is None else str(value)


def _events_of_lists(path: Path) -> pl.DataFrame:
    pairs = [(user, str(item)) for user, sequence in _read_object(path).items() for item in sequence]
    return _events(pairs)


def _events(rows: list[Any], *, split: bool = False) -> pl.DataFrame:
    schema: dict[str, pl.DataType] = {"user_id": pl.String(), "item_id": pl.String()}
    if split:
        schema["split"] = pl.Int8()
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return frame.with_columns(pl.lit(None, dtype=pl.Int64).alias("timestamp"))


def _events_of_rows(folder: Path) -> pl.DataFrame:
    rows_of_user: dict[str, list[Row]] = {}
    found = False
    for name, split in _SPLITS.items():
        path = _find(folder / name, "*.csv") or _find(folder, f"*{name}*.csv")
        if path is None:
            continue
        found = True
        for user, row in _rows(path, split):
            rows_of_user.setdefault(user, []).append(row)
    if not found:
        raise DataError(f"{folder}: neither *.inter.json nor a CSV in train/, valid/ or test/")
    events = []
    for user, rows in rows_of_user.items():
        events += [(user, item, split) for item, split in _sequence(user, rows, folder)]
    return _events(events, split=True)


def _rows(path: Path, split: int) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(io.StringIO(read_text(path)))
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; it has {', '.join(reader.fieldnames or ())}")
    for record in reader:
        try:
            history = [str(item) for item in ast.literal_eval(record["history_item_id"])]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            shown = str(record["history_item_id"])[:60]
            raise DataError(f"{path}: line {reader.line_num}: history is not a list: {shown!r}") from None
        yield record["user_id"], (history, record["item_id"], split)


def _sequence(user: str, rows: list[Row], folder: Path) -> Iterator[tuple[str, int]]:
    """One user's items with their splits; every row's history must agree with the rows before it."""
    items = list(rows[0][0])
    yield from ((item, SPLIT_TRAIN) for item in items)
    for history, target, split in rows:
        if history and items[-len(history) :] != history:
            raise DataError(
                f"{folder}: the rows of user {user!r} contradict each other: history {history} does not "
                f"continue {items[-len(history) :]}"
            )
        items.append(target)
        yield target, split
