import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from lasar.errors import ArtifactError, ConfigError
from lasar.model.backbone import (
    build_backbone,
    build_preset,
    load_backbone,
    num_parameters,
    save_backbone,
    token_weights,
)
from lasar.model.opening import NotOpenedError
from lasar.model.presets import PRESETS
from lasar.prompts.vocabulary import Vocabulary

SIZES = {"num_levels": 2, "codebook_size": 8, "orders": False, "max_history": 10, "normalise": "trie"}


def build(name, **changes):
    return build_backbone(name, **{**SIZES, "dropout": 0.0, "lora_rank": 0, "seed": 0, **changes})


@pytest.fixture(params=["tied", "untied", "biased"])
def pretrained(request, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    if request.param == "biased":
        model = PhiForCausalLM(PhiConfig(**sizes))
        model.lm_head.bias.data.normal_()
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=request.param == "tied"))
    model.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


@pytest.mark.parametrize(("preset", "millions"), [("500k", 0.59), ("1m", 1.3), ("4m", 4.0), ("12m", 12.3)])
def test_presets_have_their_size(preset, millions):
    vocabulary = Vocabulary(num_levels=4, codebook_size=256)
    assert num_parameters(build_preset(preset, vocabulary=vocabulary, seed=0)) / 1e6 == pytest.approx(
        millions, rel=0.1
    )


def test_same_seed_same_weights_and_the_global_generator_is_untouched():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = build("tiny"), build("tiny"), build("tiny", seed=1)
    assert torch.equal(torch.rand(1), expected)
    pairs = list(zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True)
    )


def test_dropout_acts_only_while_training():
    model = build("tiny", dropout=0.5).model
    ids = torch.tensor([[1, 7, 15]])
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_vocabulary_extension_keeps_the_language_model(pretrained):
    original = AutoModelForCausalLM.from_pretrained(pretrained)
    backbone = build(str(pretrained))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    logits = backbone.model.eval()(ids).logits
    assert backbone.vocabulary.base_size == 50
    assert logits.shape[-1] == backbone.vocabulary.size == 50 + 6 + 16
    torch.testing.assert_close(logits[..., :50], original(ids).logits, atol=1e-5, rtol=1e-5)
    for weights in token_weights(backbone.model):
        torch.testing.assert_close(weights[50:], weights[:50].mean(0).expand_as(weights[50:]))


def test_a_preset_gets_text_tokens_below_its_markers():
    plain, reading = build("tiny"), build("tiny", text_size=300)
    assert plain.vocabulary.base_size == 0
    assert reading.vocabulary.base_size == 300
    assert reading.model.get_input_embeddings().weight.shape[0] == 300 + plain.vocabulary.size


def test_a_pretrained_model_must_have_the_tokens_of_its_tokenizer(pretrained):
    assert build(str(pretrained), text_size=40).vocabulary.base_size == 50
    with pytest.raises(ConfigError, match="tokenizer has 51 tokens and its model 50"):
        build(str(pretrained), text_size=51)


def test_saved_model_reloads_in_plain_transformers(pretrained, tmp_path):
    backbone = build(str(pretrained))
    save_backbone(backbone, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[3, 55, 60]])
    assert torch.equal(plain(ids).logits, backbone.model.eval()(ids).logits)
    assert torch.equal(load_backbone(tmp_path / "model")(ids).logits, plain(ids).logits)
    assert Vocabulary.load(tmp_path / "vocabulary.json") == backbone.vocabulary


