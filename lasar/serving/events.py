"""Histories that grow while the server runs, and the users of the run's own event log.

An acknowledged event is on disk. A user can be deleted, old events can be made to expire, and nothing here logs an id.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sqlalchemy import Engine, delete, func, insert, select
from sqlalchemy.exc import IntegrityError

from lasar.data.interactions import Interactions, load_user_ids
from lasar.serving.database import events_table, forgotten_table

Orders = list[list[str]]

_ATTEMPTS = 5
_MAX_ORDERS = 1000  # newest orders of a user that are read


@dataclass(frozen=True, kw_only=True)
class Event:
    """One order of a user.

    Attributes:
        user_id: who.
        items: item ids taken together, at least one.
        time: seconds since 1970.
        event_id: the sender's name for it; a second event of that name is ignored.
    """

    user_id: str
    items: Sequence[str]
    time: float
    event_id: str | None = None


class EventStore:
    """Events in the database."""

    def __init__(self, engine: Engine) -> None:
        """Use an open database."""
        self._engine = engine

    def append(self, events: Sequence[Event]) -> int:
        """Store events in one transaction; they are durable when this returns.

        Returns:
            How many were new; an `event_id` that is already there is not stored again.
        """
        rows: list[dict[str, object]] = [
            {"event_id": e.event_id, "user_id": e.user_id, "items": json.dumps(list(e.items)), "time": e.time}
            for e in events
        ]
        for attempt in range(_ATTEMPTS):
            fresh = self._without_known(rows)
            if not fresh:
                break
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(events_table), fresh)
                return len(fresh)
            except IntegrityError:
                if attempt == _ATTEMPTS - 1:  # else another worker stored one of them since we looked
                    raise
        return 0

    def history(self, user_id: str) -> Orders:
        """Orders of a user, oldest first; the newest 1,000."""
        query = (
            select(events_table.c["items"])
            .where(events_table.c.user_id == user_id)
            .order_by(events_table.c.time.desc(), events_table.c.id.desc())
            .limit(_MAX_ORDERS)
        )
        with self._engine.connect() as connection:
            return [json.loads(items) for (items,) in connection.execute(query)][::-1]

    def forget(self, user_id: str) -> int:
        """Delete a user's events, and never again use what the run's own log says about them."""
        with self._engine.begin() as connection:
            removed = connection.execute(
                delete(events_table).where(events_table.c.user_id == user_id)
            ).rowcount
        try:
            with self._engine.begin() as connection:
                connection.execute(insert(forgotten_table).values(user_hash=_hash(user_id)))
        except IntegrityError:
            pass  # asked before
        return removed

    def is_forgotten(self, user_id: str) -> bool:
        """Whether the user was deleted."""
        query = select(forgotten_table.c.user_hash).where(forgotten_table.c.user_hash == _hash(user_id))
        with self._engine.connect() as connection:
            return connection.scalar(query) is not None

    def expire(self, days: float) -> int:
        """Delete events older than `days`; returns how many."""
        with self._engine.begin() as connection:
            old = events_table.c.time < time.time() - days * 86400
            return connection.execute(delete(events_table).where(old)).rowcount

    def count(self) -> int:
        """Number of stored events; also the cheapest proof that the database answers."""
        with self._engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(events_table)) or 0

    def _without_known(self, rows: list[dict[str, object]]) -> list[dict[str, object]]:
        named = {row["event_id"]: row for row in reversed(rows) if row["event_id"] is not None}
        query = select(events_table.c.event_id).where(events_table.c.event_id.in_(list(named)))
        with self._engine.connect() as connection:
            known = set(connection.scalars(query)) if named else set()
        return [
            row
            for row in rows
            if row["event_id"] is None or (row["event_id"] not in known and named[row["event_id"]] is row)
        ]


class RunUsers:
    """Users of the run's event log; none where an export left them out."""

    def __init__(self, prepare: Path, item_ids: Sequence[str]) -> None:
        """Read users and events of the `prepare` artifact.

        Raises:
            ArtifactError: a file is damaged.
        """
        self._item_ids = item_ids
        self.user_ids: list[str] = []
        present = [(prepare / name).is_file() for name in ("users.parquet", "interactions.parquet")]
        if all(present):
            self.user_ids = load_user_ids(prepare)
            events = Interactions.load(prepare)
            self._items, self._baskets = events.item_index, events.basket
            self._first = np.searchsorted(events.user_index, np.arange(len(self.user_ids) + 1))
        self._index = {user_id: index for index, user_id in enumerate(self.user_ids)}

    def history(self, user_id: str) -> Orders | None:
        """Orders of a user, oldest first; None for a user that the log does not know."""
        index = self._index.get(user_id)
        if index is None:
            return None
        rows = slice(int(self._first[index]), int(self._first[index + 1]))
        items, baskets = self._items[rows], self._baskets[rows]
        splits = np.flatnonzero(np.diff(baskets)) + 1
        orders = np.split(items, splits) if len(items) else []
        return [[self._item_ids[item] for item in order] for order in orders]


def _hash(user_id: str) -> str:
    return hashlib.sha256(user_id.encode("utf-8")).hexdigest()
