"""Stage 2 over trunks and branches against one sample at a time: same loss, same gradient.

The slow side knows nothing of trees, caches or batches: it renders one (history, target) sequence, recomputes it whole
for every latent step, and scores the answer as the trie normalises it.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset, input_table, output_table, trunk
from lasar.model.latent import PolicyHead
from lasar.prompts.latent_batches import latent_batches
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.latent_losses import (
    aligned_steps,
    alignment_loss,
    depth_loss,
    latent_pass,
    per_sample,
)

LEVELS, CODES, DEEPEST, ANCHORS = 3, 4, 4, 12
ITEMS = np.array(list(itertools.product(range(CODES), repeat=LEVELS)), np.int32)[::3][:16]
PLAIN = Vocabulary(num_levels=LEVELS, codebook_size=CODES, max_history=50)
ORDERS = Vocabulary(num_levels=LEVELS, codebook_size=CODES, max_history=50, orders=True)
SMALL = {
    "vocab_size": PLAIN.size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def models():
    torch.manual_seed(0)
    return {
        "preset": build_preset("tiny", vocabulary=PLAIN, seed=1).eval(),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval(),
        "llama": LlamaForCausalLM(LlamaConfig(**SMALL)).eval(),
    }


MODELS = models()
TRIE = Trie(ITEMS, device="cpu")


def anchors_for(width):
    return torch.randn(ANCHORS, width, generator=torch.Generator().manual_seed(3))


def steps(user, basket):
    """0 to 4 anchors per training row, as a fixed function of the row."""
    count = (3 * user + 5 * basket) % (DEEPEST + 1)
    return np.arange(count, dtype=np.int32) * (basket + 1) % ANCHORS


@st.composite
def sequences(draw):
    """Training draws the items of an order in random sequence, so an order that is history repeats one item here."""
    found = []
    item = st.integers(0, len(ITEMS) - 1)
    for user in range(draw(st.integers(1, 3))):
        orders = [[draw(item)] * draw(st.integers(1, 2)) for _ in range(draw(st.integers(0, 3)))]
        orders.append(draw(st.lists(item, min_size=1, max_size=2)))
        baskets = np.repeat(np.arange(len(orders)), [len(order) for order in orders])
        items = np.array([i for order in orders for i in order], np.int32)
        found.append(TrainSequence(user, items, baskets.astype(np.int32)))
    return found


def without_orders(found):
    return [TrainSequence(s.user_index, s.items, np.arange(len(s.items), dtype=np.int32)) for s in found]


def batched(model, head, found, vocabulary, depth, batch_tokens=10_000, closing="marker"):
    """Sums over all batches: cross-entropy, alignment, depth."""
    anchors = anchors_for(model.config.hidden_size)
    sums = []
    for batch in latent_batches(
        found, vocabulary.item_tokens(ITEMS), vocabulary=vocabulary, steps=steps, max_depth=DEEPEST, depth=depth,
        fallback_depth=2, batch_tokens=batch_tokens, train_targets="all", seed=0, epoch=0,
    ):  # fmt: skip
        done = latent_pass(model, batch, vocabulary=vocabulary, trie=TRIE, feedback="raw", closing=closing)
        loss, has = aligned_steps(done.latents, batch, lambda index: anchors[index], kind="kl")
        weights = torch.from_numpy(batch.weights_BP)
        logits = head(done.latents.hidden_BPND[:, :, 0])
        sums.append(
            torch.stack([done.codes.total, per_sample(loss, has, weights), depth_loss(logits, batch)])
        )
    return torch.stack(sums).sum(0)


def one_by_one(model, head, found, vocabulary, depth, closing="marker"):
    total = torch.zeros(3)
    for user, items, baskets in found:
        for basket in np.unique(baskets):
            before = baskets < basket
            history = vocabulary.render_history(
                vocabulary.item_tokens(ITEMS), items[before], baskets[before], open_order=True
            )
            for item in items[baskets == basket]:
                total = total + one_sample(
                    model, head, history, int(item), steps(user, int(basket)), depth, vocabulary, closing
                )
    return total


def one_sample(model, head, history, item, anchor_steps, depth, vocabulary, closing="marker"):
    anchors = anchors_for(model.config.hidden_size)
    depth = depth if depth is not None else (len(anchor_steps) or 2)
    embeddings = input_table(model)
    sequence = [embeddings[int(t)] for t in history]
    aligned = torch.zeros(())
    head_loss = torch.zeros(())
    if depth > 0:
        sequence.append(embeddings[vocabulary.latent_start])
        hidden = last_hidden(model, sequence)
        if len(anchor_steps):
            head_loss = -head(hidden).log_softmax(-1)[depth - 1]
        distances = []
        for t in range(depth):
            sequence.append(hidden)
            hidden = last_hidden(model, sequence)
            if t < len(anchor_steps):
                a, b = hidden.softmax(-1), anchors[anchor_steps[t]].softmax(-1)
                distances.append(((a * (a / b).log()).sum() + (b * (b / a).log()).sum()) / 2)
        if distances:
            aligned = torch.stack(distances).mean()
        closed = vocabulary.latent_end if closing == "marker" else int(history[-1])
        sequence.append(embeddings[closed])
    loss = torch.zeros(())
    for level in range(LEVELS):
        hidden = last_hidden(model, sequence)
        siblings = sorted({int(c[level]) for c in ITEMS if (c[:level] == ITEMS[item][:level]).all()})
        start = vocabulary.level_start(level)
        logits = output_table(model)[[start + code for code in siblings]] @ hidden
        loss = loss - logits.log_softmax(-1)[siblings.index(int(ITEMS[item][level]))]
        sequence.append(embeddings[start + int(ITEMS[item][level])])
    return torch.stack([loss, aligned, head_loss])


def last_hidden(model, sequence):
    return trunk(model)(inputs_embeds=torch.stack(sequence)[None], use_cache=False).last_hidden_state[0, -1]


def head_of(model):
    torch.manual_seed(5)
    return PolicyHead(model.config.hidden_size, max_depth=DEEPEST, width=16)


@pytest.mark.parametrize("name", list(MODELS))
@settings(max_examples=10)
@given(
    found=sequences(),
    orders=st.booleans(),
    depth=st.sampled_from([None, 0, 1, 3]),
    tokens=st.integers(16, 300),
    closing=st.sampled_from(["marker", "opening"]),
)
def test_trunk_and_branch_loss_equals_per_sample_loss(name, found, orders, depth, tokens, closing):
    model, head = MODELS[name], head_of(MODELS[name])
    vocabulary = ORDERS if orders else PLAIN
    found = found if orders else without_orders(found)
    with torch.no_grad():
        torch.testing.assert_close(
            batched(model, head, found, vocabulary, depth, tokens, closing),
            one_by_one(model, head, found, vocabulary, depth, closing),
            atol=1e-4, rtol=1e-5,
        )  # fmt: skip


@pytest.mark.parametrize("orders", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_trunk_and_branch_gradient_equals_per_sample_gradient(name, orders):
    model, head = MODELS[name], head_of(MODELS[name])
    vocabulary = ORDERS if orders else PLAIN
    found = [
        TrainSequence(0, np.array([3, 7, 7, 1, 2], np.int32), np.array([0, 1, 1, 2, 2], np.int32)),
        TrainSequence(1, np.array([5, 0], np.int32), np.array([0, 1], np.int32)),
    ]
    found = found if orders else without_orders(found)
    mix = torch.tensor([1.0, 0.3, 0.1])
    gradients = []
    for compute in (batched, one_by_one):
        model.zero_grad()
        head.zero_grad()
        (compute(model, head, found, vocabulary, None) * mix).sum().backward()
        gradients.append(
            {
                n: p.grad.clone()
                for n, p in [*model.named_parameters(), *head.named_parameters()]
                if p.grad is not None
            }
        )
    ours, theirs = gradients
    for parameter, expected in theirs.items():
        torch.testing.assert_close(
            ours[parameter], expected, atol=1e-5 * float(expected.abs().max()) + 1e-7, rtol=1e-4
        )


@settings(max_examples=8, deadline=None)
@given(found=sequences(), orders=st.booleans(), epoch=st.integers(0, 3))
@torch.no_grad()
def test_an_early_answer_is_that_of_a_sample_that_stops_there(found, orders, epoch):
    model = next(iter(MODELS.values()))
    head, vocabulary = head_of(model), ORDERS if orders else PLAIN
    found = found if orders else without_orders(found)
    for batch in latent_batches(
        found, vocabulary.item_tokens(ITEMS), vocabulary=vocabulary, steps=steps, max_depth=DEEPEST, depth=None,
        fallback_depth=2, batch_tokens=10_000, train_targets="all", seed=0, epoch=epoch, early_answers=1.0,
    ):  # fmt: skip
        assert (batch.answer_depths_BP <= batch.depths_BP).all()
        assert ((batch.answer_depths_BP > 0) == (batch.depths_BP > 0)).all()
        done = latent_pass(model, batch, vocabulary=vocabulary, trie=TRIE, feedback="raw")
        total = torch.zeros(())
        for row, column in zip(*np.nonzero(batch.items_BA >= 0), strict=True):
            branch = batch.branch_BA[row, column]
            history = batch.ids_BT[row, : batch.openings_BP[row, branch] + 1]
            answered = int(batch.answer_depths_BP[row, branch])
            item = int(batch.items_BA[row, column])
            total = total + one_sample(model, head, history, item, [], answered, vocabulary)[0]
        torch.testing.assert_close(done.codes.total, total, atol=1e-4, rtol=1e-5)


def test_alignment_kinds_against_their_definitions():
    a, b = torch.randn(5, 8), torch.randn(5, 8)
    p, q = torch.distributions.Categorical(logits=a), torch.distributions.Categorical(logits=b)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(alignment_loss(a, b, kind="kl"), (kl(p, q) + kl(q, p)) / 2)
    torch.testing.assert_close(alignment_loss(a, b, kind="mse"), ((a - b) ** 2).mean(-1))
    cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    torch.testing.assert_close(alignment_loss(a, b, kind="cosine"), 1 - cosine)
    assert (alignment_loss(a, b, kind="none") == 0).all()
    assert (alignment_loss(a, a, kind="kl") == 0).all()
