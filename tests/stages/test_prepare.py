import gzip
import hashlib
import io
import json
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from lasar.artifacts import StageContext, run_stage
from lasar.config import Recipe, parse_section
from lasar.data.interactions import SPLIT_TEST, Interactions, ItemTable, load_user_ids
from lasar.errors import ConfigError, DataError, LasarError
from lasar.stages import prepare


def run(folder: Path, values: dict) -> dict:
    """Run the stage as the command line would, without the run folder; return the summary."""
    config = parse_section(prepare.Config, values, where="recipe: prepare")
    output = folder / "prepare"
    output.mkdir()
    prepare.sources(config)
    context = StageContext(stage="prepare", seed=0, inputs={}, output=output, scratch=folder)
    prepare.run(config, context)
    return json.loads((output / "summary.json").read_text())


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(gzip.compress(text.encode(encoding)) if path.suffix == ".gz" else text.encode(encoding))
    return str(path)


# A shop's order lines with one of every blemish: orders 1 to 4 of ann, 5 to 6 of bob, 7 of eve.
SHOP = """Invoice|Code|Name|Amount|Date|Customer
1|10a|Tasse blau|1|01/02/2020 10:00|ann
1|11|Krug &amp; Gl\u00e4ser|1|01/02/2020 10:00|ann
1|10A|TASSE BLAU|3|01/02/2020 10:00|ann
2|10A|Tasse blau|1|01/03/2020 10:00|ann
3|12|Teller|1|01/04/2020 10:00|ann
4|11|besch\u00e4digt|1|01/05/2020 10:00|ann
4|10A|Tasse blau|1|01/05/2020 10:00|ann
C5|12|Teller|1|01/05/2020 10:00|ann
5|11|Krug &amp; Gl\u00e4ser|1|01/01/2020 9:00|bob
5|12|Teller|-2|01/01/2020 9:00|bob
6|POST|Versand|1|01/09/2020 9:00|bob
6|12||1|01/09/2020 9:00|bob
7|11|Krug &amp; Gl\u00e4ser|1|01/09/2020 9:00|eve
7|11|Krug &amp; Gl\u00e4ser|1|01/09/2020 9:00|
"""
SHOP_VALUES = {
    "dataset": "shop",
    "columns": {"user": "Customer", "item": "Code", "timestamp": "Date", "title": "Name"},
    "format": {"encoding": "latin-1", "separator": "|", "time_format": "%m/%d/%Y %H:%M"},
    "clean": {
        "above": {"Amount": 0}, "drop_matching": {"Invoice": "^C", "Code": "^POST$"}, "uppercase_items": True,
    },
    "split": "last_basket",
    "k_core": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["orders.csv", "orders.csv.gz"])
def test_a_real_shops_blemishes(tmp_path, name):
    source = write(tmp_path / name, SHOP, "latin-1")
    before = Path(source).read_bytes()
    summary = run(tmp_path, SHOP_VALUES | {"source": source})
    assert Path(source).read_bytes() == before
    assert summary == {
        "dataset": "shop", "split": "last_basket", "train_targets": "all",
        "num_users": 3, "num_items": 3, "num_interactions": 9, "num_pairs": 6,
        "num_train": 5, "num_valid": 1, "num_test": 3,
        "warnings": {
            "items_with_several_texts": 2, "item_rows_without_id": 0, "duplicate_item_ids": 0,
            "items_not_in_item_table": 0, "items_without_title": 0, "items_without_text": 0,
            "users_without_train": 0, "users_without_valid": 2, "users_without_test": 1,
        },
        "dropped": {
            "missing_user": 1, "Amount_not_above_0": 1, "Invoice_matches": 1, "Code_matches": 1,
            "repeats": 1,
        },
    }  # fmt: skip
    items = ItemTable.load(tmp_path / "prepare")
    assert items.item_ids == ["10A", "11", "12"]
    assert items.titles == ["Tasse blau", "Krug & Gl\u00e4ser", "Teller"]
    assert load_user_ids(tmp_path / "prepare") == ["ann", "bob", "eve"]
    interactions = Interactions.load(tmp_path / "prepare")
    cases = interactions.cases(SPLIT_TEST)
    assert [history.tolist() for history in cases.histories] == [[0, 1, 0, 2], [1]]
    assert [baskets.tolist() for baskets in cases.baskets] == [[0, 0, 1, 2], [0]]
    assert [targets.tolist() for targets in cases.targets] == [[1, 0], [2]]


