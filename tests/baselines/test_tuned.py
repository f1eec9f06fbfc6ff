import dataclasses

import numpy as np
import pytest

from lasar.baselines.popularity import Popularity
from lasar.baselines.transitions import tune_transitions
from lasar.baselines.tuned import rank_with_baseline
from lasar.data.interactions import SPLIT_TEST, SPLIT_VALID, Interactions


@pytest.fixture
def shop():
    """Forty users walk ten items in pairs; the last order is test, the one before it valid."""
    starts, orders = np.arange(40) % 10, 5
    user, basket, place = (a.ravel() for a in np.meshgrid(range(40), range(orders), range(2), indexing="ij"))
    return Interactions(
        user_index=user.astype(np.int32), basket=basket.astype(np.int32),
        item_index=((starts[user] + 2 * basket + place) % 10).astype(np.int32),
        split=np.maximum(0, basket - orders + 3).astype(np.int8), num_users=40, num_items=10,
        split_kind="last_basket", train_targets="all",
    )  # fmt: skip


def ranked(shop, name):
    return rank_with_baseline(
        name, shop, shop.cases(SPLIT_TEST), k=4, exclude_seen=False, tuning_users=15, seed=3
    )


def test_popularity_has_nothing_to_tune(shop):
    cases = shop.cases(SPLIT_TEST)
    found, chosen = ranked(shop, "popularity")
    direct = Popularity().fit(shop.train_sequences(), 10).recommend(cases.histories, cases.baskets, 4)
    assert chosen == {}
    assert np.array_equal(found[0], direct[0])


@pytest.mark.parametrize(("name", "same_basket"), [("transitions", False), ("cooccurrence", True)])
def test_transitions_are_tuned_on_a_sample_of_validation_users(shop, name, same_basket, monkeypatch):
    asked = []

    def spied(*arguments, **options):
        asked.append(options["same_basket"])
        return tune_transitions(*arguments, **options)

    monkeypatch.setattr("lasar.baselines.tuned.tune_transitions", spied)
    cases, valid = shop.cases(SPLIT_TEST), shop.cases(SPLIT_VALID).subset(15, 3)
    found, chosen = ranked(shop, name)
    assert asked == [same_basket]
    tuned = tune_transitions(shop.train_sequences(), 10, valid, exclude_seen=False, same_basket=same_basket)
    assert chosen == dataclasses.asdict(tuned.settings)
    assert np.array_equal(found[0], tuned.recommend(cases.histories, cases.baskets, 4)[0])


def test_what_follows_an_order_is_found(shop):
    """The walk is a function of the last order."""
    targets = shop.cases(SPLIT_TEST).targets
    for name in ("transitions", "cooccurrence"):
        (items_QK, _), _ = ranked(shop, name)
        assert all(set(t) <= set(items) for t, items in zip(targets, items_QK[:, :2].tolist(), strict=True))
