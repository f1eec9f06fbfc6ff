"""Jobs in several processes: their order, their logs, and what a failure does and does not take with it."""

import os
import signal
from pathlib import Path

import pytest

from lasar.errors import ArtifactError, ConfigError, DataError
from lasar.study.pool import Job, run_jobs


def leave_mark(folder: Path, name: str, *needed: str) -> None:
    print(f"this is {name} with {os.environ['OMP_NUM_THREADS']} threads")
    for other in needed:
        assert (folder / other).is_file()
    (folder / name).touch()


def fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise DataError("file.csv: is wrong") if how == "user" else ZeroDivisionError("oops")


def mark(folder: Path, name: str, *needed: str, **more) -> Job:
    return Job(
        name=name, run=leave_mark, arguments=(folder, name, *needed), log=folder / "logs" / f"{name}.log",
        after=frozenset(needed), **more,
    )  # fmt: skip


def failing(folder: Path, how: str) -> Job:
    return Job(name="bad", run=fail, arguments=(how,), log=folder / "bad.log")


def test_jobs_run_after_what_they_need_and_write_to_their_logs(tmp_path):
    said = []
    jobs = [mark(tmp_path, "c", "a", "b"), mark(tmp_path, "a"), mark(tmp_path, "b", "a")]
    run_jobs(jobs, processes=2, say=said.append)
    assert [line.partition(":")[0] for line in said if "done" in line] == ["a", "b", "c"]
    assert "this is c with " in (tmp_path / "logs" / "c.log").read_text()


def test_a_job_that_is_not_wanted_when_its_turn_comes_is_left_out(tmp_path):
    jobs = [mark(tmp_path, "a"), mark(tmp_path, "b", "a", wanted=lambda: not (tmp_path / "a").is_file())]
    run_jobs([*jobs, mark(tmp_path, "c", "a")], processes=1, say=lambda line: None)
    assert (tmp_path / "c").is_file()
    assert not (tmp_path / "b").is_file()


@pytest.mark.parametrize(
    ("how", "message"), [("user", "bad: file.csv: is wrong"), ("defect", "bad: ZeroDivisionError: oops")]
)
def test_a_failure_takes_what_needs_it_and_nothing_else(tmp_path, how, message):
    jobs = [failing(tmp_path, how), mark(tmp_path, "after", "bad"), mark(tmp_path, "other")]
    with pytest.raises(ArtifactError, match=f"{message}; after: needs bad"):
        run_jobs(jobs, processes=1, say=lambda line: None)
    assert (tmp_path / "other").is_file()
    assert not (tmp_path / "after").is_file()
    assert "Traceback" in (tmp_path / "bad.log").read_text()


def test_a_killed_process_ends_the_run_with_a_clear_message(tmp_path):
    with pytest.raises(ArtifactError, match=r"a process died.*the same command goes on"):
        run_jobs([failing(tmp_path, "killed")], processes=2, say=lambda line: None)


def test_no_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--processes 0: give at least 1"):
        run_jobs([], processes=0, say=lambda line: None)
