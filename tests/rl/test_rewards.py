import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.errors import ConfigError
from lasar.evaluation.metrics import user_metrics
from lasar.rl.rewards import Mixture, find_reward, ndcg, rank_penalty, reward_files, shared_prefix

CODES = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]], np.int32)


@given(
    items=st.permutations(range(8)).map(lambda found: np.array(found[:5], np.int32)),
    targets=st.sets(st.integers(0, 7), min_size=1).map(lambda found: np.array(sorted(found), np.int32)),
)
def test_ndcg_sums_to_the_ndcg_of_evaluation(items, targets):
    expected = user_metrics(items[None], [targets], cutoffs=(5,))["ndcg@5"][0]
    assert ndcg(items, targets, CODES).sum() == pytest.approx(expected)


def test_rank_penalty_is_that_of_minionerec():
    values = rank_penalty(np.array([4, 1, 5, 6], np.int32), np.array([1], np.int32), CODES)
    total = sum(1 / np.log2(i + 2) for i in range(4))
    assert values == pytest.approx([-1 / total, 0, -1 / np.log2(4) / total, -1 / np.log2(5) / total])


def test_shared_prefix_stops_at_the_first_difference():
    codes = np.array([[0, 5, 1], [1, 5, 1], [0, 4, 1]], np.int32)
    assert shared_prefix(np.array([1, 2]), np.array([0]), codes) == pytest.approx([0, 1 / 3])


def test_a_mixture_is_the_weighted_sum():
    items, targets = np.array([[1, 2, -1], [7, 6, 5]], np.int32), [np.array([2, 4]), np.array([0])]
    both = Mixture({"exact": 2.0, "rank_penalty": 0.5}, codes_IL=CODES)(items, targets)
    discount = 1 / np.log2(np.arange(3) + 2)
    assert both == pytest.approx(np.array([[-0.5 * discount[0] / discount.sum(), 2, 0], [0, 0, 0]]))


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "shop_rewards.py").write_text(
        "def cheap(items, targets, codes):\n    return (items % 2 == 0) * 1.0\n"
        "def short(items, targets, codes):\n    return items[:1] * 1.0\n"
        "def broken(items, targets, codes):\n    return items / 0.0 * 0.0\n"
        "def raises(items, targets, codes):\n    return 1 / 0\n"
        "def unlike(items):\n    return items\n"
        "def words(items, targets, codes):\n    return ['good' for _ in items]\n"
        "number = 3\n"
    )
    (tmp_path / "odd_rewards.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "shop_rewards.py"
    sys.modules.pop("shop_rewards", None)


def test_a_reward_of_ones_own(own_module):
    mixture = Mixture({"shop_rewards:cheap": 3.0}, codes_IL=CODES)
    assert mixture(np.array([[2, 5, 4]], np.int32), [np.array([0])]).tolist() == [[3.0, 0.0, 3.0]]
    assert reward_files(["exact", "shop_rewards:cheap", "shop_rewards:short"]) == (own_module,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "did you mean 'exact'"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("shop_rewards:cheep", "did you mean 'cheap'"),
        ("shop_rewards:number", "'shop_rewards:number' is no function but a int"),
        ("odd_rewards:f", r"cannot import 'odd_rewards' \(SyntaxError: .*mend it"),
    ],
)
def test_mistakes_are_named(own_module, name, message):
    with pytest.raises(ConfigError, match=message):
        find_reward(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"ZeroDivisionError.*shop_rewards\.py:8\)"),
        ("unlike", "TypeError.*reward\\(items, targets, codes"),
    ],
)
def test_an_error_in_ones_own_reward_says_where(own_module, name, message):
    with pytest.raises(ConfigError, match=f"'shop_rewards:{name}' failed with {message}"):
        Mixture({f"shop_rewards:{name}": 1.0}, codes_IL=CODES)(np.array([[2, 5]], np.int32), [np.array([0])])


@pytest.mark.parametrize("name", ["exakt", "shop_rewards:cheep", "no_such_module:f"])
def test_a_wrong_name_is_found_before_anything_runs(own_module, name):
    with pytest.raises(ConfigError, match=f"rl.grpo.rewards: .*{name}"):
        reward_files([name])


def test_a_missing_module_is_named_before_anything_runs():
    with pytest.raises(ConfigError, match="cannot import 'no_such_module'"):
        reward_files(["no_such_module:f"])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["short", "broken", "words"])
def test_what_is_no_reward_is_refused(own_module, name):
    with pytest.raises(ConfigError, match=f"shop_rewards:{name}.*one finite number for each"):
        Mixture({f"shop_rewards:{name}": 1.0}, codes_IL=CODES)(np.array([[2, 5]], np.int32), [np.array([0])])
