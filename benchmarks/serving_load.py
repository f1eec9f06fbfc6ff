"""`lasar serve` under load: batched against one request at a time, three times too much, hours in short, and kill -9.

Server and load generator (locust, headless, processes of their own) share this machine over loopback; what is asked are
real histories of the run. Parts:

- `throughput`: two servers, one of them with `--max-batch 1`, asked in turns by `--users` users who never pause.
  `ratio` is of the medians of answers per second; beside it that of the server's CPU time per answer, which other work
  on the machine disturbs less. With `--workers N` a third server answers in batches with N processes
  (`ratio_workers`).
- `overload`: three times the throughput just measured, at a steady pace. Nothing may crash, memory must stay, accepted
  requests must be answered by the deadline, and the others told when to come back.
- `soak`: 70 % of the throughput for `--minutes`; the slope of resident memory after the first fifth.
- `kill`: orders are sent to two workers, which are killed (SIGKILL) in turns, and at last all processes at once; then
  every acknowledged order must be in the database. Killing processes is no power cut: the disk is not lied to.

Locust is no dependency of ours: `pip install locust` anywhere and name it with `--locust`. `--preset` serves a copy of
the run with random weights of that size: speed does not depend on the weights, but for the depth, so give `--depth` a
number then. One thread (OMP_NUM_THREADS=1) unless told otherwise. Linux only (/proc).

Usage: python benchmarks/serving_load.py --run runs/beauty [--preset 4m --depth 4] [--parts throughput overload kill]
       [--seconds 30] [--rounds 3] [--minutes 10] [--locust locust]
"""

import argparse
import itertools
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the servers

import numpy as np
from _served import Memory, Server, Writer, lost_events, stored_events, with_no_mercy

from lasar.data.interactions import SPLIT_TEST, Interactions, ItemTable
from lasar.errors import ConfigError, LasarError

USERS_FILE = Path(__file__).with_name("_serving_users.py")
WARM_SECONDS = 3.0
OVERLOAD, SOAK = 3.0, 0.7  # of the throughput
Record = tuple[float, float, int, bool]  # start, milliseconds, status (0: no answer), told when to come back


def main() -> None:
    arguments = _arguments()
    if shutil.which(arguments.locust) is None and arguments.parts != ["kill"]:
        raise ConfigError(
            f"--locust {arguments.locust}: no such program; pip install locust, and give its path"
        )
    with tempfile.TemporaryDirectory(prefix="lasar-load-") as name:
        folder = Path(name)
        run: Path = arguments.run
        if arguments.preset:
            run = untrained(run, arguments.preset, folder / "run")
        bodies = folder / "bodies.jsonl"
        bodies.write_text("\n".join(map(json.dumps, requests(run, depth=arguments.depth))), encoding="utf-8")
        bench = Bench(run, folder, bodies, arguments)
        shared = {
            "preset": arguments.preset or "of the run",
            "depth": arguments.depth,
            "cores": os.cpu_count(),
        }
        for part in arguments.parts:
            print(
                json.dumps({"benchmark": "serving_load", "part": part, **getattr(bench, part)(), **shared}),
                flush=True,
            )