def test_repeats_can_be_kept(tmp_path):
    source = write(tmp_path / "orders.csv", SHOP, "latin-1")
    summary = run(tmp_path, SHOP_VALUES | {"source": source, "duplicates": "keep"})
    assert summary["num_interactions"] == 10
    assert "repeats" not in summary["dropped"]


@pytest.mark.parametrize(("k_core", "num_items"), [(0, 3), (1, None)])
def test_a_slice_has_whole_users_and_their_items(tmp_path, k_core, num_items):
    source = write(tmp_path / "orders.csv", SHOP, "latin-1")
    values = SHOP_VALUES | {"source": source, "k_core": k_core}
    for folder in ("whole", "slice"):
        (tmp_path / folder).mkdir()
    whole = run(tmp_path / "whole", values)
    summary = run(tmp_path / "slice", values | {"users": 1})
    (user,) = load_user_ids(tmp_path / "slice" / "prepare")
    assert summary["num_interactions"] == {"ann": 6, "bob": 2, "eve": 1}[user]
    dropped = summary["dropped"]["other_users"]
    assert dropped == whole["num_interactions"] - summary["num_interactions"] > 0
    assert summary["num_items"] == (num_items or {"ann": 3, "bob": 2, "eve": 1}[user])


def planted(folder: Path) -> dict:
    """12 users who each take all of 6 items on successive days, and one stray user with a stray item."""
    lines = [f"u{u},i{(u + t) % 6},{1000 + 86_400 * (20 * t + u)}" for t in range(6) for u in range(12)]
    events = write(folder / "e.csv", "\n".join(["user_id,item_id,timestamp", *lines, "stray,lost,5"]))
    items = [{"item_id": f"i{n}", "title": f"Item {n}", "group": "g"} for n in range(5)]
    rows = [*items, items[0] | {"title": "again"}, {"item_id": "unsold", "title": "x"}]
    return {"source": events, "items": write(folder / "i.jsonl", "\n".join(map(json.dumps, rows)))}


def test_leave_one_out_with_an_item_table(tmp_path):
    summary = run(tmp_path, planted(tmp_path) | {"k_core": 5, "train_targets": "last"})
    assert (summary["num_users"], summary["num_items"]) == (12, 6)
    assert (summary["num_train"], summary["num_valid"], summary["num_test"]) == (48, 12, 12)
    assert summary["dropped"]["users_below_k"] == summary["dropped"]["items_below_k"] == 1
    assert summary["warnings"]["duplicate_item_ids"] == 1
    assert summary["warnings"]["items_not_in_item_table"] == 1
    assert summary["warnings"]["items_without_text"] == 1
    items = pl.read_parquet(tmp_path / "prepare" / "items.parquet")
    assert items["item_id"].to_list() == ["i0", "i1", "i2", "i3", "i4", "i5"]
    assert items["text"].to_list() == [f"Item {n}" for n in range(5)] + [""]
    assert items["group"].to_list() == ["g"] * 5 + [""]
    interactions = Interactions.load(tmp_path / "prepare")
    assert interactions.train_targets == "last"
    for case, targets in enumerate(interactions.cases(SPLIT_TEST).targets):
        assert targets.tolist() == [(case + 5) % 6]


