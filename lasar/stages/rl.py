"""rl: reinforcement learning on the recommendation itself, and on how long to think for it (paper section 3.5).

The policy of Stage 2 answers training prompts with groups of items, at a depth its Policy Head draws. Items better
than their group become more likely (GRPO), depths that pay become more likely (REINFORCE, every step at a price), and
the last latent step stays near the last anchor. The best checkpoint on validation is kept; that may be the one it
started from.
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.errors import ConfigError
from lasar.rl.sections import DepthLearning, Grpo, Guards, Rollouts

if TYPE_CHECKING:
    from lasar.rl.loop import RlPlan, RlResult


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How to train with rewards."""

    in_ranks = True
    rollouts: Rollouts = field(default_factory=Rollouts)
    """What the policy is asked, and how it answers."""
    grpo: Grpo = field(default_factory=Grpo)
    """How answers are rewarded, and what follows from it."""
    depth: DepthLearning = field(default_factory=DepthLearning)
    """REINFORCE on the Policy Head."""
    terminal_share: Annotated[float, pydantic.Field(ge=0)] = 0.02
    """Distance of the last latent step to the last anchor, as a share of the true items' cross-entropy at the start;
    fixes its weight (the paper's gamma_KL). 0 leaves it out."""
    steps: Annotated[int, pydantic.Field(ge=1)] = 200
    """Sets of rollouts."""
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 1e-4
    """Peak learning rate of the backbone; 1e-5 suits a pre-trained model."""
    max_grad_norm: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Autocast type of the updates; rollouts are always decoded as evaluation decodes."""
    guards: Guards = field(default_factory=Guards)
    """How the best checkpoint is found, and when to stop."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare", "quantize", "anchor", "latent_sft")


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: the user's own rewards."""
    from lasar.rl.rewards import reward_files

    return reward_files(config.grpo.rewards)


def run(config: Config, context: StageContext) -> None:
    """Train from the Stage-2 policy, keep the best checkpoint on validation."""
    import torch

    from lasar.cot.anchors import AnchorStore
    from lasar.cot.rows import rewarded_rows
    from lasar.data.interactions import SPLIT_VALID, Interactions
    from lasar.decoding.ranker import Ranker
    from lasar.model.backbone import best_device
    from lasar.model.reasoner import load_reasoner, save_reasoner
    from lasar.prompts.text_tokens import TOKENIZER_FILE
    from lasar.rl.depth_cost import DepthCost
    from lasar.rl.loop import reference_of, train
    from lasar.rl.objective import Objective, terminal_weight
    from lasar.rl.prompts import PromptSource
    from lasar.rl.rewards import Mixture
    from lasar.rl.users import chosen_depths, depths_by_user
    from lasar.sid.catalog import SidCatalog
    from lasar.training.fit import write_curve
    from lasar.training.shards import divided
    from lasar.training.validation import answer_nll, validation_metrics

    stage_2 = context.inputs["latent_sft"]
    interactions = Interactions.load(context.inputs["prepare"])
    catalog = SidCatalog.load(context.inputs["quantize"])
    store = AnchorStore.load(context.inputs["anchor"])
    if config.terminal_share:
        store.require(f"rl.terminal_share={config.terminal_share:g}")
    ranker = Ranker(load_reasoner(stage_2, device=best_device()), codes_IL=catalog.codes_IL)
    reasoner, device = ranker.reasoner, ranker.trie.item_of_leaf.device
    settings = reasoner.settings
    _refuse_target(config, fixed_depth=settings.fixed_depth, max_depth=settings.max_depth)
    mixture = Mixture(config.grpo.rewards, codes_IL=catalog.codes_IL)
    valid = interactions.cases(SPLIT_VALID).subset(config.guards.users, context.seed)
    exclude_seen = not interactions.has_repeats
    source = PromptSource(
        rewarded_rows(interactions), ranker.tokens_IL, vocabulary=ranker.vocabulary, steps=store.steps,
        seed=context.seed, device=device,
    )  # fmt: skip
    grpo, depth = config.grpo, config.depth
    plan = _plan(config, seed=context.seed, exclude_seen=exclude_seen)
    objective = Objective(
        reasoner=reasoner, reference=reference_of(reasoner), trie=ranker.trie,
        tokens_IL=torch.from_numpy(ranker.tokens_IL).long().to(device),
        fetch=lambda index_S: torch.from_numpy(store.vectors_AD[index_S.numpy()]),
        clip=grpo.clip, ratio=grpo.ratio, kl_weight=grpo.kl_weight, skip_silent=grpo.skip_silent,
        depth_weight=depth.weight, depth_entropy=depth.entropy, detach_h0=depth.detach_h0, updates=grpo.updates,
    )  # fmt: skip
    gamma = terminal_weight(
        objective, source.render(source.draw(0, 4 * plan.prompts), batch_size=plan.prompts),
        loss=config.terminal_share * answer_nll(ranker, valid),
    )  # fmt: skip
    with divided(reasoner, context.shard_layers):
        result = train(
            ranker, plan=plan, objective=replace(objective, terminal_weight=gamma),
            cost=DepthCost(price=depth.cost, target=depth.target, decay=depth.baseline_decay), source=source,
            judge=lambda rollouts: mixture(rollouts.items_BG.cpu().numpy(), rollouts.prompts.targets),
            validate=lambda: {"nll": answer_nll(ranker, valid)}
            | validation_metrics(ranker, valid, exclude_seen=exclude_seen),
            checkpoint_dir=context.scratch / "checkpoint",
        )  # fmt: skip
    save_reasoner(reasoner, context.output)
    if (stage_2 / TOKENIZER_FILE).is_file():
        shutil.copy(stage_2 / TOKENIZER_FILE, context.output / TOKENIZER_FILE)
    write_curve(context.output / "curve.jsonl", result.curve)
    depths_Q, entropy_Q = chosen_depths(ranker, valid)
    users = depths_by_user(
        depths_Q, entropy_Q, valid, train_counts=interactions.train_counts(), max_depth=settings.max_depth
    )
    outcome = {
        "validation_users": len(valid),
        "terminal_weight": gamma,
        "depths": [int((depths_Q == n).sum()) for n in range(settings.max_depth + 1)],
        "users": users,
    }
    write_json(context.output / "metrics.json", _outcome(result, config.depth.target) | outcome)