class Bench:
    """One run, and the parts of the benchmark."""

    def __init__(self, run: Path, folder: Path, bodies: Path, arguments: argparse.Namespace) -> None:
        """Remember what to serve and what to ask."""
        self.run, self.folder, self.bodies, self.arguments = run, folder, bodies, arguments
        self.per_second: float = arguments.rate

    def throughput(self) -> dict[str, Any]:
        """Answers per second, batched and one at a time, in turns."""
        arguments = self.arguments
        ways = {"batched": ["--max-batch", "32"], "single": ["--max-batch", "1"]}
        if arguments.workers > 1:
            ways["workers"] = ["--max-batch", "32", "--workers", str(arguments.workers)]
        rates: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        facts: dict[str, Any] = {}
        with ExitStack() as stack:
            servers = {
                way: stack.enter_context(
                    Server(self.run, self.folder / way, *options, "--timeout-ms", "60000")
                )
                for way, options in ways.items()
            }
            for _, way in itertools.product(range(arguments.rounds), ways):
                server = servers[way]
                before = server.cpu_seconds()
                records, generator = self.load(server, users=arguments.users, seconds=arguments.seconds)
                answers = sum(record[2] == 200 for record in records)
                assert answers == len(records), Counter(record[2] for record in records)
                rates[way].append(answers_per_second(records))
                cpu[way].append(1e3 * (server.cpu_seconds() - before) / answers)
                facts[f"generator_cpu_ms_{way}"] = round(1e3 * generator / answers, 2)
            for way, server in servers.items():
                size = server.metric("lasar_batch_size_sum") / server.metric("lasar_batch_size_count")
                depth = server.metric("lasar_depth_sum") / server.metric("lasar_depth_count")
                facts |= {f"mean_batch_{way}": round(size, 1), f"mean_depth_{way}": round(depth, 2)}
        middle = {way: statistics.median(values) for way, values in rates.items()}
        self.per_second = middle["batched"]
        if "workers" in middle:
            facts |= {
                "workers": arguments.workers,
                "ratio_workers": round(middle["workers"] / middle["single"], 2),
            }
        return {
            "ratio": round(middle["batched"] / middle["single"], 2),
            "baseline": "the same server with --max-batch 1", "parity": True,
            "cpu_ratio": round(statistics.median(cpu["single"]) / statistics.median(cpu["batched"]), 2),
            **{f"per_second_{way}": [round(value, 1) for value in values] for way, values in rates.items()},
            **{f"cpu_ms_{way}": [round(value, 2) for value in values] for way, values in cpu.items()},
            **facts, "users": arguments.users, "seconds": arguments.seconds,
        }  # fmt: skip

    def overload(self) -> dict[str, Any]:
        """Three times the throughput."""
        deadline = self.arguments.deadline_ms
        rate = OVERLOAD * self._needed("overload")
        with Server(self.run, self.folder / "overload", "--timeout-ms", str(deadline)) as server:
            self.load(server, users=self.arguments.users, seconds=5)  # memory that first requests take
            memory = Memory(server)
            # Enough users that the pace holds even while many of them wait for the deadline.
            users = math.ceil(rate * (deadline / 1000 + 0.5))
            records, _ = self.load(server, users=users, seconds=self.arguments.seconds, pace=rate / users)
            used = memory.stop()
            alive = server.ready()
            size = server.metric("lasar_batch_size_sum") / server.metric("lasar_batch_size_count")
        return {
            **outcome(records, deadline_ms=deadline), "asked_per_second": round(rate, 1), "users": users,
            "answered_per_second": round(answers_per_second(records), 1), "alive": alive,
            "mean_batch": round(size, 1), "rss_mib": [round(used[0][1]), round(used[-1][1])],
            "rss_mib_per_minute": round(slope(used), 2), "seconds": self.arguments.seconds,
        }  # fmt: skip

    def soak(self) -> dict[str, Any]:
        """A usual load for a while."""
        rate, seconds = SOAK * self._needed("soak"), round(60 * self.arguments.minutes)
        deadline = self.arguments.deadline_ms
        with Server(self.run, self.folder / "soak", "--timeout-ms", str(deadline)) as server:
            memory = Memory(server)
            users = math.ceil(rate * (deadline / 1000 + 0.5))
            records, _ = self.load(server, users=users, seconds=seconds, pace=rate / users)
            used = memory.stop()
            alive = server.ready()
        late = used[len(used) // 5 :]
        fifths = np.array_split([value for _, value in used], 5)
        return {
            **outcome(records, deadline_ms=deadline), "asked_per_second": round(rate, 1), "alive": alive,
            "minutes": self.arguments.minutes,
            "rss_mib_median_of_fifths": [round(float(np.median(fifth)), 1) for fifth in fifths],
            "rss_mib_max": round(max(value for _, value in used), 1),
            "rss_mib_per_minute": round(slope(late), 3),
        }  # fmt: skip

    def kill(self) -> dict[str, Any]:
        """Kill workers while orders arrive; then all processes; then look at the database."""
        items = ItemTable.load(self.run / "prepare").item_ids
        server = Server(self.run, self.folder / "kill", "--workers", "2")
        writers = [Writer(server.port, f"writer{number}", items) for number in range(4)]
        for writer in writers:
            writer.start()
        kills = 0
        until = time.monotonic() + self.arguments.seconds
        while time.monotonic() < until:
            time.sleep(2.0)
            workers = server.workers()
            if len(workers) > 1:  # one that goes on, so that events are acknowledged all the while
                with_no_mercy(workers[kills % len(workers)])
                kills += 1
        server.kill()
        for writer in writers:
            writer.stopping.set()
        for writer in writers:
            writer.join()
        acknowledged = {name: order for writer in writers for name, order in writer.acknowledged.items()}
        stored = stored_events(server.database)
        with Server(self.run, self.folder / "kill", "--workers", "2") as again:
            alive = again.ready()
        return {
            "kills_of_a_worker": kills, "acknowledged": len(acknowledged), "stored": len(stored),
            "lost": len(lost_events(acknowledged, stored)), "broken_off": sum(w.broken_off for w in writers),
            "starts_again": alive,
        }  # fmt: skip

    def load(
        self, server: Server, *, users: int, seconds: float, pace: float = 0.0
    ) -> tuple[list[Record], float]:
        """Ask a server for a while; every request, and the generator's CPU seconds."""
        records = self.folder / "records.json"
        environment = os.environ | {
            "LOAD_BODIES": str(self.bodies), "LOAD_PACE": str(pace), "LOAD_RECORDS": str(records),
        }  # fmt: skip
        # With a pace, users arrive over one interval between two requests of each: no bursts.
        arriving = users * pace if pace else users
        command = [
            self.arguments.locust, "-f", str(USERS_FILE), "--headless", "--host", f"http://127.0.0.1:{server.port}",
            "-u", str(users), "-r", f"{max(arriving, 1):.3f}", "--run-time", f"{seconds:.0f}s", "--stop-timeout", "70",
            "--only-summary", "--exit-code-on-error", "0", "--loglevel", "WARNING",
        ]  # fmt: skip
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment.pop("PYTHONPATH", None)  # locust lives in an environment of its own
        with (self.folder / "locust.log").open("a") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log, check=False).returncode
        if code or not records.is_file():
            raise ConfigError(f"locust failed: {(self.folder / 'locust.log').read_text()[-2000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found: list[Record] = [
            (r[0], r[1], r[2], r[3]) for r in json.loads(records.read_text(encoding="utf-8"))
        ]
        records.unlink()
        return found, spent

    def _needed(self, part: str) -> float:
        if not self.per_second:
            raise ConfigError(f"--parts {part}: run it after throughput, or give --rate")
        return self.per_second


