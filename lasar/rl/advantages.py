"""Advantages: how much better than its group a rollout is.

Legend: B batch, G rollouts of a prompt.
"""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "none"]

_NOTHING = 1e-8


def group_advantages(rewards_BG: Tensor, real_BG: Tensor, *, scale: Scale) -> tuple[Tensor, Tensor]:
    """Rewards against their group; the sum over every group is 0.

    Args:
        rewards_BG: rewards.
        real_BG: where there is a rollout.
        scale: divide by the group's standard deviation (`group`, the paper's), or by nothing, so that groups that
            hardly differ weigh little.

    Returns:
        Advantages [B, G], 0 where there is no rollout, and which groups have no signal, all rewards equal [B].
    """
    exact_BG = rewards_BG.double()  # what is left of nearly equal rewards is divided by next to nothing
    count_B1 = real_BG.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = (exact_BG * real_BG).sum(1, keepdim=True) / count_B1
    centred_BG = torch.where(real_BG, exact_BG - mean_B1, 0.0)
    deviation_B1 = (centred_BG.square().sum(1, keepdim=True) / count_B1).sqrt()
    silent_B1 = deviation_B1 < _NOTHING
    if scale == "group":
        centred_BG = centred_BG / deviation_B1.clamp(min=_NOTHING)
    return torch.where(silent_B1, 0.0, centred_BG).to(rewards_BG.dtype), silent_B1[:, 0]


def group_rewards(rewards_BG: Tensor, real_BG: Tensor) -> Tensor:
    """Mean reward of every group, [B]: what its depth is judged by."""
    return (rewards_BG * real_BG).sum(1) / real_BG.sum(1).clamp(min=1)
