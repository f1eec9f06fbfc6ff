import typing
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.errors import DataError
from lasar.prompts.text_tasks import (
    TASKS,
    Renderer,
    TaskName,
    TextRow,
    asked_sources,
    interleave,
    shares,
    text_batches,
)
from lasar.prompts.text_tokens import train_tokenizer
from lasar.prompts.vocabulary import Vocabulary

CODES = np.array([[0, 1], [3, 2], [1, 1]], np.int32)
TITLES = ["Red hose", "Blue pot", ""]
TOKENIZER = train_tokenizer(TITLES, 270)


def renderer(*, orders=False, max_tokens=100, max_history=50):
    vocabulary = Vocabulary(
        num_levels=2, codebook_size=4, base_size=TOKENIZER.size, orders=orders, max_history=max_history
    )
    return Renderer(
        vocabulary=vocabulary, tokens_IL=vocabulary.item_tokens(CODES), titles=TITLES, tokenizer=TOKENIZER,
        max_tokens=max_tokens,
    )  # fmt: skip


RENDER = renderer()


def ints(*values):
    return np.array(values, np.int32)


HISTORY = TextRow(ints(1, 2, 0), ints(0, 0, 3), ints(1), "Likes pots.")
ITEMS = [TextRow(ints(), ints(), ints(item)) for item in (0, 1)]
SOURCES = {"items": ITEMS, "histories": [HISTORY], "rationales": [HISTORY]}


def spelled(ids, render):
    """Tokens as a reader sees them: markers and codes by name, text as it is."""
    names = {v: k for k, v in {"<user>": 1, "<order>": 2, "<s>": 3, "<e>": 5}.items()}
    base, words, pending = TOKENIZER.size, [], []
    for token in ids:
        if token < base:
            pending.append(token)
            continue
        if pending:
            words.append(TOKENIZER.decode(pending))
            pending = []
        code = token - render.vocabulary.first_code
        words.append(names[token - base] if code < 0 else f"{'ab'[code // 4]}{code % 4}")
    return words + ([TOKENIZER.decode(pending)] if pending else [])


@pytest.mark.parametrize(
    ("name", "prompt", "target"),
    [
        ("sid_to_title", "a3|b2|<s>", "Blue pot|<e>"),
        ("title_to_sid", "<s>|Blue pot|<e>", "a3|b2"),
        ("history_to_title", "<user>|a3|b2|a1|b1|a0|b1|<s>", "Blue pot|<e>"),
        ("titles_to_sid", "<user>|<s>|Blue pot\nRed hose|<e>", "a3|b2"),
        ("history_to_rationale", "<user>|a3|b2|a1|b1|a0|b1|<s>", "Likes pots.|<e>"),
        ("history_to_reasoned_sid", "<user>|a3|b2|a1|b1|a0|b1|<s>", "Likes pots.|<e>|a3|b2"),
    ],
)
def test_what_a_task_looks_like(name, prompt, target):
    row = HISTORY if TASKS[name].source != "items" else ITEMS[1]
    assert spelled(TASKS[name].prompt(RENDER, row, 1), RENDER) == prompt.split("|")
    assert spelled(TASKS[name].target(RENDER, row, 1), RENDER) == target.split("|")


def test_histories_with_orders_end_in_an_open_one():
    render = renderer(orders=True)
    prompt = spelled(TASKS["history_to_rationale"].prompt(render, HISTORY, 1), render)
    assert prompt == ["<user>", "<order>", "a3", "b2", "a1", "b1", "<order>", "a0", "b1", "<order>", "<s>"]


def test_long_texts_are_cut_and_still_closed():
    render = renderer(max_tokens=1, max_history=1)
    full = TOKENIZER.encode(TITLES[1])
    assert len(full) > 1
    assert TASKS["sid_to_title"].target(render, ITEMS[1], 1) == [full[0], render.vocabulary.latent_end]
    newest = TOKENIZER.encode(TITLES[0])[-1:]
    assert TASKS["titles_to_sid"].prompt(render, HISTORY, 1)[2:-1] == newest


def test_every_task_can_be_named_in_a_recipe():
    assert set(typing.get_args(TaskName)) == set(TASKS)
    assert asked_sources(["sid_to_title", "history_to_rationale"]) == {"items", "rationales"}
    assert asked_sources([]) == set()


