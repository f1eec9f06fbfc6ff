"""Comparing two runs: against scipy on random data, Holm by hand, and every way two runs may not be comparable."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats
from typer.testing import CliRunner

from lasar.artifacts import FORMAT_VERSION, file_sha256, write_json
from lasar.cli import app
from lasar.errors import ArtifactError, ConfigError, DataError
from lasar.evaluation.compare import Evaluation, compare, compare_runs, read_evaluation

FACTS = {
    "dataset": "tea", "split_kind": "leave_one_out", "split": "test", "exclude_seen": False, "num_items": 30,
    "num_users": 400, "k": 20, "main_k": 10,
}  # fmt: skip


def evaluation(seed, metrics, *, run="a", method="sft", users=None, **facts):
    values = {name: np.asarray(array, dtype=np.float64) for name, array in metrics.items()}
    count = len(next(iter(values.values())))
    users = np.arange(count, dtype=np.int32) if users is None else np.asarray(users, np.int32)
    return Evaluation(
        run=Path(run), method=method, seed=seed, facts=FACTS | facts, users_U=users, values=values
    )


@pytest.fixture
def same_data(monkeypatch):
    """In-memory evaluations of one data set."""
    monkeypatch.setattr(
        "lasar.evaluation.compare.read_manifest", lambda folder: {"inputs": {"prepare": "one"}}
    )


def random_sides(seed, *, users=400, effect=0.05):
    rng = np.random.default_rng(seed)
    ease = rng.beta(1, 4, users)
    first = {"hr@10": rng.random(users) < ease + effect, "ndcg@10": ease * rng.random(users) + effect}
    second = {"hr@10": rng.random(users) < ease, "ndcg@10": ease * rng.random(users)}
    return first, second


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scipy(seed, same_data):
    first, second = random_sides(seed, effect=0.02)
    found = compare(
        [evaluation(0, first)], [evaluation(0, second, run="b")], samples=10_000, metrics=["ndcg@10", "hr@10"]
    )
    p_values = []
    for name, compared in found.metrics.items():
        a, b = np.asarray(first[name], float), np.asarray(second[name], float)
        difference = a - b
        theirs = stats.bootstrap(
            (difference,), np.mean, n_resamples=10_000, method="percentile", vectorized=True, rng=seed
        )
        # A mean of hits moves in steps of one user.
        tolerance = max(0.08 * theirs.standard_error, 1.01 / len(a) if name == "hr@10" else 0.0)
        own = compared.difference
        assert own.difference == pytest.approx(difference.mean())
        assert own.low == pytest.approx(theirs.confidence_interval.low, abs=tolerance)
        assert own.high == pytest.approx(theirs.confidence_interval.high, abs=tolerance)
        # Another test of the same hypothesis: flip the sign of each user's difference.
        permuted = stats.permutation_test(
            (difference,), np.mean, permutation_type="samples", n_resamples=10_000, vectorized=True, rng=seed
        )
        assert own.p_value == pytest.approx(permuted.pvalue, abs=0.04 if name == "hr@10" else 0.02)
        p_values.append(own.p_value)
        ratio = stats.bootstrap(
            (a, b), lambda x, y, axis: 100 * (x.mean(axis) / y.mean(axis) - 1), paired=True, n_resamples=10_000,
            method="percentile", vectorized=True, rng=seed, batch=2000,
        )  # fmt: skip
        assert compared.percent.effect == pytest.approx(100 * (a.mean() / b.mean() - 1))
        width = ratio.confidence_interval.high - ratio.confidence_interval.low
        assert compared.percent.low == pytest.approx(ratio.confidence_interval.low, abs=0.08 * width)
        assert compared.percent.high == pytest.approx(ratio.confidence_interval.high, abs=0.08 * width)
    # Holm by hand, for two.
    small, large = sorted(p_values)
    expected = {small: min(1, 2 * small), large: max(min(1, 2 * small), large)}
    for compared in found.metrics.values():
        assert compared.difference.p_holm == pytest.approx(expected[compared.difference.p_value])


def test_a_difference_that_only_the_uncorrected_test_shows_is_a_tie(same_data):
    rng = np.random.default_rng(5)
    noise = rng.normal(0, 1, 400)
    noise -= noise.mean()
    # p about .03 by itself, and five metrics without any difference beside it.
    shown = 0.5 + noise + 2.2 * noise.std() / np.sqrt(400)
    metrics = {"hr@10": shown} | {f"m{n}": 0.5 + noise for n in range(5)}
    other = {name: np.full(400, 0.5) for name in metrics}
    alone = compare([evaluation(0, metrics)], [evaluation(0, other, run="b")], metrics=["hr@10"])
    among = compare([evaluation(0, metrics)], [evaluation(0, other, run="b")], metrics=list(metrics))
    assert alone.metrics["hr@10"].difference.p_holm < 0.05
    assert alone.metrics["hr@10"].verdict == "higher"
    assert among.metrics["hr@10"].verdict == "tie"
    assert among.metrics["hr@10"].difference.p_holm == pytest.approx(
        6 * among.metrics["hr@10"].difference.p_value
    )


@pytest.mark.parametrize(("effect", "verdict"), [(0.2, "higher"), (-0.2, "lower")])
def test_seeds_are_paired_and_aggregated(effect, verdict, same_data):
    rng = np.random.default_rng(1)
    first, second = [], []
    for seed in (3, 1, 2):
        base = rng.random(300)
        first.append(evaluation(seed, {"hr@10": base + effect + rng.normal(0, 0.05, 300)}, run=f"a{seed}"))
        second.append(evaluation(seed, {"hr@10": base}, run=f"b{seed}"))
    found = compare(first, second[::-1], metrics=["hr@10"])
    compared = found.metrics["hr@10"]
    assert found.first_runs == ("a1", "a2", "a3")
    assert found.second_runs == ("b1", "b2", "b3")
    means = [float(e.values["hr@10"].mean()) for e in sorted(first, key=lambda e: e.seed)]
    assert compared.first.by_seed == pytest.approx(means)
    assert compared.first.sd == pytest.approx(np.std(means, ddof=1))
    assert compared.difference.difference == pytest.approx(effect, abs=0.01)
    assert compared.difference.seed_sd is not None
    assert compared.verdict == verdict
    expected = 100 * effect / np.mean([e.values["hr@10"].mean() for e in second])
    assert compared.percent.effect == pytest.approx(expected, abs=2)
    assert compared.percent.low < expected < compared.percent.high


def test_identical_sides_tie_and_nothing_has_no_percentage(same_data):
    nothing = {"hr@10": np.zeros(50), "ndcg@10": np.zeros(50)}
    found = compare([evaluation(0, nothing)], [evaluation(0, nothing, run="b")])
    assert {c.verdict for c in found.metrics.values()} == {"tie"}
    assert {c.percent for c in found.metrics.values()} == {None}


def one(seed=0, run="a", count=4, **facts):
    return evaluation(
        seed, {"hr@10": np.ones(count), "ndcg@10": np.ones(count), "mrr": np.ones(count)}, run=run, **facts
    )


@pytest.mark.parametrize(
    ("first", "second", "metrics", "message"),
    [
        ([one()], [one(run="b", dataset="soap")], [], "dataset is soap but tea"),
        ([one()], [one(run="b", exclude_seen=True, split="valid")], [], r"split is valid .*; exclude_seen is True"),
        ([one()], [one(run="b", split_kind="last_basket")], [], r"prepare\.split"),
        ([one()], [one(run="b", num_items=31)], [], "num_items is 31 but 30"),
        ([one()], [one(run="b", num_users=9)], [], r"evaluate\.max_users"),
        ([one()], [one(run="b", users=[1, 2, 3, 9])], [], "1 are only in the first, 1 only in the second"),
        ([one()], [one()], [], "on both sides"),
        ([one(), one(1, "a1")], [one(run="b")], [], "seeds 0, 1 against seeds 0"),
        ([one(), one(0, "a1")], [one(run="b")], [], "a and a1|a1 and a: both have seed 0"),
        ([one(), one(1, "a1", method="rl")], [one(run="b")], [], "its model is 'rl', that of a is 'sft'"),
        ([one()], [one(run="b")], ["hr@1"], "no metric 'hr@1'; did you mean 'hr@10'"),
        ([one()], [one(run="b", k=50)], ["mrr"], "mrr is cut off at 50, in a at 20"),
    ],
)  # fmt: skip
def test_what_differs_is_named(first, second, metrics, message, same_data):
    with pytest.raises(DataError, match=message):
        compare(first, second, metrics=metrics)


def test_one_run_may_be_compared_with_one_of_another_seed(same_data):
    assert compare([one(0)], [one(7, "b")]).second_runs == ("b",)


# On disk


def finish(folder, **more):
    outputs = {path.name: file_sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}
    manifest = {
        "stage": folder.name,
        "format_version": FORMAT_VERSION,
        "fingerprint": "made up",
        "seconds": 1.0,
    }
    write_json(folder / "manifest.json", {**manifest, "seed": 0, "inputs": {}, "outputs": outputs, **more})


def write_run(run, *, seed=0, level=0.3, item_ids="abcdef", last=5, train_targets="all", method="sft"):
    """Six users of three events each, the last one test; `level` shifts the planted metrics."""
    from lasar.artifacts import content_hash

    prepare, evaluate = run / "prepare", run / "evaluate"
    for folder in (prepare, evaluate):
        folder.mkdir(parents=True)
    rows = [(user, (user + n) % 5 if n < 2 else last, n, n) for user in range(6) for n in range(3)]
    columns = {"user_index": pl.Int32, "item_index": pl.Int32, "basket": pl.Int32, "split": pl.Int8}
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(prepare / "interactions.parquet")
    ids = list(item_ids)
    pl.DataFrame({"item_id": ids, "title": ids, "text": ids}).write_parquet(prepare / "items.parquet")
    pl.DataFrame({"user_id": [f"u{n}" for n in range(6)]}).write_parquet(prepare / "users.parquet")
    summary = {
        "num_users": 6,
        "num_items": len(ids),
        "split": "leave_one_out",
        "train_targets": train_targets,
    }
    write_json(prepare / "summary.json", summary)
    finish(prepare)
    values = {name: np.arange(6) / 10 + level for name in ("hr@10", "ndcg@10", "mrr")}
    frames = [
        pl.DataFrame({"user_index": np.arange(6, dtype=np.int32)[::-1], "method": [name] * 6}
                     | {metric: (column + shift)[::-1] for metric, column in values.items()})
        for name, shift in ((method, 0.0), ("popularity", -0.2))
    ]  # fmt: skip
    pl.concat(frames).write_parquet(evaluate / "per_user.parquet")
    means = {name: float(column.mean()) for name, column in values.items()} | {"ci": {}}
    facts = FACTS | {"model": method, "num_users": 6, "methods": {method: means, "popularity": means}}
    write_json(evaluate / "metrics.json", facts)
    finish(evaluate, seed=seed, inputs={"prepare": content_hash(prepare)})
    return run


def test_runs_are_read_and_models_chosen_by_name(tmp_path):
    a, b = write_run(tmp_path / "a", level=0.5), write_run(tmp_path / "b", method="rl")
    found = compare_runs([str(a), str(b)])
    assert (found.first, found.second, list(found.metrics)) == ("sft", "rl", ["hr@10", "ndcg@10"])
    assert found.metrics["hr@10"].difference.difference == pytest.approx(0.2)
    assert found.metrics["hr@10"].first.mean == pytest.approx(0.75)
    within = compare_runs([str(a)], models=["sft", "popularity"], metrics=["mrr"])
    assert (within.first, within.second, list(within.metrics)) == ("sft", "popularity", ["mrr"])
    assert within.metrics["mrr"].difference.difference == pytest.approx(0.2)
    both = compare_runs([str(a), str(b)], models=["popularity"])
    assert (both.first, both.second) == ("popularity", "popularity")
    assert read_evaluation(a).users_U.tolist() == list(range(6))


def test_many_seeds_stand_around_against(tmp_path):
    runs = [
        str(write_run(tmp_path / f"{side}{seed}", seed=seed, level=level))
        for side, level in (("a", 0.4), ("b", 0.3))
        for seed in (0, 1)
    ]
    found = compare_runs([*runs[:2], "against", *runs[2:]])
    assert found.metrics["hr@10"].difference.seeds == (0, 1)
    for wrong in (runs[:3], ["against", runs[0]], [runs[0], "against", runs[1], "against", runs[2]]):
        with pytest.raises(ConfigError, match="against"):
            compare_runs(wrong)
    with pytest.raises(ConfigError, match="3 times"):
        compare_runs(runs[:2], models=["sft", "rl", "x"])


def test_other_artifacts_of_the_same_question_are_comparable(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", train_targets="last")
    assert compare_runs([str(a), str(b)]).num_users == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"item_ids": "abcdeg"}, r"items \(the candidates\) differ"),
        ({"last": 4}, "held-out items differ, first of user 0"),
    ],
)
def test_other_data_is_not(tmp_path, changed, message):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", **changed)
    with pytest.raises(DataError, match=message):
        compare_runs([str(a), str(b)])
    (b / "prepare" / "manifest.json").unlink()
    with pytest.raises(DataError, match="no longer there"):
        compare_runs([str(a), str(b)])


def test_missing_evaluations_and_methods_are_named(tmp_path):
    a = write_run(tmp_path / "a")
    with pytest.raises(ArtifactError, match="run the stage 'evaluate' first"):
        compare_runs([str(a), str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="'popularty' was not evaluated; did you mean 'popularity'"):
        compare_runs([str(a)], models=["sft", "popularty"])


def test_the_command_prints_a_verdict_or_json(tmp_path):
    a, b = write_run(tmp_path / "a", level=0.5), write_run(tmp_path / "b")
    printed = CliRunner().invoke(app, ["compare", str(a), str(b)]).stdout
    assert "higher: +0.2000" in printed
    assert "+36.4 %" in printed
    assert "one seed says nothing about training" in printed
    found = json.loads(CliRunner().invoke(app, ["compare", str(a), str(b), "--json"]).stdout)
    assert found["metrics"]["ndcg@10"]["verdict"] == "higher"
