"""`lasar score` in two processes against one, of a trained run, one thread each; wall time, in turns.

Time includes starting the processes and opening the model in each. `parity`: the same items in the same order for
every user. Of all lists, as long as the beam is wide: `unknown` items that the catalogue does not have, and `repeated`
ones; both must be 0. What else the machine does falls on both; two cores must be free for the ratio to mean anything.

Usage: python benchmarks/score.py --run runs/beauty [--users 8000] [--rounds 3]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import polars as pl

# Before PyTorch is imported, here and in the processes that are started.
os.environ["OMP_NUM_THREADS"] = "1"

from lasar.data.interactions import ItemTable, load_user_ids
from lasar.scoring import Scoring, read_scores, score_users

K = 50


def main() -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--users", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        users = Path(scratch) / "users.parquet"
        known = load_user_ids(options.run / "prepare")[: options.users]
        pl.DataFrame({"user_id": known}).write_parquet(users)
        tables = {}
        for number in range(options.rounds):
            for processes in seconds:
                out = Path(scratch) / f"{processes}-{number}"
                began = time.perf_counter()
                score_users(
                    options.run, out, scoring=Scoring(k=K, part_users=500), users=users, processes=processes
                )
                seconds[processes].append(time.perf_counter() - began)
                tables[processes] = read_scores(out)
    one, two = (statistics.median(seconds[processes]) for processes in (1, 2))
    line = {
        "benchmark": "score", "ratio": round(one / two, 2), "baseline": "one process, one thread",
        "parity": tables[1].drop("scores").equals(tables[2].drop("scores")), "users": len(known),
        "users_per_second": round(len(known) / two, 1), "baseline_users_per_second": round(len(known) / one, 1),
        **checked(tables[2]["items"], set(ItemTable.load(options.run / "prepare").item_ids)),
    }  # fmt: skip
    print(json.dumps(line))


def checked(lists: pl.Series, catalogue: set[str]) -> dict[str, int]:
    """How many recommendations there are, and how many should not be."""
    found = lists.explode()
    return {
        "recommendations": len(found), "unknown": sum(item not in catalogue for item in found),
        "repeated": len(found) - int(lists.list.n_unique().sum()),
    }  # fmt: skip


if __name__ == "__main__":
    main()