def _outcome(result: "RlResult", target: float | None) -> dict[str, Any]:
    from lasar.rl.guards import verdict

    start, end = (_validated(result.curve[step]) for step in (0, result.best_step))
    return {
        "kept": "rl" if result.best_step else "latent_sft",
        "verdict": verdict(improved=result.best_step > 0, start=start, end=end, target=target),
        "stopped": result.stopped,
        "steps": result.steps,
        "best_step": result.best_step,
        "start": start,
        "end": end,
    }


def _plan(config: Config, *, seed: int, exclude_seen: bool) -> "RlPlan":
    from lasar.rl.guards import Bounds
    from lasar.rl.loop import RlPlan

    asked, guards = config.rollouts, config.guards
    return RlPlan(
        steps=config.steps, learning_rate=config.learning_rate, head_learning_rate=config.depth.learning_rate,
        prompts=asked.prompts, accumulate=asked.accumulate, replay=asked.replay, group_size=asked.group_size,
        beam_width=asked.beam_width, how=asked.how, exclude_seen=exclude_seen, scale=config.grpo.scale,
        max_grad_norm=config.max_grad_norm, precision=config.precision, validate_every=guards.validate_every,
        step_worth=guards.step_worth, bounds=Bounds(max_kl=guards.max_kl, min_entropy=guards.min_entropy),
        seed=seed,
    )  # fmt: skip


def _refuse_target(config: Config, *, fixed_depth: int | None, max_depth: int) -> None:
    target = config.depth.target
    if target is not None and fixed_depth is not None:
        raise ConfigError(
            f"rl.depth.target={target:g}: latent_sft trained this model to reason for {fixed_depth} steps always; "
            "set null"
        )
    if target is not None and target > max_depth:
        raise ConfigError(f"rl.depth.target={target:g}: this model reasons for at most {max_depth} steps")


def _validated(record: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("valid_"): value for name, value in record.items() if name.startswith("valid_")}


def show(folder: Path, console: Console) -> None:
    """Print what RL did to validation, and whether it was kept."""
    metrics = read_json(folder / "metrics.json")
    start, end = metrics["start"], metrics["end"]
    table = Table(title=f"rl: {metrics['steps']} steps", title_justify="left")
    for column in (f"{metrics['validation_users']:,} validation users", "Stage 2", "kept"):
        table.add_column(column, justify="right" if column in ("Stage 2", "kept") else "left")
    for name, label, form in (
        ("ndcg@10", "N@10", ".4f"),
        ("hr@10", "HR@10", ".4f"),
        ("nll", "nats per item", ".3f"),
        ("mean_depth", "latent steps", ".2f"),
    ):
        if name in start and name in end:
            table.add_row(label, f"{start[name]:{form}}", f"{end[name]:{form}}")
    console.print(table)
    console.print(metrics["verdict"], highlight=False)
    if metrics["stopped"]:
        console.print(metrics["stopped"], highlight=False)