def test_temporal_split_leaks_nothing(tmp_path):
    summary = run(tmp_path, planted(tmp_path) | {"split": "temporal", "cuts": [0.7, 0.85], "k_core": 3})
    events = pl.read_parquet(tmp_path / "prepare" / "interactions.parquet")
    edges = events.group_by("split").agg(
        pl.col("timestamp").min().alias("a"), pl.col("timestamp").max().alias("b")
    )
    train, valid, test = edges.sort("split").select("a", "b").rows()
    assert train[1] < valid[0] <= valid[1] < test[0]
    assert summary["warnings"]["users_without_train"] == 0


def test_no_core_keeps_unsold_items_in_the_catalogue(tmp_path):
    summary = run(tmp_path, planted(tmp_path) | {"k_core": 0})
    ids = ItemTable.load(tmp_path / "prepare").item_ids
    assert ids == ["i0", "i1", "i2", "i3", "i4", "unsold", "i5", "lost"]
    assert summary["num_items"] == 8
    assert summary["warnings"]["users_without_test"] == 1


def test_items_keep_their_text_by_the_recipes_template(tmp_path):
    text = {"template": ["{group}", "No. {title}"], "max_field_chars": 4}
    run(tmp_path, planted(tmp_path) | {"text": text})
    items = ItemTable.load(tmp_path / "prepare")
    assert items.texts[0] == "g. No. Item"
    assert items.titles[0] == "Item"


def test_event_types_and_weights(tmp_path):
    lines = ["user_id,item_id,kind,stars", *(f"u,i{n},{'buy' if n % 2 else 'view'},{n}" for n in range(10))]
    source = write(tmp_path / "e.csv", "\n".join(lines))
    values = {
        "source": source, "k_core": 0, "columns": {"event_type": "kind", "weight": "stars"},
        "clean": {"event_types": ["buy"], "above": {"weight": 2}},
    }  # fmt: skip
    summary = run(tmp_path, values)
    assert ItemTable.load(tmp_path / "prepare").item_ids == ["i3", "i5", "i7", "i9"]
    assert summary["dropped"] == {"event_type": 5, "weight_not_above_2": 1, "repeats": 0}


def test_a_given_split_is_kept(tmp_path):
    folder = tmp_path / "toys"
    folder.mkdir()
    write(folder / "Toys.item.json", json.dumps({str(n): {"title": f"T{n}"} for n in range(5)}))
    header = "user_id,history_item_id,item_id\n"
    write(folder / "Toys.valid.csv", header + 'u,"[0, 1]",2\n')
    write(folder / "Toys.test.csv", header + 'u,"[0, 1, 2]",3\nv,[1],0\n')
    values = {"source": str(folder), "reader": "minionerec", "split": "given", "k_core": 0}
    summary = run(tmp_path, values)
    assert (summary["num_train"], summary["num_valid"], summary["num_test"]) == (3, 1, 2)
    assert summary["num_items"] == 5
    cases = Interactions.load(tmp_path / "prepare").cases(SPLIT_TEST)
    assert [history.tolist() for history in cases.histories] == [[0, 1, 2], [1]]
    assert [targets.tolist() for targets in cases.targets] == [[3], [0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"source": ""}, ConfigError, r"prepare\.source: name the file"),
        (
            {"source": "data/ml-100k/x.inter"},
            DataError,
            "no such file or folder; fetch it with: lasar data get",
        ),
        ({"items": "nowhere.csv"}, DataError, r"nowhere\.csv: no such file or folder$"),
        ({"columns": {"user": "usr_id"}}, DataError, r"no column 'usr_id'.*did you mean 'user_id'"),
        ({"format": {"time_format": "%d/%m/%Y"}}, DataError, r"73 of 73 rows have a time .*first: '1000'"),
        ({"format": {"encoding": "utf-9"}}, ConfigError, "unknown encoding 'utf-9'; did you mean 'utf-"),
        (
            {"reader": "recbole", "format": {"separator": ","}},
            ConfigError,
            r"reader 'recbole' fixes 'separator'",
        ),
        ({"source": "LATIN"}, DataError, r"latin\.csv: cannot be read: .*utf-8.*; set format\.encoding"),
        ({"reader": "tabel"}, ConfigError, "reader"),
        ({"columns": {"usr": "x"}}, ConfigError, "usr"),
        ({"k_core": 50}, DataError, r"no event is left \(dropped: users_below_k 13, items_below_k 7"),
        ({"split": "given"}, DataError, "split 'given' needs a source that fixes a split"),
        ({"split": "temporal", "cuts": [0.9, 0.8]}, ConfigError, "must start before test"),
        ({"text": {"template": ["{titel}"]}}, DataError, "no column 'titel'; did you mean 'title'"),
        ({"clean": {"above": {"timestmp": 0}}}, DataError, "no column 'timestmp'; did you mean 'timestamp'"),
        ({"clean": {"event_types": ["buy"]}}, DataError, "set columns.event_type"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, change, error, message):
    values = planted(tmp_path) | change
    if values["source"] == "LATIN":
        values["source"] = write(tmp_path / "latin.csv", "user_id,item_id\nJos\u00e9,1\n", "latin-1")
    with pytest.raises(error, match=message) as caught:
        run(tmp_path, values)
    assert isinstance(caught.value, LasarError)
    assert "\n" not in str(caught.value)


