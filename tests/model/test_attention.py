"""Both forms of a mask say the same, and say what reachability says; each model gets the attention it can use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lasar.errors import ConfigError
from lasar.model.attention import causal_mask, choose_attention, growth_mask, set_attention, tree_mask
from lasar.model.tree import Nodes, Tree

SMALL = {
    "vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
LLAMA = LlamaForCausalLM(LlamaConfig(**SMALL))
WIDE = LlamaForCausalLM(LlamaConfig(**(SMALL | {"hidden_size": 512})))


def uses(attention, model=LLAMA):
    model.set_attn_implementation(attention)
    return model


@st.composite
def trees(draw):
    """A tree grown in two calls, and every token's ancestors by walking up its parents."""
    batch = draw(st.integers(1, 3))
    width = draw(st.sampled_from([1, 4, 9, 127, 128, 150]))
    count = draw(st.integers(1, 6))
    lengths = [draw(st.integers(1, width)) for _ in range(batch)]
    calls, parents = [], [{t: t - 1 for t in range(width)} for _ in range(batch)]
    for first in (width, width + count):
        rows = []
        for length, of in zip(lengths, parents, strict=True):
            for q in range(first, first + count):
                of[q] = draw(st.sampled_from([*range(length), *range(width, q)]))
            rows.append([of[q] for q in range(first, first + count)])
        calls.append(torch.tensor(rows))
    reachable = torch.zeros(batch, width + 2 * count, width + 2 * count, dtype=torch.bool)
    for b, of in enumerate(parents):
        for q in range(width + 2 * count):
            node = q
            while node >= 0:
                reachable[b, q, node] = True
                node = of[node]
    return torch.tensor(lengths), width, calls, reachable


def seen_blocks(mask_BQK):
    """Which blocks of 128 x 128 anybody sees anything in, by cutting the mask up."""
    queries, keys = (-(-size // 128) * 128 for size in mask_BQK.shape[1:])
    padded = torch.zeros(len(mask_BQK), queries, keys, dtype=torch.bool)
    padded[:, : mask_BQK.shape[1], : mask_BQK.shape[2]] = mask_BQK
    return padded.unflatten(1, (-1, 128)).unflatten(3, (-1, 128)).any(4).any(2)


def check_block_mask(block_mask, expected_BQK):
    batch, queries, keys = expected_BQK.shape
    assert block_mask.shape == (batch, 1, queries, keys)
    found = create_mask(block_mask.mask_mod, batch, 1, queries, keys, device="cpu")
    assert torch.equal(found[:, 0], expected_BQK)
    assert torch.equal(block_mask.to_dense()[:, 0].bool(), seen_blocks(expected_BQK))


@settings(max_examples=40)
@given(trees())
def test_every_form_of_a_mask_is_reachability(tree):
    lengths, width, calls, reachable = tree
    at_once = Tree(lengths, width).grow(torch.cat(calls, dim=1))
    assert torch.equal(tree_mask(uses("sdpa"), at_once)[:, 0], reachable)
    check_block_mask(tree_mask(uses("flex_attention"), at_once), reachable)
    growing = Tree(lengths, width)
    for parents in calls:
        first = growing.num_keys
        nodes = growing.grow(parents)
        expected = reachable[:, first : growing.num_keys, : growing.num_keys]
        assert torch.equal(growth_mask(uses("sdpa"), nodes)[:, 0], expected)
        check_block_mask(growth_mask(uses("flex_attention"), nodes), expected)


@pytest.mark.parametrize("length", [1, 5, 128, 130, 300])
def test_a_plain_trunk(length):
    ids = torch.zeros(3, length, dtype=torch.int64)
    assert causal_mask(uses("sdpa"), ids) is None
    causal = torch.ones(3, length, length, dtype=torch.bool).tril()
    check_block_mask(causal_mask(uses("flex_attention"), ids), causal)


def test_eager_attention_adds_its_mask():
    seen = torch.tensor([[[True, False], [True, True]]])
    nodes = Nodes(index_BQ=seen[..., 0], position_BQ=seen[..., 0], mask_BQK=seen)
    mask = growth_mask(uses("eager"), nodes)
    assert mask.dtype == torch.float32
    assert torch.equal(mask[:, 0] == 0, seen)
    assert (mask[:, 0][~seen] == torch.finfo(torch.float32).min).all()
    assert causal_mask(uses("eager"), seen[..., 0]) is None


def test_an_attention_without_masks_is_refused():
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM uses attention 'flash_attention_2'.*sdpa"):
        causal_mask(model, torch.zeros(1, 2, dtype=torch.int64))


def test_flex_attention_is_for_wide_models_on_cuda():
    assert choose_attention("cpu", 1024) == "lasar_short"
    assert choose_attention(torch.device("cuda", 1), 1024) == "flex_attention"
    assert choose_attention("cuda", 256) == "sdpa"


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, attn_pdrop=0.0))


@pytest.mark.parametrize(
    ("model", "device", "before", "after"),
    [
        (WIDE, "cuda", "sdpa", "flex_attention"),
        (WIDE, "cuda", "eager", "flex_attention"),
        (LLAMA, "cuda", "sdpa", "sdpa"),
        (LLAMA, "cuda", "flex_attention", "sdpa"),
        (LLAMA, "cpu", "flex_attention", "lasar_short"),
        (LLAMA, "cpu", "sdpa", "lasar_short"),
        (LLAMA, "cuda", "lasar_short", "sdpa"),
        (LLAMA, "cpu", "eager", "eager"),
        (gpt2(), "cuda", "sdpa", "sdpa"),  # transformers has no FlexAttention for it
        (
            LlamaForCausalLM(LlamaConfig(**(SMALL | {"hidden_size": 512}), attention_dropout=0.1)),
            "cuda",
            "sdpa",
            "sdpa",
        ),
    ],
)
def test_a_model_gets_the_attention_it_can_use(model, device, before, after):
    set_attention(uses(before, model), device)
    assert model.config._attn_implementation == after


def test_torch_may_compile_every_variant():
    with torch._dynamo.config.patch(recompile_limit=8):
        set_attention(uses("sdpa"), "cpu")
        assert torch._dynamo.config.recompile_limit == 8
        set_attention(uses("sdpa", WIDE), "cuda")
        assert torch._dynamo.config.recompile_limit == 64
