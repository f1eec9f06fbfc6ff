import gzip
import json

import polars as pl
import pytest

from lasar.data.readers import READERS, only_file, read_dataset
from lasar.errors import ConfigError, DataError

EVENTS = "Buyer;Article;When;Amount;Name;Shade\nann;1;2020-01-02;2;Lamp;red\nbob;02;2020-01-01;1;Chair;\n"
ITEMS = "Article;Name;Shade;Weight\n1;Lamp;red;3\n02;Chair;;9\n"
COLUMNS = {"user": "Buyer", "item": "Article", "timestamp": "When"}


def read(reader, source, items=None, **options):
    events, table = read_dataset(reader, source, items, options)
    return events.collect(), None if table is None else table.collect()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def contract(events, items):
    """What every reader promises."""
    assert events.schema["user_id"] == events.schema["item_id"] == pl.String
    assert events.schema["timestamp"] == pl.Int64
    if items is not None:
        assert items.columns[0] == "item_id"
        assert set(items.schema.values()) == {pl.String()}


def test_table_with_named_columns_and_a_separate_item_table(tmp_path):
    source, items = write(tmp_path / "e.csv", EVENTS), write(tmp_path / "i.csv", ITEMS)
    options = {"columns": COLUMNS | {"title": "Name", "weight": "Amount"}, "separator": ";"}
    events, table = read("table", source, items, **options)
    contract(events, table)
    assert events.select("user_id", "item_id", "timestamp", "weight").rows() == [
        ("ann", "1", 1_577_923_200, 2.0), ("bob", "02", 1_577_836_800, 1.0),
    ]  # fmt: skip
    assert table.columns == ["item_id", "title", "Shade", "Weight"]
    assert table.rows() == [("1", "Lamp", "red", "3"), ("02", "Chair", None, "9")]
    _, fewer = read("table", source, items, **options, texts=["Weight"])
    assert fewer.columns == ["item_id", "title", "Weight"]
    named = write(tmp_path / "n.csv", ITEMS.replace("Name", "title"))  # a column that has our name already
    _, same = read("table", source, named, **options | {"columns": COLUMNS | {"title": "title"}})
    assert same.rows() == table.rows()


@pytest.mark.parametrize("same", [True, False])
def test_table_with_texts_on_every_event(tmp_path, same):
    source = write(tmp_path / "e.csv.gz", EVENTS)
    events, table = read(
        "table", source, source if same else None, columns=COLUMNS | {"title": "Name"}, separator=";",
        texts=["Shade"],
    )  # fmt: skip
    assert table is None
    assert events.select("title", "Shade").rows() == [("Lamp", "red"), ("Chair", None)]


def test_table_needs_no_names_for_the_usual_columns(tmp_path):
    source = write(tmp_path / "e.jsonl", '{"user_id": 1, "item_id": 7, "timestamp": 5}\n')
    items = write(tmp_path / "i.jsonl", '{"item_id": 7, "title": "x", "categories": ["a", "b"]}\n')
    events, table = read("table", source, items)
    contract(events, table)
    assert events.select("user_id", "item_id", "timestamp").rows() == [("1", "7", 5)]
    assert table.rows() == [("7", "x", "a > b")]


def test_table_without_times_keeps_the_order_of_rows(tmp_path):
    events, _ = read("table", write(tmp_path / "e.csv", "user_id,item_id\nb,2\na,1\n"))
    assert events["timestamp"].to_list() == [None, None]
    assert "timestamp_source" not in events.columns


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": "Buyr"}, r"e\.csv: no column 'Buyr' \(columns\.user\); did you mean 'Buyer'"),
        (COLUMNS | {"item": "zzz"}, r"no column 'zzz' \(columns\.item\); it has 'Buyer', 'Article'"),
        (COLUMNS | {"event_type": "Whn"}, r"no column 'Whn' \(columns\.event_type\); did you mean 'When'"),
        (COLUMNS | {"title": "Nme"}, r"i\.csv: no column 'Nme' \(columns\.title\); did you mean 'Name'"),
        (COLUMNS | {"item_key": "Articl"}, r"i\.csv: no column 'Articl' \(columns\.item_key\)"),
    ],
)
def test_a_missing_column_is_named_with_its_role_and_the_nearest(tmp_path, columns, message):
    source, items = write(tmp_path / "e.csv", EVENTS), write(tmp_path / "i.csv", ITEMS)
    with pytest.raises(DataError, match=message):
        read("table", source, items, columns=columns, separator=";")