def test_an_empty_table_is_refused_whatever_the_split(tmp_path):
    source = write(tmp_path / "e.csv", "user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match=r"no event is left.*the source has none"):
        run(tmp_path, {"source": source, "split": "temporal"})


def test_the_same_source_gives_the_same_bytes_and_is_not_read_again(tmp_path):
    values = planted(tmp_path)
    config = parse_section(prepare.Config, values, where="prepare")
    hashes = []
    for number in range(2):
        recipe = Recipe(
            name="r", seed=number, run_dir=tmp_path / f"run{number}", stages=("prepare",),
            configs={"prepare": config},
        )  # fmt: skip
        assert run_stage("prepare", prepare, recipe) is True
        assert run_stage("prepare", prepare, recipe) is False
        files = sorted((recipe.run_dir / "prepare").iterdir())
        hashes.append(
            {
                file.name: hashlib.sha256(file.read_bytes()).hexdigest()
                for file in files
                if file.stem != "manifest"
            }
        )
    assert hashes[0] == hashes[1]
    assert set(hashes[0]) == {"items.parquet", "users.parquet", "interactions.parquet", "summary.json"}
    with Path(values["items"]).open("a") as stream:
        stream.write('\n{"item_id": "new", "title": "y"}')
    assert run_stage("prepare", prepare, recipe) is True


def test_show_prints_sizes_and_what_was_dropped(tmp_path):
    run(tmp_path, planted(tmp_path))
    console = Console(width=120, record=True, file=io.StringIO())
    prepare.show(tmp_path / "prepare", console)
    text = console.export_text()
    assert "prepare: e.csv" in text
    assert "72" in text
    assert "dropped: users_below_k 1, items_below_k 1, events_below_k 1" in text
    assert "duplicate_item_ids 1" in text
    assert "item_rows_without_id" not in text


# The real files, when they are there.


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("beauty", (22_363, 12_101, 198_502)),
        ("sports", (35_598, 18_357, 296_337)),
        ("instruments", (24_772, 9_922, 206_153)),
    ],
)
def test_published_sizes(shared_data, tmp_path, name, sizes):
    summary = run(tmp_path, {"source": str(shared_data / name), "reader": "s3rec"})
    assert (summary["num_users"], summary["num_items"], summary["num_interactions"]) == sizes
    assert summary["dropped"]["events_below_k"] == 0
    assert summary["num_valid"] == summary["num_test"] == summary["num_users"]


def test_published_minionerec_sizes(shared_data, tmp_path):
    source = str(shared_data / "minionerec_industrial")
    summary = run(tmp_path, {"source": source, "reader": "minionerec", "split": "given", "k_core": 0})
    assert (summary["num_items"], summary["num_valid"], summary["num_test"]) == (3686, 4532, 4533)
