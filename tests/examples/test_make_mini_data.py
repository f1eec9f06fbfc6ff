"""The made-up shop: the same bytes every time, and a rule that is there to be found."""

import csv
import importlib.util
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "make_mini_data.py"


@pytest.fixture(scope="module")
def shop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_mini_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_same_seed_same_bytes(shop: ModuleType, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        shop.main(tmp_path / folder, seed=seed)
    read = {name: (tmp_path / name / "events.csv").read_bytes() for name in "abc"}
    assert read["a"] == read["b"] != read["c"]
    assert (tmp_path / "a" / "items.csv").read_bytes() == (tmp_path / "c" / "items.csv").read_bytes()


def test_files_are_complete_and_consistent(shop: ModuleType, tmp_path: Path) -> None:
    shop.main(tmp_path)
    with (tmp_path / "events.csv").open(newline="") as stream:
        events = list(csv.DictReader(stream))
    with (tmp_path / "items.csv").open(newline="") as stream:
        items = list(csv.DictReader(stream))
    assert len({item["item_id"] for item in items}) == len({item["title"] for item in items}) == 60
    assert len({event["user_id"] for event in events}) == 200
    assert {event["item_id"] for event in events} == {item["item_id"] for item in items}
    # 5-core filtering must keep the shop whole
    for column in ("user_id", "item_id"):
        assert min(Counter(event[column] for event in events).values()) >= 5


def test_customers_are_in_time_order_with_orders_of_several_items(shop: ModuleType) -> None:
    times = defaultdict(list)
    for user, _, time in shop.event_rows(200, 0.1, 0):
        times[user].append(time)
    assert all(series == sorted(series) for series in times.values())
    assert all(len(set(series)) >= 5 for series in times.values())
    sizes = Counter(size for series in times.values() for size in Counter(series).values())
    assert set(sizes) == {1, 2, 3}


def test_the_last_item_tells_the_next_and_popularity_does_not(shop: ModuleType) -> None:
    rows = shop.event_rows(200, 0.1, 0)
    follows: dict[str, Counter[str]] = defaultdict(Counter)
    for (user, item, _), (next_user, next_item, _) in pairwise(rows):
        if user == next_user:
            follows[item][next_item] += 1
    steps = sum(sum(counts.values()) for counts in follows.values())
    best = sum(counts.most_common(1)[0][1] for counts in follows.values())
    assert best / steps > 0.75
    popularity = Counter(item for _, item, _ in rows)
    assert popularity.most_common(1)[0][1] / len(rows) < 0.04


def test_without_noise_every_step_in_a_department_is_the_planted_one(shop: ModuleType) -> None:
    items = [row[0] for row in shop.item_rows()]
    rows = shop.event_rows(50, 0.0, 3)
    for (user, item, _), (next_user, next_item, _) in pairwise(rows):
        if user == next_user and item[:2] == next_item[:2]:
            at = items.index(item)
            assert next_item == items[at - at % 10 + (at + 1) % 10]
