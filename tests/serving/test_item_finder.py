"""Finding items by words, and the nearest id to a misspelt one."""

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.interactions import ItemTable
from lasar.serving.item_finder import ItemFinder


def finder(ids, titles=None, counts=None):
    titles = titles or [""] * len(ids)
    counts = np.zeros(len(ids), np.int64) if counts is None else np.array(counts)
    return ItemFinder(ItemTable(item_ids=ids, titles=titles, texts=titles), counts_I=counts)


@given(
    number=st.integers(100_000, 899_999),
    place=st.integers(0, 5),
    edit=st.sampled_from(["drop", "double", "swap"]),
)
def test_one_typo_anywhere_is_found_among_many(number, place, edit):
    wanted = f"AB-{number}-X"
    at = place + 3
    typo = {
        "drop": wanted[:at] + wanted[at + 1 :],
        "double": wanted[:at] + wanted[at] + wanted[at:],
        "swap": wanted[:at] + "z" + wanted[at + 1 :],
    }[edit]
    far = [f"{n:04d}/{n * 7919 % 1000}" for n in range(2000)]
    assert finder([*far, wanted]).nearest(typo) == wanted


def test_case_alone_is_found_and_nonsense_is_not():
    found = finder([f"{n}A" for n in range(10_000, 20_000)])
    assert found.nearest("12345a") == "12345A"
    assert found.nearest("no such thing") is None
    assert found.nearest("1" * 65) is None


def test_a_large_catalogue_does_not_make_a_suggestion_slow():
    found = finder([f"{n:08d}" for n in range(100_000)])
    began = time.perf_counter()
    for n in range(10):
        found.nearest(f"x{n * 777:07d}")
    assert time.perf_counter() - began < 2


def test_words_in_any_order_then_beginnings_then_the_best_known():
    titles = ["RED MUG", "MUG RED [LARGE]", "BLUE MUG", "RED MUGS", "TEA"]
    found = finder(["a", "b", "c", "d", "mug-5"], titles, [0, 5, 9, 3, 1])
    assert found.search("red MUG", limit=9).tolist() == [3, 0, 1]
    assert found.search("mug", limit=9).tolist() == [1, 2, 3, 4, 0]
    assert found.search("[large", limit=9).tolist() == [1]
    assert found.search("", limit=2).tolist() == [2, 1]
    assert found.search("green", limit=9).tolist() == []
