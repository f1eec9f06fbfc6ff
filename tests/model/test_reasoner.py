"""Thinking as one call: forced, chosen, drawn and no depth; what is saved is what is loaded."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from lasar.errors import ArtifactError, ConfigError
from lasar.model.backbone import Backbone, build_preset, input_table, save_backbone, trunk
from lasar.model.prompt import encode_branched, encode_prompts
from lasar.model.reasoner import (
    LatentReasoner,
    ReasoningSettings,
    load_reasoner,
    place_markers,
    save_reasoner,
    without_reasoning,
)
from lasar.prompts.vocabulary import Vocabulary, pad_right

VOCABULARY = Vocabulary(num_levels=2, codebook_size=6)
PROMPTS = [[1, 6, 12, 7, 13], [1], [1, 8, 14]]
N_MAX = 4


def reasoner(**settings):
    """A tiny model whose Policy Head wants another depth for every prompt."""
    torch.manual_seed(0)
    model = build_preset("tiny", vocabulary=VOCABULARY, seed=1).eval()
    made = LatentReasoner(
        model,
        vocabulary=VOCABULARY,
        settings=ReasoningSettings(max_depth=N_MAX, head_width=16, **settings),
    )
    with torch.no_grad():
        h0_BD = made.eval().think(prompts(made), depth=1).latents.hidden_BPND[:, 0, 0]
        inner, outer = made.policy_head.inner, made.policy_head.outer
        inner.weight.mul_(50)
        inner.bias.copy_(-inner.weight @ h0_BD.mean(0))
        outer.weight.mul_(5)
    return made


def prompts(model, rows=PROMPTS):
    ids, lengths = pad_right([np.array(row, np.int32) for row in rows], VOCABULARY.pad)
    return encode_prompts(model.backbone, torch.tensor(ids), torch.tensor(lengths))


MODEL = reasoner()


def recomputed(model, row, depth):
    """Hidden state at `<e>` of one prompt, the whole sequence again for every step."""
    table = input_table(model.backbone)
    sequence = [table[token] for token in [*row, VOCABULARY.latent_start]]
    for _ in range(depth):
        sequence.append(last_state(model, sequence))
    closed = VOCABULARY.latent_end if model.settings.closing == "marker" else row[-1]
    return last_state(model, [*sequence, table[closed]])


def last_state(model, sequence):
    return trunk(model.backbone)(inputs_embeds=torch.stack(sequence)[None]).last_hidden_state[0, -1]


@torch.no_grad()
def think(model, rows=PROMPTS, **options):
    return model.think(prompts(model, rows), **options)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 3, N_MAX])
def test_a_forced_depth_is_taken_by_every_prompt(depth):
    thought = think(MODEL, depth=depth)
    assert thought.depths_B.tolist() == [depth] * 3
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(
            thought.prefix.hidden_B1D[row, 0], recomputed(MODEL, prompt, depth), atol=1e-5, rtol=1e-5
        )


@torch.no_grad()
def test_reasoning_may_be_closed_by_the_token_it_left_from():
    model = reasoner(closing="opening")
    for depth in (1, 3):
        thought = think(model, depth=depth)
        for row, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(
                thought.prefix.hidden_B1D[row, 0], recomputed(model, prompt, depth), atol=1e-5, rtol=1e-5
            )


@torch.no_grad()
def test_no_depth_is_the_plain_language_model():
    before = prompts(MODEL)
    tip, hidden, keys = before.tip_B1.clone(), before.hidden_B1D.clone(), before.tree.num_keys
    thought = MODEL.think(before, depth=0)
    assert thought.prefix.tree.num_keys == keys
    assert torch.equal(thought.prefix.tip_B1, tip)
    assert torch.equal(thought.prefix.hidden_B1D, hidden)
    assert thought.depths_B.tolist() == [0, 0, 0]
    assert thought.latents is None
    assert thought.distribution_BN is None


@torch.no_grad()
def test_auto_takes_the_most_probable_depth_of_each_prompt():
    thought = think(MODEL)
    table = input_table(MODEL.backbone)
    for row, prompt in enumerate(PROMPTS):
        h0 = last_state(MODEL, [table[t] for t in [*prompt, VOCABULARY.latent_start]])
        head = MODEL.policy_head
        logits = head.outer.weight @ torch.tanh(head.inner.weight @ h0 + head.inner.bias) + head.outer.bias
        torch.testing.assert_close(thought.distribution_BN[row], logits.softmax(0), atol=1e-4, rtol=1e-3)
        depth = int(logits.argmax()) + 1
        assert thought.depths_B[row] == depth
        torch.testing.assert_close(
            thought.prefix.hidden_B1D[row, 0], recomputed(MODEL, prompt, depth), atol=1e-5, rtol=1e-5
        )
    assert len(set(thought.depths_B.tolist())) > 1, "otherwise this shows nothing"


def test_auto_is_the_depth_it_was_trained_at():
    assert think(reasoner(fixed_depth=2)).depths_B.tolist() == [2, 2, 2]
    assert think(reasoner(fixed_depth=0)).depths_B.tolist() == [0, 0, 0]
    assert think(reasoner(fixed_depth=2), depth=3).depths_B.tolist() == [3, 3, 3]


def test_sampled_depths_follow_the_distribution():
    model = reasoner()
    with torch.no_grad():
        model.policy_head.outer.weight.zero_()
        model.policy_head.outer.bias.copy_(torch.tensor([0.1, 0.4, 0.2, 0.3]).log())
    uniforms = (torch.arange(100) + 0.5) / 100
    thought = think(model, [[1, 6]] * 100, depth="sampled", uniform_B=uniforms)
    assert thought.depths_B.bincount(minlength=5).tolist() == [0, 10, 40, 20, 30]
    ends = think(model, [[1]] * 2, depth="sampled", uniform_B=torch.tensor([0.0, 1 - 2**-25]))
    assert ends.depths_B.tolist() == [1, N_MAX]


@pytest.mark.parametrize("depth", [-1, N_MAX + 1])
def test_a_depth_it_was_not_trained_for_is_refused(depth):
    with pytest.raises(ConfigError, match=f"depth={depth}: .* 0 to {N_MAX} latent steps"):
        think(MODEL, depth=depth)


def test_a_plain_language_model_never_reasons():
    plain = without_reasoning(MODEL.backbone, vocabulary=VOCABULARY)
    assert plain.policy_head is None
    assert think(plain).depths_B.tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="depth=1"):
        think(plain, depth=1)


@pytest.mark.parametrize(
    "model", [without_reasoning(MODEL.backbone, vocabulary=VOCABULARY), reasoner(fixed_depth=2)]
)
def test_depths_are_not_drawn_from_a_head_that_nothing_trained(model):
    with pytest.raises(ConfigError, match="depth='sampled': this model always reasons for"):
        think(model, depth="sampled", uniform_B=torch.zeros(3))


@pytest.mark.parametrize("fixed", [None, 3])
def test_what_is_saved_is_what_is_loaded(tmp_path, fixed):
    model = reasoner(feedback="norm_matched", fixed_depth=fixed)
    save_reasoner(model, tmp_path)
    loaded = load_reasoner(tmp_path)
    assert loaded.settings == model.settings
    assert loaded.vocabulary == VOCABULARY
    assert not loaded.training
    ours, theirs = think(model), think(loaded)
    assert torch.equal(ours.depths_B, theirs.depths_B)
    assert torch.equal(ours.prefix.hidden_B1D, theirs.prefix.hidden_B1D)


def test_a_stage_1_model_loads_as_one_that_never_reasons(tmp_path):
    save_backbone(Backbone(model=MODEL.backbone, vocabulary=VOCABULARY), tmp_path)
    loaded = load_reasoner(tmp_path)
    assert think(loaded).depths_B.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "content", ["null", "{}", '{"foo": 1}', "[1]", {"max_depth": "x"}, {"feedback": "loud"}, {"foo": 1}]
)
def test_damaged_settings_are_named(tmp_path, content):
    save_reasoner(MODEL, tmp_path)
    path = tmp_path / "reasoning.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    with pytest.raises(ArtifactError, match=r"reasoning\.json: damaged .* run the training stage again"):
        load_reasoner(tmp_path)


def test_a_damaged_head_is_named(tmp_path):
    save_reasoner(MODEL, tmp_path)
    settings = json.loads((tmp_path / "reasoning.json").read_text())
    (tmp_path / "reasoning.json").write_text(json.dumps({**settings, "max_depth": 7}))
    with pytest.raises(
        ArtifactError, match=r"policy_head\.safetensors: damaged .* run the training stage again"
    ):
        load_reasoner(tmp_path)
    (tmp_path / "reasoning.json").write_text(json.dumps(settings))
    (tmp_path / "policy_head.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"policy_head\.safetensors: damaged"):
        load_reasoner(tmp_path)
    (tmp_path / "policy_head.safetensors").unlink()
    with pytest.raises(ArtifactError, match="policy_head"):
        load_reasoner(tmp_path)


@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.parametrize("how", ["opening", "mean"])
def test_markers_start_where_they_are_told(orders, how):
    vocabulary = Vocabulary(num_levels=2, codebook_size=6, orders=orders)
    model = build_preset("tiny", vocabulary=vocabulary, seed=1)
    before = input_table(model).detach().clone()
    place_markers(model, vocabulary, how=how)
    after = input_table(model).detach()
    markers = [vocabulary.latent_start, vocabulary.latent_slot, vocabulary.latent_end]
    others = [token for token in range(vocabulary.size) if token not in markers]
    expected = before.mean(0)
    if how == "opening":
        expected = before[vocabulary.order] if orders else before[-6:].mean(0)
    torch.testing.assert_close(after[markers], expected.expand(3, -1))
    assert torch.equal(after[others], before[others])


@torch.no_grad()
def test_prompts_and_first_branches_in_one_call_are_what_they_are_apart():
    ids, lengths = pad_right([np.array(row, np.int32) for row in PROMPTS], VOCABULARY.pad)
    ids, lengths = torch.tensor(ids), torch.tensor(lengths)
    parents, tokens = torch.tensor([[4, 1, 5], [0, 0, 6], [2, 0, 5]]), torch.tensor([[9, 3, 10]] * 3)
    prefix, prompt_states, branch_states, nodes = encode_branched(
        MODEL.backbone, ids, lengths, parents_BQ=parents, branch_ids_BQ=tokens
    )
    apart = encode_prompts(MODEL.backbone, ids, lengths)
    torch.testing.assert_close(prefix.hidden_B1D, apart.hidden_B1D, atol=1e-5, rtol=1e-5)
    assert torch.equal(prefix.tip_B1, apart.tip_B1)
    after, _ = prefix.grow(nodes.index_BQ, input_ids=tokens)  # the cache continues
    table = input_table(MODEL.backbone)
    for row, prompt in enumerate(PROMPTS):
        for place in range(len(prompt)):
            expected = last_state(MODEL, [table[t] for t in prompt[: place + 1]])
            torch.testing.assert_close(prompt_states[row, place], expected, atol=1e-5, rtol=1e-5)
        for q, parent in enumerate(parents[row].tolist()):
            # A parent of 5 or more is a branch token of this same call, itself a child of a prompt's token.
            if parent < 5:
                path = [*prompt[: parent + 1], int(tokens[row, q])]
            else:
                above = parent - 5
                path = [*prompt[: parents[row, above] + 1], int(tokens[row, above]), int(tokens[row, q])]
            expected = last_state(MODEL, [table[t] for t in path])
            torch.testing.assert_close(branch_states[row, q], expected, atol=1e-5, rtol=1e-5)
            expected = last_state(MODEL, [table[t] for t in [*path, int(tokens[row, q])]])
            torch.testing.assert_close(after[row, q], expected, atol=1e-5, rtol=1e-5)


def test_step_embeddings_start_at_nothing_and_survive_a_round_trip(tmp_path):
    settings = dataclasses.replace(MODEL.settings, step_embeddings=True)
    stepped = LatentReasoner(MODEL.backbone, vocabulary=VOCABULARY, settings=settings).eval()
    stepped.policy_head.load_state_dict(MODEL.policy_head.state_dict())
    plain = think(MODEL, depth=3).prefix.hidden_B1D
    torch.testing.assert_close(think(stepped, depth=3).prefix.hidden_B1D, plain, atol=0, rtol=0)
    with torch.no_grad():
        stepped.step_table_ND[1] += 1.0  # the second slot's
    two, three = (think(stepped, depth=depth).latents.hidden_BPND for depth in (1, 2))
    torch.testing.assert_close(two, think(MODEL, depth=1).latents.hidden_BPND, atol=1e-6, rtol=0)
    assert not torch.allclose(three[:, :, 2], think(MODEL, depth=2).latents.hidden_BPND[:, :, 2], atol=1e-3)
    save_reasoner(stepped, tmp_path)
    torch.testing.assert_close(load_reasoner(tmp_path).step_table_ND, stepped.step_table_ND)
    (tmp_path / "step_embeddings.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"step_embeddings\.safetensors: damaged"):
        load_reasoner(tmp_path)


def test_an_expected_embedding_needs_a_vocabulary_that_is_predicted():
    vocabulary = Vocabulary(num_levels=2, codebook_size=4, num_items=3)
    backbone = build_preset("tiny", vocabulary=vocabulary, seed=0)
    settings = ReasoningSettings(max_depth=2, feedback="soft_token", head_width=8)
    with pytest.raises(ConfigError, match="item_tokens=false"):
        LatentReasoner(backbone, vocabulary=vocabulary, settings=settings)
