"""What a training will cost in time and memory, measured by a rehearsal of a few steps before it begins."""

import itertools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.training_s + self.validation_s

    def line(self, stage: str) -> str:
        """One line for people."""
        return (
            f"{stage}: trains {_counted(self.parameters)} weights in {self.steps:,} steps; about "
            f"{_spoken(self.seconds)} here ({_spoken(self.validation_s)} of it validation){_size(self.memory)}"
        )

    def afterwards(self, stage: str, *, seconds: float, memory: int) -> str:
        """One line for people, when it is over; early stopping makes it shorter than was said."""
        said = _spoken(self.seconds)
        sizes = (
            f", {memory / 1e9:,.1f} GB (expected {self.memory / 1e9:,.1f})" if memory and self.memory else ""
        )
        return f"{stage}: took {_spoken(seconds)} (expected {said}){sizes}"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One training of those that a stage does in a row, on the same weights.

    Attributes:
        name: of its checkpoint and in what is said.
        plan: how to train.
        batches: epoch to that epoch's batches.
        scope: within it, those weights can be trained that this phase trains.
        moving: how many weights that are, where some of what can be trained stays as it is; 0: all.
    """

    name: str
    plan: FitPlan
    batches: Callable[[int], Sequence[SizedBatch]]
    scope: Callable[[], AbstractContextManager[None]] = nullcontext
    moving: int = 0


def rehearse_and_fit(
    model: nn.Module,
    *,
    phases: Sequence[Phase],
    loss: LossFunction,
    validate: Callable[[EvalCases], dict[str, float]],
    cases: EvalCases,
    scratch: Path,
    always: Callable[[], dict[str, float]] = dict,
    shard: bool = False,
) -> list[FitResult]:
    """`fit` every phase, after one line on what each will cost, and one on all of them.

    A phase that goes on from a checkpoint is not rehearsed again.

    Args:
        model: trained in place.
        phases: in their order.
        loss: of a batch.
        validate: validation users to metrics of the model.
        cases: the validation users.
        scratch: holds a checkpoint of every phase.
        always: what a validation measures beside, which has nothing to do with its users.
        shard: divide the decoder layers among processes, if there are several; see `lasar.training.shards`.

    Returns:
        Of every phase.
    """
    expected: dict[str, Estimate] = {}
    for phase in phases:
        if (scratch / phase.name).exists():
            continue
        say(f"{phase.name}: rehearses a few steps and a validation, to say what it will cost")
        some = [cases.subset(count, phase.plan.seed) for count in (_FEW, _SOME)]
        with phase.scope(), divided(model, shard):
            found = estimate(
                model, plan=phase.plan, batches=phase.batches(0), loss=loss, users=[*map(len, some), len(cases)],
                validate=[partial(validate, part) for part in some], always=always,
            )  # fmt: skip
        expected[phase.name] = replace(found, parameters=phase.moving or found.parameters)
        say(expected[phase.name].line(phase.name))
    if len(expected) > 1:
        seconds = sum(found.seconds for found in expected.values())
        memory = max(found.memory for found in expected.values())
        say(f"{', '.join(expected)}: about {_spoken(seconds)} in all{_size(memory)}")
    results = []
    for phase in phases:
        began = time.perf_counter()
        with phase.scope(), divided(model, shard):
            device = next(model.parameters()).device
            forget_peak(device)
            result = fit(
                model, plan=phase.plan, batches=phase.batches, loss=loss, validate=lambda _: always() | validate(cases),
                checkpoint_dir=scratch / phase.name, description=phase.name,
            )  # fmt: skip
        results.append(result)
        if phase.name in expected:
            taken = time.perf_counter() - began
            say(expected[phase.name].afterwards(phase.name, seconds=taken, memory=peak(device)))
    return results


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
    always: Callable[[], Any] = dict,
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
        always: what every validation does beside; not a matter of users.
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
        few_s, some_s, always_s = (timed(part, device) for part in (*validate, always))
    memory = peak(device)
    optimizer.state.clear()
    few, some, every = users
    validation_s = always_s + some_s + (every - some) * max(0.0, some_s - few_s) / max(1, some - few)
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


def _size(memory: int) -> str:
    return f", {memory / 1e9:,.1f} GB" if memory else ""


def _counted(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e6 else f"{number:,}"


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
