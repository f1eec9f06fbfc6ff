"""One contract for every teacher: a rationale per row, training events alone, no target named, no state."""

import dataclasses
import http.server
import json
import threading
import zlib

import numpy as np
import polars as pl
import pytest

from lasar.cot.chat import Endpoint
from lasar.cot.rationale import OUTCOMES
from lasar.cot.rationale_checks import TargetCheck
from lasar.cot.rows import training_rows
from lasar.cot.teachers import TEACHERS
from lasar.data.interactions import SPLIT_TRAIN, Interactions, ItemTable

NUM_USERS, NUM_ITEMS, NUM_TRAINED = 16, 40, 30
COLOURS, THINGS = ("red", "blue", "green", "white", "black"), ("mug", "lamp", "scarf", "bowl")
WORDS = ("tall", "flat", "broad", "thin", "oval", "deep", "plain", "soft")


class Parrot(http.server.ThreadingHTTPServer):
    """A model whose every word depends on the whole prompt, so that whatever leaks into a prompt shows."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), ParrotHandler)


class ParrotHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        text = self.rfile.read(int(self.headers["Content-Length"]))
        digits = [zlib.crc32(text + bytes([n])) % len(WORDS) for n in range(6)]
        answer = f"Behaviour: Things are {' '.join(WORDS[digit] for digit in digits)}.\nRecommendation: None."
        message = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        data = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [message]}
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data.encode())


@pytest.fixture(scope="module")
def url():
    with Parrot() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()
        thread.join()


def shop(*, orders, seed=0):
    """Users with three to eight baskets, the last two held out; items from 30 on are only ever held out."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(NUM_USERS):
        baskets = int(rng.integers(3, 9))
        for basket in range(baskets):
            split = max(0, basket - baskets + 3)
            low, high = (0, NUM_TRAINED) if split == SPLIT_TRAIN else (0, NUM_ITEMS)
            items = rng.choice(
                np.arange(low, high), size=int(rng.integers(1, 4)) if orders else 1, replace=False
            )
            events += [(user, int(item), basket, split) for item in items]
    table = np.array(events, dtype=np.int32)
    return Interactions(
        user_index=table[:, 0], item_index=table[:, 1], basket=table[:, 2], split=table[:, 3].astype(np.int8),
        num_users=NUM_USERS, num_items=NUM_ITEMS, split_kind="last_basket", train_targets="all",
    )  # fmt: skip


def catalogue():
    rng = np.random.default_rng(1)
    kinds = [THINGS[item % len(THINGS)] for item in range(NUM_ITEMS)]
    titles = [
        f"{COLOURS[rng.integers(5)]} {kind} Quorv{chr(97 + item % 26)}x{item}"
        for item, kind in enumerate(kinds)
    ]
    return pl.DataFrame({"title": titles, "categories": [f"Shop > Home > {kind}" for kind in kinds]})


