import gzip
import json

import polars as pl
import pytest

from lasar.data.amazon import read_amazon, read_metadata
from lasar.errors import DataError

REVIEWS_2014 = [
    {"reviewerID": "A1", "asin": "B1", "overall": 5.0, "unixReviewTime": 1400000000, "helpful": [0, 1]},
    {"reviewerID": "A2", "asin": "B2", "overall": 2, "unixReviewTime": 1400000001, "reviewText": "no \u2603"},
]
REVIEWS_2018 = [
    REVIEWS_2014[0] | {"style": {"Size:": " L"}, "vote": "3", "verified": True},
    REVIEWS_2014[1] | {"style": {"Color Name:": " red"}},
]
REVIEWS_2023 = [
    {
        "user_id": "A1",
        "asin": "C1",
        "parent_asin": "B1",
        "rating": 5.0,
        "timestamp": 1400000000123,
        "images": [],
    },
    {"user_id": "A2", "asin": "C2", "parent_asin": "B2", "rating": 2.0, "timestamp": 1400000001999},
]
META_2014 = [
    {"asin": "B1", "title": "It's", "brand": "O'x", "categories": [["P", "Q"], ["R"]], "description": "d"},
    {"asin": "B2", "salesRank": {"P": 3}},
]
META_2018 = [
    {"asin": "B1", "title": "It's", "brand": "O'x", "category": ["P", "Q"], "description": ["d"]},
    {"asin": "B2"},
]
META_2023 = [
    {"parent_asin": "B1", "title": "It's", "store": "O'x", "categories": ["P", "Q"], "description": ["d"]},
    {"parent_asin": "B2", "title": None, "store": None, "categories": [], "description": []},
]


def write(path, lines):
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(
    ("reviews", "meta", "dump", "suffix"),
    [
        (REVIEWS_2014, META_2014, repr, ".json.gz"),
        (REVIEWS_2018, META_2018, json.dumps, ".json.gz"),
        (REVIEWS_2023, META_2023, json.dumps, ".jsonl.gz"),
        (REVIEWS_2023, META_2023, json.dumps, ".jsonl"),
    ],
)
def test_every_edition_gives_the_same_tables(tmp_path, reviews, meta, dump, suffix):
    source = write(tmp_path / f"Beauty{suffix}", map(json.dumps, reviews))
    items = write(tmp_path / f"meta_Beauty{suffix}", map(dump, meta))
    for arguments in [(tmp_path,), (source, items), (tmp_path, items)]:
        events, table = read_amazon(*arguments)
        assert events.select("user_id", "item_id", "timestamp", "weight").collect().rows() == [
            ("A1", "B1", 1400000000, 5.0), ("A2", "B2", 1400000001, 2.0),
        ]  # fmt: skip
        first, second = table.collect().fill_null("").rows()
        assert first == ("B1", "It's", "O'x", "P > Q", "d")
        assert second == ("B2", "", "", "", "")
        assert set(table.collect_schema().values()) == {pl.String()}


def test_reviews_alone_have_no_texts(tmp_path):
    source = write(tmp_path / "reviews.json", map(json.dumps, REVIEWS_2014))
    assert read_amazon(source)[1] is None
    assert read_amazon(tmp_path)[1] is None


def test_metadata_is_parsed_and_never_run(tmp_path):
    path = write(tmp_path / "meta.json", ["{'asin': 'B1'}", "__import__('os').abort()"])
    with pytest.raises(
        DataError, match=r"meta\.json: line 2 is neither JSON nor a Python literal: ...import"
    ):
        read_metadata(path)
    with pytest.raises(DataError, match="line 1 is not a record"):
        read_metadata(write(path, ["[1]"]))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither 'reviewerID' and 'asin'"):
        read_amazon(write(tmp_path / "x.json", ['{"user": 1}']))
    with pytest.raises(DataError, match="is this an Amazon review file"):
        read_amazon(write(tmp_path / "x.json", []))
    with pytest.raises(DataError, match="no such file"):
        read_amazon(tmp_path / "y.json")
    write(tmp_path / "z.json", ["{}"])
    with pytest.raises(
        DataError, match=r"expected one review file and one meta_\* file, found: x\.json, z\.json"
    ):
        read_amazon(tmp_path)