def test_lora_trains_few_weights_and_merges(pretrained, tmp_path):
    backbone = build(str(pretrained), lora_rank=2)
    trained = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "embed_tokens" in name or "lm_head" in name for name in trained)
    assert any("embed_tokens" in name for name in trained)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.tensor([[3, 55, 60]])
    expected = backbone.model.eval()(ids).logits
    save_backbone(backbone, tmp_path)
    torch.testing.assert_close(load_backbone(tmp_path / "model")(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_lora_on_a_preset_is_refused():
    with pytest.raises(ConfigError, match="no pre-trained weights"):
        build("tiny", lora_rank=4)


def test_unknown_backbone_names_the_presets():
    with pytest.raises(ConfigError, match=f"{', '.join(PRESETS)}"):
        build("no/such/model")


def test_backbones_that_cannot_exist_are_refused_without_asking_a_hub():
    with pytest.raises(ConfigError, match="did you mean '1m'"):
        build("1mm")
    for name in ("/no/such/folder", "models/smollm2", "a/b/c"):
        with pytest.raises(ConfigError, match=r"no such folder.*lasar data import-model"):
            build(name)


def test_a_gguf_file_says_how_it_is_imported(tmp_path):
    (tmp_path / "small.gguf").touch()
    for name in (tmp_path / "small.gguf", tmp_path):
        with pytest.raises(ConfigError, match=rf"import-model {tmp_path}/small\.gguf models/NAME"):
            build(str(name))


def test_a_model_of_a_hub_that_is_not_there_says_what_to_download_and_where_to_put_it(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"HF_HUB_OFFLINE is set.*into models/Qwen3-9B .*--local-dir models/Qwen3-9B"
    ):
        build("Qwen/Qwen3-9B")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("lasar.model.backbone.open_model", Mock(side_effect=NotOpenedError("404 not found")))
    with pytest.raises(ConfigError, match=r"the hub \(404 not found\); download its config.json") as raised:
        build("Qwen/Qwen3-9B")
    assert "sft.backbone=models/Qwen3-9B" in str(raised.value)


def test_files_and_folders_that_are_no_model(tmp_path):
    with pytest.raises(ConfigError, match=r"away.gguf': no such file.*lasar data import-model"):
        build(str(tmp_path / "away.gguf"))
    with pytest.raises(ConfigError, match=r"has no config.json; a model folder is"):
        build(str(tmp_path))


def without_layer(weights, number):
    tensors = load_file(weights)
    kept = {name: tensor for name, tensor in tensors.items() if f".layers.{number}." not in name}
    assert len(kept) < len(tensors)
    save_file(kept, weights, metadata={"format": "pt"})


DAMAGES = {
    "weights": "header",
    "sizes": r"weights and its config.json do not agree: .* is \[.*\] and should be \[.*\]",
    "layers": r"its weights lack model.layers.1",
    "type": "hidden_size.*wide",
    "fewer": "its config.json says 1 layers, and its weights hold model.layers.1",
    "nan": "its weights are damaged: .* holds what is no finite number",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backbone_is_one_line(pretrained, tmp_path, damage, capfd):
    folder = tmp_path / "copy"
    shutil.copytree(pretrained, folder)
    if damage == "weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:300])
    elif damage == "layers":
        without_layer(folder / "model.safetensors", 1)
    elif damage == "nan":
        tensors = load_file(folder / "model.safetensors")
        next(iter(tensors.values()))[0] = torch.nan
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        change = {
            "type": {"hidden_size": "wide"}, "sizes": {"hidden_size": 2 * config["hidden_size"]},
            "fewer": {"num_hidden_layers": 1},
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | change[damage]))
    reason = f"this folder holds no causal LM that loads: .*{DAMAGES[damage]}"
    with pytest.raises(ConfigError, match=reason) as raised:
        build(str(folder))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ArtifactError, match=f"damaged model .*{DAMAGES[damage]}"):
        load_backbone(folder)


def test_damaged_model_is_one_line(tmp_path):
    save_backbone(build("tiny"), tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged model"):
        load_backbone(tmp_path / "model")


def test_missing_model_folder(tmp_path):
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        load_backbone(tmp_path)


def test_a_control_has_the_architecture_and_random_weights(pretrained):
    known = build(str(pretrained)).model
    control, again, other = (build(str(pretrained), pretrained=False, seed=seed).model for seed in (1, 1, 2))
    assert control.config.to_dict() == known.config.to_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    rows = {model: model.state_dict()[name] for model in (known, control, again, other)}
    assert torch.equal(rows[control], rows[again])
    assert not torch.equal(rows[control], rows[other])
    assert not torch.equal(rows[control], rows[known])


def test_presets_have_no_weights_to_leave_out():
    with pytest.raises(ConfigError, match="pretrained=false: preset 'tiny' has no pre-trained weights"):
        build("tiny", pretrained=False)
