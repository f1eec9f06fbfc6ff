"""The evaluate stage on a shop with a planted rule and a stand-in for the model."""

import io

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lasar.artifacts import read_json, run_stage
from lasar.config import Recipe, parse_section
from lasar.errors import ConfigError, DataError
from lasar.stages import evaluate

FILES = ("metrics.json", "per_user.parquet", "examples.json")


def run(run_dir, *, seed=0, **values):
    config = parse_section(
        evaluate.Config,
        {"model": "sft", "also": [], "bootstrap_samples": 50, "tuning_users": 20, **values},
        where="evaluate",
    )
    recipe = Recipe(name="x", seed=seed, run_dir=run_dir, stages=("evaluate",), configs={"evaluate": config})
    return run_stage("evaluate", evaluate, recipe)


def planted_hits(run_dir, split):
    """Users whose history starts at an odd item: for them the stand-in follows the rule."""
    events = pl.read_parquet(run_dir / "prepare" / "interactions.parquet")
    first = events.group_by("user_index").agg(pl.col("item_index").first()).sort("user_index")
    return (first["item_index"].to_numpy() % 2 == 1).astype(float)


def test_metrics_are_those_of_the_planted_rule(sequence_run, fake_recommender):
    run(sequence_run)
    metrics = read_json(sequence_run / "evaluate" / "metrics.json")
    expected = planted_hits(sequence_run, "test")
    assert metrics["methods"]["sft"]["hr@5"] == pytest.approx(expected.mean())
    assert metrics["methods"]["sft"]["mrr"] == pytest.approx(expected.mean())
    assert list(metrics["methods"]) == ["sft", "popularity", "transitions"]
    assert metrics["engine"] == {"sft": "fused"}
    low, high = metrics["methods"]["sft"]["ci"]["hr@10"]
    assert low < expected.mean() < high
    assert metrics["methods"]["transitions"]["hr@10"] > metrics["methods"]["popularity"]["hr@10"]
    table = pl.read_parquet(sequence_run / "evaluate" / "per_user.parquet")
    mine = table.filter(pl.col("method") == "sft").sort("user_index")
    assert mine["hr@5"].to_list() == expected.tolist()
    assert mine["first_hit_rank"].to_list() == [1 if hit else None for hit in expected]
    assert table.height == 3 * len(expected)


def test_differences_and_slices_agree_with_the_per_user_table(sequence_run, fake_recommender):
    run(sequence_run)
    metrics = read_json(sequence_run / "evaluate" / "metrics.json")
    means = {name: metrics["methods"][name]["ndcg@10"] for name in metrics["methods"]}
    for baseline in ("popularity", "transitions"):
        paired = metrics["paired"][baseline]["ndcg@10"]
        assert paired["difference"] == pytest.approx(means["sft"] - means[baseline])
        assert paired["p_value"] <= paired["p_holm"] <= 1
    for rows, count in (("history_length", "num_users"), ("target_popularity", "num_targets")):
        slices = metrics["slices"][rows]
        name = "hr@10" if rows == "history_length" else "recall@10"
        total = sum(row[count] * row["methods"]["sft"][name] for row in slices)
        assert total / sum(row[count] for row in slices) == pytest.approx(metrics["methods"]["sft"]["hr@10"])


def test_an_interrupted_evaluation_continues_to_the_same_bytes(sequence_run, fake_recommender, monkeypatch):
    monkeypatch.setattr("lasar.evaluation.shards._BATCHES_PER_SHARD", 2)
    run(sequence_run, batch_size=7)
    uninterrupted = {name: (sequence_run / "evaluate" / name).read_bytes() for name in FILES}
    num_calls = len(fake_recommender.calls)
    assert num_calls == 9
    fake_recommender.calls.clear()
    (sequence_run / "evaluate" / "manifest.json").unlink()
    fake_recommender.fail_after = 5
    with pytest.raises(KeyboardInterrupt):
        run(sequence_run, batch_size=7)
    fake_recommender.fail_after = None
    run(sequence_run, batch_size=7)
    # Of the five calls before the interruption, the fifth belonged to an unfinished shard and is made again.
    assert len(fake_recommender.calls) == num_calls + 1
    assert {name: (sequence_run / "evaluate" / name).read_bytes() for name in FILES} == uninterrupted


def test_a_finished_evaluation_is_skipped(sequence_run, fake_recommender):
    assert run(sequence_run)
    assert not run(sequence_run)


def test_orders_have_several_targets_and_say_any_hit(order_run, fake_recommender):
    run(order_run)
    metrics = read_json(order_run / "evaluate" / "metrics.json")
    assert metrics["mean_targets"] == 2
    assert metrics["methods"]["sft"]["recall@10"] <= metrics["methods"]["sft"]["hr@10"]
    stream = io.StringIO()
    evaluate.show(order_run / "evaluate", Console(file=stream, width=200))
    assert "any-hit HR@10" in stream.getvalue()
    assert "Recall@10" in stream.getvalue()
    assert "sft - popularity" in stream.getvalue()


