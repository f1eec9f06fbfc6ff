"""The RL loop: ask the current policy, judge what it says, improve it, check on it.

Apart from `lasar.training.fit`, because here the batches come from the model that is being trained, and what a step
did is of more interest than an epoch's loss. As exact to resume: every random number is a function of the seed and
the step, and a checkpoint holds everything else.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lasar.decoding.ranker import Ranker
from lasar.errors import TrainingError
from lasar.model.reasoner import LatentReasoner
from lasar.progress import progress
from lasar.ranks import add_up, gather_all, ranks, tell
from lasar.rl.advantages import Scale, group_advantages, group_rewards
from lasar.rl.depth_cost import DepthCost
from lasar.rl.guards import Bounds, broken_bound
from lasar.rl.objective import Counts, Judged, Objective
from lasar.rl.prompts import PromptSource
from lasar.rl.rollouts import How, Rollouts, roll_out
from lasar.training.checkpoints import Pace, load_training, save_training
from lasar.training.estimate import Estimate, forget_peak, peak, say, timed
from lasar.training.fit import FitPlan, refuse_uneven, scheduled
from lasar.training.shards import (
    add_up_gradients,
    clip_gradients,
    copies_of,
    copy_into,
    gather,
    gathered,
    is_divided,
    local,
    put,
    trained,
)

_MAX_REPLAYED = 4096  # prompts waiting to be asked again
_FAST_STEP_S = 5.0

Judge = Callable[[Rollouts], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class RlPlan:
    """How to train; every value comes from the stage's config.

    Attributes:
        steps: sets of rollouts.
        learning_rate: of all but the Policy Head (short warm-up, cosine to a tenth).
        head_learning_rate: of the Policy Head.
        prompts: of a batch.
        accumulate: batches of a step.
        replay: share of a step's prompts that are earlier ones whose group had no hit.
        group_size: G.
        beam_width: of the search for rollouts.
        how: of the rollouts.
        exclude_seen: leave items of the history out of rollouts.
        scale: of the advantages.
        max_grad_norm: gradients of the backbone, and of the head, are clipped to this norm.
        precision: `bf16` autocast of the updates, or `fp32`.
        validate_every: steps between validations.
        step_worth: share of the first validation's N@10 that one latent step less is worth when the best is chosen.
        bounds: that stop the run.
        seed: of everything random.
    """

    steps: int
    learning_rate: float
    head_learning_rate: float
    prompts: int = 64
    accumulate: int = 1
    replay: float = 0.0
    group_size: int = 8
    beam_width: int = 20
    how: How = "beam"
    exclude_seen: bool = False
    scale: Scale = "group"
    max_grad_norm: float = 1.0
    precision: Literal["bf16", "fp32"] = "fp32"
    validate_every: int = 20
    step_worth: float = 0.0
    bounds: Bounds
    seed: int = 0


@dataclass
class _State:
    """Where a run is; what a checkpoint stores beside tensors."""

    cost: dict[str, Any]
    step: int = 0
    version: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    stopped: str | None = None
    waiting: list[int] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RlResult:
    """Outcome of `train`; the model holds the best weights.

    Attributes:
        best_step: step of the best validation; 0: nothing was better than the start.
        steps: taken.
        stopped: why the run ended early, None if it did not.
        curve: one record per step; the first is the start's validation.
    """

    best_step: int
    steps: int
    stopped: str | None
    curve: list[dict[str, Any]]


def reference_of(reasoner: LatentReasoner) -> LatentReasoner:
    """A frozen copy."""
    return copy.deepcopy(reasoner).eval().requires_grad_(False)


def train(
    ranker: Ranker,
    *,
    plan: RlPlan,
    objective: Objective,
    cost: DepthCost,
    source: PromptSource,
    judge: Judge,
    validate: Callable[[], dict[str, float]],
    checkpoint_dir: Path,
    description: str = "rl",
) -> RlResult:
    """Train the ranker's model, keep the best weights.

    Args:
        ranker: the policy and the catalogue; the model ends with the best validated weights.
        plan: how to train.
        objective: of the same model.
        cost: what depth costs; moves on.
        source: prompts.
        judge: rollouts to rewards [B, G].
        validate: metrics of the model as it is, `ndcg@10` among them; must not use global random numbers.
        checkpoint_dir: survives a kill; a later call with the same arguments continues from here.
        description: of the progress bar.
    """
    refuse_uneven(plan.accumulate, description)
    reasoner = ranker.reasoner.eval()
    optimizer = _optimizer(reasoner, plan)
    best = copies_of(reasoner)
    found = load_training(checkpoint_dir, reasoner, optimizer, best=best)
    at = _State(cost=cost.as_dict()) if found is None else _State(**found)
    cost = DepthCost(**at.cost)
    started, expected, device = time.perf_counter(), None, next(reasoner.parameters()).device
    if not at.curve:
        at.curve.append({"step": 0})
        validation_s = timed(lambda: _check(at, best, reasoner, plan, validate), device)
        step_s, memory = _rehearsed(ranker, plan, objective, cost, source, judge)
        expected = Estimate(
            parameters=sum(p.numel() for p in best.values()), steps=plan.steps, training_s=plan.steps * step_s,
            validation_s=validation_s * -(-plan.steps // plan.validate_every), memory=memory,
        )  # fmt: skip
        say(expected.line(description))
        started = time.perf_counter()
    pace = Pace()
    with progress(description, total=plan.steps, start=at.step, unit="step") as advance:
        while at.step < plan.steps and at.stopped is None:
            batches = _gather(ranker, plan, cost, source, judge, at)
            record = _improve(reasoner, optimizer, objective, plan, batches, at)
            at.step += 1
            at.cost = cost.as_dict()
            at.curve.append({"step": at.step, **record, "depth_price": cost.price})
            at.stopped = broken_bound(at.curve[1:], plan.bounds)
            last = at.step == plan.steps or at.stopped is not None
            if at.step % plan.validate_every == 0 or last:
                _check(at, best, reasoner, plan, validate)
            advance(note=_note(at))
            if tell(last or pace.due()) if is_divided(reasoner) else last or pace.due():
                began = time.monotonic()
                save_training(checkpoint_dir, vars(at), reasoner, optimizer, best=best)
                pace.saved(began)
    if expected is not None and at.stopped is None:
        say(expected.afterwards(description, seconds=time.perf_counter() - started, memory=peak(device)))
    copy_into(reasoner, best)
    return RlResult(best_step=at.best_step, steps=at.step, stopped=at.stopped, curve=at.curve)


def _rehearsed(
    ranker: Ranker, plan: RlPlan, objective: Objective, cost: DepthCost, source: PromptSource, judge: Judge
) -> tuple[float, int]:
    """Seconds and bytes of a step, from one that moves nothing.

    A fast one is made again, without what only the first pays.
    """
    still = replace(plan, learning_rate=0.0, head_learning_rate=0.0)
    optimizer = _optimizer(ranker.reasoner, still)
    device = next(ranker.reasoner.parameters()).device

    def step() -> None:
        at = _State(cost=cost.as_dict())
        batches = _gather(ranker, still, DepthCost(**at.cost), source, judge, at)
        _improve(ranker.reasoner, optimizer, objective, still, batches, at)

    forget_peak(device)
    seconds = timed(step, device)
    return timed(step, device) if seconds < _FAST_STEP_S else seconds, peak(device)


def _gather(
    ranker: Ranker, plan: RlPlan, cost: DepthCost, source: PromptSource, judge: Judge, at: _State
) -> list[Judged]:
    """Ask the policy as it is now, and judge what it says."""
    count = plan.prompts * plan.accumulate
    again, at.waiting = _taken(at.waiting, round(plan.replay * count))
    numbers = np.concatenate([np.array(again, np.int64), source.draw(at.step, count)[: count - len(again)]])
    mine = []
    gather(ranker.reasoner)  # until the gradients are added up
    for place, prompts in enumerate(source.render(numbers, batch_size=plan.prompts)):
        if place % ranks().size != ranks().rank:
            continue
        rollouts = roll_out(
            ranker, prompts, version=at.version, group_size=plan.group_size, beam_width=plan.beam_width,
            how=plan.how, exclude_seen=plan.exclude_seen, seed=(plan.seed, at.step, place),
        )  # fmt: skip
        rewards_BG = torch.from_numpy(judge(rollouts)).to(rollouts.items_BG.device, torch.float32)
        advantages_BG, silent_B = group_advantages(rewards_BG, rollouts.real_BG, scale=plan.scale)
        mine.append(
            Judged(rollouts=rollouts, rewards_BG=rewards_BG, advantages_BG=advantages_BG, silent_B=silent_B)
        )
    batches: list[Judged] = gather_all(mine, device=ranker.trie.item_of_leaf.device)
    if plan.replay:
        at.waiting += [
            number
            for batch in batches
            for number in batch.rollouts.prompts.numbers_B[~_hits(batch.rollouts)].tolist()
        ]
    at.waiting = at.waiting[-_MAX_REPLAYED:]
    if batches[0].rollouts.distribution_BN is not None:
        _judge_depths(batches, cost)
    return batches


def _judge_depths(batches: Sequence[Judged], cost: DepthCost) -> None:
    sizes = [len(batch.rollouts.prompts) for batch in batches]
    found_B = cost.advantages(
        torch.cat([group_rewards(batch.rewards_BG, batch.rollouts.real_BG) for batch in batches]),
        torch.cat([batch.rollouts.depths_B for batch in batches]),
    )
    for batch, part_B in zip(batches, found_B.split(sizes), strict=True):
        batch.depth_advantages_B = part_B


def _improve(
    reasoner: LatentReasoner,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    plan: RlPlan,
    batches: Sequence[Judged],
    at: _State,
) -> dict[str, Any]:
    """Take the step's updates; what happened, for the record."""
    counts = Counts.of(batches, skip_silent=objective.skip_silent)
    rates = FitPlan(epochs=1, learning_rate=1.0)
    share = scheduled(at.step, plan.steps, rates)
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
    total, sums = 0.0, dict.fromkeys(("kl", "clip_share", "entropy", "terminal", "decoder_gap"), 0.0)
    device = reasoner.backbone.device.type
    for _ in range(objective.updates):
        gather(reasoner)
        for batch in batches[ranks().rank :: ranks().size]:
            with torch.autocast(device, torch.bfloat16, enabled=plan.precision == "bf16"):
                loss, found = objective(batch, version=at.version, counts=counts)
            loss.backward()
            total += float(loss.detach())
            sums = {name: value + found[name] for name, value in sums.items()}
        add_up_gradients(reasoner)
        if not math.isfinite(total):
            raise TrainingError(
                f"loss is {total} at step {at.step}: reinforcement learning broke down; lower rl.learning_rate "
                f"(now {plan.learning_rate:g})"
            )
        for part in _parts(reasoner):
            clip_gradients(part, plan.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at.version += 1
    total, *whole = add_up(torch.tensor([total, *sums.values()], dtype=torch.float64)).tolist()
    sums = dict(zip(sums, whole, strict=True))
    over = {"kl": counts.real, "clip_share": counts.real, "decoder_gap": counts.real, "entropy": counts.prompts,
            "terminal": counts.anchored}  # fmt: skip
    means = {name: value / max(over[name], 1) / objective.updates for name, value in sums.items()}
    return {"loss": total / objective.updates, **means, **_summary(batches, reasoner.settings.max_depth)}


def _summary(batches: Sequence[Judged], max_depth: int) -> dict[str, Any]:
    rewards = torch.cat([group_rewards(b.rewards_BG, b.rollouts.real_BG) for b in batches])
    depths = torch.cat([b.rollouts.depths_B for b in batches])
    found: dict[str, Any] = {
        "reward": float(rewards.mean()),
        "hit_share": float(np.concatenate([_hits(b.rollouts) for b in batches]).mean()),
        "silent_share": float(torch.cat([b.silent_B for b in batches]).float().mean()),
        "mean_depth": float(depths.float().mean()),
        "depths": torch.bincount(depths, minlength=max_depth + 1).tolist(),
    }
    head = [b.rollouts.distribution_BN for b in batches if b.rollouts.distribution_BN is not None]
    if head:
        found["depth_entropy"] = float(torch.special.entr(torch.cat(head)).sum(-1).mean())
    return found


def _check(
    at: _State,
    best: dict[str, Tensor],
    reasoner: LatentReasoner,
    plan: RlPlan,
    validate: Callable[[], dict[str, float]],
) -> None:
    """Validate, and keep the weights if they are the best so far."""
    with torch.no_grad(), gathered(reasoner):
        metrics = validate()
    at.curve[-1] |= {f"valid_{name}": value for name, value in metrics.items()}
    start = at.curve[0]["valid_ndcg@10"]
    score = metrics["ndcg@10"] - plan.step_worth * start * metrics.get("mean_depth", 0.0)
    if score > at.best_score:
        at.best_score, at.best_step = score, at.step
        for name, parameter in trained(reasoner):
            put(best[name], parameter.detach())


def _hits(rollouts: Rollouts) -> NDArray[np.bool_]:
    items_BG = rollouts.items_BG.cpu().numpy()
    return np.array(
        [np.isin(row, wanted).any() for row, wanted in zip(items_BG, rollouts.prompts.targets, strict=True)]
    )


def _taken(waiting: list[int], count: int) -> tuple[list[int], list[int]]:
    return waiting[:count], waiting[count:]


def _optimizer(reasoner: LatentReasoner, plan: RlPlan) -> torch.optim.Optimizer:
    # No weight decay: the KL to the reference says where to stay, and it is not at 0.
    groups = []
    for part, rate in zip(_parts(reasoner), (plan.learning_rate, plan.head_learning_rate), strict=False):
        for divided in (False, True):  # fused steps take parts or whole weights, not both
            kind = [parameter for parameter in part if (local(parameter) is not parameter) == divided]
            groups += [{"params": kind, "peak": rate}] if kind else []
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def _parts(reasoner: LatentReasoner) -> list[list[torch.nn.Parameter]]:
    """What the Policy Head is not, and what it is, if there is one."""
    head = [] if reasoner.policy_head is None else list(reasoner.policy_head.parameters())
    inside = {id(parameter) for parameter in head}
    body = [parameter for parameter in reasoner.parameters() if id(parameter) not in inside]
    return [body, head] if head else [body]


def _note(at: _State) -> str:
    record = at.curve[-1]
    return (
        f"reward {record['reward']:.3f} kl {record['kl']:.4f} depth {record['mean_depth']:.2f} "
        f"best step {at.best_step}"
    )
