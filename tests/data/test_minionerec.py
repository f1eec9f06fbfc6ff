import csv
import gzip
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.minionerec import read_minionerec
from lasar.errors import DataError

ITEMS = {
    "10": {"title": "Ten", "description": "['first', 'second']", "categories": ""},
    "9": {"title": "Nine", "brand": "[sic]", "description": "[]"},
    "2": {"title": ["Two", "words"]},
}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def rows_of(sequences, splits, window=10):
    """MiniOneRec's own rows: one per target, at most `window` items of history."""
    rows = {"train": [], "valid": [], "test": []}
    for user, items in sequences.items():
        for position in range(1, len(items)):
            history = items[max(0, position - window) : position]
            rows[splits[user][position]].append((user, history, items[position]))
    return rows


def write_csvs(folder, rows, suffix=".csv"):
    for name, part in rows.items():
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(["user_id", "history_item_title", "item_title", "history_item_id", "item_id"])
        for user, history, target in part:
            writer.writerow([user, "['a, b']", "t", history, target])
        write(folder / name / f"Toys_5{suffix}", stream.getvalue())


def read(folder):
    events, items = read_minionerec(folder)
    return events.collect(), None if items is None else items.collect()


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_lc_rec_folder(tmp_path, suffix):
    write(tmp_path / f"Toys.item.json{suffix}", json.dumps(ITEMS))
    write(tmp_path / f"Toys.inter.json{suffix}", json.dumps({"u": [10, 2], "v": ["9"]}))
    events, items = read(tmp_path)
    assert events.columns == ["user_id", "item_id", "timestamp"]
    assert events.rows() == [("u", "10", None), ("u", "2", None), ("v", "9", None)]
    assert items.select("item_id", "title", "description", "brand").rows() == [
        ("2", "Two words", None, None), ("9", "Nine", "", "[sic]"), ("10", "Ten", "first second", None),
    ]  # fmt: skip


SEQUENCES = st.lists(st.lists(st.integers(0, 20), min_size=2, max_size=16), min_size=1, max_size=4)


@given(SEQUENCES, st.integers(0, 1000))
def test_rows_give_the_sequences_back(tmp_path_factory, sequences, seed):
    generator = np.random.default_rng(seed)
    users = {f"u{number}": items for number, items in enumerate(sequences)}
    splits = {
        user: sorted(generator.choice(["train", "valid", "test"], len(items)),
                     key=["train", "valid", "test"].index)
        for user, items in users.items()
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("rows")
    write_csvs(folder, rows_of(users, splits, window=3))
    events, items = read(folder)
    assert items is None
    codes = {"train": 0, "valid": 1, "test": 2}
    for user, expected in users.items():
        got = events.filter(events["user_id"] == user)
        assert [int(item) for item in got["item_id"]] == expected
        assert got["split"].to_list() == [0] + [codes[name] for name in splits[user][1:]]


def test_without_training_rows_the_first_history_is_training(tmp_path):
    splits = {"u": [None, "train", "train", "valid", "test"]}
    rows = rows_of({"u": [3, 4, 4, 6, 7]}, splits)
    write_csvs(tmp_path, {"valid": rows["valid"], "test": rows["test"]}, suffix=".csv.gz")
    events, _ = read(tmp_path)
    assert events["item_id"].to_list() == ["3", "4", "4", "6", "7"]
    assert events["split"].to_list() == [0, 0, 0, 1, 2]


def test_contradictions_and_damage_are_named(tmp_path):
    with pytest.raises(DataError, match=r"neither \*\.inter\.json nor a CSV"):
        read(tmp_path)
    write_csvs(tmp_path, {"valid": [("u", [1, 2], 3)], "test": [("u", [9], 4)]})
    with pytest.raises(DataError, match="user 'u' contradict each other"):
        read(tmp_path)
    write_csvs(tmp_path, {"valid": [("u", "oh no", 3)], "test": []})
    with pytest.raises(DataError, match=r"Toys_5\.csv: line 2: history is not a list: 'oh no'"):
        read(tmp_path)
    write(tmp_path / "valid" / "Toys_5.csv", "user_id,item_id\nu,1\n")
    with pytest.raises(DataError, match="no column 'history_item_id'"):
        read(tmp_path)
    write(tmp_path / "Toys.item.json", "{")
    write(tmp_path / "Toys.inter.json", "[1]")
    with pytest.raises(DataError, match=r"Toys\.inter\.json: expected a JSON object"):
        read(tmp_path)
    write(tmp_path / "Toys.inter.json", '{"u": [1]}')
    with pytest.raises(DataError, match=r"Toys\.item\.json: not JSON"):
        read(tmp_path)
    write(tmp_path / "Toys.item.json", '{"1": "Lamp"}')
    with pytest.raises(DataError, match="every item to be an object"):
        read(tmp_path)
    write(tmp_path / "More.item.json", "{}")
    with pytest.raises(DataError, match="several files match"):
        read(tmp_path)
