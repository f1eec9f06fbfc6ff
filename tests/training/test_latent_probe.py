"""The probe's means over samples and steps, against the same quantities computed branch by branch."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import LatentReasoner, ReasoningSettings, without_reasoning
from lasar.prompts.latent_batches import latent_batches
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.latent_probe import probe

CODES = np.array([[i // 4, i % 4] for i in range(16)], np.int32)
VOCABULARY = Vocabulary(num_levels=2, codebook_size=4, orders=True)
TRIE = Trie(CODES, device="cpu")
N_MAX = 3
ANCHORS = torch.randn(20, 32, generator=torch.Generator().manual_seed(7))
# No order that is history has two different items: training would see them in another sequence than this file does.
SEQUENCES = [
    TrainSequence(0, np.array([3, 7, 7, 1, 2], np.int32), np.array([0, 1, 1, 2, 2], np.int32)),
    TrainSequence(1, np.array([5, 0, 9], np.int32), np.array([0, 1, 2], np.int32)),
    TrainSequence(2, np.array([11], np.int32), np.array([0], np.int32)),
]


def steps(user, basket):
    return np.arange((user + 2 * basket) % (N_MAX + 1), dtype=np.int32) + 3 * user


def reasoner(fixed_depth=None):
    torch.manual_seed(0)
    model = build_preset("tiny", vocabulary=VOCABULARY, seed=1)
    with torch.no_grad():
        for matrix in model.model.layers.parameters():
            matrix.mul_(8 if matrix.ndim == 2 else 1)  # else a step hardly changes anything
    settings = ReasoningSettings(max_depth=N_MAX, head_width=8, fixed_depth=fixed_depth)
    return LatentReasoner(model, vocabulary=VOCABULARY, settings=settings).eval()


def batches(depth=None, fallback=2, tokens=10_000, steps=steps):
    return latent_batches(
        SEQUENCES, VOCABULARY.item_tokens(CODES), vocabulary=VOCABULARY, steps=steps, max_depth=N_MAX,
        depth=depth, fallback_depth=fallback, batch_tokens=tokens, train_targets="all", seed=0, epoch=0,
    )  # fmt: skip


def probed(model, made, alignment="kl", fetch=lambda index: ANCHORS[index]):
    return probe(model, made, trie=TRIE, fetch=fetch, alignment=alignment)


def rows():
    """Every training row: hidden states of its loop at the depth of its rationale, and how many answers it has."""
    model = reasoner()
    for user, items, baskets in SEQUENCES:
        for basket in np.unique(baskets).tolist():
            before = baskets < basket
            prompt = VOCABULARY.render_history(
                VOCABULARY.item_tokens(CODES), items[before], baskets[before], open_order=True
            )
            own = steps(user, basket)
            with torch.no_grad():
                prefix = encode_prompts(
                    model.backbone, torch.from_numpy(prompt).long()[None], torch.tensor([len(prompt)])
                )
                thought = model.think(prefix, depth=len(own) or 2)
            yield thought, own, int((baskets == basket).sum())


def test_alignment_is_a_mean_over_samples_of_a_mean_over_steps():
    per_sample, by_step = [], {}
    for thought, own, answers in rows():
        hidden = thought.latents.hidden_BPND[0, 0, 1:]
        distances = [float((hidden[t] - ANCHORS[anchor]).square().mean()) for t, anchor in enumerate(own)]
        per_sample += [np.mean(distances) if distances else 0.0] * answers
        for t, distance in enumerate(distances):
            by_step.setdefault(t, []).append(distance)
    found = probed(reasoner(), batches(), alignment="mse")
    assert found["alignment"] == pytest.approx(np.mean(per_sample), rel=1e-4)
    assert len(by_step) == N_MAX
    for t, distances in by_step.items():
        assert found[f"alignment_{t + 1}"] == pytest.approx(np.mean(distances), rel=1e-4)


def test_steps_are_compared_with_the_step_before_while_they_run():
    changes = {}
    for thought, _, _ in rows():
        hidden = thought.latents.hidden_BPND[0, 0]
        for t in range(1, len(hidden)):
            cosine = functional.cosine_similarity(hidden[t], hidden[t - 1], dim=0)
            changes.setdefault(t, []).append(1 - float(cosine))
    found = probed(reasoner(), batches())
    for t, values in changes.items():
        assert np.mean(values) > 1e-3
        assert found[f"step_{t}"] == pytest.approx(np.mean(values), rel=1e-3)


def test_depth_accuracy_is_of_rows_with_a_rationale():
    model = reasoner()
    with torch.no_grad():
        model.policy_head.outer.weight.zero_()
        model.policy_head.outer.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    depths = [len(own) for _, own, _ in rows() if len(own)]
    expected = np.mean([depth == 2 for depth in depths])
    assert 0 < expected < 1
    assert probed(model, batches())["depth_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("tokens", [16, 60])
def test_means_do_not_depend_on_batches(tokens):
    model = reasoner()
    together, apart = probed(model, batches()), probed(model, batches(tokens=tokens))
    assert len(batches(tokens=tokens)) > 1
    assert together.keys() == apart.keys()
    for name in together.keys() - {"norm_ratio"}:
        assert together[name] == pytest.approx(apart[name], rel=1e-3), name


def test_without_any_rationale_nothing_is_far_from_anything():
    found = probed(reasoner(), batches(steps=lambda user, basket: np.arange(0, dtype=np.int32)))
    assert found["alignment"] == 0
    assert not {"alignment_1", "depth_accuracy"} & set(found)
    assert found["step_1"] > 0


def test_without_a_loss_the_distance_is_still_measured():
    model = reasoner()
    assert probed(model, batches(), alignment="none") == probed(model, batches(), alignment="kl")
    assert probed(model, batches(), alignment="cosine")["alignment"] != probed(model, batches())["alignment"]


def test_a_model_that_does_not_reason_has_only_a_loss():
    plain = without_reasoning(reasoner().backbone, vocabulary=VOCABULARY).eval()
    assert set(probed(plain, batches(depth=0))) == {"ce"}
    # The same branches at another depth cost something else.
    assert probed(plain, batches(depth=0))["ce"] != probed(reasoner(2), batches(depth=2))["ce"]


def test_a_fixed_depth_leaves_the_policy_head_out():
    assert "depth_accuracy" not in probed(reasoner(fixed_depth=2), batches(depth=2))


def test_probing_leaves_no_gradient_and_no_random_trace():
    model = reasoner()
    state = torch.get_rng_state()
    probed(model, batches())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