def test_a_wrong_separator_is_suspected(tmp_path):
    with pytest.raises(DataError, match=r"only column is 'Buyer;.*is format\.separator right"):
        read("table", write(tmp_path / "e.csv", EVENTS))


def test_a_reader_refuses_what_its_format_fixes(tmp_path):
    with pytest.raises(ConfigError, match="reader 's3rec' fixes 'encoding' itself"):
        read_dataset("s3rec", tmp_path, None, {"encoding": "latin-1"})


S3REC = "1 10 11 10\n2 11\n3\n\n"
S3REC_ITEMS = [
    {"item_id": "B", "index": 11, "title": "b", "categories": ["x", "y"]},
    {"item_id": "A", "index": 10, "title": "a", "categories": []},
]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_s3rec_numbers_become_item_ids(tmp_path, suffix):
    write(tmp_path / f"sequences.txt{suffix}", S3REC)
    write(tmp_path / f"items.jsonl{suffix}", "\n".join(map(json.dumps, S3REC_ITEMS)))
    events, items = read("s3rec", tmp_path)
    contract(events, items)
    assert events.select("user_id", "item_id").rows() == [("1", "A"), ("1", "B"), ("1", "A"), ("2", "B")]
    assert items.select("item_id", "index", "categories").rows() == [("A", "10", ""), ("B", "11", "x > y")]


def test_s3rec_without_items_uses_the_numbers_in_order(tmp_path):
    events, items = read("s3rec", write(tmp_path / "toys.txt", "7 10 9 2\n"))
    contract(events, items)
    assert events["item_id"].to_list() == ["10", "9", "2"]
    assert items["item_id"].to_list() == ["2", "9", "10"]


def test_s3rec_files_that_do_not_belong_together_are_refused(tmp_path):
    write(tmp_path / "sequences.txt", "1 10 12 13\n")
    write(tmp_path / "items.jsonl", "\n".join(map(json.dumps, S3REC_ITEMS)))
    with pytest.raises(DataError, match=r"2 events have a number that is no 'index'.*first: '12'"):
        read("s3rec", tmp_path)
    write(tmp_path / "items.jsonl", '{"item_id": "A", "idx": 10}')
    with pytest.raises(DataError, match=r"items\.jsonl: no column 'index'"):
        read("s3rec", tmp_path)
    (tmp_path / "sequences.txt").write_text("1\n2\n")
    with pytest.raises(DataError, match="no user has an item"):
        read("s3rec", tmp_path)


INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t5\t3\t881250949\n2\t6\t4\t881250950.5\n"
)
ITEM = 'item_id:token\tmovie_title:token_seq\tclass:token_seq\n5\t"Twelve" Monkeys\tDrama\n6\tSeven\t\n'


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_recbole_headers_carry_types(tmp_path, suffix):
    write(tmp_path / f"ml.inter{suffix}", INTER)
    write(tmp_path / f"ml.item{suffix}", ITEM)
    events, items = read("recbole", tmp_path, columns={"title": "movie_title", "weight": "rating"})
    contract(events, items)
    assert events.select("user_id", "item_id", "timestamp", "weight").rows() == [
        ("1", "5", 881250949, 3.0), ("2", "6", 881250950, 4.0),
    ]  # fmt: skip
    assert items.rows() == [("5", '"Twelve" Monkeys', "Drama"), ("6", "Seven", None)]


def test_recbole_without_items(tmp_path):
    events, items = read("recbole", write(tmp_path / "ml.inter", INTER))
    contract(events, items)
    assert items is None


def test_a_folder_must_hold_exactly_one_such_file(tmp_path):
    with pytest.raises(DataError, match=r"no file \*\.inter or \*\.inter\.gz"):
        read("recbole", tmp_path)
    write(tmp_path / "a.inter", INTER)
    write(tmp_path / "b.inter", INTER)
    with pytest.raises(DataError, match=r"several files match: a\.inter, b\.inter; name the one"):
        read("recbole", tmp_path)
    assert only_file(tmp_path, "a.*").name == "a.inter"


def test_readers_are_a_closed_list():
    assert sorted(READERS) == ["amazon", "minionerec", "recbole", "s3rec", "table"]