def batches(num_rows, *, render=RENDER, batch_tokens=60, seed=0, epoch=0, sources=SOURCES):
    return text_batches(sources, render, num_rows=num_rows, batch_tokens=batch_tokens, seed=seed, epoch=epoch)


ALL = dict.fromkeys(TASKS, 5)


def rows_of(batch):
    """(prompt, target, item) of every row, read back from the arrays."""
    width = batch.ids_BT.shape[1]
    found = []
    for number, ids in enumerate(batch.ids_BT):
        mine = (batch.sources_P // width) == number
        columns = batch.sources_P[mine] - number * width
        assert columns.tolist() == list(range(columns[0], columns[0] + len(columns)))
        prompt, target = ids[: columns[0] + 1].tolist(), batch.targets_P[mine].tolist()
        assert ids[len(prompt) : len(prompt) + len(target)].tolist() == target
        assert (ids[len(prompt) + len(target) :] == RENDER.vocabulary.pad).all()
        found.append((tuple(prompt), tuple(target), batch.items_P[mine].tolist()))
    return found


def test_batches_hold_prompts_and_targets():
    found = Counter()
    for batch in batches(ALL):
        assert batch.ids_BT.size <= 60
        assert batch.num_targets == len(batch.targets_P) == len(batch.sources_P) == len(batch.items_P)
        for prompt, target, items in rows_of(batch):
            found[prompt, target] += 1
            is_code = [token >= RENDER.vocabulary.first_code for token in target]
            assert [item >= 0 for item in items] == is_code
            codes = [token for token, code in zip(target, is_code, strict=True) if code]
            if codes:
                (item,) = set(items) - {-1}
                assert RENDER.tokens_IL[item].tolist() == codes
    expected = Counter()
    for name in TASKS:
        row_items = [(row, int(row.targets[0])) for row in SOURCES[TASKS[name].source]]
        for row, item in row_items:
            key = tuple(TASKS[name].prompt(RENDER, row, item)), tuple(TASKS[name].target(RENDER, row, item))
            expected[key] += 5 // len(row_items)
    assert sum(found.values()) == 5 * len(TASKS)
    assert all(
        found[key] - count in (0, 1) for key, count in expected.items()
    )  # every row before any comes again
    assert set(found) == set(expected)


def test_an_epoch_is_a_pure_function_of_seed_and_epoch():
    def flat(**where):
        return [(b.ids_BT.tolist(), b.targets_P.tolist()) for b in batches(ALL, **where)]

    assert flat() == flat()
    assert flat() != flat(epoch=1)
    assert flat() != flat(seed=1)


def test_every_answer_of_an_order_is_drawn():
    row = HISTORY._replace(targets=ints(0, 2))
    drawn = Counter(
        int(batch.items_P.max())
        for batch in batches({"titles_to_sid": 60}, sources={"histories": [row]}, batch_tokens=1)
    )
    assert set(drawn) == {0, 2}
    assert min(drawn.values()) > 15


def test_a_task_without_rows_is_named():
    with pytest.raises(DataError, match="sid_to_title: no item has a title"):
        batches({"sid_to_title": 1}, sources={"items": []})


@given(
    st.dictionaries(st.sampled_from(sorted(TASKS)), st.floats(0.01, 100), min_size=1), st.integers(1, 1000)
)
def test_rows_are_divided_by_weight(weights, total):
    counts = shares(weights, total)
    assert sum(counts.values()) == total
    for name, weight in weights.items():
        assert abs(counts[name] - total * weight / sum(weights.values())) < 1


def test_no_tasks_no_rows():
    assert shares({}, 100) == {}


@given(st.lists(st.integers(0, 99)), st.lists(st.integers(100, 199)), st.integers(0, 9))
def test_interleaving_keeps_both_orders(main, guests, epoch):
    mixed = interleave(main, guests, seed=0, epoch=epoch)
    assert [x for x in mixed if x < 100] == main
    assert [x for x in mixed if x >= 100] == guests
    assert mixed == interleave(main, guests, seed=0, epoch=epoch)


def test_interleaving_spreads_and_changes_with_the_epoch():
    mixes = [interleave([0] * 50, [1] * 50, seed=0, epoch=epoch) for epoch in range(2)]
    assert mixes[0] != mixes[1]
    assert 15 < sum(mixes[0][:50]) < 35
