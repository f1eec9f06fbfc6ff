import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.catalogue import catalogue_items, index_events, keep_core, write_tables

EVENT = {"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64}


def events(rows):
    return pl.DataFrame(rows, schema=EVENT, orient="row")


def test_core_counts_what_it_drops():
    frame = events([(u, i, 0) for u in "ab" for i in "xyx"] + [("c", "x", 0), ("a", "z", 0)])
    kept, dropped = keep_core(frame, 2)
    assert kept.rows() == frame.rows()[:6]
    assert dropped == {"users_below_k": 1, "items_below_k": 1, "events_below_k": 2}
    assert keep_core(frame, 1) == (frame, {})


def test_the_future_does_not_decide_who_is_in_the_core():
    past = [(u, i, 1) for u in "ab" for i in "xy"]
    future = [("a", "x", 9), ("c", "x", 9), ("c", "y", 9), ("a", "z", 9), ("b", "z", 9)]
    kept, _ = keep_core(events(past + future), 2, count_before=5)
    assert kept.rows() == [*past, ("a", "x", 9)]
    kept, _ = keep_core(events(past + future), 2)
    assert len(kept) == 9


TABLE = pl.DataFrame({"item_id": ["b", "a", None, "b", "q"], "title": ["B", "A", "?", "B2", "Q"]})
USED = events([("u", "a", 0), ("u", "n", 0), ("u", "b", 0), ("u", "m", 0), ("u", "n", 1)])


def test_the_catalogue_follows_the_item_table():
    items, counts = catalogue_items(TABLE, USED, keep_unused=False, uppercase_items=False)
    assert items.rows() == [("b", "B"), ("a", "A"), ("n", None), ("m", None)]
    assert counts == {"item_rows_without_id": 1, "duplicate_item_ids": 1, "items_not_in_item_table": 2}
    everything, _ = catalogue_items(TABLE, USED, keep_unused=True, uppercase_items=False)
    assert everything["item_id"].to_list() == ["b", "a", "q", "n", "m"]


def test_upper_case_ids_meet():
    items, counts = catalogue_items(TABLE, events([("u", "A", 0)]), keep_unused=False, uppercase_items=True)
    assert items.rows() == [("A", "A")]
    assert counts["items_not_in_item_table"] == 0


ROWS = st.lists(
    st.tuples(st.sampled_from("vuw"), st.sampled_from("abcd"), st.integers(0, 3)), min_size=1, max_size=25
)


@given(ROWS, st.booleans())
def test_events_are_sorted_by_user_time_and_source_order(rows, has_time):
    frame = events([(user, item, time if has_time else None) for user, item, time in rows])
    items = pl.DataFrame({"item_id": list("abcd")})
    indexed, users = index_events(frame, items)
    order = list(dict.fromkeys(user for user, _, _ in rows))
    assert users["user_id"].to_list() == order
    expected = sorted(rows, key=lambda row: (order.index(row[0]), row[2] if has_time else 0))
    got = [(order[u], "abcd"[i]) for u, i in indexed.select("user_index", "item_index").iter_rows()]
    assert got == [(user, item) for user, item, _ in expected]
    assert indexed.schema == {
        "user_index": pl.Int32, "item_index": pl.Int32, "timestamp": pl.Int64, "basket": pl.Int32,
    }  # fmt: skip
    for user in range(len(order)):
        mine = indexed.filter(pl.col("user_index") == user)
        if has_time:
            assert mine["basket"].to_list() == (mine["timestamp"].rank("dense") - 1).to_list()
        else:
            assert mine["basket"].to_list() == mine["timestamp"].to_list() == list(range(len(mine)))


def test_written_tables_have_the_agreed_columns(tmp_path):
    indexed, users = index_events(USED, pl.DataFrame({"item_id": list("abnm")}))
    indexed = indexed.with_columns(split=pl.Series([0, 0, 1, 2, 2], dtype=pl.Int8))
    items = pl.DataFrame({"item_id": list("abnm"), "item_index": list("0000"), "title": list("ABNM")})
    sizes = write_tables(tmp_path, items=items, users=users, interactions=indexed)
    assert sizes == {
        "num_users": 1, "num_items": 4, "num_interactions": 5, "num_pairs": 4, "num_train": 2, "num_valid": 1,
        "num_test": 2,
    }  # fmt: skip
    assert pl.read_parquet_schema(tmp_path / "items.parquet") == {
        "item_index": pl.Int32, "item_id": pl.String, "title": pl.String,
    }  # fmt: skip
    assert pl.read_parquet_schema(tmp_path / "users.parquet") == {
        "user_index": pl.Int32,
        "user_id": pl.String,
    }
    assert pl.read_parquet(tmp_path / "interactions.parquet")["split"].dtype == pl.Int8
