"""Jobs of a study or a tuning in several processes, each a fresh one, some after others."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasar.errors import ArtifactError, ConfigError, LasarError


@dataclass(frozen=True, kw_only=True)
class Job:
    """One piece of work.

    Attributes:
        name: unique; what is said of it.
        run: a function that another process can import.
        arguments: of `run`.
        after: names of jobs that have to succeed first.
        log: file for what it prints; progress goes there.
        wanted: asked when its turn comes; False leaves it out.
    """

    name: str
    run: Callable[..., object]
    arguments: tuple[Any, ...]
    log: Path
    after: frozenset[str] = frozenset()
    wanted: Callable[[], bool] = lambda: True


def run_jobs(jobs: Sequence[Job], *, processes: int, say: Callable[[str], None]) -> None:
    """Run jobs in the order given, as many at once as there are processes.

    A job that fails takes those after it with it; the others go on, and at the end an error names what failed.

    Args:
        jobs: what to do.
        processes: at most; each gets its share of the threads that PyTorch would use.
        say: called with one line when a job starts and ends.

    Raises:
        ConfigError: fewer than one process.
        ArtifactError: a job failed, or its process was killed.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes}: give at least 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // processes))
    waiting, running, done, failed = list(jobs), dict[Future[None], Job](), set[str](), dict[str, str]()
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,
        initializer=_prepare,
        initargs=(threads,),
    )
    try:
        while waiting or running:
            for job in [job for job in waiting if job.after & failed.keys()]:
                waiting.remove(job)
                failed[job.name] = f"needs {', '.join(sorted(job.after & failed.keys()))}"
            ready = [job for job in waiting if job.after <= done]
            for job in ready[: processes - len(running)]:
                waiting.remove(job)
                if not job.wanted():
                    done.add(job.name)
                    continue
                say(f"{job.name}: begins; its output: {job.log}")
                running[pool.submit(_work, job.run, job.arguments, job.log)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if (error := future.exception()) is None:
                    done.add(job.name)
                    say(f"{job.name}: done; {len(done)} of {len(jobs)}")
                elif isinstance(error, BrokenProcessPool):
                    raise error
                else:
                    what = str(error) if isinstance(error, LasarError) else f"{type(error).__name__}: {error}"
                    failed[job.name] = what
                    say(f"{job.name}: failed, see {job.log}: {what}")
    except BrokenProcessPool:
        raise ArtifactError(
            "a process died (killed, or out of memory); what was finished is kept, the same command goes on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        raise ArtifactError("not everything could be run: " + _list(failed))


def _list(failed: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in failed.items())


def _prepare(threads: str) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", threads)


def _work(run: Callable[..., object], arguments: Iterable[Any], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        try:
            run(*arguments)
        except Exception:
            traceback.print_exc()  # into the log; who waits for the job gets it as one line
            raise
