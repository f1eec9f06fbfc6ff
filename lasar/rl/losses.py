"""Losses of the RL stage (paper section 3.5), each as values that the caller sums or averages.

Legend: B batch, G rollouts of a prompt, L levels, N depths 1 ... N_max.
"""

from typing import Literal

import torch
from torch import Tensor

Ratio = Literal["item", "code"]


def surrogate(
    new_BGL: Tensor, old_BGL: Tensor, advantages_BG: Tensor, *, clip: float, ratio: Ratio
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss of GRPO for every rollout.

    Args:
        new_BGL: log-probabilities of the codes under the policy.
        old_BGL: under the policy that rolled out.
        advantages_BG: of the rollouts.
        clip: how far the ratio of new to old probability may leave 1 to the policy's profit; infinite: as far as it
            likes.
        ratio: of whole items (an item is one action: its codes are worth nothing alone), or of every code, so that one
            code that moved far does not stop the others.

    Returns:
        Loss [B, G], and whether clipping stopped the gradient [B, G].
    """
    change_BGL = new_BGL - old_BGL
    if ratio == "item":
        change_BGL = change_BGL.sum(-1, keepdim=True)
    ratio_BGL = change_BGL.exp()
    gain_BGL = ratio_BGL * advantages_BG[..., None]
    bounded_BGL = ratio_BGL.clamp(1 - clip, 1 + clip) * advantages_BG[..., None]
    loss_BG = -torch.minimum(gain_BGL, bounded_BGL).sum(-1)
    return loss_BG, (bounded_BGL < gain_BGL).any(-1)


def kl_to_reference(new_BGL: Tensor, reference_BGL: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) on every rollout, nats, never negative (k3 of Schulman): [B, G].

    Summed over the codes, because each is a draw of its own given the codes before it.
    """
    behind_BGL = reference_BGL - new_BGL
    return (behind_BGL.exp() - behind_BGL - 1).sum(-1)


def reinforce(logits_BN: Tensor, depths_B: Tensor, advantages_B: Tensor, *, entropy_weight: float) -> Tensor:
    """REINFORCE on the depth: -advantage * log pi(N) - entropy_weight * H(pi), for every prompt [B].

    Args:
        logits_BN: of the Policy Head; entry n is depth n + 1.
        depths_B: depths that were drawn.
        advantages_B: what each turned out to be worth, against a baseline.
        entropy_weight: eta.
    """
    logprobs_BN = logits_BN.float().log_softmax(-1)
    drawn_B = logprobs_BN.gather(1, depths_B[:, None] - 1)[:, 0]
    entropy_B = -(logprobs_BN.exp() * logprobs_BN).sum(-1)
    return -advantages_B * drawn_B - entropy_weight * entropy_B
