"""The queue and its engine thread against a fake engine: nothing lost, nothing twice, nothing of another's."""

import asyncio
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.serving.batcher import DeadlineError, MicroBatcher, QueueFullError, StoppingError


class FakeEngine:
    """Doubles numbers, slowly; fails on some; writes down what it saw."""

    def __init__(self, seconds=0.0, poison=()):
        self.seconds, self.poison = seconds, set(poison)
        self.batches, self.threads = [], set()
        self.gate = threading.Event()
        self.gate.set()
        self.inside = 0

    def __call__(self, queries):
        assert self.inside == 0, "two batches at once"
        self.inside += 1
        try:
            self.gate.wait(10)
            self.batches.append(list(queries))
            self.threads.add(threading.get_ident())
            time.sleep(self.seconds)
            if self.poison & set(queries):
                raise ArithmeticError(f"cannot double {sorted(self.poison & set(queries))}")
            return [2 * query for query in queries]
        finally:
            self.inside -= 1


def batcher(engine, **options):
    defaults = {"group": lambda query: query % 3, "max_queue": 100, "max_batch": 8}
    made = MicroBatcher(engine, **(defaults | options))
    made.start()
    return made


async def settled(awaitables):
    return await asyncio.gather(*awaitables, return_exceptions=True)


plans = st.lists(
    st.tuples(st.sampled_from(["wait", "wait", "cancel", "hurry"]), st.integers(0, 3), st.booleans()),
    min_size=1,
    max_size=60,
)


@settings(max_examples=25)
@given(
    plan=plans, max_batch=st.integers(1, 9), max_queue=st.integers(1, 80), linger=st.sampled_from([0, 0.001])
)
def test_every_request_is_answered_exactly_once_with_its_own_answer(plan, max_batch, max_queue, linger):
    poison = {number for number, (_, _, bad) in enumerate(plan) if bad and number % 5 == 0}
    engine = FakeEngine(seconds=0.001, poison=poison)

    async def scenario():
        queue = batcher(engine, max_batch=max_batch, max_queue=max_queue, linger_seconds=linger)
        tasks = []
        for number, (what, pause, _) in enumerate(plan):
            timeout = 0.002 if what == "hurry" else 30
            tasks.append(asyncio.create_task(queue.submit(number, timeout_seconds=timeout)))
            await asyncio.sleep(pause / 2000)
            if what == "cancel":
                tasks[-1].cancel()
        outcomes = await settled(tasks)
        await queue.close()
        assert queue.waiting == 0
        return outcomes

    outcomes = asyncio.run(scenario())
    for number, ((what, _, _), outcome) in enumerate(zip(plan, outcomes, strict=True)):
        if isinstance(outcome, ArithmeticError):
            assert number in poison
            assert str(outcome) == f"cannot double [{number}]"
        elif isinstance(outcome, BaseException):
            allowed = {"cancel": asyncio.CancelledError, "hurry": DeadlineError}.get(what, ())
            assert isinstance(outcome, (QueueFullError, *(() if allowed == () else (allowed,))))
        else:
            assert outcome.result == 2 * number
            assert number not in poison
    for batch in engine.batches:
        assert len(batch) <= max_batch
        assert len({number % 3 for number in batch}) == 1
    seen = [number for batch in engine.batches for number in batch if number not in poison]
    calm = [
        number
        for number in seen
        if not any(poison & set(batch) for batch in engine.batches if number in batch)
    ]
    assert len(calm) == len(set(calm)), "computed twice without need"
    assert len(engine.threads) <= 1


