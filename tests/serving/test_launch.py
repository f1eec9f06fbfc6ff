"""Real processes: a server started, asked, told to stop in the middle of work, and killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lasar.errors import ConfigError
from lasar.serving.database import open_database
from lasar.serving.events import EventStore
from lasar.serving.settings import Settings

ROOT = Path(__file__).parents[2]
SERVE = """
import logging, sys
from pathlib import Path
from lasar.serving.launch import serve
from lasar.serving.settings import Settings
logging.basicConfig(level=logging.INFO)
if __name__ == "__main__":
    run, database, port, workers = sys.argv[1:]
    settings = Settings(run=Path(run), database=database, workers=int(workers), timeout_ms=30000, poll_seconds=0.2)
    serve(settings, host="127.0.0.1", port=int(port))
"""


class Server:
    """A server in a process of its own."""

    def __init__(self, run, folder, workers):
        self.database = f"sqlite:///{folder / 'state.sqlite'}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        script = folder / "serve.py"
        script.write_text(SERVE)
        self.log = (folder / "log").open("w+")
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "LASAR_ADMIN_TOKEN": "a-token-that-is-long-enough",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(run), self.database, str(self.port), str(workers)],
            env=environment, cwd=folder, stdout=self.log, stderr=self.log,
        )  # fmt: skip

    def wait(self, seconds=90):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, Path(self.log.name).read_text()
            try:
                if self.ask("/readyz")["status"] == "ready":
                    return
            except (OSError, ValueError):
                time.sleep(0.1)
        raise AssertionError(Path(self.log.name).read_text())

    def ask(self, path, body=None, seconds=60):
        headers = {"content-type": "application/json", "authorization": "Bearer a-token-that-is-long-enough"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return json.loads(response.read())

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()


@pytest.fixture
def start(run, tmp_path):
    servers = []

    def make(workers=1):
        servers.append(Server(run, tmp_path, workers))
        servers[-1].wait()
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def test_sigterm_answers_what_was_accepted_and_then_ends(start):
    server = start()
    requests = [
        {"history": ["sku1", f"sku{n % 7 + 10}"], "explain": True, "beam_width": 200} for n in range(64)
    ]
    answers = []

    def ask():
        answers.append(server.ask("/v1/recommend/batch", {"requests": requests}))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.15)
    assert not answers, "the server was too fast for this test"
    server.process.send_signal(signal.SIGTERM)
    asking.join()
    assert [result["status"] for result in answers[0]["results"]] == [200] * len(requests)
    assert server.process.wait(30) in (0, -signal.SIGTERM)
    with pytest.raises(urllib.error.URLError):
        server.ask("/healthz")
    log = Path(server.log.name).read_text()
    assert "Traceback" not in log
    assert "POST /v1/recommend/batch 200" in log


def workers_of(server):
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = status.parent.name, status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(rest[1]) == server.process.pid and b"spawn_main" in command:
            found.append(int(pid))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds worker processes in /proc")
def test_kill_9_of_a_worker_loses_no_acknowledged_event(start):
    server = start(workers=2)
    acknowledged, stop = [], threading.Event()

    def send(name):
        number = 0
        while not stop.is_set():
            number += 1
            event = {"user_id": name, "items": ["sku1"], "event_id": f"{name}-{number}"}
            try:
                server.ask("/v1/events", {"events": [event]})
                acknowledged.append(event["event_id"])
            except OSError:
                time.sleep(0.05)  # not acknowledged; may or may not be there

    threads = [threading.Thread(target=send, args=(f"user{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    victim = workers_of(server)[0]
    os.kill(victim, signal.SIGKILL)
    time.sleep(1)
    before = len(acknowledged)
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(acknowledged) > before > 0, "the other worker goes on"
    engine = open_database(server.database)
    with engine.connect() as connection:
        stored = set(connection.exec_driver_sql("SELECT event_id FROM lasar_events").scalars())
    assert set(acknowledged) <= stored
    assert EventStore(engine).count() == len(stored)
    engine.dispose()
    until = time.monotonic() + 60
    while len(set(workers_of(server)) - {victim}) < 2:
        assert time.monotonic() < until, "no worker took the place of the killed one"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_new_item_reaches_every_worker(start):
    server = start(workers=2)
    change = {"add": [{"item_id": "new1", "title": "RED TEAPOT"}]}
    assert server.ask("/admin/items", change)["version"] == 1
    time.sleep(1)  # poll_seconds is 0.2
    versions = {server.ask("/v1/recommend", {"history": []})["catalogue_version"] for _ in range(20)}
    assert versions == {1}
    page = urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10).read().decode()
    assert "lasar_catalogue_version 1.0" in page
    assert 'route="/v1/recommend",status="200"} 20.0' in page  # of both workers together


def test_settings_reach_workers_without_the_token(monkeypatch, tmp_path):
    monkeypatch.delenv("LASAR_ADMIN_TOKEN", raising=False)
    monkeypatch.setenv("LASAR_SERVE_SETTINGS", "")
    settings = Settings(run=tmp_path, max_queue=7, retention_days=2.5, admin_token="x" * 20)
    settings.to_environment()
    assert "x" * 20 not in os.environ["LASAR_SERVE_SETTINGS"]
    assert "x" * 20 not in repr(settings)
    found = Settings.from_environment()
    assert (found.run, found.max_queue, found.retention_days, found.admin_token) == (tmp_path, 7, 2.5, None)
    monkeypatch.setenv("LASAR_ADMIN_TOKEN", "y" * 20)
    assert Settings.from_environment().admin_token == "y" * 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_queue": 0},
        {"timeout_ms": -1},
        {"retention_days": 0},
        {"linger_ms": -1},
        {"admin_token": "short"},
    ],
)
def test_settings_that_cannot_be_used(wrong, tmp_path):
    with pytest.raises(ConfigError, match=r"must|at least 16"):
        Settings(run=tmp_path, **wrong)
