"""The server as a Ray Serve application: two replicas, one catalogue."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lasar.cluster.ray_serving import settings_from
from lasar.errors import ConfigError
from lasar.recommender import Recommender

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-that-is-long-enough"
SERVE = """
import sys, time
import ray
from ray import serve
from lasar.cluster.ray_serving import app
run, database, port = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(app({"run": run, "database": database, "replicas": "2", "max_replicas": "2", "poll_seconds": "0.2"}))
print("up", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


def ask(port, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {TOKEN}", "connection": "close"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_replicas_answer_like_the_recommender_and_follow_one_catalogue(run, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LASAR_ADMIN_TOKEN": TOKEN}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, str(script), str(run), f"sqlite:///{tmp_path / 'state.sqlite'}", str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout.readline().strip() == "up", Path(log.name).read_text()
        recommender = Recommender.load(run)
        history = recommender.items.item_ids[:3]
        expected = recommender.recommend(history, 5)
        found = ask(port, "/v1/recommend", {"history": history, "k": 5})["items"]
        assert [item["item_id"] for item in found] == [item.item_id for item in expected]
        assert [item["score"] for item in found] == pytest.approx([item.score for item in expected], abs=1e-4)

        gone = expected[0].item_id
        changed = ask(port, "/admin/items", {"deactivate": [gone]})
        until = time.monotonic() + 20
        while time.monotonic() < until:  # a replica that did not make the change looks for it on its own
            versions = {ask(port, "/v1/info")["catalogue_version"] for _ in range(12)}
            if versions == {changed["version"]}:
                break
        assert versions == {changed["version"]}
        for _ in range(12):
            items = ask(port, "/v1/recommend", {"history": history, "k": 5})["items"]
            assert gone not in [item["item_id"] for item in items]
        assert ask(port, "/readyz")["status"] == "ready"
        with pytest.raises(urllib.error.HTTPError, match="422"):
            ask(port, "/v1/recommend", {"history": ["no-such-item"]})
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        log.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "run: missing"),
        ({"run": "nowhere"}, "run=nowhere: no such folder"),
        ({"run": ".", "max_bach": "3"}, "max_bach: no such argument; did you mean 'max_batch'"),
        ({"run": ".", "max_batch": "many"}, "max_batch=many: Input should be a valid integer"),
        ({"run": ".", "max_batch": "0"}, "max_batch=0: must be positive"),
        ({"run": ".", "workers": "3"}, "workers: no such argument"),
    ],
)
def test_arguments_are_checked_before_anything_starts(arguments, said):
    with pytest.raises(ConfigError, match=said):
        settings_from(arguments)


def test_arguments_are_text_and_become_settings(tmp_path):
    settings = settings_from(
        {"run": str(tmp_path), "max_batch": "8", "linger_ms": "1.5", "show_users": "true"}
    )
    assert (settings.max_batch, settings.linger_ms, settings.show_users, settings.threads) == (
        8,
        1.5,
        True,
        1,
    )
