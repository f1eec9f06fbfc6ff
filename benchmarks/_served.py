"""`lasar serve` as a process that can be asked, watched and killed, and writers that remember what it acknowledged."""

import http.client
import itertools
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lasar.errors import ConfigError

SERVE = "from lasar.cli import main; main()"
PAGE = resource.getpagesize()
TICKS = os.sysconf("SC_CLK_TCK")
Orders = dict[str, tuple[str, tuple[str, ...]]]  # name of an event -> (user, items)


class Server:
    """`lasar serve` in a process of its own, with a database of its own."""

    def __init__(self, run: Path, folder: Path, *options: str) -> None:
        """Start it and wait until it is ready."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.database = folder / "state.sqlite"
        database = f"sqlite:///{self.database.absolute()}"
        command = [
            sys.executable,
            "-c",
            SERVE,
            "serve",
            str(run),
            "--port",
            str(self.port),
            "--database",
            database,
        ]
        with (folder / "log").open("a") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        until = time.monotonic() + 180
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise ConfigError(f"{folder / 'log'}: the server did not start")
            time.sleep(0.2)

    def __enter__(self) -> "Server":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    def ready(self) -> bool:
        """Whether requests are welcome."""
        try:
            return self.ask("GET", "/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def ask(self, method: str, path: str) -> tuple[int, str]:
        """Status and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A number of /metrics."""
        lines = self.ask("GET", "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split(" ")[0].split("{")[0] == name)

    def workers(self) -> list[int]:
        """Process ids of the workers of a server that has several."""
        return [pid for pid in children(self.process.pid) if b"spawn_main" in _read(f"/proc/{pid}/cmdline")]

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far."""
        total = 0
        for pid in (self.process.pid, *children(self.process.pid)):
            fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
            total += int(fields[11]) + int(fields[12]) if fields else 0
        return total / TICKS

    def rss_mib(self) -> float:
        """Resident memory of all its processes."""
        pids = (self.process.pid, *children(self.process.pid))
        pages = [_read(f"/proc/{pid}/statm").split() for pid in pids]
        return sum(int(fields[1]) for fields in pages if fields) * PAGE / 2**20

    def kill(self) -> None:
        """SIGKILL to every process at once, the parent first so that it starts no new worker."""
        for pid in (self.process.pid, *children(self.process.pid)):
            with_no_mercy(pid)
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that is not enough."""
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()


class Memory(threading.Thread):
    """Looks at a server's resident memory every second."""

    def __init__(self, server: Server) -> None:
        """Begin."""
        super().__init__(daemon=True)
        self._server, self._stopping = server, threading.Event()
        self._seen: list[tuple[float, float]] = []
        self.start()

    def run(self) -> None:
        """Look until told to stop."""
        while not self._stopping.wait(1.0):
            self._seen.append((time.monotonic(), self._server.rss_mib()))

    def stop(self) -> list[tuple[float, float]]:
        """Seconds and MiB of every look."""
        self._stopping.set()
        self.join()
        return self._seen


class Writer(threading.Thread):
    """Sends one order after another, and each again until it is acknowledged.

    Attributes:
        acknowledged: what a server said is stored: name -> (user, items).
        broken_off: requests that got no answer.
        stopping: set it to end the thread.
    """

    def __init__(self, port: int, user: str, items: Sequence[str]) -> None:
        """Write for one user."""
        super().__init__(daemon=True)
        self._port, self._user, self._items = port, user, items
        self.acknowledged: Orders = {}
        self.broken_off = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        """Send until told to stop."""
        for number in itertools.count():
            order = (self._items[number % len(self._items)], self._items[(7 * number + 1) % len(self._items)])
            name = f"{self._user}-{number}"
            body = {"events": [{"user_id": self._user, "items": order, "event_id": name}]}
            while not self._acknowledges(json.dumps(body)):
                if self.stopping.wait(0.05):
                    return
            self.acknowledged[name] = (self._user, order)
            if self.stopping.is_set():
                return

    def _acknowledges(self, body: str) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("POST", "/v1/events", body, {"content-type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status == 200
        except (OSError, http.client.HTTPException):
            self.broken_off += 1
            return False
        finally:
            connection.close()


def stored_events(database: Path) -> Orders:
    """Events of a SQLite file: name -> (user, items)."""
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT event_id, user_id, items FROM lasar_events").fetchall()
    connection.close()
    return {name: (user, tuple(json.loads(items))) for name, user, items in rows}


def lost_events(acknowledged: Orders, stored: Orders) -> list[str]:
    """Names of acknowledged events that are not stored as they were sent."""
    return [name for name, order in acknowledged.items() if stored.get(name) != order]


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    return [int(child) for child in _read(f"/proc/{pid}/task/{pid}/children").split()]


def with_no_mercy(pid: int) -> None:
    """SIGKILL, to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""  # the process is gone
