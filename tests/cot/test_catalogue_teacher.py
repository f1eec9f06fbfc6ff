import numpy as np
import polars as pl
import pytest

from lasar.cot.catalogue_teacher import CatalogueTeacher
from lasar.cot.rationale import sentences
from lasar.cot.rationale_checks import TargetCheck
from lasar.cot.rows import TrainingRow
from lasar.data.interactions import ItemTable

# 0-3 soap of two brands, 4-7 shampoo, 8-11 lamps; item 12 stands alone.
TITLES = [
    "Alva rose soap", "Alva lime soap", "Brio rose soap", "Brio lime soap",
    "Alva pine shampoo", "Alva mint shampoo", "Brio mint shampoo", "Brio lime shampoo",
    "Orm lamp of brass", "Dusk tall lamp of brass", "Orm lamp of steel", "Dusk lamp of steel",
    "Tikk Zanzibar clock",
]  # fmt: skip
CATEGORIES = ["Shop > Care > Soap"] * 4 + ["Shop > Care > Shampoo"] * 4 + ["Shop > Home > Lamps"] * 4
ITEMS = pl.DataFrame(
    {
        "title": TITLES,
        "categories": [*CATEGORIES, "Shop > Home > Clocks"],
        "brand": ["Alva", "Alva", "Brio", "Brio"] * 2 + ["Orm", "Dusk"] * 2 + ["Tikk"],
        "price": ["1", "1", "2", "2", "3", "3", "4", "4", "50", "60", "70", "80", "90"],
    }
)


def row(history, targets, baskets=None):
    baskets = range(len(history)) if baskets is None else baskets
    arrays = [np.array(values, dtype=np.int32) for values in (list(history), list(baskets), targets)]
    return TrainingRow(0, int(arrays[1][-1]) + 1 if len(arrays[1]) else 0, *arrays)


def teacher(items=ITEMS, **options):
    options = {"trained": [True] * len(items), "min_items": 2, "max_share": 0.5, **options}
    return CatalogueTeacher(items=items, **options)


def chain(history, targets, *, baskets=None, **options):
    (rationale,) = teacher(**options).write([row(history, targets, baskets)])
    assert rationale.outcome == "ok"
    return sentences(rationale.text)


def test_a_row_without_history_says_so():
    assert chain([], [8]) == [
        "There is no earlier choice to learn from.", "So the next choice probably turns to brass lamps."
    ]  # fmt: skip
    assert chain([], [8], intent="history_only")[-1] == "So the next choice could be anything."


def test_a_long_chain_states_shift_habit_and_brand_from_the_history():
    assert chain([0, 4, 5, 10, 9], [11]) == [
        "So far there are five choices, mostly care.",
        'The latest choice is "Dusk tall lamp of brass", which counts as lamps.',
        "Lately the interest has moved from care to home.",
        "The choices keep returning to lamps and shampoo.",
        "Alva is a brand that is chosen again and again.",
        "So the next choice probably stays with steel lamps.",
    ]


def test_each_fact_alone():
    assert "Every choice is of the same kind, soap." in chain([0, 3], [8])
    assert "Before that came lamps." in chain([8, 0], [4])
    assert "Before that came shampoo and soap." in chain([4, 0, 8], [9])
    assert "Lately there is more interest in shampoo." in chain([0, 1, 2, 5, 7], [8])
    assert "Many choices are described as rose." in chain([0, 2], [8])
    assert "Almost every choice is of another brand." in chain([0, 2, 8, 12, 11], [5])
    assert "Prices are mostly low." in chain([0, 1], [8], items=ITEMS.drop("brand", "categories"))


def test_more_to_say_makes_a_longer_chain():
    lengths = [len(chain(history, [8])) for history in ([], [0], [0, 4], [0, 4, 5, 10, 9])]
    assert lengths == [2, 3, 5, 6]
    assert all(len(chain(list(range(n)), [8])) <= 6 for n in range(13))


def test_orders_are_told_apart_and_several_targets_give_the_kinds_most_of_them_share():
    found = chain([0, 8, 1, 2], [4, 5, 8, 9, 12], baskets=[0, 0, 1, 1], has_orders=True)
    assert found[1] == 'The latest order includes "Brio rose soap", which counts as soap.'
    assert found[-1] == "So the next choice probably turns to brass lamps and shampoo."
    assert "That order leans towards soap." in chain([8, 0, 1, 2], [4], baskets=[0, 1, 1, 1], has_orders=True)


