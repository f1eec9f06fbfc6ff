import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lasar.cli_tables import print_explanation, print_history, print_recommendations
from lasar.cot.explain import Direction, Explanation, Step
from lasar.data.interactions import ItemTable
from lasar.recommender import Recommendation

IDS = [f"sku{n}" for n in range(15)]
ITEMS = ItemTable(item_ids=IDS, titles=[f"[b]Tea {n}[/b]" for n in range(15)], texts=[""] * 15)


def text_of(show, *arguments):
    stream = io.StringIO()
    show(*arguments, Console(file=stream, width=160))
    return stream.getvalue()


def item(number, title="Tea"):
    return Recommendation(f"sku{number}", f"{title} {number}" if title else "", -0.5 * number)


def explanation(lists):
    steps = [
        Step(
            number=n,
            segments=[(f"[reason] {n}", 0.5 + n / 10)],
            directions=[Direction(code=n, probability=0.25, titles=["[x] Cup", "Pot"])],
        )
        for n in range(3)
    ]
    return Explanation(depth=2, distribution=[0.125, 0.625, 0.25], steps=steps, lists=lists)


@pytest.mark.parametrize("orders", [[[i] for i in IDS], [IDS[:4], IDS[4:]]])
def test_only_the_newest_items_of_a_history_are_shown(orders):
    text = text_of(print_history, SimpleNamespace(items=ITEMS), orders)
    assert "last 10 of 15 items" in text
    assert [n for n in range(15) if f"[b]Tea {n}[/b]" in text] == list(range(5, 15))


def test_an_empty_history_is_shown_as_one():
    assert "last 0 of 0" in text_of(print_history, SimpleNamespace(items=ITEMS), [])


def test_recommendations_are_numbered_and_their_titles_are_not_markup():
    text = text_of(print_recommendations, [item(3, "[red]Cup"), item(1)])
    assert "[red]Cup 3" in text
    assert text.index("sku3") < text.index("sku1")
    assert "-1.50" in text
    assert "-0.50" in text


def test_an_explanation_has_depths_steps_and_lists():
    lists = {1: [item(1), item(2)], 2: [item(2), item(3)], 3: [item(3), item(4)]}
    text = text_of(print_explanation, explanation(lists))
    assert "latent steps: 2" in text
    assert "1: 12%  2: 62%  3: 25%" in text
    for fact in ("<s>", "[reason] 0", "0.70 [reason] 2", "25% code 1: [x] Cup; Pot", "2 (chosen)"):
        assert fact in text
    # Against the chosen list, one step fewer brings item 1, one more brings item 4; nothing of the chosen is new.
    assert [f"Tea {n} (new)" in text for n in (1, 2, 3, 4)] == [True, False, False, True]


def test_lists_of_unequal_length_and_items_without_titles():
    text = text_of(print_explanation, explanation({1: [], 2: [item(5, ""), item(6)], 3: [item(6)]}))
    assert "sku5" in text
    assert text.count("Tea 6") == 2
    assert "(new)" not in text
