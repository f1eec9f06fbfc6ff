"""Bounds that a run must stay in: RL that makes a model worse must say so and stop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NEAR = 0.1  # latent steps by which a mean may be off what was wanted
_FEWEST = 3  # steps that say anything


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """When to stop.

    Attributes:
        max_kl: KL to the reference, nats per item.
        min_entropy: entropy of the first code, as a share of what it was at the start.
        window: steps that are averaged, because single ones are noisy; from the third step on as many as there are.
    """

    max_kl: float
    min_entropy: float
    window: int = 10


def broken_bound(records: Sequence[Mapping[str, Any]], bounds: Bounds) -> str | None:
    """Say in one line which bound the latest steps have left, None if all is well.

    Args:
        records: of every step so far, with `step`, `kl` and `entropy`.
        bounds: to stay in.
    """
    latest = records[-bounds.window :]
    if len(latest) < min(_FEWEST, bounds.window):
        return None
    step = latest[-1]["step"]
    kl = sum(record["kl"] for record in latest) / len(latest)
    if not kl <= bounds.max_kl:  # a NaN is out of bounds too
        return (
            f"stopped at step {step}: {kl:.3g} nats from the Stage-2 policy, more than rl.guards.max_kl="
            f"{bounds.max_kl:g}; lower rl.learning_rate or raise rl.grpo.kl_weight"
        )
    first = records[: bounds.window]
    share = sum(record["entropy"] for record in latest) / max(
        sum(record["entropy"] for record in first), 1e-9
    )
    if not share >= bounds.min_entropy:
        return (
            f"stopped at step {step}: the first code's entropy fell to {share:.0%} of what it was, below "
            f"rl.guards.min_entropy={bounds.min_entropy:g}; lower rl.learning_rate or raise rl.grpo.kl_weight"
        )
    return None


def verdict(
    *, improved: bool, start: Mapping[str, float], end: Mapping[str, float], target: float | None = None
) -> str:
    """One plain sentence on what RL did to validation N@10 and to depth, and whether a wanted mean depth was missed."""
    depths = ""
    if improved and "mean_depth" in start and "mean_depth" in end:
        depths = f", mean depth {start['mean_depth']:.2f} to {end['mean_depth']:.2f}"
    missed = ""
    if target is not None and end.get("mean_depth", 0.0) > target + _NEAR:
        missed = (
            f"; what is kept takes {end['mean_depth']:.2f} steps, more than rl.depth.target={target:g}: raise "
            "rl.guards.step_worth to pay more for fewer steps"
        )
    if not improved:
        return f"RL did not improve validation: keeping the Stage-2 policy{missed}"
    return f"RL: validation N@10 {start['ndcg@10']:.4f} to {end['ndcg@10']:.4f}{depths}{missed}"