def untrained(run: Path, preset: str, out: Path) -> Path:
    """A copy of a run whose model has random weights of a preset's size; the other artifacts are symlinks."""
    import torch

    from lasar.model.backbone import build_preset
    from lasar.model.presets import PRESETS
    from lasar.model.reasoner import LatentReasoner, ReasoningSettings, save_reasoner
    from lasar.recommender import Recommender

    if preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: no such preset; one of {', '.join(PRESETS)}")
    trained = Recommender.load(run, device="cpu").ranker.reasoner
    backbone = build_preset(preset, vocabulary=trained.vocabulary, seed=0)
    torch.manual_seed(0)
    settings = trained.settings if trained.settings.max_depth else ReasoningSettings()
    out.mkdir(parents=True)
    for stage in ("prepare", "embed", "quantize"):
        if (run / stage).is_dir():
            (out / stage).symlink_to((run / stage).resolve(), target_is_directory=True)
    (out / "latent_sft").mkdir()
    save_reasoner(
        LatentReasoner(backbone, vocabulary=trained.vocabulary, settings=settings), out / "latent_sft"
    )
    return out


def requests(run: Path, *, depth: str, count: int = 1000) -> list[dict[str, Any]]:
    """Bodies that ask for what test users might want next."""
    items = ItemTable.load(run / "prepare").item_ids
    cases = Interactions.load(run / "prepare").cases(SPLIT_TEST).subset(count, 0)
    chosen: str | int = int(depth) if depth.isdecimal() else depth
    bodies = []
    for history, baskets in zip(cases.histories, cases.baskets, strict=True):
        splits = np.flatnonzero(np.diff(baskets)) + 1
        orders = [[items[item] for item in order] for order in np.split(history, splits) if len(order)]
        bodies.append({"history": orders[-1000:], "k": 10, "depth": chosen})
    return bodies


