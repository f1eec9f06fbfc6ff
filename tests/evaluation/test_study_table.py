"""A study's statistic: right against theory, honest on planted nulls, and able to find planted effects."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lasar.errors import DataError
from lasar.evaluation.results import check, write_document
from lasar.evaluation.significance import holm, paired_bootstrap
from lasar.evaluation.study_table import (
    Cell,
    StudyResult,
    build_rows,
    compare_arms,
    corrected,
    read_studies,
    seeded_difference,
    write_study,
)
from lasar.evaluation.study_view import render_study, study_cells


def planted(rng, *, seeds=3, users=100, of=100, effect=0.0, between=0.0, user_sd=0.5):
    """Differences of `users` out of `of` users per seed; a seed adds an effect of its own, so does a user."""
    user_effect = rng.normal(0, user_sd, of)
    found = {}
    for seed in range(seeds):
        chosen = np.sort(rng.choice(of, users, replace=False)).astype(np.int32)
        noise = rng.normal(0, 1, users) + rng.normal(0, between)
        found[seed] = (chosen, effect + user_effect[chosen] + noise)
    return found


def false_positives(trials=250, **facts):
    rng = np.random.default_rng(7)
    verdicts = [
        seeded_difference(planted(rng, **facts), samples=200, seed=trial).verdict for trial in range(trials)
    ]
    return sum(verdict != "tie" for verdict in verdicts) / trials


@pytest.mark.parametrize("between", [0.0, 0.1, 0.5])  # the users' own standard error is about 0.08
@pytest.mark.parametrize("seeds", [2, 3])
def test_identical_arms_are_seldom_called_different(seeds, between):
    assert false_positives(seeds=seeds, between=between) <= 0.07


def test_identical_arms_on_other_users_in_every_seed_are_seldom_called_different():
    assert false_positives(users=60, of=150, between=0.1) <= 0.07


def test_users_alone_would_call_identical_arms_different():
    """What the statistic is for: the test above has something to find."""
    rng = np.random.default_rng(7)
    found = 0
    for trial in range(250):
        values = np.mean([values for _, values in planted(rng, between=0.2).values()], axis=0)
        alone = paired_bootstrap(values, np.zeros(100), samples=200, seed=trial)
        found += not alone.low <= 0 <= alone.high
    assert found / 250 > 0.2


@pytest.mark.parametrize(("effect", "verdict"), [(0.8, "higher"), (-0.8, "lower")])
def test_a_planted_effect_is_found(effect, verdict):
    rng = np.random.default_rng(3)
    results = [
        seeded_difference(planted(rng, effect=effect, users=70), samples=300, seed=n).verdict
        for n in range(40)
    ]
    assert results.count(verdict) >= 36
    assert set(results) <= {verdict, "tie"}


@given(data=st.data())
@settings(max_examples=30)
def test_the_difference_is_that_of_the_means_whatever_users_each_seed_has(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    by_seed = {}
    for seed in range(data.draw(st.integers(1, 4))):
        users = np.sort(rng.choice(50, data.draw(st.integers(1, 50)), replace=False)).astype(np.int32)
        by_seed[seed] = (users, rng.normal(size=len(users)))
    found = seeded_difference(by_seed, samples=50)
    assert found.difference == pytest.approx(np.mean([values.mean() for _, values in by_seed.values()]))
    assert found.low <= found.high
    assert 0 < found.p_value <= 1
    assert found.num_users == len(set(np.concatenate([users for users, _ in by_seed.values()])))
    mirrored = seeded_difference({seed: (u, -v) for seed, (u, v) in by_seed.items()}, samples=50)
    # The noise that stands for training runs isn't mirrored: where an end of an interval is near 0, either may be.
    if all(min(abs(f.low), abs(f.high)) > 0.25 * (f.high - f.low) for f in (found, mirrored)):
        assert {found.verdict, mirrored.verdict} in ({"tie"}, {"higher", "lower"})


def test_one_seed_is_the_bootstrap_over_users():
    values = np.random.default_rng(1).normal(0.2, 1, 200)
    found = seeded_difference({5: (np.arange(200, dtype=np.int32), values)}, samples=500, seed=2)
    expected = paired_bootstrap(values, np.zeros(200), samples=500, seed=2)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.p_value == expected.p_value
    assert found.seed_sd is None


def test_the_same_users_three_times_are_no_more_evidence_than_once():
    users, values = np.arange(200, dtype=np.int32), np.random.default_rng(1).normal(0.2, 1, 200)
    once = seeded_difference({0: (users, values)}, samples=500)
    thrice = seeded_difference(dict.fromkeys(range(3), (users, values)), samples=500)
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high))


def test_without_noise_between_users_it_is_the_t_interval_over_seeds():
    users, means = np.arange(30, dtype=np.int32), np.array([0.1, 0.4, 0.2])
    found = seeded_difference(
        {seed: (users, np.full(30, mean)) for seed, mean in enumerate(means)}, samples=100_000
    )
    half = stats.t.ppf(0.975, 2) * means.std(ddof=1) / np.sqrt(3)
    assert found.high - found.difference == pytest.approx(half, rel=0.05)
    assert found.difference - found.low == pytest.approx(half, rel=0.05)
    assert found.p_value == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=0.05)


def test_no_difference_at_all_is_a_tie():
    users = np.arange(20, dtype=np.int32)
    found = seeded_difference({seed: (users, np.zeros(20)) for seed in range(3)}, samples=100)
    assert (found.verdict, found.p_value, found.low, found.high) == ("tie", 1.0, 0.0, 0.0)


def cell(arm, seed, level, *, users=range(40), **more):
    """HR of the first `level` users is 1."""
    users = np.array(list(users), dtype=np.int32)
    values = {"hr@10": (users < level).astype(float), "ndcg@10": (users < level) / 2}
    more = {"reported": {"nats": 2.0 + seed}, "depth": 1.5, "seconds": 90.0} | more
    return Cell(arm=arm, seed=seed, users_U=users, values=values, **more)


def test_a_verdict_heeds_the_correction():
    found = seeded_difference({0: (np.arange(40), np.repeat([0.0, 1.0], [32, 8]))}, samples=500)
    assert found.verdict == "higher"
    weak = dataclasses.replace(found, p_value=0.02)
    alone, among = corrected([weak])[0], corrected([weak] * 3)[0]
    assert (alone.verdict, alone.p_holm) == ("higher", pytest.approx(0.02))
    assert (among.verdict, among.p_holm) == ("tie", pytest.approx(0.06))


def test_arms_are_compared_on_common_seeds_and_users_and_corrected_over_the_table():
    cells = [
        cell("ours", 0, 10), cell("ours", 1, 12), cell("plain", 1, 8, users=range(5, 40)),
        cell("plain", 2, 39), cell("other", 0, 30), cell("other", 1, 33), cell("late", 2, 5),
    ]  # fmt: skip
    found = compare_arms(cells, "ours", samples=200)
    assert set(found) == {"plain", "other"}  # late has no seed in common
    assert found["plain"]["hr@10"].seeds == (1,)
    assert found["plain"]["hr@10"].num_users == 35
    assert found["plain"]["hr@10"].difference == pytest.approx(3 / 35 - 7 / 35)
    assert found["other"]["ndcg@10"].difference == pytest.approx((20 / 80 + 21 / 80) / 2)
    every = [difference for by_metric in found.values() for difference in by_metric.values()]
    assert [d.p_holm for d in every] == pytest.approx(holm([d.p_value for d in every]))
    with pytest.raises(DataError, match="different users"):
        compare_arms([cell("a", 0, 1, users=range(5)), cell("b", 0, 1, users=range(5, 9))], "a")


def result(**changes):
    cells = [
        cell("kl", 0, 10), cell("kl", 1, 12), cell("none", 1, 12, reported={"nats": None}),
        cell("sft", 0, 4, kind="before", depth=None), cell("sft", 1, 8, kind="before", depth=None),
    ]  # fmt: skip
    rows = build_rows(
        cells, "kl", changes={"none": {"latent_sft.alignment": "none"}, "kl": {}, "unfinished": {}},
        settings={"kl": {"latent_sft": {"alignment": "kl"}}}, samples=100,
    )  # fmt: skip
    facts = {
        "name": "shop", "file": "recipes/study/shop.yaml", "base": "recipes/shop.yaml", "dataset": "shop",
        "split": "last_basket", "evaluated_on": "test", "exclude_seen": True, "num_users": 40, "model": "latent_sft",
        "reference": "kl", "planned_seeds": (0, 1), "shared": {}, "device": "a box", "commit": "c0ffee", "versions": (),
    }  # fmt: skip
    return StudyResult(**{**facts, "rows": rows, **changes})


def test_the_table_shows_means_over_seeds_and_verdicts():
    header, rows = study_cells(result())
    assert header[:6] == ["arm", "changes", "seeds", "HR@10", "NDCG@10", "depth"]
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(table) == ["sft", "none", "kl"]  # what the arms started from, then the study's order
    assert table["sft"]["changes"] == "before"
    assert table["sft"]["depth"] == "-"
    assert table["none"]["changes"] == "latent_sft.alignment=none"
    assert (table["kl"]["HR@10"], table["none"]["HR@10"]) == ("0.2750 +- 0.0354", "0.3000")
    assert (table["kl"]["nats"], table["none"]["nats"]) == ("2.500 +- 0.707", "-")
    assert table["kl"]["HR@10 minus kl"] == "reference"
    assert table["none"]["HR@10 minus kl"].startswith("tie: +0.0000 [+0.0000, +0.0000], one seed, p = 1")
    assert "-0.1250 [" in table["sft"]["HR@10 minus kl"]


def test_a_saved_study_comes_back_and_is_a_section_of_the_page(tmp_path):
    rows, page = tmp_path / "results" / "results.jsonl", tmp_path / "docs" / "results.md"
    write_study(rows.parent / "studies" / "shop.json", result())
    write_study(rows.parent / "studies" / "aa.json", result(name="another"))
    another, shop = read_studies(rows.parent / "studies")
    assert study_cells(shop) == study_cells(result())
    write_document(rows, page)
    text = page.read_text()
    assert text.index("## Study `another`") < text.index("## Study `shop`: shop: last_basket, test, 40 users")
    assert render_study(another) in text
    assert "| sft | before | 0, 1 |" in text
    assert check(rows, page) == []
    write_study(rows.parent / "studies" / "shop.json", result(commit="other"))
    assert "differs" in check(rows, page)[0]


@pytest.mark.parametrize("text", ["{oops", "{}", '{"nane": "x"}', "[]"])
def test_a_damaged_study_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        read_studies(tmp_path)
    assert read_studies(tmp_path / "nowhere") == []
