import gzip
import json

import numpy as np
import polars as pl
import pytest

from lasar.errors import DataError
from lasar.sid.published import load_published_codes, match_items

LINES = '{"id": 1, "sid": ["<a_183>", "<b_7>"]}\n\n{"id": 3, "sid": ["<a_0>", "<b_12>"]}\n'
EXPECTED = {"1": (183, 7), "3": (0, 12)}


def test_lines_plain_and_packed(tmp_path):
    plain, packed = tmp_path / "sid.jsonl", tmp_path / "sid.jsonl.gz"
    plain.write_text(LINES)
    packed.write_bytes(gzip.compress(LINES.encode()))
    assert load_published_codes(plain) == load_published_codes(packed) == EXPECTED


def test_one_json_object(tmp_path):
    path = tmp_path / "Shop.index.json"
    path.write_text(json.dumps({"1": ["<a_183>", "<b_7>"], "3": [0, 12]}))
    assert load_published_codes(path) == EXPECTED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{", "JSON"),
        ("a.jsonl", b"\xff\xfe", "JSON"),
        ("a.jsonl.gz", b"not packed", "JSON"),
        ("a.jsonl", b'{"item": 1}', "expected lines like"),
        ("a.jsonl", b"[1]", "expected lines like"),
        ("a.json", b"[1]", "expected lines like"),
        ("a.jsonl", b"", "no semantic IDs"),
        ("a.jsonl", b'{"id": 1, "sid": ["<a>"]}', "'<a>' is not a code"),
        ("a.jsonl", b'{"id": 1, "sid": [1]}\n{"id": 2, "sid": [1, 2]}', r"\[1, 2\]"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_published_codes(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError):
        load_published_codes(tmp_path / "nowhere.jsonl")


def test_items_match_by_source_index_and_else_by_id(tmp_path):
    items = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": ["x", "y", "z"], "index": ["3", "2", "1"]}).write_parquet(items)
    rows, codes = match_items(EXPECTED, items, path=tmp_path / "sid.jsonl")
    assert rows.tolist() == [0, 2]
    assert codes.tolist() == [[0, 12], [183, 7]]
    assert codes.dtype == np.int32
    pl.DataFrame({"item_id": ["0", "1"]}).write_parquet(items)
    assert match_items(EXPECTED, items, path=tmp_path / "sid.jsonl")[0].tolist() == [1]
    pl.DataFrame({"item_id": ["x"]}).write_parquet(items)
    with pytest.raises(DataError, match="no id in it"):
        match_items(EXPECTED, items, path=tmp_path / "sid.jsonl")
