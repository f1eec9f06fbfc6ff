"""`lasar score`: the recommender's lists, each user once, whatever is killed in between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import torch
from typer.testing import CliRunner

from lasar import scoring as module
from lasar.artifacts import exclusive
from lasar.cli import app
from lasar.errors import ArtifactError, ConfigError, DataError
from lasar.recommender import Recommender
from lasar.scoring import PLAN, SUMMARY, Scoring, read_scores, score_users

ASKED = Scoring(k=5, beam_width=10, exclude_seen=True, part_users=40)


@pytest.fixture(scope="module")
def run(mini_run: Path) -> Path:
    return mini_run


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "scores"
    return out, score_users(run, out, scoring=ASKED)


def test_every_user_gets_the_recommenders_list_exactly_once(run, scored):
    out, summary = scored
    table, recommender = read_scores(out), Recommender.load(run)
    assert table["user_id"].n_unique() == len(table) == summary["users"] > 80
    assert summary["parts"] == len(list(out.glob("part-*.parquet"))) == -(-len(table) // 40)
    for row in table.gather_every(37).iter_rows(named=True):
        expected = recommender.recommend_user(row["user_id"], 5, exclude_seen=True, beam_width=10)
        assert row["items"] == [item.item_id for item in expected]
        assert row["scores"] == pytest.approx([item.score for item in expected], abs=1e-4)
        assert row["depth"] == 0


def test_processes_do_not_change_a_list(run, scored, tmp_path, monkeypatch):
    here, rank = [], module.rank_part
    monkeypatch.setattr(module, "rank_part", lambda *args: here.append(1) or rank(*args))
    threads = torch.get_num_threads()
    summary = score_users(run, tmp_path / "two", scoring=ASKED, processes=2)
    assert torch.get_num_threads() == threads
    assert 1 <= len(here) < summary["parts_of_this_call"]
    one, two = read_scores(scored[0]), read_scores(tmp_path / "two")
    assert one.drop("scores").equals(two.drop("scores"))
    scores = [table["scores"].explode().to_numpy() for table in (one, two)]
    assert abs(scores[0] - scores[1]).max() < 1e-4


def test_a_single_part_starts_no_process(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ProcessPoolExecutor", None)
    scoring = Scoring(k=5, beam_width=10, exclude_seen=True, part_users=10_000)
    assert score_users(run, tmp_path / "one", scoring=scoring, processes=4)["parts"] == 1


def test_a_killed_scoring_goes_on_with_what_is_missing(run, scored, tmp_path, monkeypatch):
    out = tmp_path / "out"
    rank, calls = module.rank_part, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rank(*arguments)

    monkeypatch.setattr(module, "rank_part", killed)
    with pytest.raises(KeyboardInterrupt):
        score_users(run, out, scoring=ASKED)
    assert len(list(out.glob("part-*.parquet"))) == 2
    with pytest.raises(ArtifactError, match="no complete scoring"):
        read_scores(out)
    summary = score_users(run, out, scoring=ASKED)
    assert summary["parts_of_this_call"] == summary["parts"] - 2
    assert read_scores(out).equals(read_scores(scored[0]))
    assert score_users(run, out, scoring=ASKED)["parts_of_this_call"] == 0


def test_a_part_that_cannot_be_written_is_said_and_leaves_nothing(run, tmp_path, monkeypatch):
    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(ArtifactError, match=r"part-00000-of-\d+.parquet: cannot be written: .*No space left"):
        score_users(run, tmp_path / "out", scoring=ASKED)
    assert not list((tmp_path / "out").glob("*part-*"))


def command(run, out):
    return [
        sys.executable, "-c", "from lasar.cli import main; main()", "score", str(run), "--out", str(out), "--k", "5",
        "--beam-width", "10", "--exclude-seen", "--part-users", "4", "--processes", "2",
    ]  # fmt: skip


def started(command, out):
    """A scoring that has written a part, and its workers."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("part-*.parquet")):
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.is_file():
        process.kill()
        pytest.skip("needs /proc to find a worker")
    workers = [
        int(child) for child in children.read_text().split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]  # fmt: skip
    return process, workers


