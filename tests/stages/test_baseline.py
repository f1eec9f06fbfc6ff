"""The stages of the trained baselines, and evaluating what they wrote, on the shop whose users walk in order."""

import io
import json
import shutil

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lasar.artifacts import read_json, run_stage
from lasar.config import Recipe, load_recipe, parse_section
from lasar.errors import ArtifactError, ConfigError
from lasar.sid.catalog import SidCatalog
from lasar.stages import BASELINES, STAGES, evaluate
from tests.stages.conftest import NUM_ITEMS, finish

TINY = {"hidden_size": 32, "dropout": 0.0, "batch_tokens": 128, "epochs": 12, "learning_rate": 1e-2}
VALUES = {
    "gru4rec": TINY | {"learning_rate": 3e-2, "epochs": 20},
    "sasrec": TINY | {"num_layers": 1},
    "rearec": TINY | {"num_layers": 1, "temperature": 0.5, "reasoning": {"contrastive_weight": 0.01}},
    "tiger": TINY | {"num_layers": 1, "num_heads": 2, "head_size": 8, "feed_size": 32, "epochs": 2},
}


@pytest.fixture
def shop(sequence_run):
    """The run with semantic IDs of two levels."""
    codes = np.stack([np.arange(NUM_ITEMS) // 8, np.arange(NUM_ITEMS) % 8], axis=1).astype(np.int32)
    SidCatalog(codes, 8).save(sequence_run / "quantize")
    finish(sequence_run / "quantize")
    return sequence_run


def run(run_dir, stage, **values):
    config = parse_section(STAGES[stage].Config, values, where=stage)
    recipe = Recipe(name="x", seed=0, run_dir=run_dir, stages=(stage,), configs={stage: config})
    return run_stage(stage, STAGES[stage], recipe)


def evaluated(run_dir, **values):
    settings = {"model": "sft", "also": [], "bootstrap_samples": 20, "tuning_users": 20, **values}
    run(run_dir, "evaluate", **settings)
    return read_json(run_dir / "evaluate" / "metrics.json")


@pytest.mark.parametrize("stage", VALUES)
def test_an_artifact_that_evaluates_as_well_as_it_validated(shop, stage):
    assert run(shop, stage, **VALUES[stage])
    assert not run(shop, stage, **VALUES[stage])
    files = {"baseline.json", "baseline.safetensors", "curve.jsonl", "metrics.json", "manifest.json"}
    assert {path.name for path in (shop / stage).iterdir()} == files
    facts = read_json(shop / stage / "metrics.json")
    curve = [json.loads(line) for line in (shop / stage / "curve.jsonl").read_text().splitlines()]
    assert facts["valid_ndcg@10"] == max(record["valid_ndcg@10"] for record in curve)
    metrics = evaluated(shop, model=stage, split="valid", exclude_seen=True, baselines=[])
    assert metrics["methods"][stage]["ndcg@10"] == pytest.approx(facts["valid_ndcg@10"])
    if stage != "tiger":  # two epochs are enough for its plumbing only
        assert metrics["methods"][stage]["hr@10"] > 0.8
    stream = io.StringIO()
    STAGES[stage].show(shop / stage, Console(file=stream, width=120))
    assert f"{stage}: baseline" in stream.getvalue()


def test_beside_the_model_and_the_closed_forms(shop, fake_recommender):
    run(shop, "sasrec", **VALUES["sasrec"])
    metrics = evaluated(shop, also=["sasrec"], baselines=["item_knn", "ease"])
    assert list(metrics["methods"]) == ["sft", "sasrec", "item_knn", "ease"]
    assert set(metrics["settings"]["item_knn"]) == {"neighbours", "shrinkage"}
    assert set(metrics["settings"]["ease"]) == {"l2"}
    assert metrics["methods"]["sasrec"]["ndcg@10"] > metrics["methods"]["ease"]["ndcg@10"] > 0


def test_tiger_searches_as_widely_as_evaluate_says(shop, monkeypatch):
    run(shop, "tiger", **VALUES["tiger"] | {"epochs": 1})
    widths = []
    from lasar.baselines.tiger import Tiger

    search = Tiger._search
    monkeypatch.setattr(
        Tiger, "_search", lambda self, h, width, a: widths.append(width) or search(self, h, width, a)
    )
    evaluated(shop, model="tiger", baselines=[], beam_width=33)
    assert set(widths) == {33}


def test_orders_lie_one_after_the_other(order_run):
    run(order_run, "gru4rec", **VALUES["gru4rec"])
    metrics = evaluated(order_run, model="gru4rec", baselines=["popularity"])
    assert metrics["mean_targets"] == 2
    assert metrics["methods"]["gru4rec"]["recall@10"] > metrics["methods"]["popularity"]["recall@10"]


def test_without_orders_baskets_play_no_part(sequence_run, tmp_path):
    # Leave-one-out asks for the next event even where several share a time.
    other = tmp_path / "other"
    shutil.copytree(sequence_run, other)
    path = other / "prepare" / "interactions.parquet"
    pl.read_parquet(path).with_columns(basket=pl.lit(0, pl.Int32)).write_parquet(path)
    finish(other / "prepare")
    for folder in (sequence_run, other):
        run(folder, "gru4rec", **TINY | {"epochs": 1})
    outputs = [read_json(f / "gru4rec" / "manifest.json")["outputs"] for f in (sequence_run, other)]
    assert outputs[0] == outputs[1]


def test_a_baseline_has_no_depth(shop):
    run(shop, "gru4rec", **TINY | {"epochs": 1})
    with pytest.raises(ConfigError, match="gru4rec has no depth to choose"):
        evaluated(shop, model="gru4rec", depth={"choice": 2})


def test_a_baseline_that_was_not_trained_is_named(shop):
    with pytest.raises(ArtifactError, match="run the stage 'sasrec' first"):
        evaluated(shop, model="sasrec")


def test_only_recipes_that_list_baselines_run_them(tmp_path):
    sections = {name: module.Config for name, module in STAGES.items()}
    recipe = tmp_path / "x.yaml"
    recipe.write_text("name: x\n")
    assert not set(load_recipe(recipe, sections=sections).stages) & set(BASELINES)
    recipe.write_text("stages: [prepare, evaluate, sasrec]\n")
    assert load_recipe(recipe, sections=sections).stages == ("prepare", "sasrec", "evaluate")


def test_every_baseline_has_its_command():
    from typer.testing import CliRunner

    from lasar.cli import app

    listed = CliRunner().invoke(app, ["baseline", "--help"]).stdout
    assert all(name in listed for name in BASELINES)
    assert CliRunner().invoke(app, ["baseline", "sasrec", "--help"]).exit_code == 0


def test_evaluate_names_the_methods_it_knows():
    with pytest.raises(ConfigError, match="item_knn"):
        parse_section(evaluate.Config, {"baselines": ["item_kn"]}, where="evaluate")
