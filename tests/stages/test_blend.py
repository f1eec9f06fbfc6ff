import json

import numpy as np
import pytest

from lasar import Recommender
from lasar.artifacts import StageContext, read_json
from lasar.baselines.opened import open_ranker
from lasar.config import parse_section
from lasar.data.interactions import SPLIT_TEST, Interactions
from lasar.decoding.counts import COUNTS_FILE, Counts
from lasar.errors import ConfigError
from lasar.model.backbone import Backbone, build_preset, save_backbone
from lasar.prompts.vocabulary import Vocabulary
from lasar.sid.catalog import SidCatalog
from lasar.stages import BASELINES, STAGES, blend, evaluate

NUM_ITEMS = 40


def stage(module, values, folder, name, tmp):
    config = parse_section(module.Config, values, where=f"recipe: {name}")
    output, scratch = folder / name, tmp / f"scratch-{name}"
    output.mkdir()
    scratch.mkdir()
    inputs = {upstream: folder / upstream for upstream in module.inputs(config)}
    module.run(config, StageContext(stage=name, seed=0, inputs=inputs, output=output, scratch=scratch))
    return output


@pytest.fixture
def untrained(sequence_run):
    """The shop of conftest.py, where users walk the items in order, with a model that has learnt nothing."""
    SidCatalog(np.stack(np.divmod(np.arange(NUM_ITEMS), 8), axis=1), 8).save(sequence_run / "quantize")
    vocabulary = Vocabulary(num_levels=2, codebook_size=8)
    model = build_preset("tiny", vocabulary=vocabulary, seed=0)
    (sequence_run / "sft").mkdir(exist_ok=True)
    save_backbone(Backbone(model=model, vocabulary=vocabulary), sequence_run / "sft")
    (sequence_run / "sft" / "curve.jsonl").write_text("of training\n")
    return sequence_run


@pytest.fixture
def blended(untrained, tmp_path):
    stage(blend, {"model": "sft", "beam_width": 10}, untrained, "blend", tmp_path)
    return untrained


def test_counts_rescue_a_model_that_has_learnt_nothing(blended, tmp_path):
    facts = read_json(blended / "blend" / "metrics.json")
    assert facts["share"] > 0
    assert facts["valid_ndcg@10"] > 0.9 > 0.3 > facts["valid_ndcg@10_model"]
    assert len(facts["tried"]) == len(blend.TEMPERATURES) * len(blend.SHARES)
    values = {
        "model": "blend",
        "also": ["sft"],
        "k": 10,
        "beam_width": 10,
        "baselines": [],
        "num_examples": 1,
    }
    methods = read_json(stage(evaluate, values, blended, "evaluate", tmp_path) / "metrics.json")["methods"]
    assert methods["blend"]["ndcg@10"] > 0.9 > methods["sft"]["ndcg@10"]


def test_the_artifact_is_the_model_and_its_counts(blended):
    for path in (blended / "sft" / "model").iterdir():
        assert (blended / "blend" / "model" / path.name).read_bytes() == path.read_bytes()
    assert (blended / "blend" / COUNTS_FILE).is_file()
    assert not (blended / "blend" / "curve.jsonl").exists()
    assert Recommender.load(blended).ranker.counts is not None  # the last stage is what is served
    assert Recommender.load(blended, model="sft").ranker.counts is None


def test_filters_hold_for_what_counts_name(blended):
    recommender = Recommender.load(blended)
    ids = recommender.items.item_ids
    history = [ids[10], ids[11]]
    usual = [item.item_id for item in recommender.recommend(history, 5)]
    assert usual[0] == ids[12]
    assert ids[12] not in [item.item_id for item in recommender.recommend(history, 5, exclude=[ids[12]])]
    allowed = [ids[13], ids[30]]
    assert {item.item_id for item in recommender.recommend(history, 5, allow=allowed)} == set(allowed)
    seen = recommender.recommend([ids[12], ids[11]], 20, exclude_seen=True, beam_width=20)
    assert not {ids[12], ids[11]} & {item.item_id for item in seen}
    assert [item.score for item in seen] == sorted((item.score for item in seen), reverse=True)


def test_a_larger_catalogue_keeps_the_counts(blended):
    ranker = Recommender.load(blended).ranker
    larger = ranker.with_codes(np.concatenate([ranker.codes_IL, [[7, 7]]]).astype(np.int32))
    history, baskets = [np.array([10, NUM_ITEMS], np.int32)], [np.zeros(2, dtype=np.int32)]
    assert larger.counts is ranker.counts is not None
    larger.counts = ranker.counts.mixed(temperature=1.0, share=0.9)
    items = larger.rank(history, baskets, k=3, beam_width=10).items_QK[0]
    assert items[0] == 11  # the new item says nothing, the one bought with it does


def test_a_list_does_not_depend_on_its_batch_or_on_how_many_items_are_asked_for(blended):
    ranker = Recommender.load(blended).ranker
    cases = Interactions.load(blended / "prepare").cases(SPLIT_TEST)
    together = ranker.rank(cases.histories, cases.baskets, k=20, beam_width=20, batch_size=16)
    for query in range(0, len(cases), 7):
        alone = ranker.rank([cases.histories[query]], [cases.baskets[query]], k=5, beam_width=20)
        np.testing.assert_array_equal(alone.items_QK[0], together.items_QK[query, :5])


def test_a_trained_baseline_can_be_mixed_too(untrained, tmp_path):
    from lasar.stages import sasrec

    small = {"hidden_size": 16, "num_layers": 1, "epochs": 1, "training": {"precision": "fp32"}}
    stage(sasrec, small, untrained, "sasrec", tmp_path)
    stage(blend, {"model": "sasrec", "beam_width": 10}, untrained, "blend", tmp_path)
    rank = open_ranker(
        untrained / "blend", prepare=untrained / "prepare", quantize=untrained / "quantize", device="cpu", k=5,
        beam_width=10, exclude_seen=True, seed=0,
    ).rank  # fmt: skip
    history, baskets = [np.array([10, 11], np.int32)], [np.arange(2, dtype=np.int32)]
    found = rank(history, baskets, "auto").items_QK[0]
    assert (found[0], len(found)) == (12, 5)
    with pytest.raises(ConfigError, match="has no depth to choose"):
        rank(history, baskets, 2)


def test_it_runs_only_where_listed_and_is_no_baseline():
    assert not blend.Config.by_default
    assert list(STAGES)[list(STAGES).index("rl") + 1 :][:1] == ["blend"]
    assert "blend" not in BASELINES


def test_what_was_chosen_is_what_is_used(blended):
    facts, counts = read_json(blended / "blend" / "metrics.json"), Counts.load(blended / "blend")
    best = max(facts["tried"], key=lambda row: row["valid_ndcg@10"])
    assert (counts.temperature, counts.share) == (best["temperature"], best["share"])
    assert json.dumps(facts["counts"])
