"""The cached, batched, mixed-depth latent loop against recomputing one sequence at a time from scratch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from lasar.model.backbone import build_preset, output_table, trunk
from lasar.model.latent import PolicyHead, finish_reasoning, reason, start_reasoning
from lasar.model.prompt import encode_prompts
from lasar.prompts.vocabulary import Vocabulary, pad_right

VOCABULARY = Vocabulary(num_levels=2, codebook_size=6)
SMALL = {
    "vocab_size": VOCABULARY.size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def models():
    torch.manual_seed(0)
    return {
        "preset": build_preset("tiny", vocabulary=VOCABULARY, seed=1).eval(),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval(),
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL)).eval(),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)).eval(),  # scales its embeddings
    }


MODELS = models()


def embedded(model):
    return model.get_input_embeddings()(torch.arange(VOCABULARY.size))


def fed_back(model, hidden, feedback):
    embeddings = embedded(model)
    if feedback == "norm_matched":
        return hidden / hidden.norm() * embeddings.norm(dim=-1).mean()
    if feedback == "soft_token":
        return (output_table(model) @ hidden).softmax(0) @ embeddings
    return hidden


def one_by_one(model, tokens, depth, answer, feedback):
    """Full recompute: the whole sequence again for every latent step; no cache, no batch, no mask."""
    embeddings = embedded(model)
    sequence = [embeddings[t] for t in [*tokens, VOCABULARY.latent_start]]
    states = []
    for _ in range(depth + 1):
        hidden = trunk(model)(inputs_embeds=torch.stack(sequence)[None], use_cache=False).last_hidden_state[
            0, -1
        ]
        states.append(hidden)
        sequence.append(fed_back(model, hidden, feedback))
    sequence = sequence[:-1] + [embeddings[t] for t in [VOCABULARY.latent_end, *answer]]
    hidden = trunk(model)(inputs_embeds=torch.stack(sequence)[None], use_cache=False).last_hidden_state[0]
    return torch.stack(states), hidden[-1 - len(answer) :]


def in_one_batch(model, prompts, cuts, depths, answers, feedback):
    ids, lengths = pad_right([np.array(p, np.int32) for p in prompts], VOCABULARY.pad)
    prefix = encode_prompts(model, torch.tensor(ids), torch.tensor(lengths))
    h0, start = start_reasoning(prefix, torch.tensor(cuts), vocabulary=VOCABULARY)
    depths = torch.tensor(depths)
    latents = reason(prefix, h0, start, num_steps=int(depths.max()), feedback=feedback)
    end_hidden, end = finish_reasoning(prefix, latents.tips_BP(depths), vocabulary=VOCABULARY)
    answer_hidden, _ = prefix.grow(end, input_ids=torch.tensor(answers))
    return latents, torch.stack([end_hidden, answer_hidden], dim=2)


@st.composite
def cases(draw):
    batch, branches = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    token = st.integers(1, VOCABULARY.size - 1)
    prompts = [draw(st.lists(token, min_size=1, max_size=7)) for _ in range(batch)]
    cuts = [[draw(st.integers(0, len(p) - 1)) for _ in range(branches)] for p in prompts]
    depths = [[draw(st.integers(0, 4)) for _ in range(branches)] for _ in prompts]
    answers = [[draw(token) for _ in range(branches)] for _ in prompts]
    return prompts, cuts, depths, answers


@pytest.mark.parametrize("feedback", ["raw", "norm_matched", "soft_token"])
@pytest.mark.parametrize("name", list(MODELS))
@settings(max_examples=8)
@given(case=cases())
def test_mixed_depths_in_one_batch_equal_one_by_one(name, feedback, case):
    model = MODELS[name]
    prompts, cuts, depths, answers = case
    with torch.no_grad():
        latents, hidden = in_one_batch(model, prompts, cuts, depths, answers, feedback)
        for b, prompt in enumerate(prompts):
            for p, cut in enumerate(cuts[b]):
                depth = depths[b][p]
                states, last = one_by_one(model, prompt[: cut + 1], depth, [answers[b][p]], feedback)
                torch.testing.assert_close(
                    latents.hidden_BPND[b, p, : depth + 1], states, atol=1e-5, rtol=1e-5
                )
                torch.testing.assert_close(hidden[b, p], last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_flow_through_the_whole_chain(name):
    model = MODELS[name]
    prompts, cuts, depths, answers = (
        [[1, 7, 13], [1, 8]],
        [[0, 2], [1, 1]],
        [[3, 1], [0, 2]],
        [[7, 8], [9, 10]],
    )
    weights = torch.randn(2, 2, 2, 32, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    _, hidden = in_one_batch(model, prompts, cuts, depths, answers, "raw")
    (hidden * weights).sum().backward()
    batched = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for b, prompt in enumerate(prompts):
        for p, cut in enumerate(cuts[b]):
            _, last = one_by_one(model, prompt[: cut + 1], depths[b][p], [answers[b][p]], "raw")
            (last * weights[b, p]).sum().backward()
    for n, p in model.named_parameters():
        if p.grad is not None:
            scale = p.grad.abs().max()
            torch.testing.assert_close(batched[n] / scale, p.grad / scale, atol=1e-4, rtol=1e-4)
    slot = VOCABULARY.latent_slot
    assert (batched[next(iter(batched))][slot] == 0).all()  # the slot's own embedding is never read


def test_deeper_branches_do_not_disturb_shallow_ones():
    model = MODELS["preset"]
    alone = in_one_batch(model, [[1, 7]], [[1]], [[1]], [[8]], "raw")[1]
    beside = in_one_batch(model, [[1, 7]], [[1, 1]], [[1, 4]], [[8, 9]], "raw")[1]
    torch.testing.assert_close(alone[0, 0], beside[0, 0], atol=1e-5, rtol=1e-5)


def test_norm_matched_feedback_has_the_norm_of_embeddings():
    model = MODELS["preset"]
    latents, _ = in_one_batch(model, [[1, 7]], [[1]], [[3]], [[8]], "norm_matched")
    assert latents.norm_ratio == pytest.approx(1.0, abs=1e-5)
    assert in_one_batch(model, [[1, 7]], [[1]], [[0]], [[8]], "raw")[0].norm_ratio == 0.0


def test_policy_head_is_its_formula():
    torch.manual_seed(0)
    head = PolicyHead(8, max_depth=5, width=16)
    h0 = torch.randn(2, 3, 8)
    expected = torch.tanh(h0 @ head.inner.weight.T + head.inner.bias) @ head.outer.weight.T + head.outer.bias
    torch.testing.assert_close(head(h0), expected)
    assert head(h0).shape == (2, 3, 5)
