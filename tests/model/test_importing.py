"""Pre-trained models as plain folders, and tokenizers without what a shop never says."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lasar.artifacts import read_json
from lasar.cli import app
from lasar.errors import ConfigError, DataError, MissingExtraError
from lasar.model.backbone import build_backbone, head_bias, input_table, output_table
from lasar.model.importing import import_model
from lasar.prompts.text_tokens import pretrained_tokenizer
from lasar.prompts.trimming import trim

CORPUS = [
    "green tea for the morning",
    "teapots and teacups",
    "towels, soaps and combs",
    "the morning after",
] * 3
SHOP = ["green tea", "a teapot for the morning", ""]


def bpe(**options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<bos>", "<eos>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<late>"])
    tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def write_model(folder, *, tied: bool, kind: str = "llama") -> Tokenizer:
    tokenizer = bpe()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=tokenizer.get_vocab_size() + 5, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
        pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if (bias := head_bias(model)) is not None:
        bias.data.normal_()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("options", [{}, {"ignore_merges": True}])
def test_a_trimmed_tokenizer_encodes_the_texts_as_before_and_every_other_text(options):
    tokenizer = bpe(**options)
    trimmed = trim(tokenizer, SHOP, name="it")
    assert len(trimmed.old_ids) == trimmed.tokenizer.get_vocab_size() < tokenizer.get_vocab_size()
    for text in SHOP:
        old = tokenizer.encode(text).ids  # with what stands around a text
        assert trimmed.old_ids[trimmed.tokenizer.encode(text).ids].tolist() == old
    for text in (*CORPUS, "Zebra \u00e9\u4e2d\U0001f642 <late>"):
        ids = trimmed.tokenizer.encode(text, add_special_tokens=False).ids
        assert trimmed.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert trimmed.tokenizer.token_to_id("<late>") is not None
    assert trimmed.tokenizer.token_to_id("\u0120teacups") is None


def characters_and_bytes() -> Tokenizer:
    """As SentencePiece makes them: spaces are characters, what the alphabet lacks is written in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    single = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *single], show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    tokenizer.train_from_iterator([*CORPUS, "tea > b"], trainer)
    facts = json.loads(tokenizer.to_str())
    facts["pre_tokenizer"] = None
    facts["model"]["vocab"][">\u2581"] = len(facts["model"]["vocab"])  # one token reaches into the next word
    facts["model"]["merges"].append([">", "\u2581"])
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] == "<unk>"]
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def test_a_tokenizer_of_characters_and_bytes_can_be_trimmed():
    tokenizer = characters_and_bytes()
    texts = [*SHOP, "tea > b", "  two  spaces ", "caf\u00e9"]
    trimmed = trim(tokenizer, texts, name="it")
    assert len(trimmed.old_ids) < tokenizer.get_vocab_size()
    for text in texts:
        assert trimmed.old_ids[trimmed.tokenizer.encode(text).ids].tolist() == tokenizer.encode(text).ids
    for text in (*CORPUS, "Zebra \u00e9\u4e2d\U0001f642"):
        assert trimmed.tokenizer.decode(trimmed.tokenizer.encode(text).ids) == text
    assert trimmed.tokenizer.token_to_id("\u2581teacups") is None


