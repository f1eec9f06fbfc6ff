from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.cleaning import (
    clean_events,
    drop_repeats,
    k_core,
    most_frequent_texts,
    refuse_empty,
    slice_users,
)
from lasar.data.tables import with_event_columns
from lasar.errors import ConfigError, DataError

PATH = Path("orders.csv")
COLUMNS = {"user": "who", "item": "what", "timestamp": "when", "event_type": "kind"}


def events(rows):
    frame = pl.DataFrame(rows, schema=["who", "what", "when", "kind", "price"], orient="row")
    return with_event_columns(frame.lazy(), COLUMNS, path=PATH)


ROWS = [
    ("u", "a", "10", "buy", "1.5"),
    (" u ", "b ", "11", "view", "2"),
    ("", "c", "12", "buy", "3"),
    ("v", None, "13", "buy", "4"),
    ("v", "d", "14", "buy", "0"),
    ("v", "e", "15", "buy", "none"),
    ("v", "POST", "16", "buy", "7"),
    ("v", "f", "", "buy", "8"),
    ("v", "g", "17", None, "9"),
]


def test_every_rule_drops_and_counts():
    kept, dropped = clean_events(
        events(ROWS), path=PATH, event_types=["buy"], above={"price": 0}, drop_matching={"what": "^POST$"},
        uppercase_items=True,
    )  # fmt: skip
    assert kept.rows() == [("u", "A", 10)]
    assert dropped == {
        "missing_user": 1, "missing_item": 1, "event_type": 2, "price_not_above_0": 2, "what_matches": 1,
        "missing_time": 1,
    }  # fmt: skip


def test_no_rules_keep_everything_usable():
    kept, dropped = clean_events(events(ROWS[:2]), path=PATH, texts=["kind"])
    assert kept.rows() == [("u", "a", 10, "buy"), ("u", "b", 11, "view")]
    assert dropped == {}


def test_a_bad_time_is_shown_with_its_count():
    rows = [*ROWS[:2], ("u", "a", "tomorrow", "buy", "1"), ("u", "a", "never", "buy", "1")]
    with pytest.raises(DataError, match=r"2 of 4 rows have a time.*first: 'tomorrow'.*time_format"):
        clean_events(events(rows), path=PATH)
    kept, dropped = clean_events(events(rows), path=PATH, drop_matching={"when": "^[a-z]"})
    assert (len(kept), dropped) == (2, {"when_matches": 2})


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"above": {"pric": 0}}, DataError, "clean.above: no column 'pric'; did you mean 'price'"),
        ({"drop_matching": {"wat": "x"}}, DataError, "drop_matching: no column 'wat'; did you mean 'what'"),
        ({"drop_matching": {"what": "("}}, ConfigError, r"clean.drop_matching.what: '\(' is not a pattern"),
    ],
)
def test_wrong_rules_are_named(rules, error, message):
    with pytest.raises(error, match=message):
        clean_events(events(ROWS), path=PATH, **rules)


def test_event_types_need_a_column():
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [None]}).lazy()
    with pytest.raises(DataError, match=r"orders\.csv: clean\.event_types needs .* columns\.event_type"):
        clean_events(frame, path=PATH, event_types=["buy"])


def test_a_repeat_within_a_basket_goes_and_a_later_one_stays():
    frame = pl.DataFrame(
        {"user_id": list("uuuuv"), "item_id": list("abaaa"), "timestamp": [1, 1, 1, 2, 1], "n": range(5)}
    )
    kept, dropped = drop_repeats(frame)
    assert kept["n"].to_list() == [0, 1, 3, 4]
    assert dropped == 1
    timeless = frame.with_columns(timestamp=pl.lit(None, dtype=pl.Int64))
    assert drop_repeats(timeless) == (timeless, 0)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 3)), max_size=40),
    st.booleans(),
    st.booleans(),
)
def test_repeats_agree_with_a_plain_count(rows, first_only, numbered):
    frame = pl.DataFrame(
        [(*row, place) for place, row in enumerate(rows)], orient="row",
        schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64, "place": pl.Int64},
    )  # fmt: skip
    if numbered:  # as cleaning leaves them
        frame = frame.cast({name: pl.Categorical(pl.Categories.random()) for name in ("user_id", "item_id")})
    kept, dropped = drop_repeats(frame, first_only=first_only)
    in_time = sorted(enumerate(rows), key=lambda row: row[1][2]) if first_only else list(enumerate(rows))
    expected, met = [], set()
    for place, (user, item, time) in in_time:
        key = (user, item) if first_only else (user, item, time)
        if key not in met:
            expected.append(place)
            met.add(key)
    assert kept["place"].to_list() == expected
    assert dropped == len(rows) - len(expected)


def test_the_most_frequent_text_of_an_item_counts():
    frame = pl.DataFrame(
        {
            "item_id": ["a", "b", "a", "a", "c", "b"],
            "title": ["old", "x", "new", "new", None, "y"],
            "size": ["S", " ", "S", "S", "", None],
        }
    )
    table, several = most_frequent_texts(frame, ["title", "size"])
    assert table.rows() == [("a", "new", "S"), ("b", "x", None), ("c", None, None)]
    assert several == 2
    table, several = most_frequent_texts(frame, [])
    assert (table["item_id"].to_list(), several) == (["a", "b", "c"], 0)


def plain_core(pairs, k):
    kept = set(pairs)
    while True:
        users = {u for u, _ in kept if len({i for v, i in kept if v == u}) >= k}
        items = {i for _, i in kept if len({u for u, j in kept if j == i}) >= k}
        smaller = {(u, i) for u, i in kept if u in users and i in items}
        if smaller == kept:
            return kept
        kept = smaller


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=60), st.integers(0, 4))
def test_core_agrees_with_the_definition(pairs, k):
    users = np.array([u for u, _ in pairs], dtype=np.int64)
    items = np.array([i for _, i in pairs], dtype=np.int64)
    core = plain_core(pairs, k) if k > 1 else set(pairs)
    assert k_core(users, items, k).tolist() == [pair in core for pair in pairs]


def test_repeats_do_not_make_an_item_popular():
    users, items = np.array([0, 0, 0, 0]), np.array([0, 0, 1, 1])
    assert not k_core(users, items, 2).any()


def test_an_empty_result_says_what_dropped_it():
    refuse_empty(pl.DataFrame({"a": [1]}), {}, path=PATH)
    with pytest.raises(DataError, match=r"orders\.csv: no event is left \(dropped: users_below_k 1,200\)"):
        refuse_empty(pl.DataFrame(), {"users_below_k": 1200, "event_type": 0}, path=PATH)
    with pytest.raises(DataError, match="the source has none"):
        refuse_empty(pl.DataFrame(), {}, path=PATH)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 12))
def test_a_slice_keeps_whole_users_whatever_order_they_come_in(users, num_users):
    events = pl.DataFrame(
        {"user_id": [f"u{user}" for user in users], "item_id": [str(n) for n in range(len(users))]}
    )
    kept, dropped = slice_users(events, num_users)
    chosen = set(kept["user_id"])
    assert len(chosen) == min(num_users, len(set(users)))
    assert kept.equals(events.filter(pl.col("user_id").is_in(list(chosen))))
    assert dropped == len(events) - len(kept)
    assert set(slice_users(events.reverse(), num_users)[0]["user_id"]) == chosen
