"""Users of a server, for locust: what `serving_load.py` has it run, in a process of its own.

Every user asks for recommendations again and again, as fast as it is answered or at a fixed pace. One line per request
is kept (start, milliseconds, status, whether a refusal said when to come back): locust's own percentiles are rounded.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, constant_throughput, events, task

BODIES = [line.encode() for line in Path(os.environ["LOAD_BODIES"]).read_text(encoding="utf-8").splitlines()]
PACE = float(os.environ["LOAD_PACE"])  # requests per second of one user; 0: without a pause
RECORDS: list[tuple[float, float, int, bool]] = []


class Customer(FastHttpUser):
    """Asks for random customers' recommendations."""

    wait_time = constant_throughput(PACE) if PACE else constant(0)
    connection_timeout = network_timeout = 60.0

    def on_start(self) -> None:
        """Spread users with a pace evenly, or all of them would come in one burst."""
        self._random = random.Random(id(self))
        self._bodies = self._random.sample(BODIES, len(BODIES))
        self._next = 0

    @task
    def recommend(self) -> None:
        """Ask once."""
        body = self._bodies[self._next % len(self._bodies)]
        self._next += 1
        self.client.post("/v1/recommend", data=body, headers={"content-type": "application/json"})


@events.request.add_listener
def _record(response: Any, start_time: float, response_time: float, **_: Any) -> None:
    status = getattr(response, "status_code", 0) or 0
    told = status == 429 and "retry-after" in response.headers
    RECORDS.append((start_time, response_time, status, told))


@events.quitting.add_listener
def _write(**_: Any) -> None:
    Path(os.environ["LOAD_RECORDS"]).write_text(json.dumps(RECORDS), encoding="utf-8")
