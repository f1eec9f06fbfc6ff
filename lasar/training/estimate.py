"""What a training will cost in time and memory, measured by a rehearsal of a few steps before it begins."""

import itertools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lasar.data.interactions import EvalCases
from lasar.model.precision import choose_precision
from lasar.ranks import ranks, tell
from lasar.training.fit import (
    FitPlan,
    FitResult,
    LossFunction,
    SizedBatch,
    Standing,
    build_optimizer,
    fit,
    train_step,
)
from lasar.training.shards import divided, gathered, local, trained

_SAMPLES = 4
_FEW, _SOME = 8, 64  # validation users
_PROC = Path("/proc/self")
_CLEAR_PEAK = "5"  # proc(5), clear_refs: resets the peak of the resident set


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one training.

    Attributes:
        parameters: trained.
        steps: of the optimizer.
        training_s: seconds of steps.
        validation_s: seconds of validation.
        memory: bytes at the peak: of this process on a CPU, of the device elsewhere; 0 where it cannot be told.
    """

    parameters: int
    steps: int
    training_s: float
    validation_s: float
    memory: int

    def line(self, stage: str) -> str:
        """One line for people."""
        memory = f", {self.memory / 1e9:,.1f} GB" if self.memory else ""
        return (
            f"{stage}: trains {self.parameters / 1e6:,.1f} M weights in {self.steps:,} steps; about "
            f"{_spoken(self.training_s + self.validation_s)} here "
            f"({_spoken(self.validation_s)} of it validation){memory}"
        )

    def afterwards(self, stage: str, *, seconds: float, memory: int) -> str:
        """One line for people, when it is over; early stopping makes it shorter than was said."""
        said = _spoken(self.training_s + self.validation_s)
        sizes = (
            f", {memory / 1e9:,.1f} GB (expected {self.memory / 1e9:,.1f})" if memory and self.memory else ""
        )
        return f"{stage}: took {_spoken(seconds)} (expected {said}){sizes}"


def rehearse_and_fit(
    model: nn.Module,
    *,
    plan: FitPlan,
    batches: Callable[[int], Sequence[SizedBatch]],
    loss: LossFunction,
    validate: Callable[[EvalCases], dict[str, float]],
    cases: EvalCases,
    checkpoint_dir: Path,
    description: str,
    shard: bool = False,
) -> FitResult:
    """`fit`, after one line on what it will cost; a training that goes on from a checkpoint is not rehearsed again.

    Args:
        model: trained in place.
        plan: how to train.
        batches: epoch to that epoch's batches.
        loss: of a batch.
        validate: validation users to metrics of the model.
        cases: the validation users.
        checkpoint_dir: of the training.
        description: of the training.
        shard: divide the decoder layers among processes, if there are several; see `lasar.training.shards`.
    """
    expected = None
    with divided(model, shard):
        if not checkpoint_dir.exists():
            some = [cases.subset(count, plan.seed) for count in (_FEW, _SOME)]
            expected = estimate(
                model, plan=plan, batches=batches(0), loss=loss, users=[*map(len, some), len(cases)],
                validate=[partial(validate, part) for part in some],
            )  # fmt: skip
            say(expected.line(description))
        began = time.perf_counter()
        result = fit(
            model, plan=plan, batches=batches, loss=loss, validate=lambda _: validate(cases),
            checkpoint_dir=checkpoint_dir, description=description,
        )  # fmt: skip
    if expected is not None:
        taken = time.perf_counter() - began
        say(expected.afterwards(description, seconds=taken, memory=peak(next(model.parameters()).device)))
    return result


def say(line: str) -> None:
    """Tell people, once for all processes."""
    if not ranks().rank:
        print(line, file=sys.stderr, flush=True)


def estimate(
    model: nn.Module,
    *,
    plan: FitPlan,
    batches: Sequence[SizedBatch],
    loss: LossFunction,
    validate: Sequence[Callable[[], Any]],
    users: Sequence[int],
) -> Estimate:
    """Rehearse a few steps, small batches and large ones, with an optimizer that moves nothing.

    Early stopping is left out: the estimate is of all epochs.

    Args:
        model: its weights stay as they are.
        plan: how it will be trained.
        batches: of one epoch.
        loss: of a batch.
        validate: ranks few validation users, and some more: what every validation costs, and what each user does.
        users: how many few and some are, and how many there are in all.
    """
    weights = [parameter for _, parameter in trained(model)]
    device = weights[0].device
    at = Standing(precision=tell(choose_precision(plan.precision, model)))
    still = replace(plan, learning_rate=0.0)
    optimizer = build_optimizer(model, still)
    by_size = sorted(range(len(batches)), key=lambda index: batches[index].num_targets)
    wanted = plan.accumulate
    spots = [round(q * (len(batches) - wanted) / (_SAMPLES - 1)) for q in range(_SAMPLES)]
    groups = [[batches[i] for i in by_size[max(0, spot) : max(0, spot) + wanted]] for spot in spots]
    was_training = model.training
    model.train()
    forget_peak(device)
    train_step(
        model, optimizer, groups[-1], loss, still, at
    )  # the first pays for allocations, and is the largest
    seconds = [
        timed(partial(train_step, model, optimizer, group, loss, still, at), device) for group in groups
    ]
    model.eval()
    with torch.no_grad(), gathered(model):
        validate[0]()  # the first arranges weights
        few_s, some_s = (timed(part, device) for part in validate)
    memory = peak(device)
    optimizer.state.clear()
    few, some, every = users
    validation_s = some_s + (every - some) * max(0.0, some_s - few_s) / max(1, some - few)
    model.train(was_training)
    steps = -(-len(batches) // plan.accumulate) * plan.epochs
    # Beside what the rehearsal held: the best weights, those of the moment during validation, and the average.
    copies = (2 + bool(plan.ema_decay)) * sum(local(p).nbytes for p in weights)
    return Estimate(
        parameters=sum(p.numel() for p in weights), steps=steps,
        # Trapezoids over sizes: the groups are quantiles of them.
        training_s=steps * sum((a + b) / 2 for a, b in itertools.pairwise(seconds)) / (_SAMPLES - 1),
        validation_s=validation_s * -(-plan.epochs // plan.validate_every),
        memory=memory + copies if memory else 0,
    )  # fmt: skip


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that work takes, a GPU's part of it included."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def forget_peak(device: torch.device) -> None:
    """Begin to watch `peak` anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (_PROC / "clear_refs").write_text(_CLEAR_PEAK, encoding="ascii")
    except OSError:
        return  # no such system: the peak of the process so far stands in for it


def peak(device: torch.device) -> int:
    """Most bytes held so far: by this process where `device` is a CPU, on the device elsewhere; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = (_PROC / "status").read_text(encoding="ascii")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0")
    return int(line.split()[1]) * 1024


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
