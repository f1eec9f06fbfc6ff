import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lasar.rl.advantages import group_advantages, group_rewards

GROUPS = st.lists(
    st.tuples(st.lists(st.floats(-3, 3, width=32), min_size=6, max_size=6), st.integers(1, 6)),
    min_size=1,
    max_size=5,
)


def tensors(groups):
    rewards = torch.tensor([values for values, _ in groups])
    real = torch.arange(6) < torch.tensor([[count] for _, count in groups])
    return torch.where(real, rewards, 0.0), real


@pytest.mark.parametrize("scale", ["group", "none"])
@given(groups=GROUPS)
def test_every_group_sums_to_nothing(scale, groups):
    rewards, real = tensors(groups)
    advantages, _ = group_advantages(rewards, real, scale=scale)
    assert (advantages[~real] == 0).all()
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(groups)), atol=1e-4, rtol=0)


@given(groups=GROUPS)
def test_groups_are_brought_to_one_deviation_or_are_silent(groups):
    rewards, real = tensors(groups)
    advantages, silent = group_advantages(rewards, real, scale="group")
    for row, (values, count) in enumerate(groups):
        deviation = torch.tensor(values[:count]).double().std(correction=0)
        if bool(silent[row]):
            assert deviation < 1e-6
            assert (advantages[row] == 0).all()
        elif deviation > 1e-3:
            assert advantages[row, :count].std(correction=0).item() == pytest.approx(1, abs=1e-3)
        assert group_rewards(rewards, real)[row].item() == pytest.approx(
            sum(values[:count]) / count, abs=1e-5
        )


def test_unscaled_advantages_are_differences_to_the_mean():
    rewards, real = torch.tensor([[3.0, 0.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool)
    advantages, silent = group_advantages(rewards, real, scale="none")
    assert advantages.tolist() == [[2.0, -1.0, -1.0]]
    assert not silent.any()
