"""What ten million items, a hundred million users and a billion events would take: memory, hours, replicas.

Nothing here is run at that size. Bytes follow from the data structures; training hours from the operations of a
decoder, a GPU's measured peak and an assumed share of it; replicas from a simulated queue: requests arrive at random,
a replica takes what is waiting (up to a batch) and is busy for `fixed + each * batch`. Constants that were measured
say where; the assumed ones are marked so in the output.

Usage: python benchmarks/scale_model.py [--items 10000000] [--users 100000000] [--events 1000000000] [--rate 10000]
"""

import argparse
import json
from dataclasses import dataclass

import numpy as np

GB, LEVELS, HISTORY = 1e9, 4, 50
LATENT_STEPS, BEAM = 4, 50
PEAK = 798e12  # FLOP/s of one H100 in bf16: an 8192 x 8192 x 8192 product of random numbers, measured
BANDWIDTH = 3.0e12  # bytes/s, device to device, read and written, measured on the same card
SHARE_TRAINING, SHARE_SERVING = 0.35, 0.5  # of the peak and of the bandwidth: assumed
EPOCHS = 2
DEADLINE = 0.050


@dataclass(frozen=True)
class Model:
    """A decoder.

    Attributes:
        name: of the size.
        layers: N.
        width: hidden size.
        inner: of the MLP.
        key_share: key and value heads as a share of query heads.
    """

    name: str
    layers: int
    width: int
    inner: int
    key_share: float

    @property
    def weights(self) -> float:
        """Parameters without any table of tokens."""
        attention = self.width**2 * (2 + 2 * self.key_share)
        return self.layers * (attention + 3 * self.width * self.inner)


MODELS = (
    Model("1M", 4, 128, 512, 1.0),
    Model("0.6B", 28, 1024, 3072, 1.0),
    Model("1.7B", 28, 2048, 6144, 0.5),
)


def memory(items: int, users: int, events: int, *, codebook: int, model: Model) -> dict[str, float]:
    """Gigabytes of what has to be held or stored."""
    trie = 8 * (
        2 * items + 2 * items + LEVELS * items
    )  # leaves, both orders, the node of each item on each level
    rows = events - 2 * users  # leave-one-out
    return {
        "catalogue of codes": 4 * LEVELS * items / GB,
        "trie": trie / GB,
        "item vectors, 480 wide, fp32": 4 * 480 * items / GB,
        "tables of codes, both, fp32": 2 * 4 * LEVELS * codebook * model.width / GB,
        "tables of item tokens, both, fp32": 2 * 4 * items * model.width / GB,
        "the same while training (Adam, gradients)": 4 * 2 * 4 * items * model.width / GB,
        "events as Parquet": 8 * events / GB,
        "anchors, every row its own": 3.8 * 4 * rows * model.width / GB,
        "anchors, equal words shared": 4 * min(5e7, 3.8 * rows) * model.width / GB,
    }


def training_hours(model: Model, *, users: int, events: int) -> dict[str, float]:
    """H100 hours of one pass over the data, and of the stages with their passes."""
    tokens = LEVELS * events
    length = min(HISTORY, events / users) * LEVELS
    each = 6 * model.weights + 12 * model.layers * model.width * length / 2
    stage_1 = tokens * each
    steps = 1 + LATENT_STEPS + LEVELS  # a branch at every event: latent steps, the answer
    stage_2 = events * steps * (6 * model.weights + 12 * model.layers * model.width * length)
    hours = PEAK * SHARE_TRAINING * 3600
    return {
        "stage 1, one pass": stage_1 / hours,
        f"stage 1, {EPOCHS} passes": EPOCHS * stage_1 / hours,
        "stage 2, one pass, a branch at every event": (stage_1 + stage_2) / hours,
        "stage 2, a tenth of the events": (stage_1 + stage_2 / 10) / hours,
    }


def gpu_seconds(model: Model, batch: int, *, items_in_history: int = 30) -> float:
    """Seconds that one GPU is busy with a batch: the larger of moving weights and multiplying, for every pass."""
    tokens = {"prompt": items_in_history * LEVELS, "latent": 1, "beam": BEAM}
    passes = {"prompt": 1, "latent": LATENT_STEPS + 1, "beam": LEVELS - 1}
    total = 0.0
    for kind, count in passes.items():
        move = 2 * model.weights / (BANDWIDTH * SHARE_SERVING)
        multiply = 2 * model.weights * tokens[kind] * batch / (PEAK * SHARE_SERVING)
        total += count * max(move, multiply)
    return total


@dataclass(frozen=True)
class Replica:
    """How long a batch takes: `fixed + each * batch` seconds.

    Attributes:
        name: what it runs on.
        fixed: seconds.
        each: seconds a request.
        batch: requests at most.
        source: where the constants come from.
    """

    name: str
    fixed: float
    each: float
    batch: int
    source: str


def p99_seconds(replica: Replica, rate: float, *, requests: int = 40_000, seed: int = 0) -> float:
    """99th percentile of waiting and service of one replica, requests arriving at random."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
    waited, now, first = np.empty(requests), 0.0, 0
    while first < requests:
        now = max(now, arrivals[first])
        last = min(int(np.searchsorted(arrivals, now, side="right")), first + replica.batch)
        now += replica.fixed + replica.each * (last - first)
        waited[first:last] = now - arrivals[first:last]
        first = last
    return float(np.quantile(waited, 0.99))


def rate_within(replica: Replica, deadline: float) -> float:
    """Requests a second that one replica answers with 99 of 100 within the deadline; 0 where none is."""
    low, high = 0.0, replica.batch / (replica.fixed + replica.each * replica.batch)
    for _ in range(20):
        rate = (low + high) / 2
        low, high = (rate, high) if p99_seconds(replica, rate) <= deadline else (low, rate)
    return low


def replicas() -> list[Replica]:
    """What was timed on a CPU, and what a GPU's roofline gives."""
    found = [
        Replica(
            "0.5M (4M with item rows), one CPU thread",
            5.6e-3,
            1.13e-3,
            32,
            "measured: 6.7 ms alone, 1.3 of 32",
        ),
    ]
    for model in MODELS[1:]:
        one, many = gpu_seconds(model, 1), gpu_seconds(model, 64)
        each = (many - one) / 63
        found.append(Replica(f"{model.name}, one H100", one - each, each, 64, "roofline at an assumed half"))
    return found


def main() -> None:
    """Print JSON lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=100_000_000)
    parser.add_argument("--events", type=int, default=1_000_000_000)
    parser.add_argument("--rate", type=float, default=10_000, help="requests a second")
    options = parser.parse_args()
    for model in MODELS:
        size = memory(options.items, options.users, options.events, codebook=1024, model=model)
        print(json.dumps({"model": model.name, "gigabytes": {k: round(v, 2) for k, v in size.items()}}))
    for model in MODELS[1:]:  # the smallest is bound by launches, not by arithmetic
        hours = training_hours(model, users=options.users, events=options.events)
        print(json.dumps({"model": model.name, "h100_hours": {k: round(v, 1) for k, v in hours.items()}}))
    for replica in replicas():
        rate = rate_within(replica, DEADLINE)
        line = {
            "replica": replica.name, "requests_per_second_at_p99_50_ms": round(rate, 1),
            "replicas": int(np.ceil(options.rate / rate)) if rate else None, "constants": replica.source,
        }  # fmt: skip
        print(json.dumps(line))


if __name__ == "__main__":
    main()
