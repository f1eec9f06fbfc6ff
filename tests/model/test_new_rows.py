import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lasar.model.backbone import build_backbone, input_table, output_table
from lasar.model.new_rows import only_new_rows, place_codes, title_vectors

WORDS, WIDTH = 50, 32


@pytest.fixture(params=["tied", "untied"])
def backbone(request, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=request.param == "tied",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        input_table(model).mul_(3).add_(0.5)  # words lie elsewhere, and wider, than fresh rows would
    model.save_pretrained(tmp_path / "lm")
    return build(str(tmp_path / "lm"))


def build(name, **changes):
    sizes = {"num_levels": 2, "codebook_size": 8, "orders": False, "max_history": 10, "normalise": "trie"}
    return build_backbone(name, **{**sizes, "dropout": 0.0, "lora_rank": 0, "seed": 0, **changes})


def vectors(width):
    return torch.randn(2, 8, width, generator=torch.Generator().manual_seed(0))


def test_near_codes_start_near_each_other():
    backbone = build("tiny")
    vectors_LCE = vectors(20)
    vectors_LCE[0, 1] = vectors_LCE[0, 0] + 0.01
    markers = input_table(backbone.model)[:6].clone()
    place_codes(backbone.model, backbone.vocabulary, vectors_LCE)
    for table in (input_table(backbone.model), output_table(backbone.model)):
        codes = table[backbone.vocabulary.first_code :].detach()
        assert codes.std().item() == pytest.approx(0.02, rel=1e-3)
        # 20 dimensions fit into 32 channels: distances keep their proportions exactly.
        ours, theirs = torch.pdist(codes), torch.pdist(vectors_LCE.flatten(0, 1))
        torch.testing.assert_close(ours / ours.mean(), theirs / theirs.mean(), atol=1e-4, rtol=1e-3)
    assert torch.equal(input_table(backbone.model)[:6], markers)


@pytest.mark.parametrize("width", [20, WIDTH])
def test_among_words_codes_lie_where_words_lie_and_as_wide(backbone, width):
    words = input_table(backbone.model)[:WORDS].detach().clone()
    place_codes(backbone.model, backbone.vocabulary, vectors(width), among_words=True)
    table = input_table(backbone.model).detach()
    codes = table[backbone.vocabulary.first_code :]
    assert torch.equal(table[:WORDS], words)
    torch.testing.assert_close(codes.mean(0), words.mean(0), atol=1e-5, rtol=1e-5)
    assert (codes - codes.mean(0)).std().item() == pytest.approx(
        (words - words.mean(0)).std().item(), rel=1e-2
    )
    assert torch.equal(output_table(backbone.model)[backbone.vocabulary.first_code :], codes)


def test_vectors_of_the_models_own_space_keep_their_directions(backbone):
    own = vectors(WIDTH)
    place_codes(backbone.model, backbone.vocabulary, own, among_words=True)
    codes = input_table(backbone.model)[backbone.vocabulary.first_code :].detach()
    theirs = own.flatten(0, 1) - own.flatten(0, 1).mean(0)
    assert torch.cosine_similarity(codes - codes.mean(0), theirs).min() > 0.999


def test_a_title_lies_at_the_mean_of_its_tokens(backbone):
    class Letters:
        def encode(self, text):
            return [ord(letter) - ord("a") for letter in text]

    table = input_table(backbone.model).detach()
    found = title_vectors(backbone.model, Letters(), ["ad", "c", ""])
    torch.testing.assert_close(found, torch.stack([(table[0] + table[3]) / 2, table[2], table.mean(0)]))


def test_training_new_rows_leaves_every_other_weight_alone(backbone):
    model = backbone.model
    model.model.norm.weight.requires_grad_(False)  # of the caller's own; stays so
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[1, backbone.vocabulary.first_code, 7]])
    with only_new_rows(model, backbone.vocabulary):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
        for _ in range(3):
            nn.functional.cross_entropy(model(ids).logits[0], ids[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        if value.shape[0] == backbone.vocabulary.size:
            assert torch.equal(value[:WORDS], before[name][:WORDS])
            assert not torch.equal(value[WORDS:], before[name][WORDS:])
        else:
            assert torch.equal(value, before[name]), name
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == [
        "model.norm.weight"
    ]
    model(ids).logits.sum().backward()
    assert input_table(model).grad[:WORDS].any()  # the hooks are gone
