"""Histories in the database."""

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from lasar.errors import ArtifactError, ConfigError, MissingExtraError
from lasar.serving.database import open_database
from lasar.serving.events import Event, EventStore, RunUsers


@pytest.fixture
def store(database):
    engine = open_database(database)
    yield EventStore(engine)
    engine.dispose()


def event(user="ann", items=("a",), when=1.0, name=None):
    return Event(user_id=user, items=items, time=when, event_id=name)


def test_orders_come_back_in_order_of_time_then_arrival(store):
    store.append([event(items=["b", "c"], when=2), event(items=["a"], when=1), event(user="bob")])
    store.append([event(items=["d"], when=2)])
    assert store.history("ann") == [["a"], ["b", "c"], ["d"]]
    assert store.history("cid") == []


def test_a_named_event_is_stored_once(store):
    first, other = event(name="x"), event(items=["z"], name="x")
    assert store.append([first, other, event(), event(name="y")]) == 3
    assert store.append([other, event(name="y")]) == 0
    assert store.history("ann") == [["a"], ["a"], ["a"]]


def test_named_events_from_many_threads_are_stored_once(store):
    counts = []

    def send():
        for number in range(5):
            counts.append(store.append([event(name=f"e{number}"), event(user="bob", name=f"f{number}")]))

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == store.count() == 10


def test_old_events_expire(store):
    now = time.time()
    store.append([event(when=now - 3 * 86400), event(items=["new"], when=now - 86400)])
    assert store.expire(2) == 1
    assert store.history("ann") == [["new"]]


def test_a_forgotten_user_leaves_no_trace_in_the_file(store, database):
    store.append([event(user="ann-4711", items=["secret-item"])])
    assert store.forget("ann-4711") == 1
    assert store.is_forgotten("ann-4711")
    assert not store.is_forgotten("bob")
    path = database.removeprefix("sqlite:///")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = Path(path).read_bytes()
    assert b"ann-4711" not in content
    assert b"secret-item" not in content


def test_sqlite_syncs_at_every_commit(database):
    engine = open_database(database)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    engine.dispose()


def test_errors_quote_no_values(store):
    with pytest.raises(IntegrityError, match="NOT NULL") as raised:
        store.append([event(items=["secret-item"], user=None)])
    assert "secret-item" not in str(raised.value)


def test_databases_that_cannot_be_used(tmp_path):
    with pytest.raises(ConfigError, match="--database"):
        open_database("not a url")
    with pytest.raises((ConfigError, MissingExtraError), match="--database"):
        open_database("postgresql+nodriver://localhost/x")
    (tmp_path / "text.sqlite").write_text("this is no database, and long enough to be seen as none " * 20)
    with pytest.raises(ArtifactError, match="cannot be used"):
        open_database(f"sqlite:///{tmp_path / 'text.sqlite'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        open_database(f"sqlite:///{tmp_path / 'file' / 'x.sqlite'}")


def test_a_database_of_another_format_is_refused(database):
    engine = open_database(database)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE lasar_format SET format = 7")
    engine.dispose()
    with pytest.raises(ArtifactError, match="format 7"):
        open_database(database)


def test_users_of_the_run(run, shop, tmp_path):
    users = RunUsers(run / "prepare", shop.items)
    assert users.user_ids == ["ann", "bob", "cid"]
    for user, orders in shop.histories.items():
        assert users.history(user) == [[shop.items[item] for item in order] for order in orders]
    assert users.history("dan") is None
    assert RunUsers(tmp_path, shop.items).history("ann") is None  # an export without users
