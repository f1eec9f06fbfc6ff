"""Three terms, their weights, and what each of them trains."""

import numpy as np
import pytest
import torch

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.prompts.latent_batches import latent_batches
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.latent_losses import alignment_loss, latent_pass
from lasar.training.latent_objective import LatentObjective

CODES = np.array([[i // 4, i % 4] for i in range(16)], np.int32)
VOCABULARY = Vocabulary(num_levels=2, codebook_size=4)
TRIE = Trie(CODES, device="cpu")
ANCHORS = torch.randn(9, 32, generator=torch.Generator().manual_seed(7))
N_MAX = 3


def make(*, alpha=0.0, beta=0.0, alignment="kl", fetch=lambda index: ANCHORS[index]):
    torch.manual_seed(0)
    settings = ReasoningSettings(max_depth=N_MAX, head_width=8)
    model = LatentReasoner(
        build_preset("tiny", vocabulary=VOCABULARY, seed=1), vocabulary=VOCABULARY, settings=settings
    ).eval()
    return LatentObjective(
        reasoner=model, trie=TRIE, fetch=fetch, alignment=alignment, alpha=alpha, beta=beta
    )


def batch():
    sequences = [
        TrainSequence(u, np.arange(u, u + 5, dtype=np.int32), np.arange(5, dtype=np.int32)) for u in range(3)
    ]
    (made,) = latent_batches(
        sequences, VOCABULARY.item_tokens(CODES), vocabulary=VOCABULARY,
        steps=lambda user, basket: np.arange((user + basket) % (N_MAX + 1), dtype=np.int32) + 2 * user,
        max_depth=N_MAX, depth=None, fallback_depth=1, batch_tokens=10_000, train_targets="all", seed=0, epoch=0,
    )  # fmt: skip
    return made


def value(**options):
    objective = make(**options)
    with torch.no_grad():
        return float(objective(objective.reasoner, batch()))


def terms():
    """Alignment and depth term, summed over rows by hand."""
    model = make().reasoner
    made = batch()
    with torch.no_grad():
        latents = latent_pass(
            model.backbone, made, vocabulary=VOCABULARY, trie=TRIE, feedback="raw"
        ).latents.hidden_BPND
    aligned = depth = 0.0
    for b, p in zip(*np.nonzero(made.weights_BP), strict=True):
        anchors = made.anchors_BPN[b, p][made.anchors_BPN[b, p] >= 0].tolist()
        if not anchors:
            continue
        states = latents[b, p, 1 : len(anchors) + 1]
        aligned += float(alignment_loss(states, ANCHORS[anchors], kind="kl").mean())
        with torch.no_grad():
            depth -= float(
                model.policy_head(latents[b : b + 1, p : p + 1, 0]).log_softmax(-1)[0, 0, len(anchors) - 1]
            )
    return aligned, depth


def test_the_loss_is_the_weighted_sum_of_its_terms():
    plain, (aligned, depth) = value(), terms()
    assert aligned > 0
    assert depth > 0
    assert value(alpha=0.5) == pytest.approx(plain + 0.5 * aligned, rel=1e-4)
    assert value(beta=2.0) == pytest.approx(plain + 2.0 * depth, rel=1e-4)
    assert value(alpha=3.0, beta=0.1) == pytest.approx(plain + 3 * aligned + 0.1 * depth, rel=1e-4)


def test_no_alignment_costs_nothing_and_reads_no_anchor():
    def refuse(index):
        raise AssertionError("an anchor was read")

    assert value(alpha=0.0, fetch=refuse) == value(alpha=5.0, alignment="none", fetch=refuse)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_only_the_depth_term_trains_the_policy_head(beta):
    objective = make(alpha=0.3, beta=beta)
    objective(objective.reasoner, batch()).backward()
    gradients = [p.grad for p in objective.reasoner.policy_head.parameters()]
    assert all((g is not None and bool(g.any())) == (beta > 0) for g in gradients)
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in objective.reasoner.parameters() if p.grad is not None
    )


def test_alignment_pulls_the_steps_to_their_anchors():
    objective = make(alpha=1.0)
    optimizer = torch.optim.Adam(objective.reasoner.parameters(), lr=1e-3)
    before = objective.probe([batch()])
    for _ in range(10):
        optimizer.zero_grad()
        objective(objective.reasoner, batch()).backward()
        optimizer.step()
    after = objective.probe([batch()])
    assert after["probe_alignment"] < 0.9 * before["probe_alignment"]
    assert after["probe_ce"] < before["probe_ce"]


def test_the_probe_s_names_say_that_they_are_the_probe_s():
    names = set(make().probe([batch()]))
    assert {
        "probe_ce",
        "probe_alignment",
        "probe_alignment_3",
        "probe_step_1",
        "probe_depth_accuracy",
    } <= names
    assert all(name.startswith("probe_") for name in names)
