import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.baselines.transitions import Transitions, TransitionSettings
from lasar.data.interactions import TrainSequence
from lasar.decoding.counts import COUNTS_FILE, Counts
from lasar.errors import ArtifactError

NUM_ITEMS = 12
NOTHING = np.zeros(0, np.int64)
ITEM = st.integers(0, NUM_ITEMS - 1)


def table(seed=0, recency=0.5, per_item=4):
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.choice(NUM_ITEMS, size=rng.integers(0, per_item + 1), replace=False))
        for _ in range(NUM_ITEMS)
    ]
    items_E = np.concatenate(rows).astype(np.int32)
    return Counts(
        starts=np.cumsum([0, *map(len, rows)]).astype(np.int64), items_E=items_E,
        weights_E=rng.uniform(0.1, 3, len(items_E)).astype(np.float32), recency=recency,
    )  # fmt: skip


histories = st.lists(st.integers(0, NUM_ITEMS + 2), max_size=8)  # some items are newer than the counts


@given(
    histories,
    st.sets(st.integers(0, NUM_ITEMS - 1)),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_shares_are_decayed_sums_over_permitted_items(history, listed, allow, seed, recency):
    counts = table(seed, recency)
    expected = np.zeros(NUM_ITEMS)
    for age, item in enumerate(reversed(history)):
        if item < NUM_ITEMS:
            span = slice(counts.starts[item], counts.starts[item + 1])
            np.add.at(expected, counts.items_E[span], counts.weights_E[span].astype(float) * recency**age)
    permitted = np.isin(np.arange(NUM_ITEMS), list(listed)) == allow
    expected[~permitted] = 0
    items_N, shares_N = counts.follow(
        np.array(history, np.int32), np.arange(len(history), dtype=np.int32),
        listed=np.array(sorted(listed), np.int64), allow=allow,
    )  # fmt: skip
    found = np.zeros(NUM_ITEMS)
    found[items_N] = shares_N
    np.testing.assert_allclose(found, expected / (expected.sum() or 1), atol=1e-12)
    assert list(items_N) == sorted(set(items_N))


@given(
    st.lists(ITEM, unique=True, max_size=6), st.lists(ITEM, max_size=5),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.sampled_from([0.3, 1.0, 2.0]),
)  # fmt: skip
def test_a_mixture_is_what_it_says(ranked, history, share, temperature):
    counts = table().mixed(temperature=temperature, share=share)
    scores = -np.arange(len(ranked), dtype=np.float32) / 2
    named = counts.follow(
        np.array(history, np.int32), np.zeros(len(history), np.int32), listed=NOTHING, allow=False
    )
    width = 8
    items_W = np.array([*ranked, *[-1] * (width - len(ranked))], np.int32)
    scores_W = np.array([*scores, *[-np.inf] * (width - len(ranked))], np.float32)
    items, logs = counts.mix(items_W, scores_W, *named)

    expected = np.zeros(NUM_ITEMS)
    if not len(named[0]):
        share = 0.0
    elif not ranked:
        share = 1.0
    if ranked:
        own = np.exp(temperature * scores)
        expected[ranked] += (1 - share) * own / own.sum()
    expected[named[0]] += share * named[1]
    kept = items[items >= 0]
    assert len(set(kept)) == len(kept) == min(width, int((expected > 0).sum()))
    np.testing.assert_allclose(np.exp(logs[: len(kept)]), np.sort(expected)[::-1][: len(kept)], rtol=1e-5)
    np.testing.assert_allclose(np.exp(logs[: len(kept)]), expected[kept], rtol=1e-5)
    assert np.isneginf(logs[len(kept) :]).all()


def test_no_share_and_no_counts_keep_the_models_order():
    counts = table().mixed(temperature=0.5, share=0.0)
    items_W, scores_W = np.array([7, 2, 9], np.int32), np.array([-1.0, -1.0, -3.0], np.float32)
    assert list(counts.mix(items_W, scores_W, np.array([2, 3]), np.array([0.5, 0.5]))[0]) == [7, 2, 9]
    assert list(counts.mixed(temperature=1.0, share=0.9).mix(items_W, scores_W, NOTHING, np.zeros(0))[0]) == [
        7,
        2,
        9,
    ]


def test_reads_what_it_wrote(tmp_path):
    counts = table().mixed(temperature=0.7, share=0.4)
    counts.save(tmp_path)
    read = Counts.load(tmp_path)
    assert (read.recency, read.temperature, read.share) == (0.5, 0.7, 0.4)
    for name in ("starts", "items_E", "weights_E"):
        np.testing.assert_array_equal(getattr(read, name), getattr(counts, name))


def test_damage_is_one_line(tmp_path):
    table().save(tmp_path)
    (tmp_path / COUNTS_FILE).write_bytes(b"123")
    with pytest.raises(ArtifactError, match="run the stage 'blend' again"):
        Counts.load(tmp_path)


def walks():
    rng = np.random.default_rng(1)
    return [
        TrainSequence(user, rng.integers(0, NUM_ITEMS, 9).astype(np.int32), np.arange(9, dtype=np.int32))
        for user in range(20)
    ]


@pytest.mark.parametrize("recency", [0.0, 0.5, 1.0])
def test_counts_rank_as_the_baseline_they_come_from(recency):
    baseline = Transitions(TransitionSettings(recency=recency)).fit(walks(), NUM_ITEMS)
    counts = baseline.counts(NUM_ITEMS)
    history, baskets = np.array([3, 8, 5], np.int32), np.arange(3, dtype=np.int32)
    items_K, _ = (rows[0] for rows in baseline.recommend([history], [baskets], 5))
    named, shares = counts.follow(history, baskets, listed=NOTHING, allow=False)
    assert list(named[np.argsort(-shares)][:5]) == list(items_K)


def test_only_the_heaviest_neighbours_are_kept():
    baseline = Transitions().fit(walks(), NUM_ITEMS)
    whole, cut = baseline.counts(NUM_ITEMS), baseline.counts(2)
    for item in range(NUM_ITEMS):
        every = whole.weights_E[whole.starts[item] : whole.starts[item + 1]]
        kept = cut.weights_E[cut.starts[item] : cut.starts[item + 1]]
        assert sorted(kept) == sorted(every)[-2:]
