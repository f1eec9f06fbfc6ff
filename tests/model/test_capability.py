"""Models that pass the probe compute trees rightly; the others are refused by name, with the reason."""

import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lasar.errors import ConfigError
from lasar.model import capability
from lasar.model.backbone import build_preset, head_bias, trunk
from lasar.model.capability import check_tree_attention
from lasar.model.head import part_logits
from lasar.model.prompt import encode_prompts
from lasar.prompts.vocabulary import Vocabulary

VOCAB = 64
LAYERS = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {**LAYERS, "intermediate_size": 48, "pad_token_id": 0}
GROUPED = {**MLP, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 64}
N_EMBD = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}

CAN = {
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 64},
    "gemma2": {**GEMMA, "final_logit_softcapping": 0.5},  # eager attention only
    "phi": GROUPED,  # a head with a bias
    "granite": {**GROUPED, "logits_scaling": 8.0},
    "cohere": GROUPED,  # scales its logits by 1/16
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},  # five sliding layers to one full
    "smollm3": {**GROUPED, "num_hidden_layers": 4},  # the fourth without positions
    "phi3": GROUPED,
    "gpt2": N_EMBD,
    "gpt_neox": MLP,
    "opt": {**LAYERS, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {**LAYERS, "alibi": False},
    "mixtral": {**GROUPED, "num_local_experts": 4},
}
CANNOT = {
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, r"BloomForCausalLM.*ALiBi"),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4}, "ignores position ids.*ALiBi"),
    "alibi": ("falcon", {**LAYERS, "alibi": True}, r"'falcon' \(FalconForCausalLM\).*takes no 4-D attention mask"),
    "mamba": ("mamba", {**LAYERS, "state_size": 8}, "takes no 4-D attention mask.*without attention"),
    "rwkv": ("rwkv", {**LAYERS, "attention_hidden_size": 32}, "sees what a 4-D mask hides"),
    "lfm2": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "sees what a 4-D mask hides"),
    "head": ("bert", {**MLP, "is_decoder": True}, "its logits are not those of a head on the states"),
    "encoder": ("bert", MLP, "'bert'.*depends on the tokens after it"),
    "roberta": ("roberta", {**MLP, "is_decoder": True}, "does not count positions from 0"),
    "window": ("mistral", {**GROUPED, "sliding_window": 23}, r"sliding_window is 23.*up to 24 tokens.*max_history"),
    "gemma": ("gemma3_text", {**GEMMA, "sliding_window": 16, "num_hidden_layers": 7}, "sliding_window is 16"),
    "short": ("gpt2", {**N_EMBD, "n_positions": 20}, "max_position_embeddings is 20"),
}  # fmt: skip


def build(kind, sizes, *, sharp=False):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    if sharp:  # fresh weights attend almost uniformly; larger ones make a wrong mask or position visible
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0)
            if (bias_V := head_bias(model)) is not None:
                bias_V += torch.linspace(-1, 1, len(bias_V))
    return model


def tokens(rng, *shape):
    return torch.randint(1, VOCAB, shape, generator=rng)


def last_state(model, ids):
    return trunk(model)(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]


@pytest.mark.parametrize("kind", CAN)
@torch.no_grad()
def test_what_passes_computes_every_token_as_in_its_own_sequence(kind):
    model = build(kind, CAN[kind], sharp=True)
    check_tree_attention(model, max_tokens=64)
    rng = torch.Generator().manual_seed(1)
    lengths, width = [9, 4], 9
    ids = tokens(rng, 2, width)
    prefix = encode_prompts(model, ids, torch.tensor(lengths))
    paths = [[row[: t + 1].tolist() for t in range(width)] for row in ids]
    for step in range(4):
        count = 5
        options = [*range(4), *range(width, width + count * step)]
        parents = torch.tensor(
            [[options[int(torch.randint(len(options), (), generator=rng))] for _ in range(count)]] * 2
        )
        new = tokens(rng, 2, count)
        hidden, _ = prefix.grow(parents, input_ids=new)
        for b in range(2):
            for q in range(count):
                paths[b].append([*paths[b][parents[b, q]], int(new[b, q])])
                expected = last_state(model, paths[b][-1])
                torch.testing.assert_close(
                    hidden[b, q], expected, atol=1e-5 * max(1, expected.abs().max().item()), rtol=1e-5
                )


@pytest.mark.parametrize("kind", CAN)
@torch.no_grad()
def test_logits_over_a_part_are_the_models_own(kind):
    model = build(kind, CAN[kind], sharp=True)
    ids = tokens(torch.Generator().manual_seed(2), 2, 6)
    hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(part_logits(model, hidden, 9, 21), model(input_ids=ids).logits[..., 9:21])


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning"
)  # transformers' own, of old architectures
@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_is_refused_with_the_reason(case):
    kind, sizes, reason = CANNOT[case]
    with pytest.raises(ConfigError, match=reason):
        check_tree_attention(build(kind, sizes), max_tokens=24)


def test_a_window_as_long_as_the_longest_path_is_enough():
    check_tree_attention(build("mistral", {**GROUPED, "sliding_window": 24}), max_tokens=24)


@torch.no_grad()
def test_a_tree_may_have_more_keys_than_the_window_is_long():
    model = build("mistral", {**GROUPED, "sliding_window": 8}, sharp=True)
    check_tree_attention(model, max_tokens=8)
    ids = tokens(torch.Generator().manual_seed(0), 1, 5)
    prefix = encode_prompts(model, ids, torch.tensor([5]))
    for _ in range(3):
        hidden, _ = prefix.grow(torch.tensor([[4, 4, 4, 4]]), input_ids=torch.tensor([[7, 8, 9, 10]]))
    expected = last_state(model, [*ids[0].tolist(), 10])
    torch.testing.assert_close(hidden[0, 3], expected, atol=1e-5, rtol=1e-5)


def test_an_attention_without_masks_is_refused():
    model = build("llama", GROUPED)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ConfigError, match="flash_attention_2"):
        check_tree_attention(model, max_tokens=24)


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_no_trace(training):
    model = build_preset("tiny", vocabulary=Vocabulary(num_levels=2, codebook_size=6), seed=0, dropout=0.5)
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_tree_attention(model, max_tokens=64)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_cache_that_miscounts_is_noticed(monkeypatch):
    true = capability.encode_prompts

    def one_token_short(model, ids, lengths):
        prefix = true(model, ids, lengths)
        prefix.cache.crop(ids.shape[1] - 1)
        return prefix

    monkeypatch.setattr(capability, "encode_prompts", one_token_short)
    with pytest.raises(ConfigError, match="key-value cache"):
        check_tree_attention(build("llama", GROUPED), max_tokens=24)
