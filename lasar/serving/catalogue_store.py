"""Catalogue versions in the database: an append-only chain of changes.

Version 0 is the catalogue as trained. Every other version has a parent and the changes against it, so going back is one
more version whose parent is the old one, and nothing is ever overwritten. Two workers that write at once collide on the
version number; the second one looks again and tries anew.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, func, insert, select
from sqlalchemy.exc import IntegrityError

from lasar.serving.database import added_table, switched_table, versions_table


class NewItem(NamedTuple):
    """An item that came after training.

    Attributes:
        item_id: the shop's id.
        title: shown.
        text: what it was embedded by.
        codes: its semantic ID.
        vector: float32 [E].
    """

    item_id: str
    title: str
    text: str
    codes: tuple[int, ...]
    vector: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class CatalogueState:
    """What a version adds to the trained catalogue.

    Attributes:
        version: its number.
        added: items after the trained ones, in order.
        inactive: ids never to recommend.
    """

    version: int
    added: tuple[NewItem, ...] = ()
    inactive: frozenset[str] = frozenset()


class VersionRow(NamedTuple):
    """One line of the chain."""

    version: int
    parent: int
    action: str
    created: float


class VersionTakenError(Exception):
    """Another writer made this version first."""


class CatalogueStore:
    """Reads and appends versions of one trained catalogue."""

    def __init__(self, engine: Engine, *, catalogue: str) -> None:
        """Use an open database; `catalogue` is the content hash of the trained catalogue."""
        self._engine, self._catalogue = engine, catalogue

    def head(self) -> int:
        """The newest version; 0 where nothing was ever changed."""
        query = select(func.max(versions_table.c.version)).where(
            versions_table.c.catalogue == self._catalogue
        )
        with self._engine.connect() as connection:
            return connection.scalar(query) or 0

    def versions(self) -> list[VersionRow]:
        """All versions but 0, oldest first."""
        table = versions_table
        query = (
            select(table.c.version, table.c.parent, table.c.action, table.c.created)
            .where(table.c.catalogue == self._catalogue)
            .order_by(table.c.version)
        )
        with self._engine.connect() as connection:
            return [VersionRow(*row) for row in connection.execute(query)]

    def state(self, version: int) -> CatalogueState | None:
        """A version in full, or None if there is no such version."""
        parents = {row.version: row.parent for row in self.versions()}
        chain: list[int] = []
        at = version
        while at != 0:
            if at not in parents:
                return None
            chain.append(at)
            at = parents[at]
        added: list[NewItem] = []
        inactive: set[str] = set()
        with self._engine.connect() as connection:
            additions = self._additions(connection)
            switches = self._switches(connection)
        for step in reversed(chain):
            added += additions.get(step, [])
            for item_id, active in switches.get(step, []):
                if active:
                    inactive.discard(item_id)
                else:
                    inactive.add(item_id)
        return CatalogueState(version=version, added=tuple(added), inactive=frozenset(inactive))

    def append(
        self,
        version: int,
        *,
        parent: int,
        action: str,
        added: Sequence[NewItem] = (),
        switched: Sequence[tuple[str, bool]] = (),
    ) -> None:
        """Make `version`, in one transaction.

        Raises:
            VersionTakenError: it exists already.
        """
        key = {"catalogue": self._catalogue, "version": version}
        try:
            with self._engine.begin() as connection:
                row = key | {"parent": parent, "action": action, "created": time.time()}
                connection.execute(insert(versions_table).values(row))
                if added:
                    connection.execute(
                        insert(added_table),
                        [
                            key
                            | {
                                "position": position,
                                "item_id": item.item_id,
                                "title": item.title,
                                "text": item.text,
                                "codes": json.dumps(item.codes),
                                "vector": item.vector.astype("<f4").tobytes(),
                            }
                            for position, item in enumerate(added)
                        ],
                    )
                if switched:
                    rows = [key | {"item_id": item_id, "active": active} for item_id, active in switched]
                    connection.execute(insert(switched_table), rows)
        except IntegrityError:
            raise VersionTakenError from None

    def _additions(self, connection: Connection) -> dict[int, list[NewItem]]:
        table = added_table
        query = (
            select(table)
            .where(table.c.catalogue == self._catalogue)
            .order_by(table.c.version, table.c.position)
        )
        found: dict[int, list[NewItem]] = {}
        for row in connection.execute(query):
            item = NewItem(
                row.item_id,
                row.title,
                row.text,
                tuple(json.loads(row.codes)),
                np.frombuffer(row.vector, "<f4"),
            )
            found.setdefault(row.version, []).append(item)
        return found

    def _switches(self, connection: Connection) -> dict[int, list[tuple[str, bool]]]:
        table = switched_table
        found: dict[int, list[tuple[str, bool]]] = {}
        for row in connection.execute(select(table).where(table.c.catalogue == self._catalogue)):
            found.setdefault(row.version, []).append((row.item_id, row.active))
        return found
