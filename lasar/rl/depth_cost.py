"""What a depth is worth: its group's reward against a running baseline, less a price for every step.

The price lambda is in standard deviations of the group reward, so that it means the same for every mixture of rewards.
It is fixed, or moves until the mean depth is at most what was asked for (a dual variable).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Per step of excess depth: what it adds to the price at once, and to the dual variable for good. The dual variable
# alone overshoots: while it grows the depth collapses, and a collapsed Policy Head recovers slowly (measured: swings
# between 1 and 5 steps for ever, none with the damping term of the augmented Lagrangian).
_DAMPING, _RATE = 0.5, 0.01
_LEAST_DEVIATION = 1e-6


@dataclass
class DepthCost:
    """Running statistics, and the price of a step.

    Attributes:
        price: lambda as it is now, reward standard deviations for one latent step.
        target: mean depth to reach at most; None leaves the price alone.
        decay: of the running averages.
        dual: the dual variable, the part of the price that stays; None: the first price.
        seen: batches averaged so far.
        reward: running mean of the group reward.
        square: running mean of its square.
        depth: running mean of the depth.
    """

    price: float
    target: float | None
    decay: float
    dual: float | None = None
    seen: int = 0
    reward: float = 0.0
    square: float = 0.0
    depth: float = 0.0

    @property
    def deviation(self) -> float:
        """Running standard deviation of the group reward."""
        return math.sqrt(max(self.square - self.reward**2, 0.0))

    def advantages(self, rewards_B: Tensor, depths_B: Tensor) -> Tensor:
        """Advantages of the depths of a batch, [B], in reward standard deviations; moves averages and price.

        Args:
            rewards_B: reward of every group.
            depths_B: its depth.
        """
        # A plain mean at first, so that the start is forgotten quickly.
        keep = min(self.decay, self.seen / (self.seen + 1))
        rewards_B, depths_B = rewards_B.double(), depths_B.double()
        self.reward = keep * self.reward + (1 - keep) * float(rewards_B.mean())
        self.square = keep * self.square + (1 - keep) * float(rewards_B.square().mean())
        self.depth = keep * self.depth + (1 - keep) * float(depths_B.mean())
        self.seen += 1
        gain_B = (rewards_B - self.reward) / max(self.deviation, _LEAST_DEVIATION)
        if self.target is not None:
            excess = float(depths_B.mean()) - self.target
            dual = self.price if self.dual is None else self.dual
            self.price = max(0.0, dual + _DAMPING * excess)
            self.dual = max(0.0, dual + _RATE * excess)
        worth_B = gain_B - self.price * (depths_B - self.depth)
        return worth_B.to(torch.float32)

    def as_dict(self) -> dict[str, Any]:
        """Every field as plain JSON data; `DepthCost(**values)` is the way back."""
        return asdict(self)
