"""Sections of a recipe's `rl` part; the stage's file holds the rest."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pydantic

from lasar.config import StageConfig

Share = Annotated[float, pydantic.Field(ge=0, le=1)]
Positive = Annotated[float, pydantic.Field(gt=0)]
NotNegative = Annotated[float, pydantic.Field(ge=0)]
Count = Annotated[int, pydantic.Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Rollouts(StageConfig):
    """What the policy is asked, and how it answers."""

    how: Literal["beam", "sample"] = "beam"
    """The most probable items, by beam search; or items drawn without replacement from the policy's distribution."""
    group_size: Annotated[int, pydantic.Field(ge=2)] = 8
    """Items of a group (the paper's G)."""
    beam_width: Count = 20
    """Beams of the search, of which the best `group_size` are the group."""
    prompts: Count = 64
    """Prompts of a batch."""
    accumulate: Count = 1
    """Batches of a step."""
    replay: Share = 0.0
    """Share of a step's prompts that are earlier ones whose group had no hit."""


@dataclass(frozen=True, kw_only=True)
class Grpo(StageConfig):
    """How answers are rewarded, and what follows from it."""

    rewards: Annotated[dict[str, pydantic.FiniteFloat], pydantic.Field(min_length=1)] = field(
        default_factory=lambda: {"exact": 1.0, "ndcg": 1.0}
    )
    """Weights of exact, ndcg, rank_penalty, shared_prefix, or of your own function as module:function."""
    scale: Literal["group", "none"] = "group"
    """Divide advantages by the group's standard deviation, or let groups that hardly differ weigh little."""
    skip_silent: bool = True
    """Leave groups whose items are all rewarded alike out of the mean; else they only dilute it."""
    clip: Positive = 0.2
    """How far a probability may move from the rollouts' to the policy's profit; acts from the second update on."""
    ratio: Literal["item", "code"] = "item"
    """Clip the ratio of whole items, which are what is rewarded, or of each code by itself."""
    updates: Count = 1
    """Optimizer steps for one set of rollouts."""
    kl_weight: NotNegative = 0.02
    """Weight of the KL to the Stage-2 policy."""


@dataclass(frozen=True, kw_only=True)
class DepthLearning(StageConfig):
    """REINFORCE on the Policy Head."""

    weight: NotNegative = 1.0
    """Weight of the term (the paper's gamma_RF); 0 leaves the Policy Head as Stage 2 trained it."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of the Policy Head."""
    cost: NotNegative = 0.14
    """Price of a latent step in standard deviations of the group reward (the paper's lambda; 1/7 spans the depths)."""
    target: Annotated[float, pydantic.Field(ge=1)] | None = None
    """Mean depth to reach at most; the price starts at `cost` and moves until it holds. Null: the price stays."""
    baseline_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.99
    """Decay of the running mean that a group's reward is compared with."""
    entropy: NotNegative = 0.01
    """Weight of the entropy bonus (the paper's eta)."""
    detach_h0: bool = True
    """Train the Policy Head alone; else REINFORCE also moves the backbone, whose states answers are made from."""


@dataclass(frozen=True, kw_only=True)
class Guards(StageConfig):
    """How the best checkpoint is found, and when to stop."""

    validate_every: Count = 20
    """Steps between validations."""
    users: Count = 2000
    """Validation users."""
    step_worth: Share = 0.0025
    """Share of Stage 2's N@10 that one latent step less is worth when the best checkpoint is chosen; 0: N@10 alone."""
    max_kl: Positive = 1.0
    """Stop when the KL to the Stage-2 policy is above this, nats per item, mean of ten steps."""
    min_entropy: Share = 0.5
    """Stop when the first code's entropy falls below this share of what it was."""
