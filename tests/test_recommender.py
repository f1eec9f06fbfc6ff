import json

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file

from lasar import ArtifactError, ConfigError, Recommender, UnknownItemError
from lasar.model.backbone import Backbone, build_preset, save_backbone
from lasar.model.reasoner import LatentReasoner, ReasoningSettings, save_reasoner
from lasar.prompts.vocabulary import Vocabulary

ITEMS = [f"sku{i}" for i in range(20)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder written by hand: three users, twenty items, an untrained model."""
    run = tmp_path_factory.mktemp("run")
    for stage in ("prepare", "quantize", "sft"):
        (run / stage).mkdir()
    pl.DataFrame(
        {
            "item_index": pl.Series(range(20), dtype=pl.Int32),
            "item_id": ITEMS,
            "title": [f"Item [{i}]" for i in range(20)],
            "text": [""] * 20,
        }
    ).write_parquet(run / "prepare" / "items.parquet")
    pl.DataFrame({"user_index": pl.Series([0, 1], dtype=pl.Int32), "user_id": ["ann", "bob"]}).write_parquet(
        run / "prepare" / "users.parquet"
    )
    pl.DataFrame(
        {
            "user_index": pl.Series([0, 0, 0, 1, 1], dtype=pl.Int32),
            "item_index": pl.Series([3, 4, 5, 6, 7], dtype=pl.Int32),
            "timestamp": [0, 0, 1, 0, 1],
            "basket": pl.Series([0, 0, 1, 0, 1], dtype=pl.Int32),
            "split": pl.Series([0, 0, 2, 0, 2], dtype=pl.Int8),
        }
    ).write_parquet(run / "prepare" / "interactions.parquet")
    (run / "prepare" / "summary.json").write_text(
        json.dumps({"num_users": 2, "num_items": 20, "split": "last_basket", "train_targets": "all"})
    )
    codes = np.stack([np.arange(20) // 5, np.arange(20) % 5], axis=1).astype(np.int32)
    save_file({"codes": codes}, run / "quantize" / "catalog.safetensors")
    (run / "quantize" / "catalog.json").write_text(
        json.dumps({"num_levels": 2, "codebook_size": 5, "num_items": 20})
    )
    vocabulary = Vocabulary(num_levels=2, codebook_size=5, orders=True)
    save_backbone(
        Backbone(model=build_preset("tiny", vocabulary=vocabulary, seed=0), vocabulary=vocabulary),
        run / "sft",
    )
    return run


@pytest.fixture(scope="module")
def recommender(run):
    return Recommender.load(run)


def test_recommends_distinct_items_with_titles_best_first(recommender):
    found = recommender.recommend(["sku1", ["sku2", "sku3"]], 7)
    assert len({item.item_id for item in found}) == 7
    assert all(item.title == f"Item [{item.item_id.removeprefix('sku')}]" for item in found)
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)


def test_an_order_is_not_a_sequence(recommender):
    together = recommender.recommend([["sku2", "sku3"]], 5)
    apart = recommender.recommend(["sku2", "sku3"], 5)
    assert [item.score for item in together] != [item.score for item in apart]


def test_user_and_own_history_agree(recommender):
    assert recommender.user_history("ann") == [["sku3", "sku4"], ["sku5"]]
    assert recommender.recommend_user("ann", 5) == recommender.recommend([["sku3", "sku4"], ["sku5"]], 5)


def test_filters(recommender):
    assert {i.item_id for i in recommender.recommend([], 5, allow=["sku1", "sku9"])} == {"sku1", "sku9"}
    assert recommender.recommend([], 5, allow=["sku1"], exclude=["sku1"]) == []
    assert recommender.recommend([], 5, allow=[]) == []
    seen = recommender.recommend(["sku0", "sku1"], 20, exclude_seen=True)
    assert {i.item_id for i in seen} == set(ITEMS[2:])


def test_everything_can_be_asked_for(recommender):
    assert {i.item_id for i in recommender.recommend([], 500)} == set(ITEMS)


def test_unknown_ids_name_the_closest(recommender):
    with pytest.raises(UnknownItemError, match="no item 'SKU1' in the catalogue; did you mean 'sku1'"):
        recommender.recommend(["SKU1"])
    with pytest.raises(UnknownItemError, match="no user 'anne' in the event log; did you mean 'ann'"):
        recommender.recommend_user("anne")


def test_k_below_one_is_refused(recommender):
    with pytest.raises(ConfigError, match="k=0"):
        recommender.recommend([], 0)


def test_no_run_and_no_model(tmp_path):
    with pytest.raises(ArtifactError, match="no such run folder"):
        Recommender.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="no trained model"):
        Recommender.load(tmp_path)


def test_unknown_device(run):
    with pytest.raises(ConfigError, match="device"):
        Recommender.load(run, device="tpu-9")


def test_only_stages_that_answer_alone_are_models(run):
    with pytest.raises(ConfigError, match="one of sft, latent_sft, rl"):
        Recommender.load(run, model="explicit_cot")


def test_model_of_another_catalogue_is_refused(run):
    manifest = {"format_version": 1, "fingerprint": "x", "outputs": {}}
    (run / "quantize" / "manifest.json").write_text(json.dumps(manifest))
    (run / "sft" / "manifest.json").write_text(json.dumps({**manifest, "inputs": {"quantize": "other"}}))
    try:
        with pytest.raises(ArtifactError, match="another 'quantize' than"):
            Recommender.load(run)
    finally:
        (run / "quantize" / "manifest.json").unlink()
        (run / "sft" / "manifest.json").unlink()


@pytest.fixture(scope="module")
def thinker(run):
    """The same run with a second model that reasons: up to 3 steps, 2 by itself."""
    vocabulary = Vocabulary(num_levels=2, codebook_size=5, orders=True)
    torch.manual_seed(0)
    reasoner = LatentReasoner(
        build_preset("tiny", vocabulary=vocabulary, seed=1), vocabulary=vocabulary,
        settings=ReasoningSettings(max_depth=3, head_width=8),
    )  # fmt: skip
    with torch.no_grad():
        reasoner.policy_head.outer.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    (run / "latent_sft").mkdir()
    save_reasoner(reasoner, run / "latent_sft")
    return Recommender.load(run)


def test_the_last_trained_model_is_the_default(run, recommender, thinker):
    assert thinker.ranker.reasoner.settings.max_depth == 3
    stage_1 = Recommender.load(run, model="sft")
    assert stage_1.recommend(["sku1"], 5) == recommender.recommend(["sku1"], 5)
    assert stage_1.recommend(["sku1"], 5) != thinker.recommend(["sku1"], 5)


def test_depth_by_itself_forced_and_none(thinker):
    by_depth = [thinker.recommend(["sku1", "sku2"], 5, depth=depth) for depth in (0, 1, 2, 3)]
    assert len({tuple(found) for found in by_depth}) == 4
    assert thinker.recommend(["sku1", "sku2"], 5) == by_depth[2]
    assert thinker.recommend_user("ann", 5, depth=2) == thinker.recommend_user("ann", 5)
    assert thinker.recommend_user("ann", 5, depth=0) != thinker.recommend_user("ann", 5)


def test_a_sampled_depth_is_repeated_by_its_seed(thinker):
    by_depth = [thinker.recommend(["sku1", "sku2"], 5, depth=depth) for depth in (1, 2, 3)]
    drawn = [thinker.recommend(["sku1", "sku2"], 5, depth="sampled", seed=seed) for seed in range(12)]
    assert drawn == [thinker.recommend(["sku1", "sku2"], 5, depth="sampled", seed=seed) for seed in range(12)]
    chosen = {by_depth.index(found) for found in drawn}
    assert len(chosen) > 1


@pytest.mark.parametrize("depth", [-1, 4])
def test_a_depth_beyond_the_model_is_refused(thinker, depth):
    with pytest.raises(ConfigError, match=f"depth={depth}: .* 0 to 3 latent steps"):
        thinker.recommend(["sku1"], depth=depth)


@pytest.mark.parametrize("depth", [1, "sampled"])
def test_a_model_without_reasoning_refuses_depth(run, depth):
    with pytest.raises(ConfigError, match="depth="):
        Recommender.load(run, model="sft").recommend(["sku1"], depth=depth)


def test_training_counts_leave_held_out_events_out(recommender):
    assert recommender.train_counts.tolist() == [int(i in (3, 4, 6)) for i in range(20)]
