"""Top-K lists for many users at once: one Parquet part per shard, each user exactly once, resumable.

The parts of a plan are independent. Each is ranked by whichever process is free and appears by one rename when it is
complete, so whatever is killed, the same command goes on with the parts that are missing.

Shapes: Q users of a part, K rank positions.
"""

import hashlib
import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from lasar.artifacts import content_hash, exclusive, read_json, write_json
from lasar.data.interactions import Interactions, load_user_ids
from lasar.errors import ArtifactError, ConfigError, DataError, UnknownItemError, nearest, reason_of
from lasar.model.precision import PrecisionChoice
from lasar.model.reasoner import Depth
from lasar.progress import progress
from lasar.recommender import Recommender, last_trained

PLAN, SUMMARY = "plan.json", "summary.json"
_TYPES: list[tuple[str, pl.DataType]] = [
    ("user_id", pl.String()), ("items", pl.List(pl.String())), ("scores", pl.List(pl.Float32())),
    ("depth", pl.Int32()),
]  # fmt: skip
SCHEMA = pl.Schema(_TYPES)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is asked for; with the model and the users, it decides every part.

    Attributes:
        k: length of the lists.
        beam_width: beams of the search; at least `k`.
        exclude_seen: leave out items of the history.
        depth: latent steps before answering; see `Recommender.recommend`.
        seed: of a `sampled` depth.
        precision: on CPUs; see `Recommender.load`.
        part_users: users of a part.
    """

    k: int = 20
    beam_width: int = 50
    exclude_seen: bool = False
    depth: Depth = "auto"
    seed: int = 0
    precision: PrecisionChoice = "fp32"
    part_users: int = 2000


class Opened(NamedTuple):
    """What a process that ranks has to open.

    Attributes:
        run: a run folder, or an exported one.
        stage: its training stage.
        device: see `Recommender.load`.
        scoring: what is asked for.
    """

    run: Path
    stage: str
    device: str
    scoring: Scoring


class Users(NamedTuple):
    """Whom to score.

    Attributes:
        ids: distinct.
        histories: item indices of each, oldest first.
        baskets: their order numbers.
    """

    ids: list[str]
    histories: list[NDArray[np.int32]]
    baskets: list[NDArray[np.int32]]

    def part(self, rows: range) -> "Users":
        """Some of them."""
        return Users(*([values[row] for row in rows] for values in self))  # type: ignore[arg-type]


# Parts, by number, to their lists, in any order: what ranks, elsewhere than in this process.
Part = tuple[int, Users]
RankParts = Callable[[Iterator[Part], Opened, int], Iterator[tuple[int, pl.DataFrame]]]


def score_users(
    run: Path,
    out: Path,
    *,
    scoring: Scoring,
    users: Path | None = None,
    model: str | None = None,
    device: str = "auto",
    processes: int = 1,
    elsewhere: RankParts | None = None,
) -> dict[str, int | float]:
    """Write the lists of all users into `part-*.parquet` and what was done into `summary.json`.

    Args:
        run: a run folder, or an exported one.
        out: folder of the parts; made, or continued.
        scoring: what is asked for.
        users: file of users, see `read_users`; all of the event log by default.
        model: training stage; the last by default.
        device: see `Recommender.load`.
        processes: how many rank at the same time; each has its own model and its share of the cores.
        elsewhere: ranks parts in `processes` other processes; by default this one and others of this machine.

    Returns:
        The summary.

    Raises:
        ConfigError: a setting is out of range, or `out` holds another scoring.
        DataError: the users' file is wrong.
        ArtifactError: the run is not usable, or a process died.
    """
    for name, value in (("k", scoring.k), ("processes", processes), ("part_users", scoring.part_users)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    if scoring.k > scoring.beam_width:
        raise ConfigError(
            f"k={scoring.k} exceeds beam_width={scoring.beam_width}; raise the beam width or lower k"
        )
    stage = model or last_trained(run)
    recommender = Recommender.load(run, model=stage, device=device, precision=scoring.precision)
    asked = read_users(users, recommender=recommender, prepare=run / "prepare")
    plan = {
        "model": stage, "model_content": content_hash(run / stage), "catalog_content": content_hash(run / "quantize"),
        "users_content": _digest(asked), "num_users": len(asked.ids), **asdict(scoring),
    }  # fmt: skip
    _refuse_other(out, plan)
    with exclusive(out, who="this scoring", elsewhere="choose another folder with --out"):
        write_json(out / PLAN, plan)
        opened = Opened(run, stage, device, scoring)
        if elsewhere is not None:
            return _score(out, asked, scoring.part_users, lambda parts: elsewhere(parts, opened, processes))
        return _score(out, asked, scoring.part_users, partial(_with_others, recommender, opened, processes))


def _score(
    out: Path,
    asked: Users,
    part_users: int,
    rank: Callable[[Iterator[Part]], Iterator[tuple[int, pl.DataFrame]]],
) -> dict[str, int | float]:
    rows = [
        range(start, min(start + part_users, len(asked.ids)))
        for start in range(0, len(asked.ids), part_users)
    ]
    files = [out / f"part-{number:05d}-of-{len(rows):05d}.parquet" for number in range(len(rows))]
    missing = [number for number, file in enumerate(files) if not file.is_file()]
    started, left = time.perf_counter(), sum(len(rows[number]) for number in missing)
    with progress("scoring", total=len(asked.ids), start=len(asked.ids) - left, unit="users") as advance:
        for number, table in (
            rank((number, asked.part(rows[number])) for number in missing) if missing else ()
        ):
            _write(files[number], table)
            advance(len(table))
    seconds = time.perf_counter() - started
    summary = {
        "users": len(asked.ids), "parts": len(files), "parts_of_this_call": len(missing),
        "seconds_of_this_call": round(seconds, 2), "users_per_second": round(left / max(seconds, 1e-9), 2),
    }  # fmt: skip
    write_json(out / SUMMARY, summary)
    return summary


def read_users(path: Path | None, *, recommender: Recommender, prepare: Path) -> Users:
    """Users and their histories.

    Args:
        path: `.txt` with one user id a line, or `.csv` or `.parquet` with a column `user_id`; a Parquet file may have a
            column `items`, lists of item ids, oldest first, for users whom the event log does not know. None: every
            user of the event log.
        recommender: knows the items.
        prepare: artifact with the event log.

    Raises:
        DataError: the file is missing, unreadable or names somebody twice; a user or an item is unknown.
    """
    ids, histories = (None, None) if path is None else _read_file(path)
    if histories is not None and ids is not None:
        try:
            indexed = [recommender.indices(history)[0] for history in histories]
        except UnknownItemError as error:
            raise DataError(f"{path}: {error}") from None
        return Users(ids, indexed, [np.arange(len(items), dtype=np.int32) for items in indexed])
    if not (prepare / "interactions.parquet").is_file() and not (prepare / "users.parquet").is_file():
        raise DataError(f"{prepare}: has no event log; give --users a Parquet file with the column 'items'")
    known, events = load_user_ids(prepare), Interactions.load(prepare)
    number_of = {user: number for number, user in enumerate(known)}
    ids = known if ids is None else ids
    for row, user in enumerate(ids):
        if user not in number_of:
            raise DataError(f"{path}: row {row + 1}: no user {user!r} in the event log{nearest(user, known)}")
    numbers = np.array([number_of[user] for user in ids], dtype=np.int64)
    first, last = np.searchsorted(events.user_index, numbers), np.searchsorted(events.user_index, numbers + 1)
    return Users(
        ids,
        [events.item_index[a:b] for a, b in zip(first, last, strict=True)],
        [events.basket[a:b] for a, b in zip(first, last, strict=True)],
    )


def rank_part(recommender: Recommender, users: Users, scoring: Scoring) -> pl.DataFrame:
    """The lists of some users, best item first; a row each, in their order."""
    items_QK, scores_QK, depths_Q = recommender.rank(
        users.histories, users.baskets, k=scoring.k, beam_width=scoring.beam_width,
        exclude_seen=scoring.exclude_seen, depth=scoring.depth, seed=scoring.seed,
    )  # fmt: skip
    names = recommender.items.item_ids
    found = [items_Q[items_Q >= 0] for items_Q in items_QK]
    return pl.DataFrame(
        {
            "user_id": users.ids,
            "items": [[names[item] for item in items] for items in found],
            "scores": [scores[: len(items)].tolist() for items, scores in zip(found, scores_QK, strict=True)],
            "depth": depths_Q,
        },
        schema=SCHEMA,
    )


def _read_file(path: Path) -> tuple[list[str], list[list[str]] | None]:
    try:
        if path.suffix == ".txt":
            table = pl.DataFrame(
                {"user_id": path.read_text(encoding="utf-8").split()}, schema={"user_id": pl.String}
            )
        elif path.suffix == ".csv":
            table = pl.read_csv(path, infer_schema=False)
        elif path.suffix == ".parquet":
            table = pl.read_parquet(path)
        else:
            raise DataError(f"{path}: expected .txt, .csv or .parquet")
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not readable: {error}") from None
    if "user_id" not in table.columns:
        raise DataError(f"{path}: no column 'user_id'; there are: {', '.join(table.columns)}")
    if len(table) == 0:
        raise DataError(f"{path}: names no user")
    users = table["user_id"].cast(pl.String)
    if users.null_count():
        raise DataError(f"{path}: row {int(users.is_null().arg_max() or 0) + 1}: user_id is empty")
    if users.n_unique() < len(users):
        twice = users.filter(users.is_duplicated())[0]
        raise DataError(f"{path}: names user {twice!r} twice")
    if "items" not in table.columns:
        return users.to_list(), None
    if table["items"].dtype != pl.List(pl.String):
        raise DataError(
            f"{path}: column 'items' is {table['items'].dtype}; expected lists of item ids (strings)"
        )
    return users.to_list(), [history or [] for history in table["items"].to_list()]


def _refuse_other(out: Path, plan: dict[str, object]) -> None:
    """Refuse a folder that holds anything but this very scoring."""
    if not out.is_dir() or not any(file.name != ".lock" for file in out.iterdir()):
        return
    if not (out / PLAN).is_file():
        raise ConfigError(f"{out}: holds something else; choose a new folder")
    there = read_json(out / PLAN)
    for key, value in plan.items():
        if there.get(key) != value:
            raise ConfigError(
                f"{out}: holds a scoring with {key}={there.get(key)}, asked for is {value}; choose another folder"
            )


def _digest(users: Users) -> str:
    digest = hashlib.sha256()
    for user, items, baskets in zip(*users, strict=True):
        digest.update(f"{user}\n{len(items)}\n".encode() + items.tobytes() + baskets.tobytes())
    return digest.hexdigest()


def _write(file: Path, table: pl.DataFrame) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        table.write_parquet(partial, compression="zstd")
    except (OSError, pl.exceptions.PolarsError) as error:
        partial.unlink(missing_ok=True)
        raise ArtifactError(
            f"{file}: cannot be written: {reason_of(error)}; finished parts are kept"
        ) from None
    partial.replace(file)


_loaded: tuple[Recommender, Scoring] | None = None  # of a worker process


def _open(parent: int, threads: int, opened: Opened) -> None:
    global _loaded  # a process pool has no other place
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    _loaded = load(opened), opened.scoring


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, killed perhaps: nobody would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def load(opened: Opened) -> Recommender:
    """What a process ranks with."""
    return Recommender.load(
        opened.run, model=opened.stage, device=opened.device, precision=opened.scoring.precision
    )


def _work(number: int, users: Users) -> tuple[int, pl.DataFrame]:
    assert _loaded is not None
    recommender, scoring = _loaded
    return number, rank_part(recommender, users, scoring)


def _with_others(
    recommender: Recommender, opened: Opened, processes: int, parts: Iterator[Part]
) -> Iterator[tuple[int, pl.DataFrame]]:
    """Rank parts here and in other processes; this one is at it while the others are still starting."""
    left = deque(parts)
    others = min(processes, len(left)) - 1
    if others < 1:
        for number, users in left:
            yield number, rank_part(recommender, users, opened.scoring)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // (others + 1)))
    pool = ProcessPoolExecutor(
        others, mp_context=multiprocessing.get_context("spawn"), initializer=_open,
        initargs=(os.getpid(), torch.get_num_threads(), opened),
    )  # fmt: skip
    given: set[Future[tuple[int, pl.DataFrame]]] = set()
    try:
        while left:
            # One for each of the others and, unless it ends soon, one that waits for whoever is first.
            if len(given) < others + (len(left) > others + 1):
                given.add(pool.submit(_work, *left.popleft()))
                continue
            number, users = left.popleft()
            yield number, rank_part(recommender, users, opened.scoring)
            done, given = wait(given, timeout=0)
            yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(given))
    except BrokenProcessPool:
        raise ArtifactError(
            "a scoring process died (killed, or out of memory); finished parts are kept, the same command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _number_of(part: Path) -> int:
    return int(part.name.split("-")[1])


def read_scores(out: Path) -> pl.DataFrame:
    """All finished parts of a scoring, in the order of its users.

    Raises:
        ArtifactError: it is not complete.
    """
    if not (out / SUMMARY).is_file():
        raise ArtifactError(f"{out}: no complete scoring; run the same `lasar score` again")
    return pl.concat([pl.read_parquet(file) for file in sorted(out.glob("part-*.parquet"), key=_number_of)])
