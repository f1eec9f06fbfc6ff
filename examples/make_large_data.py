"""Write the event log of a large made-up shop, part by part: what does a stage need for a hundred million events?

Users come back at random, items are popular by a power law and lie on a line; a user likes what is near his place on
it. Parts follow in time, as a log's do, and are written as they are made: memory does not depend on how many there are.
Beside them items.parquet with titles, and vectors.parquet, one vector for each item.

Usage: python examples/make_large_data.py OUT [--items 1000000] [--users 5000000] [--events 100000000]
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl

PART = 5_000_000  # events
NEAR = 0.002  # of the line: how far from his place a user looks
WIDTH = 64  # of the vectors
START = 1_600_000_000  # Unix seconds of the first event


def part(number: int, events: int, *, items: int, users: int, seconds: int, seed: int) -> pl.DataFrame:
    """Events of one part, in time order; a function of the seed and its number."""
    rng = np.random.default_rng((seed, number))
    user = rng.integers(0, users, events)
    # Half of the choices are near the user's place, half are what is popular with everybody.
    near = (user / users + rng.normal(0.0, NEAR, events)) % 1.0
    popular = rng.random(events) ** 4
    item = (np.where(rng.random(events) < 0.5, near, popular) * items).astype(np.int64)
    time = np.sort(rng.integers(0, seconds, events)) + START + number * seconds
    return pl.DataFrame(
        {
            "user_id": pl.Series(user).cast(pl.String).str.zfill(8).str.replace("^", "u"),
            "item_id": pl.Series(item).cast(pl.String).str.zfill(8).str.replace("^", "i"),
            "timestamp": time,
        }
    )


def main() -> None:
    """Write the shop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=5_000_000)
    parser.add_argument("--events", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    (options.out / "events").mkdir(parents=True, exist_ok=True)
    number = np.arange(options.items)
    ids = pl.Series(number).cast(pl.String).str.zfill(8)
    shelf = pl.Series(number * 1000 // options.items).cast(pl.String)
    pl.DataFrame({"item_id": "i" + ids, "title": "item " + ids + " of shelf " + shelf}).write_parquet(
        options.out / "items.parquet"
    )
    rng = np.random.default_rng((options.seed, -1 % 2**32))
    frequencies = rng.normal(0.0, 30.0, WIDTH // 2)
    angles = number[:, None] / options.items * frequencies * 2 * np.pi
    vectors = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    vectors = (vectors + rng.normal(0.0, 0.2, vectors.shape)).astype(np.float32)
    pl.DataFrame({"item_id": "i" + ids, "vector": vectors}).write_parquet(options.out / "vectors.parquet")
    sizes = [min(PART, options.events - start) for start in range(0, options.events, PART)]
    for place, events in enumerate(sizes):
        part(
            place, events, items=options.items, users=options.users, seconds=86_400, seed=options.seed
        ).write_parquet(options.out / "events" / f"part-{place:05d}.parquet")
        print(f"part {place + 1} of {len(sizes)}", flush=True)


if __name__ == "__main__":
    main()
