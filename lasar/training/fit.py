"""The one training loop: batches times loss, in one process or in several.

What differs between stages is the batches and the loss, never the loop. The loop is exact to resume: batches are a
function of (seed, epoch), dropout of (seed, step, batch), the learning rate of the step; a checkpoint holds weights,
optimizer and running average, so an interrupted run ends with the same bytes as an undisturbed one.

Several processes (`lasar.ranks`) share the batches of each step, add up their gradients, and hold the same weights:
what comes out is what one process makes of the same recipe, but for the order in which numbers are added.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lasar.errors import ConfigError, TrainingError
from lasar.model.attention import without_plans
from lasar.model.opening import layer_of
from lasar.model.precision import Precision, PrecisionChoice, choose_precision
from lasar.progress import progress
from lasar.ranks import add_up, ranks, tell
from lasar.training.checkpoints import Pace, load_training, save_training
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


class SizedBatch(Protocol):
    """A batch that knows its number of loss terms, so that gradients are means over targets, not over batches."""

    @property
    def num_targets(self) -> int:
        """Number of loss terms."""


LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class FitPlan:
    """How to train; every value comes from the stage's config.

    Attributes:
        epochs: passes over the data.
        learning_rate: peak of the schedule (linear warm-up, cosine to a tenth).
        weight_decay: of matrices; vectors (norms, biases) have none.
        warmup_fraction: of all steps.
        accumulate: batches per optimizer step.
        max_grad_norm: gradients are clipped to this norm.
        precision: `bf16` autocast, `fp32`, or `auto`: the faster one; see `choose_precision`.
        ema_decay: of the running average of weights that is validated and kept; 0 keeps the weights themselves.
        metric: key of the validation result to maximise.
        validate_every: epochs between validations.
        patience: validations without a new best before stopping; 0 never stops early.
        seed: of dropout.
        layer_decay: each layer learns at this times the rate of the one above it; tables and what has no layer at the
            whole rate.
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 0.1
    warmup_fraction: float = 0.03
    accumulate: int = 1
    max_grad_norm: float = 1.0
    precision: PrecisionChoice = "auto"
    ema_decay: float = 0.0
    metric: str = "ndcg@10"
    validate_every: int = 1
    patience: int = 0
    seed: int = 0
    layer_decay: float = 1.0


@dataclass
class Standing:
    """Where a training is; what a checkpoint stores beside tensors."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    total_steps: int = 0
    best_metric: float = -math.inf
    best_epoch: int = -1
    since_best: int = 0
    precision: Precision | None = None
    epoch_loss: float = 0.0
    epoch_targets: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Outcome of `fit`; the model holds the best weights.

    Attributes:
        best_metric: best validation value.
        best_epoch: its epoch, counted from 1; 0 if there was no validation.
        curve: one record per epoch and per validation.
        precision: in which it was trained.
    """

    best_metric: float
    best_epoch: int
    curve: list[dict[str, float]]
    precision: Precision

    def facts(self) -> dict[str, str | float]:
        """What a stage's `metrics.json` says of it."""
        return {
            "best_epoch": self.best_epoch, "valid_ndcg@10": self.best_metric, "precision": self.precision
        }  # fmt: skip


def fit(
    model: nn.Module,
    *,
    plan: FitPlan,
    batches: Callable[[int], Sequence[SizedBatch]],
    loss: LossFunction,
    validate: Callable[[nn.Module], dict[str, float]],
    checkpoint_dir: Path,
    description: str,
) -> FitResult:
    """Train, validate, keep the best weights.

    Args:
        model: trained in place; ends with the best validated weights.
        plan: how to train.
        batches: epoch (from 0) to that epoch's batches; must be a pure function, equally long every epoch or nearly.
        loss: (model, batch) to the loss summed over the batch's targets.
        validate: model in evaluation mode to metrics; must not consume the global random state.
        checkpoint_dir: survives a kill; a later call with the same arguments continues from here.
        description: of the progress bar.
    """
    refuse_uneven(plan.accumulate, description)
    without_plans()
    optimizer = build_optimizer(model, plan)
    average = copies_of(model) if plan.ema_decay else {}
    best = copies_of(model)
    found = load_training(checkpoint_dir, model, optimizer, average=average, best=best)
    at = Standing() if found is None else Standing(**found)
    at.precision = at.precision or tell(choose_precision(plan.precision, model))
    epoch_batches = batches(at.epoch)
    # Epochs can differ by a batch, so the schedule's length is decided once, not wherever a run was killed.
    at.total_steps = at.total_steps or math.ceil(len(epoch_batches) / plan.accumulate) * plan.epochs
    pace = Pace()
    with progress(description, total=at.total_steps, start=at.step, unit="step") as advance:
        while at.epoch < plan.epochs and not (plan.patience and at.since_best >= plan.patience):
            model.train()
            while at.batch < len(epoch_batches):
                group = epoch_batches[at.batch : at.batch + plan.accumulate]
                _set_learning_rate(optimizer, scheduled(at.step, at.total_steps, plan))
                note = train_step(model, optimizer, group, loss, plan, at)
                _update_average(average, model, plan.ema_decay, at.step)
                at.batch += len(group)
                at.step += 1
                advance(note=note)
                if tell(pace.due()) if is_divided(model) else pace.due():
                    began = time.monotonic()
                    save_training(checkpoint_dir, vars(at), model, optimizer, average=average, best=best)
                    pace.saved(began)
            at.epoch, at.batch = at.epoch + 1, 0
            _end_epoch(model, average, best, plan, validate, at)
            epoch_batches = batches(at.epoch) if at.epoch < plan.epochs else []
            began = time.monotonic()
            save_training(checkpoint_dir, vars(at), model, optimizer, average=average, best=best)
            pace.saved(began)
    copy_into(model, best)
    model.eval()
    return FitResult(
        best_metric=at.best_metric, best_epoch=at.best_epoch, curve=at.curve, precision=at.precision
    )


