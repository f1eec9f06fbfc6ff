"""The load benchmark's arithmetic, the model that it makes, and that it would notice a lost event."""

import json
import sqlite3
import sys
from pathlib import Path

import pytest

from lasar.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _served
import serving_load

pytest.importorskip("fastapi", reason="the extra: pip install 'lasar[serve]'")


def test_answers_are_counted_after_the_warm_up():
    # One answer every half second for 13 s, the first three seconds of which do not count.
    records = [(100 + n / 2, 100.0, 200, False) for n in range(27)]
    assert serving_load.answers_per_second(records) == pytest.approx(2.0)
    refused = [(start, ms, 429, True) for start, ms, _, _ in records]
    assert serving_load.answers_per_second(sorted(records + refused)) == pytest.approx(2.0)


def test_what_became_of_requests():
    records = [
        *((0.0, 100.0, 200, False) for _ in range(97)),
        *((0.0, 5100.0, 503, False) for _ in range(3)),
        (0.0, 1.0, 429, True),
        (0.0, 1.0, 429, False),
        (0.0, 1.0, 500, False),
    ]
    found = serving_load.outcome(records, deadline_ms=5000)
    assert found["statuses"] == {"200": 97, "429": 2, "500": 1, "503": 3}
    assert found["accepted_ms_p99"] == 5100, "who was accepted and got no answer counts"
    assert not found["p99_within_deadline"]
    assert (found["refused_without_retry_after"], found["unexpected"]) == (1, 1)
    assert serving_load.outcome(records[:97], deadline_ms=5000)["p99_within_deadline"]


def test_slope_is_mib_per_minute():
    assert serving_load.slope([(10 + n, 500 + n / 10) for n in range(60)]) == pytest.approx(6.0)


def test_a_lost_a_changed_and_an_extra_event(tmp_path):
    path = tmp_path / "state.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE lasar_events (event_id, user_id, items)")
        rows = [("a", "ann", '["x", "y"]'), ("b", "ann", '["x"]'), ("extra", "ann", '["x"]')]
        connection.executemany("INSERT INTO lasar_events VALUES (?, ?, ?)", rows)
    connection.close()
    stored = _served.stored_events(path)
    acknowledged = {"a": ("ann", ("x", "y")), "b": ("ann", ("y",)), "c": ("ann", ("x",))}
    assert _served.lost_events(acknowledged, stored) == ["b", "c"]


def test_an_untrained_copy_can_be_served(tmp_path, shop_run):
    from lasar.recommender import Recommender

    out = serving_load.untrained(shop_run, "500k", tmp_path / "copy")
    ours, theirs = Recommender.load(out), Recommender.load(shop_run)
    assert ours.ranker.vocabulary == theirs.ranker.vocabulary
    assert ours.ranker.reasoner.settings.max_depth == 3
    assert ours.ranker.reasoner.backbone.config.hidden_size == 128
    assert len(ours.recommend(["sku3"], k=5, depth=2)) == 5
    with pytest.raises(ConfigError, match="--preset 5k: no such preset"):
        serving_load.untrained(shop_run, "5k", tmp_path / "other")


def test_requests_are_histories_in_orders(shop_run):
    prepared = shop_run / "prepare" / "interactions.parquet"
    import polars as pl

    table = pl.read_parquet(prepared)
    last = (pl.col("basket") == pl.col("basket").max().over("user_index")) & (pl.col("user_index") < 2)
    table.with_columns(split=pl.when(last).then(2).otherwise(0).cast(pl.Int8)).write_parquet(prepared)
    bodies = serving_load.requests(shop_run, depth="2")
    assert json.loads(json.dumps(bodies)) == [
        {"history": [["sku3", "sku4"]], "k": 10, "depth": 2},
        {"history": [["sku6"]], "k": 10, "depth": 2},
    ]


@pytest.fixture
def shop_run(tmp_path):
    from tests.serving.conftest import write_run

    return write_run(tmp_path / "run")
