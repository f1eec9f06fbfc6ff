"""`lasar score --engine ray`: the lists that one process makes, each user once, whatever is killed in between."""

import builtins
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lasar.cluster import ray_scoring
from lasar.errors import MissingExtraError
from lasar.scoring import Opened, Scoring, Users, read_scores, score_users

ASKED = Scoring(k=5, beam_width=10, part_users=4)


def command(run, out):
    return [
        sys.executable, "-c", "from lasar.cli import main; main()", "score", str(run), "--out", str(out), "--k", "5",
        "--beam-width", "10", "--part-users", "4", "--engine", "ray", "--processes", "2",
    ]  # fmt: skip


def actors():
    """Process ids of actors that rank."""
    found = subprocess.run(["pgrep", "-f", "ray::.*RayRanking"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_that_is_killed_changes_nothing(run, tmp_path):
    score_users(run, tmp_path / "here", scoring=ASKED)
    process = subprocess.Popen(
        command(run, tmp_path / "ray"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list((tmp_path / "ray").glob("part-*.parquet")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.kill(actors()[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "200 users" in output
    here, there = read_scores(tmp_path / "here"), read_scores(tmp_path / "ray")
    assert there.drop("scores").equals(here.drop("scores"))
    np.testing.assert_allclose(there["scores"].explode(), here["scores"].explode(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_scoring_that_is_killed_goes_on_on_another_engine(run, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(run, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not list(out.glob("part-*.parquet")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    done = len(list(out.glob("part-*.parquet")))
    summary = score_users(run, out, scoring=ASKED)
    assert summary["parts_of_this_call"] == summary["parts"] - done
    score_users(run, tmp_path / "here", scoring=ASKED)
    assert read_scores(out).drop("scores").equals(read_scores(tmp_path / "here").drop("scores"))


def test_users_survive_the_journey():
    users = Users(
        ["a", "b", "c"],
        [np.array([3, 1], np.int32), np.array([], np.int32), np.array([7], np.int32)],
        [np.array([0, 0], np.int32), np.array([], np.int32), np.array([2], np.int32)],
    )
    back = ray_scoring.users_of(ray_scoring.users_bytes(users))
    assert back.ids == users.ids
    for name in ("histories", "baskets"):
        for there, here in zip(getattr(back, name), getattr(users, name), strict=True):
            np.testing.assert_array_equal(there, here)
            assert there.dtype == np.int32


def test_without_ray_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_ray(name, *arguments, **keywords):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr("importlib.import_module", lambda name: no_ray(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'lasar\[ray\]'"):
        next(ray_scoring.in_ray(iter(()), Opened(Path("run"), "sft", "cpu", ASKED), 1))