def test_history_only_looks_at_no_target():
    for intent, same in (("history_only", True), ("from_target", False)):
        texts = {" ".join(chain([0, 4, 5], [target], intent=intent)) for target in (8, 1, 12)}
        assert (len(texts) == 1) is same
    assert chain([0, 1, 8, 9, 10], [0], intent="history_only")[-1].endswith("stays with lamps.")


def test_max_history_forgets_what_is_older():
    newest = chain([4, 8, 0], [1], max_history=2)
    assert newest[0] == "So far there are three choices, mostly care."  # the count is of all, the rest of two
    assert newest[1:] == chain([5, 8, 0], [1], max_history=2)[1:]
    assert newest[2] == "Before that came lamps."


def test_the_intent_holds_for_at_least_min_items_items():
    endings = {min_items: chain([0], [8], min_items=min_items)[-1] for min_items in (1, 2, 3, 5, 6)}
    assert endings == {
        1: "So the next choice probably turns to brass lamps.",
        2: "So the next choice probably turns to brass lamps.",
        3: "So the next choice probably turns to lamps.",
        5: "So the next choice probably turns to home.",
        6: "So the next choice is hard to tell.",
    }
    assert chain([0], [12], min_items=2)[-1] == "So the next choice probably turns to home."


@pytest.mark.parametrize("columns", [["title"], ITEMS.columns])
@pytest.mark.parametrize("intent", ["from_target", "history_only"])
def test_no_chain_names_its_target(columns, intent):
    items = ITEMS.select(columns)
    table = ItemTable(item_ids=[f"sku-{n}" for n in range(13)], titles=TITLES, texts=TITLES)
    check = TargetCheck(table, [True] * 13, max_items=1)
    rng = np.random.default_rng(0)
    rows = [
        row(rng.integers(13, size=rng.integers(0, 8)), rng.integers(13, size=2), baskets=None)
        for _ in range(300)
    ]
    for one, rationale in zip(rows, teacher(items, intent=intent).write(rows), strict=True):
        history = one.history.tolist()
        assert check.outcome(rationale.text, targets=one.targets.tolist(), history=history) == "ok"
        intention = sentences(rationale.text)[-1].lower()
        assert not any(TITLES[target].lower() in intention for target in one.targets)


def test_words_that_follow_each_other_in_few_titles_are_not_repeated():
    titles = ["steel desk lamp", "lamp of steel", "lamp, tall, steel", "desk lamp", "tin lamp", "tin box"]
    items = pl.DataFrame({"title": titles, "categories": ["A > Desk lamp"] * 5 + ["B"]})
    assert chain([5], [1], items=items)[-1] == "So the next choice probably turns to steel desk lamp."
    assert chain([5], [0], items=items)[-1] == "So the next choice probably turns to desk lamp."


def test_every_chain_splits_into_the_sentences_it_was_made_of():
    titles = [f"Dr. No? vol. {n}! No. {n}" for n in range(13)]
    items = ITEMS.with_columns(title=pl.Series(titles), brand=pl.Series(["St. Ives Inc."] * 13))
    for rationale in teacher(items).write([row(range(n), [8]) for n in range(13)]):
        parts = sentences(rationale.text)
        assert all(part[0].isupper() and part.endswith(".") for part in parts)
        assert 2 <= len(parts) <= 6
    assert (
        "St. Ives Inc is a brand that is chosen again and again." not in rationale.text
    )  # would be cut in two


def test_a_row_depends_on_no_other_row():
    rng = np.random.default_rng(1)
    rows = [row(rng.integers(13, size=n % 7), rng.integers(13, size=1)) for n in range(40)]
    together = teacher().write(rows)
    assert together == [teacher().write([one])[0] for one in rows]
    assert together == teacher().write(rows[::-1])[::-1]


def test_items_without_any_text_still_give_a_chain():
    items = pl.DataFrame({"title": [""] * 13})
    assert chain([1, 2, 3], [4], items=items) == [
        "So far there are three choices.", "The latest choice is an item without a name.",
        "So the next choice is hard to tell.",
    ]  # fmt: skip
