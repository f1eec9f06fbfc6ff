"""Micro-batching: requests wait in a bounded queue, and one engine thread takes them in compatible groups.

The event loop owns the queue; only the engine thread runs the model. Every request is answered exactly once: with its
result, with the error that its own computation raised, or by leaving (deadline, cancelled client), after which its
result is thrown away. The engine never waits while there is work, and never holds more than one batch.
"""

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Q = TypeVar("Q")
R = TypeVar("R")

_DECAY = 0.2  # weight of the newest batch in the expected duration where it was quicker than expected
_MARGIN = 1.25  # what is accepted should be in time even if batches take longer than any of late


class QueueFullError(Exception):
    """The queue is full, or so long that the request could not be answered in time.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, retry_after: int) -> None:
        """Say when to come back."""
        super().__init__(f"queue full; retry after {retry_after} s")
        self.retry_after = retry_after


class DeadlineError(Exception):
    """The request's time is up.

    Attributes:
        started: whether the engine had begun with it.
    """

    def __init__(self, *, started: bool) -> None:
        """Remember how far it came."""
        super().__init__("deadline passed")
        self.started = started


class StoppingError(Exception):
    """The batcher takes no more requests."""


@dataclass(frozen=True, kw_only=True)
class Answered(Generic[R]):
    """A result and how long it waited.

    Attributes:
        result: what the engine returned for the query.
        queue_seconds: from submission until the engine took it.
        batch_size: queries of its batch.
    """

    result: R
    queue_seconds: float
    batch_size: int


@dataclass(eq=False)
class _Entry(Generic[Q, R]):
    query: Q
    group: Hashable
    future: "asyncio.Future[Answered[R]]"
    arrived: float
    deadline: float
    started: float | None = None


class MicroBatcher(Generic[Q, R]):
    """Groups queries for an engine that answers many at once."""

    def __init__(
        self,
        run: Callable[[Sequence[Q]], Sequence[R]],
        *,
        group: Callable[[Q], Hashable],
        max_queue: int,
        max_batch: int,
        linger_seconds: float = 0.0,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        """Prepare; `start` must be called inside the event loop.

        Args:
            run: answers queries of one group, in order; called on the engine thread only.
            group: queries with equal groups may share a batch.
            max_queue: queries that may wait.
            max_batch: queries of one call of `run`.
            linger_seconds: how long an idle engine waits for company.
            on_batch: told the size and the seconds of every batch.
        """
        self._run, self._group, self._on_batch = run, group, on_batch
        self._max_queue, self._max_batch, self._linger = max_queue, max_batch, linger_seconds
        self._waiting: dict[int, _Entry[Q, R]] = {}
        self._next = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._began: float | None = None  # the batch that is being computed
        self._batch_seconds = 0.0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lasar-engine")
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Queries in the queue."""
        return len(self._waiting)

    @property
    def stopping(self) -> bool:
        """Whether it takes no more queries."""
        return self._stopping

    def start(self) -> None:
        """Begin to serve the queue."""
        self._loop_task = asyncio.get_running_loop().create_task(self._serve())

    async def submit(self, query: Q, *, timeout_seconds: float) -> Answered[R]:
        """Wait for a query's answer.

        Raises:
            QueueFullError: it was not taken.
            DeadlineError: its time is up; if it had not started, the engine never sees it.
            StoppingError: the server shuts down.
            Exception: whatever the engine raised for this query.
        """
        self.check_room(timeout_seconds)
        future: asyncio.Future[Answered[R]] = asyncio.get_running_loop().create_future()
        now = time.perf_counter()
        entry = _Entry(query, self._group(query), future, now, now + timeout_seconds)
        ticket, self._next = self._next, self._next + 1
        self._waiting[ticket] = entry
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                return await future
        except TimeoutError:
            if future.done() and not future.cancelled() and future.exception() is not None:
                raise  # the engine's own TimeoutError
            raise DeadlineError(started=entry.started is not None) from None
        finally:
            self._waiting.pop(ticket, None)

    def check_room(self, timeout_seconds: float) -> None:
        """Raise what `submit` would raise at once; cheap, so that preparing a query in vain can be avoided.

        Raises:
            QueueFullError: see `submit`.
            StoppingError: see `submit`.
        """
        if self._stopping:
            raise StoppingError
        expected = self.expected_seconds()
        if len(self._waiting) >= self._max_queue or (self._waiting and expected * _MARGIN > timeout_seconds):
            raise QueueFullError(max(1, math.ceil(expected)))

    def expected_seconds(self) -> float:
        """Time until a query submitted now would be answered, judged by the slowest of the latest batches."""
        seconds, rest = self._batch_seconds, 0.0
        if self._began is not None and seconds:
            elapsed = time.perf_counter() - self._began
            seconds = max(seconds, elapsed)  # one that takes longer than any before: so may the next
            rest = seconds - elapsed
        return rest + math.ceil((len(self._waiting) + 1) / self._max_batch) * seconds

    async def close(self) -> None:
        """Take no more queries, answer those that wait, stop the thread."""
        self._stopping = True
        self._wake.set()
        if self._loop_task is not None:
            await self._loop_task
        self._thread.shutdown(wait=True)

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting:
                if self._stopping:
                    return
                self._wake.clear()
                await self._wake.wait()
                if self._linger and len(self._waiting) < self._max_batch and not self._stopping:
                    await asyncio.sleep(self._linger)
            batch = self._take()
            if not batch:
                continue
            self._began = started = time.perf_counter()
            outcomes = await loop.run_in_executor(self._thread, self._answer, [e.query for e in batch])
            seconds = time.perf_counter() - started
            self._began = None
            # Up at once, down slowly: to expect too little is to accept what will be late.
            quicker = self._batch_seconds + _DECAY * (seconds - self._batch_seconds)
            self._batch_seconds = max(seconds, quicker)
            for entry, outcome in zip(batch, outcomes, strict=True):
                _deliver(entry, outcome, len(batch))
            if self._on_batch is not None:
                self._on_batch(len(batch), seconds)

    def _take(self) -> list[_Entry[Q, R]]:
        """The oldest query that can be in time and those behind it that may share its batch; they leave the queue.

        What would be late waits until nothing else does: computed now, it would make the next ones late as well, and
        a server with too much to do would answer nobody.
        """
        chosen: dict[int, _Entry[Q, R]] = {}
        now = time.perf_counter()
        # An entry that is done: its client has gone, and is about to say so.
        waiting = {ticket: entry for ticket, entry in self._waiting.items() if not entry.future.done()}
        latest = now + self._batch_seconds
        timely = {ticket: entry for ticket, entry in waiting.items() if entry.deadline >= latest}
        for ticket, entry in (timely or waiting).items():
            if not chosen or entry.group == next(iter(chosen.values())).group:
                entry.started = now
                chosen[ticket] = entry
                if len(chosen) == self._max_batch:
                    break
        if not chosen:
            self._waiting.clear()
        for ticket in chosen:
            del self._waiting[ticket]
        return list(chosen.values())

    def _answer(self, queries: list[Q]) -> list[Any]:
        try:
            results = list(self._run(queries))
            if len(results) != len(queries):
                raise RuntimeError(f"the engine gave {len(results)} answers to {len(queries)} queries")
            return results
        except Exception as error:
            if len(queries) == 1:
                return [_Failure(error)]
        # One query must not spoil its neighbours': each on its own.
        return [outcome for query in queries for outcome in self._answer([query])]


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _deliver(entry: _Entry[Q, R], outcome: Any, batch_size: int) -> None:
    if entry.future.done():
        return
    if isinstance(outcome, _Failure):
        entry.future.set_exception(outcome.error)
        return
    assert entry.started is not None
    answered = Answered(result=outcome, queue_seconds=entry.started - entry.arrived, batch_size=batch_size)
    entry.future.set_result(answered)
