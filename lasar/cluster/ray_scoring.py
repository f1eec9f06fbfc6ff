"""Scoring with Ray Data: parts go to actors wherever the cluster has room, lists come back and are written here.

A worker that dies is replaced and its part ranked again; nothing is written twice, because only this process writes.
Every machine needs lasar and the run folder at the same path.
"""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import polars as pl
import torch

from lasar.errors import ArtifactError, LasarError, require
from lasar.scoring import Opened, Part, Users, load, rank_part

# Of a Ray that is started here, unless somebody asked for something else: no statistics to anybody, no log on stderr.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
_USERS = ("user_id", "items", "baskets")


class RayRanking:
    """An actor that ranks parts with a model of its own."""

    def __init__(self, opened: Opened) -> None:
        """Open the run."""
        torch.set_num_threads(1)  # Ray gave this actor one core
        self.recommender, self.scoring = load(opened), opened.scoring

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Lists of a part."""
        return {
            "number": row["number"],
            "lists": to_bytes(rank_part(self.recommender, users_of(row["users"]), self.scoring)),
        }


def in_ray(parts: Iterator[Part], opened: Opened, processes: int) -> Iterator[tuple[int, pl.DataFrame]]:
    """Rank parts in a Ray cluster (`RAY_ADDRESS`), or in a Ray of this machine where none is named.

    Args:
        parts: to rank.
        opened: what every actor opens.
        processes: actors at most.

    Raises:
        ArtifactError: Ray could not finish; parts that came back are kept.
        MissingExtraError: Ray is not installed.
    """
    ray = require("ray", extra="ray")
    data = require("ray.data", extra="ray")
    rows = [{"number": number, "users": users_bytes(users)} for number, users in parts]
    with connected(ray):
        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts users
        ranked = data.from_items(rows, override_num_blocks=len(rows)).map(
            RayRanking,
            fn_constructor_args=(opened._replace(run=opened.run.absolute()),),
            num_cpus=1,
            num_gpus=1 if opened.device == "cuda" else 0,
            compute=data.ActorPoolStrategy(min_size=1, max_size=max(1, min(processes, len(rows)))),
        )
        try:
            for row in ranked.iter_rows():
                yield int(row["number"]), pl.read_ipc(io.BytesIO(row["lists"]))
        except LasarError:
            raise
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise ArtifactError(
                f"Ray could not finish: {last}; parts that came back are kept, the same command goes on"
            ) from None


@contextmanager
def connected(ray: Any) -> Iterator[None]:
    """A Ray to work with: the one that is there already, that of `RAY_ADDRESS`, or one of this machine for as long."""
    if ray.is_initialized():
        yield
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def to_bytes(table: pl.DataFrame) -> bytes:
    """A table as an Arrow file."""
    out = io.BytesIO()
    table.write_ipc(out, compression="zstd")
    return out.getvalue()


def users_bytes(users: Users) -> bytes:
    """Users as an Arrow file."""
    lists = dict.fromkeys(_USERS[1:], pl.List(pl.Int32))
    return to_bytes(pl.DataFrame(dict(zip(_USERS, users, strict=True)), schema_overrides=lists))


def users_of(table: bytes) -> Users:
    """Inverse of `users_bytes`."""
    found = pl.read_ipc(io.BytesIO(table))
    items, baskets = ([values.to_numpy() for values in found[name]] for name in _USERS[1:])
    return Users(found["user_id"].to_list(), items, baskets)
