"""Reasoning of all positions at once against one history at a time, and each term of the loss by its formula."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from lasar.baselines.rearec import ReaRec
from lasar.baselines.sequences import Histories, TargetBatch
from tests.baselines.conftest import ENCODER, NUM_ITEMS, REASONING


def network(learning, **changes):
    torch.manual_seed(0)
    built = ReaRec(
        num_items=NUM_ITEMS, learning=learning, **ENCODER | {"num_layers": 2} | REASONING | changes
    )
    for parameter in built.parameters():  # far enough from the start for every part to matter
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


def one_by_one(model, items):
    """States after one history, by appending every thought and encoding all again from the start."""
    encoder, length = model.encoder, len(items)
    tokens = [encoder.items.weight[items] + encoder.positions.weight[:length]]
    states = []
    for step in range(len(model.steps.weight) + 1):
        x_1TD = torch.cat(tokens)[None]
        mask = torch.ones(x_1TD.shape[1], x_1TD.shape[1], dtype=torch.bool).tril()
        states.append(encoder.extend(x_1TD, None, mask)[0][0, -1])
        if step < len(model.steps.weight):
            tokens.append((states[-1] + model.steps.weight[step])[None])
    return torch.stack(states)


def test_all_positions_at_once_equal_one_history_at_a_time():
    model = network("prl", num_steps=3)
    items = torch.tensor([[NUM_ITEMS, 1, 5, 2, 2], [NUM_ITEMS, 4, 0, NUM_ITEMS, NUM_ITEMS]])
    states, twins = model.reason(items)
    assert twins is None
    for row, length in ((0, 5), (1, 3)):
        for place in range(length):
            expected = one_by_one(model, items[row, : place + 1])
            torch.testing.assert_close(states[row, place], expected, atol=1e-5, rtol=1e-4)


def test_a_twin_without_noise_is_the_state_itself():
    model = network("prl")
    states, twins = model.reason(torch.tensor([[NUM_ITEMS, 1, 5]]), noise=1e-12)
    torch.testing.assert_close(states[:, :, 1:], twins)
    _, apart = model.reason(torch.tensor([[NUM_ITEMS, 1, 5]]), noise=0.5)
    assert (apart - twins).abs().max() > 0.01


BATCH = TargetBatch(
    histories=Histories(
        items_BT=torch.tensor([[NUM_ITEMS, 1, 5], [NUM_ITEMS, 4, NUM_ITEMS]]), lengths_B=torch.tensor([3, 2])
    ),
    targets_BT=torch.tensor([[1, 5, 6], [-1, 3, -1]]),
)


def predictions(model):
    """States and target of every prediction of the batch."""
    states, _ = model.reason(BATCH.histories.items_BT)
    return [(states[b, t], int(BATCH.targets_BT[b, t])) for b, t in ((0, 0), (0, 1), (0, 2), (1, 1))]


def test_ensemble_loss():
    model = network("erl", diversity_weight=0.7)
    table, expected = model.encoder.items.weight[:NUM_ITEMS], 0.0
    for states, target in predictions(model):
        expected -= (states.mean(0) @ table.T / 0.5).log_softmax(-1)[target]
        logs = [(state @ table.T / 0.5).log_softmax(-1) for state in states]
        pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
        apart = [functional.kl_div(logs[b], logs[a].exp(), reduction="sum") for a, b in pairs]
        expected -= 0.7 * torch.stack(apart).mean()
    torch.testing.assert_close(model(BATCH), expected)


def test_ensemble_pushes_a_step_away_from_the_others_held_fixed():
    model = network("erl")
    states_PSD = torch.randn(2, 3, 32)
    table = model.encoder.items.weight[:NUM_ITEMS].detach()
    gradient = torch.autograd.functional.jacobian(model._diversity, states_PSD)
    fixed = (states_PSD @ table.T / 0.5).log_softmax(-1)

    def moving(states):
        logs = (states @ table.T / 0.5).log_softmax(-1)
        return (
            sum(
                (logs[:, a].exp() * (logs[:, a] - fixed[:, b])).sum()
                for a in range(3)
                for b in range(3)
                if a != b
            )
            / 6
        )

    torch.testing.assert_close(gradient, torch.autograd.functional.jacobian(moving, states_PSD))


def test_progressive_loss():
    model = network("prl", contrastive_weight=0.0)
    table, expected = model.encoder.items.weight[:NUM_ITEMS], 0.0
    for states, target in predictions(model):
        first, second, last = (state @ table.T for state in states)
        expected -= (last / 0.5).log_softmax(-1)[target]
        # Twice and four times the temperature, mean of the two.
        expected -= ((first / 2.0).log_softmax(-1)[target] + (second / 1.0).log_softmax(-1)[target]) / 2
    torch.testing.assert_close(model(BATCH), expected)


def test_contrastive_loss_tells_twins_apart():
    model = network("prl")
    clean, twins = torch.randn(4, 2, 32), torch.randn(4, 2, 32)
    logits = np.array(
        [[[float(twins[b, s] @ clean[c, s]) / 0.5 for c in range(4)] for b in range(4)] for s in (0, 1)]
    )
    expected = np.mean(
        [np.log(np.exp(logits[s, b]).sum()) - logits[s, b, b] for s in (0, 1) for b in range(4)]
    )
    assert model._contrast(clean, twins).item() == pytest.approx(expected, rel=1e-4)
    assert model._contrast(10 * clean, 10 * clean).item() < 1e-3


def test_who_answers():
    states = torch.randn(2, 3, 32)
    torch.testing.assert_close(network("erl").answer(states), states.mean(1))
    torch.testing.assert_close(network("prl").answer(states), states[:, 2])
