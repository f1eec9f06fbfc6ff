"""Semantic IDs published by others, read as they are, to put their numbers beside ours."""

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.errors import DataError

_CODE = re.compile(r"(\d+)\D*$")


def load_published_codes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read IDs by the id of their source.

    Two layouts, plain or `.gz`: `.jsonl` with one `{"id": 7, "sid": ["<a_183>", "<b_70>", ...]}` a line, and
    the `.index.json` of LC-Rec and MiniOneRec, `{"7": ["<a_183>", ...], ...}`. Codes may also be plain
    numbers.

    Raises:
        DataError: missing, unreadable, or not in one of these layouts.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
        rows = _rows(text, as_lines=".jsonl" in path.name)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())}") from None
    except (KeyError, TypeError, AttributeError):
        raise DataError(f'{path}: expected lines like {{"id": 7, "sid": ["<a_183>", "<b_70>"]}}') from None
    if not rows:
        raise DataError(f"{path}: holds no semantic IDs")
    codes = {key: tuple(_code(code, path) for code in sid) for key, sid in rows.items()}
    lengths = {len(sid) for sid in codes.values()}
    if len(lengths) > 1 or 0 in lengths:
        raise DataError(f"{path}: semantic IDs have different numbers of codes: {sorted(lengths)}")
    return codes


def match_items(
    published: dict[str, tuple[int, ...]], items_file: Path, *, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Find our items among published IDs: by `index` (the source's numbering), else by `item_id`.

    Returns:
        rows: item indices that have a published ID, ascending; codes [len(rows), their levels].

    Raises:
        DataError: not one item matches.
    """
    items = pl.read_parquet(items_file)
    for column in ("index", "item_id"):
        if column not in items.columns:
            continue
        keys = items[column].cast(pl.String).to_list()
        rows = [row for row, key in enumerate(keys) if key in published]
        if rows:
            return np.array(rows), np.array([published[keys[row]] for row in rows], dtype=np.int32)
    raise DataError(f"{path}: no id in it is an 'index' or 'item_id' of {items_file}")


def _rows(text: str, *, as_lines: bool) -> dict[str, list[Any]]:
    if not as_lines:
        return {str(key): list(sid) for key, sid in json.loads(text).items()}
    records = [json.loads(line) for line in text.splitlines() if line.strip()]
    return {str(record["id"]): list(record["sid"]) for record in records}


def _code(code: Any, path: Path) -> int:
    found = _CODE.search(str(code))
    if found is None:
        raise DataError(f"{path}: {code!r} is not a code; expected a number or something like '<a_183>'")
    return int(found[1])
