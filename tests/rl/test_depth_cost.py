"""What drives depth: the price alone, the reward alone, and a target."""

import math

import pytest
import torch

from lasar.model.latent import PolicyHead
from lasar.rl.depth_cost import DepthCost
from lasar.rl.losses import reinforce

N_MAX = 6


def train_head(worth, *, cost, steps, seed=0, target_rows=None):
    """A Policy Head alone, on two kinds of users that it can tell apart; `worth(kind, depth)` is the reward."""
    torch.manual_seed(seed)
    head = PolicyHead(8, max_depth=N_MAX, width=16)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    kinds = torch.randint(2, (64,))
    states = torch.randn(2, 8)[kinds] + 0.3 * torch.randn(64, 8)
    for _ in range(steps):
        logits = head(states)
        depths = torch.distributions.Categorical(logits=logits.detach()).sample() + 1
        advantages = cost.advantages(worth(kinds, depths), depths)
        optimizer.zero_grad()
        reinforce(logits, depths, advantages, entropy_weight=0.01).mean().backward()
        optimizer.step()
    chosen = head(states).argmax(-1) + 1
    expected = (head(states).softmax(-1) * torch.arange(1, N_MAX + 1)).sum(-1)
    return kinds, chosen, expected.mean().item()


def test_the_price_alone_leads_to_one_step():
    _, chosen, _ = train_head(
        lambda kinds, depths: torch.rand(len(kinds)),
        cost=DepthCost(price=0.5, target=None, decay=0.99), steps=400,
    )  # fmt: skip
    assert (chosen == 1).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reward_alone_finds_who_needs_one_step_and_who_four(seed):
    needed = torch.tensor([1, 4])
    kinds, chosen, _ = train_head(
        lambda kinds, depths: (depths == needed[kinds]).float(),
        cost=DepthCost(price=0.0, target=None, decay=0.99), steps=500, seed=seed,
    )  # fmt: skip
    assert (chosen == needed[kinds]).float().mean() >= 0.9


def test_with_a_price_enough_is_enough():
    """Reward from the fourth step on: without a price anything from 4 is as good, with one 4 is best."""
    _, chosen, _ = train_head(
        lambda kinds, depths: (depths >= torch.tensor([1, 4])[kinds]).float(),
        cost=DepthCost(price=0.2, target=None, decay=0.99), steps=600,
    )  # fmt: skip
    assert set(chosen.tolist()) == {1, 4}


def test_the_price_moves_until_the_mean_depth_is_reached():
    cost = DepthCost(price=0.0, target=2.5, decay=0.99)
    *_, mean = train_head(
        lambda kinds, depths: 0.1 * depths.float() + 0.2 * torch.rand(len(kinds)), cost=cost, steps=600
    )
    assert cost.price > 0
    assert mean == pytest.approx(2.5, abs=0.4)


def test_advantages_are_in_deviations_and_the_price_too():
    rewards, depths = torch.tensor([0.0, 10.0]), torch.tensor([1, 3])
    cost = DepthCost(price=0.5, target=None, decay=0.9)
    assert cost.advantages(rewards, depths).tolist() == pytest.approx([-1 + 0.5, 1 - 0.5])
    assert (cost.reward, cost.deviation, cost.depth) == pytest.approx((5, 5, 2))


def test_the_averages_start_as_plain_means_and_then_forget():
    cost = DepthCost(price=0.0, target=None, decay=0.75)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        cost.advantages(torch.tensor([value]), torch.tensor([2]))
    assert cost.reward == pytest.approx(0.75 * 2.5 + 0.25 * 5)


def test_equal_rewards_are_no_reason_to_move():
    cost = DepthCost(price=0.0, target=None, decay=0.99)
    for _ in range(3):
        found = cost.advantages(torch.full((4,), 0.3), torch.tensor([1, 2, 3, 4]))
        assert found.abs().max() < 1e-3


def test_it_goes_through_json_and_back():
    cost = DepthCost(price=0.1, target=3.0, decay=0.9)
    cost.advantages(torch.tensor([1.0, 2.0]), torch.tensor([5, 6]))
    assert DepthCost(**cost.as_dict()) == cost
    assert (cost.price, cost.dual) == pytest.approx((0.1 + 0.5 * 2.5, 0.1 + 0.01 * 2.5))
    assert math.isclose(cost.depth, 5.5)