def refuse_uneven(accumulate: int, stage: str) -> None:
    """Refuse a step whose batches do not divide among the processes.

    Raises:
        ConfigError: they do not.
    """
    size = ranks().size
    if accumulate % size:
        raise ConfigError(
            f"accumulate={accumulate} batches a step of {stage} do not divide among {size} processes; "
            f"set it to a multiple of {size}, and make batches smaller to keep the step's size"
        )


def build_optimizer(model: nn.Module, plan: FitPlan) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors do not; a group's `share` is its part of the learning rate.

    Raises:
        ConfigError: layers are to learn at rates of their own, but which weights are in which cannot be told.
    """
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    layers = [layer_of(name) for name, _ in trained(model)]
    if plan.layer_decay != 1.0 and all(layer_of(name) is None for name, _ in model.named_parameters()):
        raise ConfigError(
            f"layer_decay={plan.layer_decay:g}: this model's layers have no names that we know; set 1"
        )
    top = max((layer for layer in layers if layer is not None), default=0)
    for layer, (_, parameter) in zip(layers, trained(model), strict=True):
        below = 0 if layer is None or plan.layer_decay == 1.0 else top - layer
        part = local(parameter) is not parameter  # fused steps take parts or whole weights, not both
        groups.setdefault((below, parameter.ndim < 2, part), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": groups[below, vectors, part],
                "weight_decay": 0.0 if vectors else plan.weight_decay,
                "share": plan.layer_decay**below,
            }
            for below, vectors, part in sorted(groups)
        ],
        lr=plan.learning_rate, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip


def scheduled(step: int, total_steps: int, plan: FitPlan) -> float:
    """Learning rate of a step: linear warm-up, then cosine to a tenth of the peak."""
    warmup = max(1, round(plan.warmup_fraction * total_steps))
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return plan.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """Write one JSON line per record."""
    path.write_text("".join(json.dumps(record) + "\n" for record in curve), encoding="utf-8")


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group: Sequence[SizedBatch],
    loss: LossFunction,
    plan: FitPlan,
    at: Standing,
) -> str:
    """One optimizer step over a group of batches; the note that progress shows of it.

    Raises:
        TrainingError: the loss is not finite.
    """
    targets = sum(batch.num_targets for batch in group)
    parameters = [parameter for _, parameter in trained(model)]
    device = parameters[0].device
    gather(model)
    loss_1 = torch.zeros(1, device=device)
    for number in range(ranks().rank, len(group), ranks().size):
        torch.manual_seed(_seed_of(plan.seed, at.step, number))  # dropout: the same in whatever process
        with torch.autocast(device.type, torch.bfloat16, enabled=at.precision == "bf16"):
            summed = loss(model, group[number])
        (summed / targets).backward()
        loss_1 += summed.detach()
    add_up_gradients(model)
    step_loss = float(add_up(loss_1))
    if not math.isfinite(step_loss):
        raise TrainingError(
            f"loss is {step_loss} at step {at.step}, learning rate {plan.learning_rate:g}: training broke down; "
            "lower learning_rate, or check the input for extreme values"
        )
    clip_gradients(parameters, plan.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    at.epoch_loss += step_loss
    at.epoch_targets += targets
    return (
        f"epoch {at.epoch + 1}/{plan.epochs} loss {step_loss / targets:.3f} best {max(at.best_metric, 0):.4f}"
    )


def _seed_of(seed: int, step: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _end_epoch(
    model: nn.Module,
    average: dict[str, Tensor],
    best: dict[str, Tensor],
    plan: FitPlan,
    validate: Callable[[nn.Module], dict[str, float]],
    at: Standing,
) -> None:
    record: dict[str, float] = {
        "epoch": at.epoch,
        "step": at.step,
        "loss": at.epoch_loss / max(at.epoch_targets, 1),
    }
    at.epoch_loss, at.epoch_targets = 0.0, 0
    if at.epoch % plan.validate_every == 0 or at.epoch == plan.epochs:
        own = copies_of(model)
        if average:
            copy_into(model, average)
        model.eval()
        with torch.no_grad(), gathered(model):
            metrics = validate(model)
        record |= {f"valid_{name}": value for name, value in metrics.items()}
        if metrics[plan.metric] > at.best_metric:
            at.best_metric, at.best_epoch, at.since_best = metrics[plan.metric], at.epoch, 0
            for name, parameter in trained(model):
                put(best[name], parameter.detach())
        else:
            at.since_best += 1
        copy_into(model, own)
    at.curve.append(record)


def _update_average(average: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    if not average:
        return
    weight = max(1 - decay, 1 / (step + 2))  # a plain mean at first, so that the start is forgotten quickly
    with torch.no_grad():
        names, parameters = zip(*trained(model), strict=True)
        torch._foreach_lerp_([local(average[name]) for name in names], [local(p) for p in parameters], weight)


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]
