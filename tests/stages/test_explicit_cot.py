"""The stage explicit_cot on the shop whose users walk in order, whose rationales say where the walk is."""

import io
import json

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from lasar.artifacts import read_json, run_stage
from lasar.config import Recipe, parse_section
from lasar.errors import ArtifactError, ConfigError
from lasar.model.backbone import Backbone, build_preset, save_backbone
from lasar.prompts.text_tokens import TextTokenizer, train_tokenizer
from lasar.prompts.vocabulary import Vocabulary
from lasar.sid.catalog import SidCatalog
from lasar.stages import BASELINES, STAGES
from tests.stages.conftest import NUM_ITEMS, finish

SMALL = {
    "epochs": 10, "learning_rate": 1e-2, "dropout": 0.0, "precision": "fp32", "text_vocabulary": 300,
    "max_tokens": 12, "batch_tokens": 512,
}  # fmt: skip


def write_stage1(run_dir, *, text_size=0, orders=False):
    folder = run_dir / "sft"
    vocabulary = Vocabulary(num_levels=2, codebook_size=8, base_size=text_size, orders=orders)
    model = build_preset("tiny", vocabulary=vocabulary, seed=0)
    save_backbone(Backbone(model=model, vocabulary=vocabulary), folder)
    finish(folder)


def write_rationales(run_dir):
    """A rationale for every training item but the first of a user: which shelf (of eight) comes next."""
    events = pl.read_parquet(run_dir / "prepare" / "interactions.parquet").filter(pl.col("split") == 0)
    rows = events.group_by("user_index", "basket", maintain_order=True).agg(pl.col("item_index").first())
    rows = rows.filter(pl.col("basket") > 0)
    texts = [f"Shelf {item // 8} comes next." for item in rows["item_index"]]
    folder = run_dir / "rationalize"
    folder.mkdir()
    rows.select("user_index", "basket", text=pl.Series(texts), outcome=pl.lit("ok")).write_parquet(
        folder / "rationales.parquet"
    )
    (folder / "summary.json").write_text(json.dumps({"teacher": "made up", "intent": "from_target"}))
    finish(folder)


@pytest.fixture
def shop(sequence_run):
    codes = np.stack([np.arange(NUM_ITEMS) // 8, np.arange(NUM_ITEMS) % 8], axis=1).astype(np.int32)
    SidCatalog(codes, 8).save(sequence_run / "quantize")
    finish(sequence_run / "quantize")
    write_stage1(sequence_run)
    write_rationales(sequence_run)
    return sequence_run


def run(run_dir, stage, **values):
    config = parse_section(STAGES[stage].Config, values, where=stage)
    recipe = Recipe(name="x", seed=0, run_dir=run_dir, stages=(stage,), configs={stage: config})
    return run_stage(stage, STAGES[stage], recipe)


def test_it_learns_to_write_and_to_answer_and_evaluates_as_it_validated(shop):
    assert run(shop, "explicit_cot", **SMALL)
    facts = read_json(shop / "explicit_cot" / "metrics.json")
    curve = [json.loads(line) for line in (shop / "explicit_cot" / "curve.jsonl").read_text().splitlines()]
    assert facts["valid_ndcg@10"] == max(record["valid_ndcg@10"] for record in curve)
    assert facts["teacher"] == "made up"
    assert facts["rationales_cut"] == 0
    texts = [example["text"] for example in facts["written"]["examples"]]
    assert all(text.startswith("Shelf ") and text.endswith(" comes next.") for text in texts)
    assert facts["written"]["mean_tokens"] == pytest.approx(facts["rationale_tokens"], abs=1)
    run(
        shop, "evaluate", model="explicit_cot", also=[], split="valid", exclude_seen=True, baselines=["popularity"],
        bootstrap_samples=20, tuning_users=20, beam_width=20, depth={"forced": [0]},
    )  # fmt: skip
    metrics = read_json(shop / "evaluate" / "metrics.json")
    assert metrics["methods"]["explicit_cot"]["ndcg@10"] == pytest.approx(facts["valid_ndcg@10"], abs=0.01)
    assert metrics["methods"]["explicit_cot"]["hr@10"] > metrics["methods"]["popularity"]["hr@10"] + 0.2
    assert metrics["depth"]["mean"] == 0  # words are no latent steps
    stream = io.StringIO()
    STAGES["explicit_cot"].show(shop / "explicit_cot", Console(file=stream, width=120))
    assert "rationales by made up" in stream.getvalue()


def test_the_same_twice_and_longer_texts_are_cut(shop):
    once = SMALL | {"epochs": 1, "max_tokens": 3}
    run(shop, "explicit_cot", **once)
    first = read_json(shop / "explicit_cot" / "manifest.json")["outputs"]
    assert read_json(shop / "explicit_cot" / "metrics.json")["rationales_cut"] == 1
    assert read_json(shop / "explicit_cot" / "explicit_cot.json") == {"max_tokens": 3}
    (shop / "explicit_cot" / "manifest.json").unlink()
    run(shop, "explicit_cot", **once)
    assert read_json(shop / "explicit_cot" / "manifest.json")["outputs"] == first


def test_the_words_of_stage_1_are_kept(shop):
    tokenizer = train_tokenizer(["Shelf 1 comes next."], 270)
    write_stage1(shop, text_size=tokenizer.size)
    tokenizer.save(shop / "sft")
    finish(shop / "sft")
    run(shop, "explicit_cot", **SMALL | {"epochs": 1})
    assert TextTokenizer.load(shop / "explicit_cot").size == tokenizer.size
    assert Vocabulary.load(shop / "explicit_cot" / "vocabulary.json").base_size == tokenizer.size


def test_latent_steps_and_missing_rationales_are_refused(shop):
    run(shop, "explicit_cot", **SMALL | {"epochs": 1})
    with pytest.raises(ConfigError, match="in words, not in latent steps"):
        run(shop, "evaluate", model="explicit_cot", also=[], baselines=[], depth={"choice": 2})
    (shop / "rationalize" / "rationales.parquet").unlink()
    with pytest.raises(ArtifactError, match="'rationalize'"):
        run(shop, "explicit_cot", **SMALL)


def test_it_is_a_baseline():
    assert "explicit_cot" in BASELINES