@pytest.fixture(params=sorted(TEACHERS))
def kind(request):
    if request.param == "endpoint":
        pytest.importorskip("openai", reason="needs the extra: pip install 'lasar[teacher]'")
    return request.param


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Answers are found by what was asked, so sharing them hides no leak: it would ask something else."""
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(params=["from_target", "history_only"])
def write(request, kind, cache, url):
    """`write(interactions, items, rows)` with a fresh teacher; the rows default to all of the interactions."""

    def write(interactions, items, rows=None):
        rows = training_rows(interactions) if rows is None else rows
        trained = (interactions.train_counts() > 0).tolist()
        shared = {"trained": trained, "intent": request.param, "max_history": 10}
        if kind == "endpoint":
            table = ItemTable(item_ids=ids(), titles=items["title"].to_list(), texts=items["title"].to_list())
            endpoint = Endpoint(url=url, model="parrot", concurrency=4)
            teacher = TEACHERS[kind](items=table, endpoint=endpoint, cache=cache, **shared)
        else:
            has_orders = any(len(row.targets) > 1 for row in rows)
            teacher = TEACHERS[kind](items=items, has_orders=has_orders, min_items=2, max_share=0.5, **shared)
        assert teacher.name.split(":")[0] == kind
        return teacher.write(rows)

    return write


def ids():
    return [f"SKU-{item:05}" for item in range(NUM_ITEMS)]


def test_one_rationale_per_row_with_a_text_exactly_where_it_is_ok(write):
    interactions = shop(orders=True)
    found = write(interactions, catalogue())
    assert len(found) == len(training_rows(interactions))
    for rationale in found:
        assert rationale.outcome in OUTCOMES
        assert bool(rationale.text) is (rationale.outcome == "ok")
        assert rationale.text == " ".join(rationale.text.split())
    assert any(rationale.outcome == "ok" for rationale in found)
    assert write(interactions, catalogue(), rows=[]) == []


def test_no_target_is_named(write):
    interactions, items = shop(orders=True), catalogue()
    titles = items["title"].to_list()
    check = TargetCheck(
        ItemTable(item_ids=ids(), titles=titles, texts=titles), [True] * NUM_ITEMS, max_items=2
    )
    for row, rationale in zip(training_rows(interactions), write(interactions, items), strict=True):
        assert not check.names_target(
            rationale.text, targets=row.targets.tolist(), history=row.history.tolist()
        )
        for target in set(row.targets.tolist()) - set(row.history.tolist()):
            assert titles[target].split()[-1].lower() not in rationale.text.lower()
            assert ids()[target].lower() not in rationale.text.lower()


def test_twice_is_the_same_and_a_row_depends_on_no_other(write):
    interactions, items = shop(orders=False), catalogue()
    rows = training_rows(interactions)
    found = write(interactions, items)
    assert write(interactions, items) == found
    assert write(interactions, items, rows=rows[::-3]) == found[::-3]


@pytest.mark.parametrize("orders", [False, True])
def test_held_out_events_change_no_byte(write, orders):
    interactions, items = shop(orders=orders), catalogue()
    expected = write(interactions, items)
    held_out = interactions.split != SPLIT_TRAIN
    rng = np.random.default_rng(2)
    for change in (rng.permutation, lambda values: rng.integers(NUM_ITEMS, size=len(values)), np.zeros_like):
        item_index = interactions.item_index.copy()
        item_index[held_out] = change(item_index[held_out])
        assert write(dataclasses.replace(interactions, item_index=item_index), items) == expected
    kept = {
        name: getattr(interactions, name)[~held_out]
        for name in ("user_index", "item_index", "basket", "split")
    }
    assert write(dataclasses.replace(interactions, **kept), items) == expected


def test_texts_of_items_that_are_only_held_out_change_no_byte(write):
    interactions, items = shop(orders=True), catalogue()
    only_held_out = interactions.train_counts() == 0
    assert only_held_out.any()
    expected = write(interactions, items)
    rng = np.random.default_rng(3)
    others = [
        ("red mug soft", "Shop > Home > mug"),
        ("", ""),
        ("Quorvax0 lamp", "Other > Thing"),
        ("x. y! z", "A|B"),
        ("x", "Red > Blue"),
    ]
    for title, category in others:
        changed = items.with_columns(
            title=pl.when(pl.Series(only_held_out)).then(pl.lit(title)).otherwise("title"),
            categories=pl.when(pl.Series(only_held_out)).then(pl.lit(category)).otherwise("categories"),
        )
        assert write(interactions, changed) == expected
    shuffled = np.arange(NUM_ITEMS)
    shuffled[only_held_out] = rng.permutation(shuffled[only_held_out])
    assert write(interactions, items[shuffled.tolist()]) == expected


def test_later_training_events_do_not_change_earlier_rows(write):
    """Statistics are over which items occur in training, so the change keeps that set."""
    interactions, items = shop(orders=False), catalogue()
    trained = interactions.split == SPLIT_TRAIN
    late = trained & (interactions.basket >= 2)
    item_index = interactions.item_index.copy()
    item_index[late] = np.random.default_rng(4).permutation(item_index[late])
    assert not np.array_equal(item_index, interactions.item_index)
    before, after = (
        write(interactions, items),
        write(dataclasses.replace(interactions, item_index=item_index), items),
    )
    early = [n for n, row in enumerate(training_rows(interactions)) if row.basket < 2]
    assert [before[n] for n in early] == [after[n] for n in early]
    assert before != after
