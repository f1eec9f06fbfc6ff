"""Rollouts and their log-probabilities against plain arithmetic: one sequence at a time, no tree, no cache.

The slow side repeats the prompt for every rollout, recomputes the whole sequence for every latent step, and normalises
codes by the definition.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasar.cot.rows import TrainingRow
from lasar.decoding.ranker import Ranker
from lasar.model.backbone import build_preset, input_table, output_table, trunk
from lasar.model.reasoner import LatentReasoner, ReasoningSettings, without_reasoning
from lasar.prompts.vocabulary import Vocabulary
from lasar.rl.advantages import group_advantages
from lasar.rl.objective import Counts, Judged, Objective
from lasar.rl.prompts import PromptSource
from lasar.rl.rollouts import Rollouts, assert_fresh, roll_out
from lasar.rl.scoring import first_code_entropy, score

LEVELS, CODES, N_MAX = 3, 4, 4
ITEMS = np.array(list(itertools.product(range(CODES), repeat=LEVELS)), np.int32)[::3][:18]
VOCABULARY = Vocabulary(num_levels=LEVELS, codebook_size=CODES, orders=True, max_history=4)
TOKENS = torch.from_numpy(VOCABULARY.item_tokens(ITEMS)).long()


def make_reasoner(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    backbone = build_preset("tiny", vocabulary=VOCABULARY, seed=1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
    settings = ReasoningSettings(max_depth=N_MAX, head_width=16, **settings)
    return LatentReasoner(backbone, vocabulary=VOCABULARY, settings=settings).to(dtype).eval()


REASONER = make_reasoner()
RANKER = Ranker(REASONER, codes_IL=ITEMS)


def make_source(num_rows=12, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_rows):
        baskets = np.sort(rng.integers(0, 3, user % 7 + 1)).astype(np.int32)
        items, targets = rng.integers(0, 18, len(baskets)), rng.choice(18, user % 3 + 1, replace=False)
        rows.append(TrainingRow(user, 3, items.astype(np.int32), baskets, targets.astype(np.int32)))
    return PromptSource(
        rows, VOCABULARY.item_tokens(ITEMS), vocabulary=VOCABULARY,
        steps=lambda user, basket: np.arange(user % 3, dtype=np.int32), seed=seed,
    )  # fmt: skip


def rolled(ranker=RANKER, *, how="beam", group_size=5, seed=0, version=0, exclude_seen=False, count=6):
    source = make_source()
    (prompts,) = source.render(source.draw(0, count), batch_size=count)
    return roll_out(
        ranker, prompts, version=version, group_size=group_size, beam_width=18, how=how,
        exclude_seen=exclude_seen, seed=(seed,),
    )  # fmt: skip


def one_sequence(reasoner, prompt, depth, item):
    """Log-probability of every code of one item."""
    model, table = reasoner.backbone, input_table(reasoner.backbone)
    embedded = table[prompt]
    if depth:
        embedded = torch.cat([embedded, table[[VOCABULARY.latent_start]]])
        for _ in range(depth):
            hidden = trunk(model)(inputs_embeds=embedded[None], use_cache=False).last_hidden_state
            embedded = torch.cat([embedded, hidden[0, -1:]])
        closed = VOCABULARY.latent_end if reasoner.settings.closing == "marker" else int(prompt[-1])
        embedded = torch.cat([embedded, table[[closed]]])
    codes = ITEMS[item].tolist()
    embedded = torch.cat([embedded, table[TOKENS[item, :-1]]])
    hidden = trunk(model)(inputs_embeds=embedded[None], use_cache=False).last_hidden_state[0, -LEVELS:]
    found = []
    for level in range(LEVELS):
        siblings = sorted({row[level] for row in ITEMS.tolist() if row[:level] == codes[:level]})
        tokens = [VOCABULARY.level_start(level) + code for code in siblings]
        logits = hidden[level] @ output_table(model)[tokens].T
        found.append(logits.log_softmax(-1)[siblings.index(codes[level])])
    return torch.stack(found)


def scored(reasoner, rollouts):
    return score(
        reasoner, rollouts.prompts.ids_BT, rollouts.prompts.lengths_B, depths_B=rollouts.depths_B,
        items_BG=rollouts.items_BG, tokens_IL=TOKENS, trie=RANKER.trie,
    )  # fmt: skip


def one_by_one(reasoner, rollouts):
    prompts = rollouts.prompts
    return torch.stack(
        [
            torch.stack(
                [
                    one_sequence(
                        reasoner, prompts.ids_BT[b, : prompts.lengths_B[b]], int(rollouts.depths_B[b]), item
                    )
                    for item in rollouts.items_BG[b].tolist()
                ]
            )
            for b in range(len(prompts))
        ]
    )


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 100), how=st.sampled_from(["beam", "sample"]))
def test_groups_at_mixed_depths_are_one_sequence_at_a_time(seed, how):
    rollouts = rolled(how=how, seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(
            scored(REASONER, rollouts).logprobs_BGL, one_by_one(REASONER, rollouts), atol=2e-5, rtol=0
        )


def test_groups_after_reasoning_that_is_closed_by_the_opening():
    rollouts = rolled(count=3)
    settings = dataclasses.replace(REASONER.settings, closing="opening")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        marker = scored(REASONER, rollouts).logprobs_BGL
        patch.setattr(REASONER, "settings", settings)
        opening = scored(REASONER, rollouts).logprobs_BGL
        torch.testing.assert_close(opening, one_by_one(REASONER, rollouts), atol=2e-5, rtol=0)
    assert (opening - marker).abs().max() > 1e-3


def test_gradients_too():
    rollouts = rolled(count=3)
    assert len(set(rollouts.depths_B.tolist())) > 1
    weights = torch.randn(3, 5, LEVELS)
    gradients = []
    for values in (scored(REASONER, rollouts).logprobs_BGL, one_by_one(REASONER, rollouts)):
        REASONER.zero_grad()
        (values * weights).sum().backward()
        gradients.append([p.grad.clone() for p in REASONER.backbone.parameters()])
    REASONER.zero_grad()
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("depth", [0, 3])
def test_a_model_of_fixed_depth_is_scored_at_it(depth):
    reasoner = (
        without_reasoning(REASONER.backbone, vocabulary=VOCABULARY)
        if depth == 0
        else make_reasoner(fixed_depth=3)
    )
    rollouts = rolled(Ranker(reasoner, codes_IL=ITEMS))
    assert (rollouts.depths_B == depth).all()
    assert rollouts.distribution_BN is None
    found = scored(reasoner, rollouts)
    torch.testing.assert_close(found.logprobs_BGL, one_by_one(reasoner, rollouts), atol=2e-5, rtol=0)
    assert (found.h0_BD is None) is (depth == 0)


@torch.no_grad()
@pytest.mark.parametrize("how", ["beam", "sample"])
def test_the_ratio_is_one_on_the_first_step(how):
    """The decoder's scores and the scorer's are two paths to one number."""
    reasoner = make_reasoner(torch.float64)
    rollouts = rolled(Ranker(reasoner, codes_IL=ITEMS), how=how)
    ratio = (scored(reasoner, rollouts).logprobs_BGL.sum(-1) - rollouts.scores_BG).exp()
    # Logits are rounded to fp32 before they are normalised, in decoder and loss alike.
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-6, rtol=0)


@torch.no_grad()
def test_probabilities_of_the_catalogue_sum_to_one():
    rollouts = rolled(group_size=18)
    total = scored(REASONER, rollouts).logprobs_BGL.sum(-1).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(6), atol=1e-5, rtol=0)


@torch.no_grad()
def test_missing_rollouts_count_for_nothing():
    few, many = rolled(group_size=18, exclude_seen=True), rolled(group_size=18)
    seen = [len(np.unique(history)) for history in few.prompts.histories]
    assert few.real_BG.sum(1).tolist() == [18 - count for count in seen]
    for history, row in zip(few.prompts.histories, few.items_BG.tolist(), strict=True):
        assert not set(history.tolist()) & set(row)
    assert (scored(REASONER, few).logprobs_BGL[~few.real_BG] == 0).all()
    assert many.real_BG.all()


@torch.no_grad()
def test_first_code_entropy_by_the_definition():
    rollouts = rolled()
    found = scored(REASONER, rollouts)
    logits = found.opening_BD @ output_table(REASONER.backbone)[VOCABULARY.level_start(0) :][:CODES].T
    expected = torch.distributions.Categorical(logits=logits).entropy()
    entropy = first_code_entropy(REASONER.backbone, found.opening_BD, vocabulary=VOCABULARY, trie=RANKER.trie)
    torch.testing.assert_close(entropy, expected)


def test_stale_rollouts_are_refused():
    rollouts = rolled(version=3)
    assert_fresh(rollouts, 3, updates=1)
    assert_fresh(rollouts, 4, updates=2)
    for version, updates in ((4, 1), (5, 2), (2, 2)):
        with pytest.raises(AssertionError, match=f"policy 3 cannot train policy {version}"):
            assert_fresh(rollouts, version, updates=updates)
    with pytest.raises(AssertionError, match="policy 3 cannot train policy 4"):
        objective()(judged(rollouts), version=4, counts=Counts(prompts=1, rollouts=1, anchored=1, real=1))


ANCHORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))


def objective(**values):
    return Objective(
        reasoner=REASONER, reference=REASONER, trie=RANKER.trie, tokens_IL=TOKENS, fetch=lambda index: ANCHORS[index],
        **values,
    )  # fmt: skip


def judged(rollouts):
    rewards = torch.rand(rollouts.items_BG.shape, generator=torch.Generator().manual_seed(5))
    advantages, silent = group_advantages(rewards, rollouts.real_BG, scale="group")
    worth = torch.randn(len(rollouts.prompts), generator=torch.Generator().manual_seed(6))
    return Judged(
        rollouts=rollouts,
        rewards_BG=rewards,
        advantages_BG=advantages,
        silent_B=silent,
        depth_advantages_B=worth,
    )


def gradients(loss):
    REASONER.zero_grad()
    loss.backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in REASONER.named_parameters()}
    REASONER.zero_grad()
    return found


def test_the_objective_is_the_sum_of_its_parts_one_sample_at_a_time():
    rollouts = rolled()
    batch = judged(rollouts)
    loss, sums = objective(
        kl_weight=0.5, terminal_weight=0.7, depth_weight=0.3, depth_entropy=0.1, detach_h0=False
    )(batch, version=0, counts=Counts.of([batch], skip_silent=True))
    found = gradients(loss)
    prompts = rollouts.prompts
    policy_gradient = -(batch.advantages_BG * one_by_one(REASONER, rollouts).sum(-1)).mean()
    terminal, depth = [], []
    for b in range(len(prompts)):
        table = input_table(REASONER.backbone)
        embedded = table[[*prompts.ids_BT[b, : prompts.lengths_B[b]].tolist(), VOCABULARY.latent_start]]
        states = []
        for _ in range(int(rollouts.depths_B[b]) + 1):
            hidden = trunk(REASONER.backbone)(inputs_embeds=embedded[None], use_cache=False).last_hidden_state
            states.append(hidden[0, -1])
            embedded = torch.cat([embedded, hidden[0, -1:]])
        logprobs = REASONER.policy_head(states[0]).log_softmax(-1)
        drawn = logprobs[rollouts.depths_B[b] - 1]
        depth.append(-batch.depth_advantages_B[b] * drawn + 0.1 * (logprobs.exp() * logprobs).sum())
        if prompts.anchors_B[b] >= 0:
            p, q = states[-1].softmax(-1), ANCHORS[prompts.anchors_B[b]].softmax(-1)
            terminal.append(((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2)
    assert 0 < len(terminal) < len(prompts)
    assert sums["terminal"] == pytest.approx(torch.stack(terminal).sum().item(), rel=1e-4)
    # The KL term is nothing yet, and so is its gradient: policy and reference are equal.
    plain = policy_gradient + 0.7 * torch.stack(terminal).mean() + 0.3 * torch.stack(depth).mean()
    expected = gradients(plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3)


def test_a_detached_head_leaves_the_backbone_alone():
    batch = judged(rolled())
    batch.advantages_BG = torch.zeros_like(batch.advantages_BG)
    counts = Counts.of([batch], skip_silent=True)
    found = gradients(objective()(batch, version=0, counts=counts)[0])
    for name, gradient in found.items():
        moved = gradient is not None and bool(gradient.abs().max() > 1e-7)
        assert moved is name.startswith("policy_head"), name


def test_batches_of_any_size_make_one_step():
    source = make_source()
    numbers = source.draw(0, 12)
    (prompts,) = source.render(numbers, batch_size=12)
    whole = roll_out(
        RANKER, prompts, version=0, group_size=4, beam_width=18, how="beam", exclude_seen=False, seed=(0,)
    )
    hits = torch.stack(
        [torch.isin(r, torch.from_numpy(t)) for r, t in zip(whole.items_BG, prompts.targets, strict=True)]
    )
    advantages, silent = group_advantages(hits.float(), whole.real_BG, scale="group")
    worth = torch.randn(12)
    totals = []
    for size in (12, 5):
        batches = []
        for start, part in zip(range(0, 12, size), source.render(numbers, batch_size=size), strict=True):
            rows = slice(start, start + size)
            rollouts = Rollouts(
                prompts=part, version=0, depths_B=whole.depths_B[rows], distribution_BN=None,
                items_BG=whole.items_BG[rows], scores_BG=whole.scores_BG[rows],
            )  # fmt: skip
            batches.append(
                Judged(
                    rollouts=rollouts, rewards_BG=hits[rows].float(), advantages_BG=advantages[rows],
                    silent_B=silent[rows], depth_advantages_B=worth[rows],
                )
            )  # fmt: skip
        counts = Counts.of(batches, skip_silent=True)
        assert 0 < counts.rollouts < counts.real == 48
        loss = objective(terminal_weight=1.0)
        totals.append(gradients(sum(loss(b, version=0, counts=counts)[0] for b in batches)))
    for name, gradient in totals[0].items():
        torch.testing.assert_close(totals[1][name], gradient, atol=1e-5, rtol=1e-3)
