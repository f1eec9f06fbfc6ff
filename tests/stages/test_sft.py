import json
import re

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from lasar.artifacts import StageContext, read_json
from lasar.config import parse_section
from lasar.errors import ArtifactError, ConfigError
from lasar.prompts.text_tokens import TextTokenizer, load_reader
from lasar.prompts.vocabulary import Vocabulary
from lasar.sid.catalog import SidCatalog
from lasar.stages import sft

NUM_ITEMS = 40


def config(**values):
    small = {"backbone": "tiny", "epochs": 1, "batch_tokens": 512, "precision": "fp32", "dropout": 0.0}
    return parse_section(sft.Config, {**small, "validation": {"users": 5}, **values}, where="recipe: sft")


ALIGN = {"tasks": {"sid_to_title": 1, "title_to_sid": 3}, "rows_per_epoch": 20, "vocabulary": 270}


@pytest.fixture
def train(sequence_run, tmp_path):
    """Run the stage on the shop of conftest.py, with made-up codes, vectors and rationales."""
    codes_IL = np.stack(np.divmod(np.arange(NUM_ITEMS), 8), axis=1)
    SidCatalog(codes_IL, 8).save(sequence_run / "quantize")
    for folder in ("embed", "rationalize"):
        (sequence_run / folder).mkdir()
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, 6)).astype(np.float32)
    save_file({"item_embeddings": vectors}, sequence_run / "embed" / "embeddings.safetensors")
    first = pl.read_parquet(sequence_run / "prepare" / "interactions.parquet").filter(split=0, basket=0)
    first.select("user_index", "basket", text=pl.lit("Tea comes next."), outcome=pl.lit("ok")).write_parquet(
        sequence_run / "rationalize" / "rationales.parquet"
    )

    def run(name, **values):
        settings = config(**values)
        output, scratch = tmp_path / name, tmp_path / f".{name}"
        output.mkdir()
        scratch.mkdir()
        inputs = {stage: sequence_run / stage for stage in sft.inputs(settings)}
        sft.run(settings, StageContext(stage="sft", seed=0, inputs=inputs, output=output, scratch=scratch))
        return output

    return run


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_text_is_off_by_default(train):
    plain = train("plain")
    assert files(plain) == files(train("off", text={"rows_per_epoch": 7}))
    assert not (plain / "text_tokenizer.json").exists()
    assert Vocabulary.load(plain / "vocabulary.json").base_size == 0
    assert not any("text" in key for key in json.loads((plain / "metrics.json").read_text()))


def test_a_model_with_text_tasks_is_saved_with_its_tokenizer(train):
    first, second = train("first", text=ALIGN), train("second", text=ALIGN)
    assert files(first) == files(second)
    tokenizer, vocabulary = TextTokenizer.load(first), Vocabulary.load(first / "vocabulary.json")
    assert tokenizer.size == vocabulary.base_size == 270
    assert AutoModelForCausalLM.from_pretrained(first / "model").config.vocab_size == vocabulary.size
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["text_tokens"] == 270
    assert metrics["text_rows_per_epoch"] == {"sid_to_title": 5, "title_to_sid": 15}


def test_text_leaves_the_count_of_training_targets_alone(train):
    counts = [
        json.loads((train(name, **values) / "metrics.json").read_text())["training_targets"]
        for name, values in (("plain", {}), ("text", {"text": ALIGN}))
    ]
    assert counts[0] == counts[1]


def test_rationales_are_an_input_only_where_a_task_needs_them(train):
    assert "rationalize" not in sft.inputs(config(text=ALIGN))
    asked = {**ALIGN, "tasks": {"history_to_rationale": 1}}
    assert sft.inputs(config(text=asked)) == ("prepare", "embed", "quantize", "rationalize")
    assert json.loads((train("asked", text=asked) / "metrics.json").read_text())["text_rows_per_epoch"] == {
        "history_to_rationale": 20
    }


def test_a_pretrained_backbone_brings_its_own_tokenizer(train, tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **size)).save_pretrained(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        train("refused", backbone=str(tmp_path / "lm"), text=ALIGN)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "Tea": 1, "Towel": 2, "no": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "lm" / "tokenizer.json"))
    output = train("pretrained", backbone=str(tmp_path / "lm"), text=ALIGN)
    assert Vocabulary.load(output / "vocabulary.json").base_size == 50
    assert TextTokenizer.load(output).encode("Tea no Towel") == [1, 3, 2]


@pytest.fixture
def words_model(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=60, **size)).save_pretrained(tmp_path / "words")
    vocabulary = {"[UNK]": 0, **{str(number): number for number in range(1, 50)}, "Item": 50}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words" / "tokenizer.json"))
    return str(tmp_path / "words")


