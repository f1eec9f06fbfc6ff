import http.server
import json
import os
import signal
import threading
import time
from email.utils import formatdate

import numpy as np
import pytest

from lasar.cot.chat import Endpoint
from lasar.cot.endpoint_teacher import EXAMPLE_TARGET, EndpointTeacher
from lasar.cot.rows import TrainingRow
from lasar.data.interactions import ItemTable
from lasar.errors import ConfigError, DataError

pytest.importorskip("openai", reason="the endpoint teacher needs the extra: pip install 'lasar[teacher]'")

TITLES = [f"Quorvex{chr(97 + n)} thing" for n in range(10)]
GOOD = (
    "Behaviour: Buys things.\nPreferences: Plain ones.\nIntent: More of them.\nRecommendation: Quorvexa thing"
)
SECRET = "sk-secret-123"


class Server(http.server.ThreadingHTTPServer):
    """A chat endpoint that does what it is told: `plan` holds one entry per coming request, then all is well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.asked, self.times = [], [], []
        self.keys, self.in_flight, self.most_in_flight = set(), 0, 0
        self.lock = threading.Lock()
        self.delay, self.counts = 0.0, True

    def handle_error(self, request, client_address):
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            step = server.plan.pop(0) if server.plan else GOOD
        try:
            time.sleep(server.delay)
            self.answer(step(body) if callable(step) else step)
        finally:
            with server.lock:
                server.in_flight -= 1

    def answer(self, step):
        if isinstance(step, str):
            step = {"message": {"role": "assistant", "content": step}, "finish_reason": "stop"}
        if "message" in step:
            usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
            step = {"status": 200, "body": {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                    "choices": [{"index": 0, **step}], **({"usage": usage} if self.server.counts else {})}}  # fmt: skip
        payload = step.get("body", {"error": {"message": f"no luck with {SECRET}"}})
        data = payload.encode() if isinstance(payload, str) else json.dumps(payload).encode()
        self.send_response(step["status"])
        for name, value in {"Content-Type": "application/json", **step.get("headers", {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def rows(count=6):
    found = []
    for n in range(count):
        history = np.array([n % 10], dtype=np.int32)
        found.append(TrainingRow(n, 1, history, np.zeros(1, np.int32), np.array([(n + 1) % 10], np.int32)))
    return found


def teacher(server, folder, *, url=None, **options):
    wire = {"concurrency": 1, "attempts": 4, "timeout_seconds": 5.0, "pause_seconds": 0.01, "api_key": SECRET}
    wire |= {name: options.pop(name) for name in list(options) if name in Endpoint.__dataclass_fields__}
    endpoint = Endpoint(
        url=url or server.url, model="tiny", key_source="the environment variable KEY", **wire
    )
    items = ItemTable(item_ids=[f"sku-{n}" for n in range(10)], titles=TITLES, texts=TITLES)
    return EndpointTeacher(
        items=items,
        trained=[True] * 10,
        endpoint=endpoint,
        cache=folder / "answers",
        max_tokens=50,
        **options,
    )


def outcomes(found):
    return [rationale.outcome for rationale in found]


def test_the_recommendation_is_cut_off_and_tokens_are_counted(server, tmp_path):
    found = teacher(server, tmp_path).write(rows(2))
    assert [tuple(rationale) for rationale in found] == [
        ("Buys things. Plain ones. More of them.", "ok", 100, 20)
    ] * 2
    assert server.keys == {f"Bearer {SECRET}"}
    assert server.asked[0]["model"] == "tiny"
    assert server.asked[0]["max_tokens"] == 50
    assert "temperature" not in server.asked[0]


@pytest.mark.parametrize("intent", ["from_target", "history_only"])
def test_the_model_sees_the_target_only_where_the_intent_says_so(server, tmp_path, intent):
    teacher(server, tmp_path, intent=intent).write(rows(1))
    text = json.dumps(server.asked[0]["messages"])
    assert TITLES[0] in text
    assert (TITLES[1] in text) is (intent == "from_target")
    assert (f"Chosen next: {EXAMPLE_TARGET}" in text) is (intent == "from_target")


def test_every_row_has_an_outcome_and_nothing_is_dropped_in_silence(server, tmp_path):
    server.plan = [
        GOOD,
        "I'm sorry, I can't help with that.",
        "",
        "Intent: They want a Quorvexe thing now.",  # the target of row 3
        {"message": {"role": "assistant", "content": None, "refusal": "No."}, "finish_reason": "stop"},
        {"message": {"role": "assistant", "content": "Cut"}, "finish_reason": "content_filter"},
        {"status": 400, "body": {"error": {"message": "too long"}}},
        "Recommendation: x",
        {
            "message": {"role": "assistant", "content": "Intent: All is well. And th"},
            "finish_reason": "length",
        },
    ]
    found = teacher(server, tmp_path).write(rows(10))
    assert outcomes(found) == [
        "ok", "refused", "empty", "names_target", "refused", "refused", "failed", "empty", "ok", "ok"
    ]  # fmt: skip
    assert [bool(rationale.text) for rationale in found] == [outcome == "ok" for outcome in outcomes(found)]
    assert found[8].text == "All is well."
    assert len(server.asked) == 10


def test_overload_and_errors_of_the_server_are_tried_again(server, tmp_path):
    busy = {"status": 429, "headers": {"Retry-After": "0"}}
    server.plan = [busy, {"status": 500}, {"status": 503}, GOOD, {"status": 200, "body": "not json"}, GOOD]
    assert outcomes(teacher(server, tmp_path).write(rows(2))) == ["ok", "ok"]
    assert len(server.asked) == 6


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured_by_all(server, tmp_path, as_date):
    told = formatdate(time.time() + 2, usegmt=True) if as_date else "0.4"
    server.plan = [GOOD, {"status": 429, "headers": {"Retry-After": told}}]
    server.delay = 0.02
    found = teacher(server, tmp_path, concurrency=2).write(rows(6))
    assert outcomes(found) == ["ok"] * 6
    gaps = np.diff(server.times)
    assert gaps.max() >= 0.35
    # What the other worker had begun when the server spoke came before the pause; nothing came within it.
    assert int(gaps.argmax()) <= 3


def test_pauses_grow(server, tmp_path):
    server.plan = [{"status": 500}] * 3
    teacher(server, tmp_path, pause_seconds=0.1).write(rows(1))
    gaps = np.diff(server.times)
    assert [0.05 * 2**n < gap < 0.1 * 2**n + 0.15 for n, gap in enumerate(gaps)] == [True] * 3


def test_a_silent_server_times_out_and_is_asked_again(server, tmp_path):
    def silent(body):
        time.sleep(0.6)
        return GOOD

    server.plan = [GOOD, silent]
    found = teacher(server, tmp_path, timeout_seconds=0.3).write(rows(3))
    assert outcomes(found) == ["ok"] * 3
    assert len(server.asked) == 4


def test_a_row_that_fails_for_good_is_counted_and_asked_again_by_a_rerun(server, tmp_path):
    server.plan = [GOOD] + [{"status": 500}] * 4
    assert outcomes(teacher(server, tmp_path).write(rows(3))) == ["ok", "failed", "ok"]
    assert len(server.asked) == 6
    assert outcomes(teacher(server, tmp_path).write(rows(3))) == ["ok"] * 3
    assert len(server.asked) == 7  # the failed one alone


def test_a_server_that_counts_no_tokens_is_held_to_the_budget_all_the_same(server, tmp_path):
    server.counts = False
    found = teacher(server, tmp_path, token_budget=3000).write(rows(40))
    assert {"ok", "over_budget"} == set(outcomes(found))
    assert len(server.asked) < 40


def test_concurrency_is_bounded_and_used(server, tmp_path):
    server.delay = 0.05
    teacher(server, tmp_path, concurrency=3).write(rows(10))
    assert server.most_in_flight == 3


def test_equal_prompts_are_asked_once(server, tmp_path):
    found = teacher(server, tmp_path).write([rows(1)[0]._replace(user_index=n) for n in range(4)])
    assert outcomes(found) == ["ok"] * 4
    assert len(server.asked) == 1
    assert sum(rationale.prompt_tokens for rationale in found) == 100


def test_a_rerun_pays_nothing_and_an_interrupted_run_continues(server, tmp_path):
    # Whoever starts the tests in the background of a shell script starts them with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(body):
        os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C does
        time.sleep(0.2)
        return GOOD

    server.plan = [GOOD] * 3 + [interrupt]
    with pytest.raises(KeyboardInterrupt):
        teacher(server, tmp_path).write(rows(10))
    assert len(server.asked) == 4
    resumed = teacher(server, tmp_path).write(rows(10))
    assert outcomes(resumed) == ["ok"] * 10
    assert len(server.asked) == 4 + 7  # three were kept
    assert teacher(server, tmp_path).write(rows(10)) == resumed
    assert len(server.asked) == 11
    teacher(server, tmp_path, temperature=0.5).write(rows(10))  # another question
    assert len(server.asked) == 21


def test_the_budget_is_a_cap_and_a_rerun_says_no_to_the_same_rows(server, tmp_path):
    budget = 2500
    options = {"token_budget": budget, "concurrency": 4}
    distinct = [
        row._replace(history=np.arange(n + 1, dtype=np.int32) % 10) for n, row in enumerate(rows(10) * 3)
    ]
    first = teacher(server, tmp_path, **options).write(distinct)
    asked = len(server.asked)
    assert set(outcomes(first)) == {"ok", "over_budget"}
    spent = sum(rationale.prompt_tokens + rationale.completion_tokens for rationale in first)
    assert budget / 2 < spent <= budget
    assert teacher(server, tmp_path, **options).write(distinct) == first
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("status", "key", "expected"),
    [
        (401, SECRET, r"endpoint.api_key_variable: the environment variable KEY is refused: .* answers 401"),
        (401, "", r"endpoint.api_key_variable: the environment variable KEY is not set"),
        (404, SECRET, r"endpoint.model: 'tiny' is not served at http://127.*answers 404"),
    ],
)
@pytest.mark.parametrize("answers_before", [0, 3])
def test_mistakes_that_concern_all_requests_stop_at_once(
    server, tmp_path, status, key, expected, answers_before
):
    server.plan = [GOOD] * answers_before + [{"status": status}] * 99
    with pytest.raises(ConfigError, match=expected) as caught:
        teacher(server, tmp_path, api_key=key).write(rows(10))
    assert SECRET not in str(caught.value) or not key
    assert len(server.asked) == answers_before + 1


def test_no_server_is_one_clear_error_at_once(tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/v1"
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"endpoint.url: http://127.*cannot be reached .*; start the server"
    ):
        teacher(None, tmp_path, url=url, pause_seconds=10.0).write(rows(10))
    assert time.monotonic() - began < 5


def test_a_request_that_the_server_dislikes_from_the_start_is_shown(server, tmp_path):
    server.plan = [{"status": 400, "body": {"error": {"message": "unsupported parameter: max_tokens"}}}] * 99
    with pytest.raises(DataError, match=r"answers 400: .*unsupported parameter: max_tokens.*run again"):
        teacher(server, tmp_path).write(rows(10))
    assert len(server.asked) == 1


def test_a_server_that_dies_is_given_up_after_a_while(server, tmp_path):
    server.plan = [GOOD] * 2 + [{"status": 500}] * 999
    with pytest.raises(
        DataError, match=r"answers 500.*2 attempts; answers so far are kept, run again to continue"
    ):
        teacher(server, tmp_path, attempts=2, max_failures=3).write(rows(10))
    assert len(server.asked) == 2 + 3 * 2
    server.plan = []
    assert outcomes(teacher(server, tmp_path).write(rows(10))) == ["ok"] * 10
    assert len(server.asked) == 8 + 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_model_behind_a_real_server(tmp_path):
    url, model = os.environ.get("LASAR_TEACHER_URL"), os.environ.get("LASAR_TEACHER_MODEL")
    if not url or not model:
        pytest.skip("needs a chat endpoint: set LASAR_TEACHER_URL and LASAR_TEACHER_MODEL")
    titles = [
        f"{colour} {thing}" for colour in ("Red", "Blue", "Green") for thing in ("tea mug", "lamp", "scarf")
    ]
    items = ItemTable(item_ids=[f"sku-{n}" for n in range(9)], titles=titles, texts=titles)

    def write(name=model):
        endpoint = Endpoint(
            url=url, model=name, api_key=os.environ.get("LASAR_TEACHER_API_KEY", ""), concurrency=2
        )
        with_model = EndpointTeacher(
            items=items,
            trained=[True] * 9,
            endpoint=endpoint,
            cache=tmp_path,
            max_tokens=120,
            temperature=0.0,
        )
        return with_model.write(
            [TrainingRow(n, 1, np.array([n, n + 1], np.int32), np.zeros(2, np.int32), np.array([n + 3], np.int32))
             for n in range(3)]
        )  # fmt: skip

    found = write()
    assert set(outcomes(found)) <= {"ok", "empty", "refused", "names_target"}
    assert all(rationale.completion_tokens > 0 for rationale in found)
    assert all("Recommendation" not in rationale.text for rationale in found)
    assert write() == found
