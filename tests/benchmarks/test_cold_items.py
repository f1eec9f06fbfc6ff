"""The cold-item benchmark measures what it says: planted lists, and a log from which items are really gone."""

import argparse
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from lasar.artifacts import run_stage
from lasar.config import load_recipe
from lasar.data.interactions import SPLIT_TEST, Interactions, ItemTable
from lasar.errors import ConfigError
from lasar.stages import STAGES

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cold_items

SECTIONS = {name: module.Config for name, module in STAGES.items()}
COLD = np.array([False, False, False, True, True])


def write_log(path: Path) -> None:
    """Twelve users and twenty items, an order of two items a day, with names and one event to be cleaned away."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "who": f"u{user}",
            "what": f"a{item}",
            "when": f"2020-01-{day + 1:02d}",
            "name": f"thing {item}",
            "n": 1,
        }
        for user in range(12)
        for day, pair in enumerate(rng.permutation(20)[:10].reshape(5, 2))
        for item in pair
    ]
    pl.DataFrame([*rows, rows[0] | {"what": "A99", "n": 0}]).write_csv(path)


@pytest.fixture
def recipe(tmp_path):
    write_log(tmp_path / "log.csv")
    (tmp_path / "r.yaml").write_text("stages: [prepare]\n")
    fixed = [
        f"prepare.source={tmp_path / 'log.csv'}",
        "prepare.columns={user: who, item: what, timestamp: when, title: name}",
        "prepare.clean={above: {n: 0}, uppercase_items: true}",
        "prepare.split=last_basket",
        "prepare.k_core=0",
    ]

    def load(name, *more):
        overrides = [*fixed, *more, f"run_dir={tmp_path / name}"]
        loaded = load_recipe(tmp_path / "r.yaml", overrides=overrides, sections=SECTIONS)
        (tmp_path / name).mkdir(exist_ok=True)
        run_stage("prepare", STAGES["prepare"], loaded)
        return loaded, tmp_path / name / "prepare"

    return load


def events_by_name(folder):
    items, log = ItemTable.load(folder), Interactions.load(folder)
    return [
        (int(user), items.item_ids[item], items.titles[item], int(basket), int(split))
        for user, item, basket, split in zip(
            log.user_index, log.item_index, log.basket, log.split, strict=True
        )
    ]


def test_a_log_without_held_out_items_is_the_log(recipe, tmp_path):
    whole, folder = recipe("whole")
    _, again = recipe("again", *cold_items.write_log(whole.configs["prepare"], set(), tmp_path / "written"))
    assert events_by_name(again) == events_by_name(folder)
    assert len(events_by_name(folder)) == 120


def test_held_out_items_are_gone_and_nothing_else(recipe, tmp_path):
    whole, folder = recipe("whole")
    held_out = {"A3", "A7"}
    _, shared = recipe(
        "shared", *cold_items.write_log(whole.configs["prepare"], held_out, tmp_path / "written")
    )
    assert set(ItemTable.load(folder).item_ids) - set(ItemTable.load(shared).item_ids) == held_out
    left = [(user, item) for user, item, *_ in events_by_name(folder) if item not in held_out]
    assert sorted(left) == sorted((user, item) for user, item, *_ in events_by_name(shared))


def test_first_buyers_have_only_known_items_behind_them_and_a_new_one_before_them(recipe):
    _, folder = recipe("whole")
    items, log = ItemTable.load(folder), Interactions.load(folder)
    held_out = {"A3", "A7", "A11"}
    known = set(items.item_ids) - held_out - {"A5"}  # A5: lost to the k-core
    buyers = cold_items.first_buyers(log, items, held_out, known=known)
    cases = log.cases(SPLIT_TEST)
    wanted = [{items.item_ids[i] for i in taken} & held_out for taken in cases.targets]
    assert [set(taken) for taken in buyers.cold] == [taken for taken in wanted if taken] != []
    for history, warm in zip(buyers.histories, buyers.warm, strict=True):
        assert history
        assert {item for order in history for item in order} | set(warm) <= known
    assert buyers.exclude_seen


def test_items_to_hold_out_have_enough_buyers():
    log = Interactions(
        user_index=np.array([0, 0, 0, 1, 1, 2], np.int32), item_index=np.array([0, 1, 1, 0, 2, 2], np.int32),
        basket=np.zeros(6, np.int32), split=np.zeros(6, np.int8), num_users=3, num_items=3,
        split_kind="last_basket", train_targets="all",
    )  # fmt: skip
    arguments = argparse.Namespace(min_buyers=2, share=2 / 3, seed=0)
    assert cold_items.choose_cold(log, arguments).tolist() == [0, 2], "two events of one user are one buyer"
    with pytest.raises(ConfigError, match="2 have --min-buyers"):
        cold_items.choose_cold(log, argparse.Namespace(min_buyers=2, share=1.0, seed=0))


def test_metrics_of_planted_lists():
    ranked = np.array([[2, 4, 0, 3, 1], [3, 0, 1, 2, -1]], np.int32)  # the second buyer has item 4
    found = cold_items.metrics(ranked, [[3, 4], [3]], COLD)
    np.testing.assert_allclose(found["percentile"], [(1 / 4 + 3 / 4) / 2, 0])
    np.testing.assert_allclose(found["recall@10"], [1, 1])
    np.testing.assert_allclose(cold_items.recall(ranked, [[3, 4], [3]], 2), [0.5, 1])
    np.testing.assert_allclose(cold_items.expected_of_random(ranked, COLD)["recall@10"], [1, 1])


def test_a_target_that_is_no_candidate_is_an_error():
    with pytest.raises(AssertionError, match="not among the candidates"):
        cold_items.metrics(np.array([[0, 1, 2, -1, -1]], np.int32), [[3]], COLD)


def test_text_neighbours_by_hand():
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32)
    ranked = cold_items.text_ranked(vectors, [np.array([0])], None)
    assert ranked.tolist() == [[0, 1, 2, 3]]
    ranked = cold_items.text_ranked(vectors, [np.array([0, 2])], [np.array([0, 2])])
    assert ranked.tolist() == [[1, 3, -1, -1]]


def test_scores_that_differ_are_noticed():
    every, scores = np.array([[2, 0, 1]], np.int32), np.array([[-1.0, -2.0, -3.0]], np.float32)
    listed = np.array([[0, -1]], np.int32)
    assert cold_items._agree(listed, np.array([[-2.0, -np.inf]]), every, scores)
    assert not cold_items._agree(listed, np.array([[-2.5, -np.inf]]), every, scores)