def test_another_kind_of_tokenizer_is_refused():
    words = Tokenizer(models.WordLevel({"tea": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(
        ConfigError, match=r"it: its tokenizer is WordLevel; only BPE with bytes can be trimmed"
    ):
        trim(words, ["tea"], name="it")
    with pytest.raises(ConfigError, match="BPE without bytes"):
        trim(Tokenizer(models.BPE({"a": 0}, [])), ["a"], name="it")


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("phi", False)])
def test_the_logits_of_the_kept_tokens_stay(tmp_path, kind, tied):
    tokenizer = write_model(tmp_path / "whole", tied=tied, kind=kind)
    facts = import_model(tmp_path / "whole", tmp_path / "small", texts=SHOP)
    assert facts == read_json(tmp_path / "small" / "import.json")
    assert {(tmp_path / "small" / name).stat().st_mode for name in ("model.safetensors", "import.json")} == {
        (tmp_path / "small" / "import.json").stat().st_mode
    }
    assert len(facts["old_ids"]) == facts["tokens"]
    assert facts["tokens"] < facts["tokens_before"] == tokenizer.get_vocab_size() + 5
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert small.config.vocab_size == facts["tokens"] == len(input_table(small)) == len(output_table(small))
    assert (input_table(small) is output_table(small)) == tied
    trimmed = Tokenizer.from_file(str(tmp_path / "small" / "tokenizer.json"))
    old_ids = trim(tokenizer, SHOP, name="it").old_ids
    for text in SHOP[:2]:
        ids = [torch.tensor([t.encode(text).ids]) for t in (tokenizer, trimmed)]
        with torch.no_grad():
            logits = [model(input_ids=i).logits[0] for model, i in zip((whole, small), ids, strict=True)]
        torch.testing.assert_close(logits[1], logits[0][:, old_ids], atol=1e-6, rtol=0)
    assert (small.config.bos_token_id, small.config.eos_token_id) == (
        trimmed.token_to_id("<bos>"), trimmed.token_to_id("<eos>"),
    )  # fmt: skip


def test_what_is_imported_is_a_backbone_and_a_plain_folder(tmp_path):
    write_model(tmp_path / "whole", tied=True)
    import_model(tmp_path / "whole", tmp_path / "copy")
    out = str(tmp_path / "copy")
    text = pretrained_tokenizer(out)
    backbone = build_backbone(
        out, num_levels=2, codebook_size=4, orders=False, max_history=5, normalise="trie", dropout=0.0, lora_rank=0,
        seed=0, text_size=text.size,
    )  # fmt: skip
    assert backbone.vocabulary.base_size == len(input_table(AutoModelForCausalLM.from_pretrained(out)))
    assert AutoTokenizer.from_pretrained(out).decode(text.encode("green tea")) == "green tea"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tokenizer = write_model(tmp_path / "whole", tied=True)
    tokenizer.add_special_tokens([f"<more {number}>" for number in range(9)])
    tokenizer.save(str(tmp_path / "whole" / "tokenizer.json"))
    with pytest.raises(DataError, match=r"tokenizer has a token \d+ and its model \d+ rows"):
        import_model(tmp_path / "whole", tmp_path / "out", texts=SHOP)
    assert not (tmp_path / "out").exists()


def test_wrong_sources_are_named_and_nothing_is_left(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"none: no such file or folder"):
        import_model(tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match=r"neither a .gguf file nor a model folder"):
        import_model(tmp_path, tmp_path / "out")
    write_model(tmp_path / "whole", tied=True)
    weights = tmp_path / "whole" / "model.safetensors"
    tensors = load_file(weights)
    save_file(
        {name: t for name, t in tensors.items() if "mlp" not in name}, weights, metadata={"format": "pt"}
    )
    with pytest.raises(DataError, match=r"whole: cannot be opened: its weights lack .*mlp"):
        import_model(tmp_path / "whole", tmp_path / "out")
    weights.write_bytes(b"torn")
    with pytest.raises(DataError, match="whole: cannot be opened"):
        import_model(tmp_path / "whole", tmp_path / "out")
    (tmp_path / "whole" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer.json"):
        import_model(tmp_path / "whole", tmp_path / "out")
    with pytest.raises(ConfigError, match="whole: is there already"):
        import_model(tmp_path / "whole", tmp_path / "whole")
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF?")
    for name in ("broken.gguf", "missing.gguf"):
        with pytest.raises(DataError, match=name):
            import_model(tmp_path / name, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lasar\[gguf\]'"):
        import_model(tmp_path / "broken.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_keeps_what_a_run_says(tmp_path, monkeypatch):
    write_model(tmp_path / "whole", tied=False)
    monkeypatch.setattr("lasar.cot.rationale_reader.texts_of_run", lambda run: SHOP)
    words = [
        "data",
        "import-model",
        str(tmp_path / "whole"),
        str(tmp_path / "out"),
        "--texts-of",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "LlamaForCausalLM" in done.output
    assert "tokens (of" in done.output
