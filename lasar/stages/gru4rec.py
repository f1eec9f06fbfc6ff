"""gru4rec: a baseline, GRU4Rec with full softmax cross-entropy (see docs/stages/baseline.md)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pydantic

from lasar.artifacts import StageContext
from lasar.config import StageConfig
from lasar.stages.baseline import Training, show, train

__all__ = ["Config", "inputs", "run", "show", "sources"]


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How to train GRU4Rec."""

    by_default = False  # only recipes that list it run it
    in_ranks = True

    max_history: Annotated[int, pydantic.Field(ge=1)] = 50
    """Items of a history that the model sees; the newest are kept."""
    hidden_size: Annotated[int, pydantic.Field(ge=1)] = 128
    """Width of item embeddings and hidden states."""
    num_layers: Annotated[int, pydantic.Field(ge=1)] = 1
    """Recurrent layers."""
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.3
    """Of item embeddings, between layers, and of states."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 30
    """Passes over the training histories."""
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 3e-3
    """Peak learning rate."""
    batch_tokens: Annotated[int, pydantic.Field(ge=2)] = 1024
    """History items per batch, padding included."""
    training: Training = field(default_factory=Training)
    """What is the same for every baseline."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare",)


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Train, keep the best epoch on validation N@10, save."""
    names = ("max_history", "hidden_size", "num_layers", "dropout")
    train(
        "gru4rec", context, settings={name: getattr(config, name) for name in names},
        epochs=config.epochs, learning_rate=config.learning_rate, batch_tokens=config.batch_tokens,
        training=config.training,
    )  # fmt: skip