def test_a_pretrained_backbone_can_read_words_even_without_text_tasks(train, words_model, tmp_path, caplog):
    output = train("wordless", backbone=words_model)
    assert not (output / "text_tokenizer.json").exists()
    assert load_reader(output).encode("Item 7") == [50, 7]
    with pytest.raises(ArtifactError, match=r"has no tokenizer; a preset gets one with sft.text.tasks"):
        load_reader(train("preset"))
    (tmp_path / "words" / "tokenizer.json").unlink()
    assert not caplog.text
    with caplog.at_level("INFO"):
        assert not (train("mute", backbone=words_model) / "backbone_tokenizer.json").exists()
    assert "has no tokenizer.json that can be kept" in caplog.text


def rows(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("start", ["vectors", "text", "mean"])
def test_new_rows_start_as_asked(train, words_model, start):
    output = train(start, backbone=words_model, learning_rate=1e-12, weights={"code_init": start})
    table, vocabulary = rows(output), Vocabulary.load(output / "vocabulary.json")
    words, codes = table[:60], table[vocabulary.first_code : vocabulary.first_item]
    spread = (codes - words.mean(0)).std().item()
    if start == "mean":
        assert spread < 1e-6
    else:
        assert spread > 0.1 * words.std().item()


def test_new_rows_first_then_training_goes_on_from_them(train, words_model):
    still = {"backbone": words_model, "learning_rate": 1e-12, "weight_decay": 0.0}
    first = {"new_rows_first": 1}
    plain = rows(train("plain", **still))
    torch.testing.assert_close(
        rows(train("still", weights=first, **still)), plain
    )  # both are where they started
    moved = train("moved", weights=first, backbone=words_model, learning_rate=1e-2, weight_decay=0.0)
    assert (moved.parent / ".moved" / "sft_new_rows" / "facts.json").exists()
    assert (rows(moved) - plain)[60:].abs().max() > 0.01


def test_gradient_checkpointing_computes_twice_and_trains_the_same(train, monkeypatch):
    forward, calls = Qwen3MLP.forward, []

    def counted(self, hidden):
        calls.append(self.training and torch.is_grad_enabled())
        return forward(self, hidden)

    monkeypatch.setattr(Qwen3MLP, "forward", counted)
    plain = train("plain", dropout=0.1)
    once = sum(calls)
    calls.clear()
    again = train("again", dropout=0.1, weights={"gradient_checkpointing": True})
    assert sum(calls) > 1.5 * once
    torch.testing.assert_close(rows(again), rows(plain))


def test_align_first_has_text_in_its_own_epochs_alone(train, monkeypatch):
    from lasar.training import text_loss as module

    read = []
    whole = module.text_loss
    monkeypatch.setattr(module, "text_loss", lambda *args, **rest: read.append(1) or whole(*args, **rest))
    counts = {}
    for name, phases in (
        ("to_the_end", {}),
        ("first", {"align_first": 1}),
    ):
        read.clear()
        folder = train(name, text={**ALIGN, **phases}, epochs=6)
        counts[name] = len(read)
        curves = {path.name: len(path.read_text().splitlines()) for path in folder.glob("curve*.jsonl")}
        assert curves == {"curve.jsonl": 6} | ({"curve_align.jsonl": 1} if phases else {})
        earlier = read_json(folder / "metrics.json")["earlier"]
        assert [(name, facts["best_epoch"]) for name, facts in earlier.items()] == [("sft_align", 1)] * len(
            phases
        )
    assert counts["to_the_end"] > 3 * counts["first"] > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": {"code_init": "text"}}, "code_init=text: 'tiny' is a preset; set vectors or random"),
        ({"weights": {"new_rows_first": 1}}, "sft.weights.new_rows_first: 'tiny' is a preset"),
        ({"text": {"align_first": 1}}, "sft.text.align_first: there is nothing to align with"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        sft.sources(config(**values))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"lora_rank": 4}, "adapters would stand on random layers"),
        ({"code_init": "mean"}, "code_init=mean: with pretrained=false no word means anything"),
    ],
)
def test_a_control_without_pre_training_takes_nothing_from_it(words_model, weights, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        sft.sources(config(backbone=words_model, weights={"pretrained": False, **weights}))


def test_random_rows_among_words_are_refused(words_model):
    with pytest.raises(ConfigError, match="is a pre-trained model; set vectors, text or mean"):
        sft.sources(config(backbone=words_model, weights={"code_init": "random"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"tasks": {"sid_to_titel": 1}}, "sft.text.tasks"),
        ({"tasks": {"sid_to_title": 0}}, "greater than 0"),
        ({"vocabulary": 100}, "greater than or equal to 256"),
        ({"row_per_epoch": 1}, "did you mean 'rows_per_epoch'"),
    ],
)
def test_mistakes_are_named(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        config(text=text)