def test_workers_end_with_a_command_that_is_killed(run, tmp_path):
    process, workers = started(command(run, tmp_path / "out"), tmp_path / "out")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60  # they look every second, once they have started
    while workers and time.monotonic() < deadline:
        workers = [pid for pid in workers if b"spawn_main" in command_line(pid)]
        time.sleep(0.1)
    assert not workers


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_a_worker_that_is_killed_loses_nothing(run, scored, tmp_path):
    """kill -9 of a worker process while it ranks: a clear message, and the same command ends it."""
    out = tmp_path / "out"
    words = command(run, out)
    process, workers = started(words, out)
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was done before the worker was killed")
    assert process.returncode == 2
    assert "a scoring process died" in errors.replace("\n", " ")
    assert "Traceback" not in errors
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    table = read_scores(out)
    assert table.drop("scores").equals(read_scores(scored[0]).drop("scores"))
    assert {file.name for file in out.iterdir() if file.name.startswith(".")} <= {".lock"}


def test_two_processes_never_write_one_folder(run, tmp_path):
    with (
        exclusive(tmp_path / "out", who="the first"),
        pytest.raises(ArtifactError, match="another process is writing here, this scoring cannot"),
    ):
        score_users(run, tmp_path / "out", scoring=ASKED)


def test_the_command_scores_a_file_of_users(run, tmp_path):
    known = read_known(run)[:3]
    (tmp_path / "users.txt").write_text("\n".join(reversed(known)))
    command = ["score", str(run), "--out", str(tmp_path / "out"), "--users", str(tmp_path / "users.txt")]
    done = CliRunner().invoke(app, [*command, "--k", "3"])
    assert done.exit_code == 0, done.output
    assert "3 users in 1 parts" in done.output
    assert read_scores(tmp_path / "out")["user_id"].to_list() == list(reversed(known))


def read_known(run):
    return pl.read_parquet(run / "prepare" / "users.parquet")["user_id"].to_list()


def test_histories_of_ones_own(run, tmp_path):
    recommender = Recommender.load(run)
    histories = [recommender.items.item_ids[:3], []]
    table = pl.DataFrame(
        {"user_id": ["new", "empty"], "items": histories},
        schema={"user_id": pl.String, "items": pl.List(pl.String)},
    )
    table.write_parquet(tmp_path / "new.parquet")
    score_users(run, tmp_path / "out", scoring=Scoring(k=4), users=tmp_path / "new.parquet")
    found = read_scores(tmp_path / "out")
    for row, history in zip(found.iter_rows(named=True), histories, strict=True):
        assert row["items"] == [item.item_id for item in recommender.recommend(history, 4)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("users.txt", "nobody-here", "row 1: no user 'nobody-here' in the event log"),
        ("users.csv", "user\n1\n", "no column 'user_id'; there are: user"),
        ("users.csv", "user_id\nx\nx\n", "names user 'x' twice"),
        ("users.csv", "user_id,a\n,1\n", "row 1: user_id is empty"),
        ("users.txt", "", "names no user"),
        ("users.json", "{}", "expected .txt, .csv or .parquet"),
        ("users.parquet", "not parquet", "not readable"),
    ],
)
def test_a_wrong_file_of_users_is_named(run, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        score_users(run, tmp_path / "out", scoring=ASKED, users=tmp_path / name)
    assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_item_of_a_history_is_named(run, tmp_path):
    table = pl.DataFrame({"user_id": ["new"], "items": [["not-an-item"]]})
    table.write_parquet(tmp_path / "new.parquet")
    with pytest.raises(DataError, match=r"new\.parquet: .*'not-an-item'"):
        score_users(run, tmp_path / "out", scoring=ASKED, users=tmp_path / "new.parquet")


def test_a_folder_with_another_scoring_is_left_alone(run, scored, tmp_path):
    out = shutil.copytree(scored[0], tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a scoring with k=5, asked for is 6; choose another folder"):
        score_users(run, out, scoring=Scoring(k=6, beam_width=10, exclude_seen=True, part_users=40))
    assert json.loads((out / PLAN).read_text())["k"] == 5
    (out / PLAN).unlink()
    with pytest.raises(ConfigError, match="holds something else"):
        score_users(run, out, scoring=ASKED)
    assert (out / SUMMARY).is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k=0: must be at least 1"),
        ({"k": 60}, "k=60 exceeds beam_width=50"),
        ({"part_users": 0}, "part_users=0"),
    ],
)
def test_settings_out_of_range(run, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        score_users(run, tmp_path / "out", scoring=Scoring(**changes))
    with pytest.raises(ConfigError, match="processes=0"):
        score_users(run, tmp_path / "out", scoring=ASKED, processes=0)