def test_a_full_queue_says_when_to_come_back():
    engine = FakeEngine()
    engine.gate.clear()

    async def scenario():
        queue = batcher(engine, max_queue=3, max_batch=1)
        running = asyncio.create_task(queue.submit(0, timeout_seconds=30))
        await asyncio.sleep(0.02)  # the engine has taken it
        waiting = [asyncio.create_task(queue.submit(n, timeout_seconds=30)) for n in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as full:
            await queue.submit(4, timeout_seconds=30)
        engine.gate.set()
        answers = await settled([running, *waiting])
        await queue.close()
        return full.value.retry_after, [answer.result for answer in answers]

    retry_after, answers = asyncio.run(scenario())
    assert retry_after >= 1
    assert answers == [0, 2, 4, 6]


def test_a_request_that_cannot_be_in_time_is_refused_at_once():
    engine = FakeEngine(seconds=0.05)

    async def scenario():
        queue = batcher(engine, max_batch=1)
        await queue.submit(0, timeout_seconds=30)  # now it knows how long a batch takes
        many = [asyncio.create_task(queue.submit(n, timeout_seconds=30)) for n in range(6)]
        await asyncio.sleep(0.01)
        began = time.perf_counter()
        with pytest.raises(QueueFullError):
            await queue.submit(7, timeout_seconds=0.1)
        assert time.perf_counter() - began < 0.05
        await settled(many)
        await queue.close()

    asyncio.run(scenario())


def test_what_would_be_late_makes_nobody_else_late():
    engine = FakeEngine(seconds=0.05)

    async def scenario():
        queue = batcher(engine, max_batch=1)
        await queue.submit(0, timeout_seconds=30)
        engine.seconds = 0.3  # slower than it could know when it accepted these
        tasks = [
            asyncio.create_task(queue.submit(n, timeout_seconds=seconds))
            for n, seconds in ((1, 30), (2, 0.45), (3, 0.8))
        ]
        outcomes = await settled(tasks)
        queue._batch_seconds = 30.0  # an estimate that nobody can meet must not stop everybody
        alone = await queue.submit(4, timeout_seconds=2)
        await queue.close()
        return [*outcomes, alone]

    running, hasty, timely, alone = asyncio.run(scenario())
    assert (running.result, timely.result, alone.result) == (2, 6, 8)
    assert isinstance(hasty, DeadlineError)
    assert not hasty.started
    assert engine.batches == [[0], [1], [3], [4]]


def test_one_quick_batch_does_not_hide_that_others_are_slow():
    engine = FakeEngine(seconds=0.1)

    async def scenario():
        queue = batcher(engine, max_batch=1)
        await queue.submit(0, timeout_seconds=30)
        engine.seconds = 0.0
        await queue.submit(1, timeout_seconds=30)
        quick = queue.expected_seconds()
        for number in range(30):
            await queue.submit(number, timeout_seconds=30)
        long_since = queue.expected_seconds()
        engine.gate.clear()
        running = asyncio.create_task(queue.submit(0, timeout_seconds=30))
        await asyncio.sleep(0.2)
        stalled = queue.expected_seconds()
        engine.gate.set()
        await running
        await queue.close()
        return quick, long_since, stalled

    quick, long_since, stalled = asyncio.run(scenario())
    assert quick > 0.075
    assert long_since < 0.05
    assert stalled > 0.19, "a batch that has not ended yet counts, too"


def test_who_leaves_the_queue_is_never_computed():
    engine = FakeEngine()
    engine.gate.clear()

    async def scenario():
        queue = batcher(engine, max_batch=4)
        first = asyncio.create_task(queue.submit(0, timeout_seconds=30))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(queue.submit(3, timeout_seconds=30))
        hasty = asyncio.create_task(queue.submit(6, timeout_seconds=0.01))
        stays = asyncio.create_task(queue.submit(9, timeout_seconds=30))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        outcomes = await settled([first, gone, hasty, stays])
        await queue.close()
        return outcomes

    first, gone, hasty, stays = asyncio.run(scenario())
    assert (first.result, stays.result) == (0, 18)
    assert isinstance(gone, asyncio.CancelledError)
    assert isinstance(hasty, DeadlineError)
    assert not hasty.started
    assert engine.batches == [[0], [9]]


def test_a_deadline_during_the_computation_says_so():
    engine = FakeEngine(seconds=0.1)

    async def scenario():
        queue = batcher(engine)
        with pytest.raises(DeadlineError) as late:
            await queue.submit(1, timeout_seconds=0.02)
        await queue.close()
        return late.value.started

    assert asyncio.run(scenario())


def test_what_arrives_together_is_computed_together_and_groups_do_not_mix():
    engine = FakeEngine(seconds=0.01)

    async def scenario():
        queue = batcher(engine, linger_seconds=0.02)
        answers = await asyncio.gather(*(queue.submit(n, timeout_seconds=30) for n in range(12)))
        await queue.close()
        return answers

    answers = asyncio.run(scenario())
    assert [sorted(batch) for batch in engine.batches] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert {answer.batch_size for answer in answers} == {4}


def test_closing_answers_what_waits_and_refuses_the_rest():
    engine = FakeEngine(seconds=0.02)

    async def scenario():
        queue = batcher(engine, max_batch=2)
        tasks = [asyncio.create_task(queue.submit(n, timeout_seconds=30)) for n in range(9)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0)
        with pytest.raises(StoppingError):
            await queue.submit(10, timeout_seconds=30)
        await closing
        return await settled(tasks)

    assert [answer.result for answer in asyncio.run(scenario())] == [2 * n for n in range(9)]


def test_an_engine_that_miscounts_fails_every_query_and_the_queue_lives_on():
    async def scenario():
        queue = MicroBatcher(
            lambda queries: [] if 1 in queries else list(queries), group=bool, max_queue=9, max_batch=4
        )
        queue.start()
        with pytest.raises(RuntimeError, match="0 answers to 1 queries"):
            await queue.submit(1, timeout_seconds=5)
        answer = await queue.submit(2, timeout_seconds=5)
        await queue.close()
        return answer.result

    assert asyncio.run(scenario()) == 2