def answers_per_second(records: Sequence[Record]) -> float:
    """Answers in the time from the end of the warm-up to the last request's start, per second."""
    begin, end = records[0][0] + WARM_SECONDS, max(record[0] for record in records)
    ends = [start + ms / 1000 for start, ms, status, _ in records if status == 200]
    return sum(begin <= moment < end for moment in ends) / max(end - begin, 1e-9)


def outcome(records: Sequence[Record], *, deadline_ms: int) -> dict[str, Any]:
    """What became of requests, and how long the accepted ones took (answered, or given up at the deadline)."""
    counts = Counter(status for _, _, status, _ in records)
    answered = [ms for _, ms, status, _ in records if status == 200]
    accepted = [ms for _, ms, status, _ in records if status in (200, 503)]
    refused = [told for _, _, status, told in records if status == 429]
    p50, p99 = (round(float(np.quantile(accepted, q))) for q in (0.5, 0.99))
    return {
        "statuses": {str(status): count for status, count in sorted(counts.items())},
        "accepted_ms_p50": p50, "accepted_ms_p99": p99, "answered_ms_max": round(max(answered)),
        "deadline_ms": deadline_ms, "p99_within_deadline": p99 <= deadline_ms,
        "refused_without_retry_after": refused.count(False),
        "unexpected": sum(count for status, count in counts.items() if status not in (200, 429, 503)),
    }  # fmt: skip


def slope(seen: Sequence[tuple[float, float]]) -> float:
    """MiB per minute, by least squares."""
    seconds, mib = np.array(seen).T
    return float(np.polyfit((seconds - seconds[0]) / 60, mib, 1)[0])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="a run folder with a trained model")
    parser.add_argument("--preset", default="", help="serve random weights of this size instead")
    parser.add_argument("--depth", default="auto", help="latent steps of every request")
    parts = ("throughput", "overload", "soak", "kill")
    parser.add_argument("--parts", nargs="+", choices=parts, default=["throughput", "overload", "kill"])
    parser.add_argument("--locust", default="locust", help="the program")
    parser.add_argument("--users", type=int, default=64, help="of the throughput part")
    parser.add_argument("--seconds", type=float, default=30, help="of every measurement")
    parser.add_argument(
        "--workers", type=int, default=1, help="of a third server in the throughput part, batched; 1: none"
    )
    parser.add_argument("--rounds", type=int, default=3, help="of the throughput part")
    parser.add_argument("--minutes", type=float, default=10, help="of the soak")
    parser.add_argument("--deadline-ms", type=int, default=5000, help="of overload and soak")
    parser.add_argument(
        "--rate", type=float, default=0, help="answers per second, where throughput is not run"
    )
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except LasarError as error:
        raise SystemExit(f"error: {error}") from None
