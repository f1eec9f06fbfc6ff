"""Transitions against a count by hand, and on data with a planted rule."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.baselines.popularity import Popularity
from lasar.baselines.transitions import Transitions, TransitionSettings, tune_transitions
from lasar.data.interactions import EvalCases, TrainSequence
from lasar.evaluation.metrics import user_metrics


def sequence(user, events):
    items, baskets = zip(*events, strict=True)
    return TrainSequence(user, np.array(items, dtype=np.int32), np.array(baskets, dtype=np.int32))


def score_by_hand(sequences, num_items, settings, history):
    """The definition in the module's docstring, pair by pair."""
    frequency = np.zeros(num_items)
    counts = np.zeros((num_items, num_items))
    for _, items, baskets in sequences:
        for item in items:
            frequency[item] += 1
        names = sorted(set(baskets.tolist()))
        sets = [set(items[baskets == name].tolist()) for name in names]
        for at, earlier in enumerate(sets):
            for i in earlier:
                for j in earlier - {i}:
                    counts[i, j] += settings.same_basket
                for lag, later in enumerate(sets[at + 1 :], start=1):
                    for j in later if lag <= settings.window else ():
                        counts[i, j] += settings.decay ** (lag - 1)
    frequency = np.maximum(frequency, 1)
    scores = np.zeros(num_items)
    for item, basket in history:
        weight = settings.recency ** float(history[-1][1] - basket)
        if weight > 1e-3:
            scores += weight * counts[item] / frequency[item] ** settings.source_power
    return scores / frequency**settings.target_power


@st.composite
def worlds(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_items = int(rng.integers(3, 9))

    def events(user):
        baskets = np.sort(rng.integers(0, 4, size=rng.integers(1, 9)))
        return sequence(user, [(int(rng.integers(num_items)), int(b)) for b in baskets])

    return num_items, [events(user) for user in range(int(rng.integers(1, 5)))], events(99)


@settings(max_examples=40, deadline=None)
@given(
    worlds(),
    st.builds(
        TransitionSettings,
        window=st.integers(1, 3),
        decay=st.sampled_from([0.5, 1.0]),
        same_basket=st.sampled_from([0.0, 0.7]),
        source_power=st.sampled_from([0.0, 0.5]),
        target_power=st.sampled_from([0.0, 0.3]),
        recency=st.sampled_from([0.0, 0.5, 1.0]),
    ),
)
def test_scores_equal_the_definition(world, chosen):
    num_items, sequences, query = world
    model = Transitions(chosen).fit(sequences, num_items)
    items, scores = model.recommend([query.items], [query.baskets], num_items)
    history = list(zip(query.items.tolist(), query.baskets.tolist(), strict=True))
    expected = score_by_hand(sequences, num_items, chosen, history)
    assert sorted(items[0].tolist()) == list(range(num_items))
    assert scores[0] == pytest.approx(expected[items[0]], abs=1e-5)
    assert (np.diff(scores[0]) <= 0).all()


def chain(num_users, num_items, seed):
    """A planted rule: item i is always followed by i + 1."""
    rng = np.random.default_rng(seed)
    starts = rng.integers(num_items, size=num_users)
    return [
        sequence(user, [((int(start) + step) % num_items, step) for step in range(5)])
        for user, start in enumerate(starts)
    ]


def as_cases(sequences):
    return EvalCases(
        user_index=np.arange(len(sequences), dtype=np.int32),
        histories=[s.items[:-1] for s in sequences],
        baskets=[s.baskets[:-1] for s in sequences],
        targets=[s.items[-1:] for s in sequences],
    )


def test_a_planted_rule_is_found_and_popularity_does_not_find_it():
    train, cases = chain(200, 30, 0), as_cases(chain(60, 30, 1))
    model = tune_transitions(train, 30, cases)
    found, _ = model.recommend(cases.histories, cases.baskets, 5)
    assert user_metrics(found, cases.targets, cutoffs=(5,))["mrr"].mean() > 0.95
    popular, _ = Popularity().fit(train, 30).recommend(cases.histories, cases.baskets, 5)
    assert user_metrics(popular, cases.targets, cutoffs=(5,))["hr@5"].mean() < 0.5


def test_tuning_never_ends_below_the_defaults_on_validation():
    rng = np.random.default_rng(4)
    train = [sequence(u, [(int(rng.integers(25)), b) for b in range(6)]) for u in range(60)]
    cases = as_cases([sequence(u, [(int(rng.integers(25)), b) for b in range(6)]) for u in range(40)])

    def quality(model):
        items, _ = model.recommend(cases.histories, cases.baskets, 10)
        return user_metrics(items, cases.targets, cutoffs=(10,))["ndcg@10"].mean()

    assert quality(tune_transitions(train, 25, cases)) >= quality(Transitions().fit(train, 25))


def test_without_validation_cases_the_defaults_are_kept():
    model = tune_transitions(chain(20, 10, 0), 10, as_cases([]))
    assert model.settings == TransitionSettings()


def test_an_empty_or_unknown_history_falls_back_to_popularity():
    train = [sequence(0, [(1, 0), (2, 1), (2, 2)])]
    model = Transitions(dataclasses.replace(TransitionSettings(), same_basket=0.0)).fit(train, 4)
    empty = np.zeros(0, dtype=np.int32)
    items, _ = model.recommend([empty, np.array([3], dtype=np.int32)], [empty, np.array([0])], 4)
    assert items.tolist() == [[2, 1, 0, 3]] * 2


def test_many_queries_equal_one_by_one():
    train, cases = chain(50, 12, 0), as_cases(chain(600, 12, 1))
    model = Transitions().fit(train, 12)
    together, _ = model.recommend(cases.histories, cases.baskets, 6)
    for query in (0, 511, 512, 599):
        alone, _ = model.recommend([cases.histories[query]], [cases.baskets[query]], 6)
        assert (alone[0] == together[query]).all()


def test_transitions_alone_never_count_one_basket():
    train = [sequence(u, [(1, 0), (2, 0), (3, 1)]) for u in range(5)]
    cases = as_cases([sequence(9, [(1, 0), (2, 1)])])
    directed = tune_transitions(train, 4, cases, same_basket=False)
    assert directed.settings.same_basket == 0.0
    items, _ = directed.recommend([np.array([1], np.int32)], [np.array([0], np.int32)], 1)
    assert items[0].tolist() == [3]
