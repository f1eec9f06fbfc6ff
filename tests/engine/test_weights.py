"""What the fused path knows, and that it notices when weights change."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lasar.decoding.ranker import Ranker
from lasar.engine.weights import FusedWeights, why_unknown
from lasar.model.backbone import build_preset
from lasar.model.reasoner import without_reasoning
from lasar.prompts.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_levels=2, codebook_size=4)
CODES = np.array([[a, b] for a in range(4) for b in range(3)], np.int32)
HISTORY = [np.array([1, 5, 2], np.int32)]
SIZES = {
    "vocab_size": VOCABULARY.size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def preset():
    return build_preset("tiny", vocabulary=VOCABULARY, seed=0).eval().requires_grad_(False)


def replaced(path: str, module: nn.Module):
    model = preset()
    model.set_submodule(path, module)
    return model


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


UNKNOWN = {
    r"architecture 'gpt2' \(GPT2LMHeadModel\)": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY.size, n_embd=16, n_layer=1, n_head=2)
    ),
    "architecture 'mistral'": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "activation 'gelu'": lambda: LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **SIZES)),
    "rotary embedding of type 'dynamic'": lambda: LlamaForCausalLM(
        LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, **SIZES)
    ),
    "sliding window": lambda: Qwen2ForCausalLM(
        Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, **SIZES)
    ),
    "o_proj of layer 0 has a bias": lambda: LlamaForCausalLM(LlamaConfig(attention_bias=True, **SIZES)),
    "gate_proj of layer 0 has a bias": lambda: LlamaForCausalLM(LlamaConfig(mlp_bias=True, **SIZES)),
    "down_proj of layer 1 is a Doubled": lambda: replaced(
        "model.layers.1.mlp.down_proj", Doubled(64, 32, bias=False)
    ),
    "float64 on cpu": lambda: preset().double(),
}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_an_unknown_model_says_why_and_is_ranked_all_the_same(reason):
    model = UNKNOWN[reason]().eval()
    ranker = Ranker(without_reasoning(model, vocabulary=VOCABULARY), codes_IL=CODES)
    with pytest.raises(AssertionError, match=reason):
        assert not ranker.engine, ranker.engine
    assert ranker.engine.startswith("generic: ")
    items_QK, _, _ = ranker.rank(HISTORY, HISTORY, k=5, beam_width=12)
    assert (items_QK >= 0).all()


def test_training_mode_and_autocast_take_the_generic_path():
    model = preset()
    assert why_unknown(model) is None
    assert why_unknown(model.train()) == "the model is in training mode"
    with torch.autocast("cpu", torch.bfloat16):
        assert why_unknown(model.eval()) == "autocast is on"


@pytest.mark.parametrize("how", ["in place", "other storage"])
def test_weights_that_have_changed_are_noticed(how):
    model = preset()
    rankers = [
        Ranker(without_reasoning(model, vocabulary=VOCABULARY), codes_IL=CODES, fused=fused)
        for fused in (True, False)
    ]
    before, _ = (ranker.rank(HISTORY, HISTORY, k=5, beam_width=12) for ranker in rankers)
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        if how == "in place":
            weight.mul_(5.0)
        else:
            weight.data = weight * 5.0
        model.model.norm.weight.mul_(3.0)
    after, expected = (ranker.rank(HISTORY, HISTORY, k=5, beam_width=12) for ranker in rankers)
    np.testing.assert_allclose(after.scores_QK, expected.scores_QK, atol=1e-5)
    assert np.abs(after.scores_QK - before.scores_QK).max() > 1e-3


def test_a_model_in_training_is_ranked_as_it_is_after_every_step():
    model = preset()
    ranker = Ranker(without_reasoning(model, vocabulary=VOCABULARY), codes_IL=CODES)
    frozen = ranker.rank(HISTORY, HISTORY, k=5, beam_width=12)
    model.requires_grad_(True)
    # Its fused kernel leaves a tensor's version as it is.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.tensor([[1, 6, 7]])).logits.square().sum().backward()
    optimizer.step()
    assert ranker.engine == "generic: its weights can be trained; freeze them with requires_grad_(False)"
    trained = ranker.rank(HISTORY, HISTORY, k=5, beam_width=12)
    assert np.abs(trained.scores_QK - frozen.scores_QK).max() > 1e-3
    model.requires_grad_(False)
    assert ranker.engine == "fused"
    again = ranker.rank(HISTORY, HISTORY, k=5, beam_width=12)
    np.testing.assert_allclose(again.scores_QK, trained.scores_QK, atol=1e-5)


def test_weights_are_arranged_once_while_nothing_changes():
    model = preset()
    weights = FusedWeights(model)
    assert weights.fresh
    model(torch.tensor([[1, 2, 3]]))
    assert weights.fresh


@torch.no_grad()
def test_what_a_token_contributes_to_the_first_layer_is_looked_up():
    model = preset()
    layer = model.model.layers[0]
    torch.nn.init.normal_(layer.input_layernorm.weight)
    ids = torch.tensor([3, 7])
    _, mixed = FusedWeights(model).embed(ids)
    normed = layer.input_layernorm(model.model.embed_tokens(ids))
    attention = layer.self_attn
    expected = torch.cat([p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=-1)
    torch.testing.assert_close(mixed, expected)