def test_one_target_is_not_called_any_hit(sequence_run, fake_recommender):
    run(sequence_run)
    stream = io.StringIO()
    evaluate.show(sequence_run / "evaluate", Console(file=stream, width=200))
    assert "any-hit" not in stream.getvalue()


def test_a_subset_is_chosen_by_the_seed(sequence_run, fake_recommender):
    def users():
        return (
            pl.read_parquet(sequence_run / "evaluate" / "per_user.parquet")["user_index"]
            .unique()
            .sort()
            .to_list()
        )

    run(sequence_run, max_users=10)
    first = users()
    assert len(first) == 10
    run(sequence_run, max_users=10, seed=1)
    assert users() != first


def test_examples_hold_hits_and_misses_with_titles(sequence_run, fake_recommender):
    run(sequence_run, num_examples=6)
    examples = read_json(sequence_run / "evaluate" / "examples.json")
    assert [example["hit_rank"] is not None for example in examples] == [True] * 3 + [False] * 3
    for example in examples:
        places = [place for place, item in enumerate(example["recommended"], start=1) if item["hit"]]
        assert example["hit_rank"] == (places[0] if places else None)
        assert len(example["recommended"]) == 10
        wanted = {item["item_id"] for item in example["targets"]}
        assert all(item["hit"] == (item["item_id"] in wanted) for item in example["recommended"])
        for item in (*example["history"], *example["recommended"]):
            # An item without a title is shown by its id.
            assert item["title"] == (
                "SKU000" if item["item_id"] == "SKU000" else f"Tea & <Towel> no. {int(item['item_id'][3:])}"
            )


def test_seen_items_are_left_out_for_all_methods(sequence_run, fake_recommender):
    run(sequence_run, exclude_seen=True, num_examples=60)
    for example in read_json(sequence_run / "evaluate" / "examples.json"):
        seen = {item["item_id"] for item in example["history"]}
        assert not seen & {item["item_id"] for item in example["recommended"]}


def test_validation_split_and_short_lists(sequence_run, fake_recommender):
    run(sequence_run, split="valid", k=7, baselines=[])
    metrics = read_json(sequence_run / "evaluate" / "metrics.json")
    assert metrics["split"] == "valid"
    assert set(metrics["methods"]["sft"]) == {"hr@5", "recall@5", "ndcg@5", "mrr", "ci"}
    assert metrics["main_k"] == 5
    assert metrics["paired"] == {}
    assert metrics["methods"]["sft"]["hr@5"] == pytest.approx(np.mean(planted_hits(sequence_run, "valid")))


def test_a_model_that_returns_too_many_rows_is_a_defect(sequence_run, fake_recommender, monkeypatch):
    monkeypatch.setattr(
        fake_recommender,
        "rank",
        lambda self, h, b, **_: (np.zeros((1, 20), np.int32), np.zeros((1, 20), np.float32), np.zeros(1)),
    )
    with pytest.raises(ValueError, match="60 users"):
        run(sequence_run)


def test_no_test_event_is_named(sequence_run, fake_recommender, seal):
    path = sequence_run / "prepare" / "interactions.parquet"
    pl.read_parquet(path).filter(pl.col("split") < 2).write_parquet(path)
    seal(sequence_run / "prepare")
    with pytest.raises(DataError, match="no user has a test event"):
        run(sequence_run)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"baselines": ["popularty"]}, "popularity"),
        ({"k": 2}, "greater than or equal to 5"),
        ({"beam": 3}, "beam_width"),
        ({"split": "train"}, "split"),
    ],
)
def test_wrong_config_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_section(evaluate.Config, values, where="evaluate")


def test_depths_are_studied_on_the_same_users(sequence_run, fake_recommender):
    run(sequence_run, depth={"forced": [0, 3], "users": 40, "timed_users": 5})
    depth = read_json(sequence_run / "evaluate" / "metrics.json")["depth"]
    lengths = pl.read_parquet(sequence_run / "evaluate" / "per_user.parquet").filter(
        pl.col("method") == "sft"
    )
    assert depth["mean"] == pytest.approx(lengths["history_length"].mean())  # the stand-in's own choice
    assert sum(row["num_users"] for row in depth["by_chosen"]) == len(lengths)
    for row in depth["by_chosen"]:
        mine = lengths.filter(pl.col("history_length") == row["depth"])
        assert row["num_users"] == len(mine)
        assert row["hr@10"] == pytest.approx(mine["hr@10"].mean())
    # Its lists do not depend on depth, so every difference is exactly zero.
    assert [(row["depth"], row["num_users"], row["ndcg@10_minus_chosen"]) for row in depth["forced"]] == [
        (0, 40, [0, 0, 0]), (3, 40, [0, 0, 0])
    ]  # fmt: skip
    latency = read_json(sequence_run / "evaluate" / "latency.json")
    assert latency["users"] == 5
    assert set(latency["seconds"]) == {"auto", "0", "3"}
