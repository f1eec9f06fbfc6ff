"""What the stages of the trained baselines share: the common settings, and training from artifact to artifact."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from lasar.baselines.trained import Method


@dataclass(frozen=True, kw_only=True)
class Training(StageConfig):
    """What is the same for every baseline, and as in Stage 1."""

    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.1
    """AdamW weight decay of matrices."""
    accumulate: Annotated[int, pydantic.Field(ge=1)] = 1
    """Batches per optimizer step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type; `auto`: bf16 where this machine multiplies it faster."""
    ema_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """Decay of the running average of weights that is validated and kept; 0 is off."""
    validation_users: Annotated[int, pydantic.Field(ge=1)] = 2000
    """Validation users ranked after every epoch; the best N@10 is kept."""
    patience: Annotated[int, pydantic.Field(ge=0)] = 0
    """Epochs without improvement before stopping early; 0 never stops early."""


def train(
    method: "Method",
    context: StageContext,
    *,
    settings: Mapping[str, Any],
    epochs: int,
    learning_rate: float,
    batch_tokens: int,
    training: Training,
    given: "Mapping[str, Tensor] | None" = None,
) -> None:
    """Train a baseline on the `prepare` artifact and write it into the output folder.

    Args:
        method: which one.
        context: of the stage.
        settings: arguments of the network.
        epochs: passes over the data.
        learning_rate: peak of the schedule.
        batch_tokens: history items per batch, padding included.
        training: what all baselines share.
        given: buffers of the network that are not learnt.
    """
    from lasar.baselines.trained import Trained
    from lasar.data.interactions import SPLIT_VALID, Interactions
    from lasar.model.backbone import num_parameters
    from lasar.training.fit import FitPlan, write_curve

    interactions = Interactions.load(context.inputs["prepare"])
    sequences = interactions.train_sequences()
    if interactions.split_kind != "last_basket":  # the next event is the task, not the next order
        sequences = [s._replace(baskets=np.arange(len(s.items), dtype=np.int32)) for s in sequences]
    valid = interactions.cases(SPLIT_VALID).subset(training.validation_users, context.seed)
    baseline = Trained(
        method, settings=settings, given=given, batch_tokens=batch_tokens, validation=valid,
        exclude_seen=not interactions.has_repeats, train_targets=interactions.train_targets,
        checkpoint_dir=context.scratch / "checkpoint",
        plan=FitPlan(
            epochs=epochs, learning_rate=learning_rate, weight_decay=training.weight_decay,
            accumulate=training.accumulate, precision=training.precision, ema_decay=training.ema_decay,
            patience=training.patience, seed=context.seed,
        ),
    ).fit(sequences, interactions.num_items)  # fmt: skip
    baseline.save(context.output)
    write_curve(context.output / "curve.jsonl", baseline.result.curve)
    facts = {
        "method": method, "parameters": num_parameters(baseline.network),
        **baseline.result.facts(),
        "validation_users": len(valid),
    }  # fmt: skip
    write_json(context.output / "metrics.json", facts)


def show(folder: Path, console: Console) -> None:
    """Print what was trained and how well it validates."""
    metrics = read_json(folder / "metrics.json")
    table = Table(title=f"{metrics['method']}: baseline", show_header=False)
    for name in ("parameters", "best_epoch"):
        table.add_row(name.replace("_", " "), f"{metrics[name]:,}")
    table.add_row(
        f"N@10 of {metrics['validation_users']:,} validation users", f"{metrics['valid_ndcg@10']:.4f}"
    )
    console.print(table)
