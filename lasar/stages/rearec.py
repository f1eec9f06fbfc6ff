"""rearec: a baseline, SASRec that reasons in latent steps (see docs/stages/baseline.md)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from lasar.artifacts import StageContext
from lasar.config import StageConfig
from lasar.stages.baseline import Training, show, train

__all__ = ["Config", "inputs", "run", "show", "sources"]


@dataclass(frozen=True, kw_only=True)
class Reasoning(StageConfig):
    """The latent steps, and how they are learnt."""

    learning: Literal["erl", "prl"] = "prl"
    """Ensemble (the mean of all states answers, steps are kept apart) or progressive (the last state answers)."""
    num_steps: Annotated[int, pydantic.Field(ge=1)] = 2
    """Latent steps before every answer."""
    diversity_weight: Annotated[float, pydantic.Field(ge=0)] = 0.05
    """Weight of the KL term between steps; erl only."""
    temperature_scale: Annotated[float, pydantic.Field(ge=1)] = 2.0
    """A state n steps before the last predicts at this to the n-th times the temperature; prl only."""
    contrastive_weight: Annotated[float, pydantic.Field(ge=0)] = 0.1
    """Weight of the term that pulls a step towards its noisy twin; prl only."""
    noise: Annotated[float, pydantic.Field(ge=0)] = 0.01
    """Standard deviation of the twins' noise; prl only."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How to train ReaRec."""

    by_default = False  # only recipes that list it run it
    in_ranks = True

    max_history: Annotated[int, pydantic.Field(ge=1)] = 50
    """Items of a history that the model sees; the newest are kept."""
    hidden_size: Annotated[int, pydantic.Field(ge=1)] = 128
    """Width of item embeddings and hidden states."""
    num_layers: Annotated[int, pydantic.Field(ge=1)] = 2
    """Attention blocks."""
    num_heads: Annotated[int, pydantic.Field(ge=1)] = 2
    """Attention heads; they divide `hidden_size`."""
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.4
    """Of embeddings and residual branches."""
    temperature: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """Divides the logits, in training and ranking alike."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 30
    """Passes over the training histories."""
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 2e-3
    """Peak learning rate."""
    batch_tokens: Annotated[int, pydantic.Field(ge=2)] = 512
    """History items per batch, padding included."""
    reasoning: Reasoning = field(default_factory=Reasoning)
    """The latent steps, and how they are learnt."""
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
    names = ("max_history", "hidden_size", "num_layers", "num_heads", "dropout", "temperature")
    train(
        "rearec", context, settings={name: getattr(config, name) for name in names} | config.reasoning.as_dict(),
        epochs=config.epochs, learning_rate=config.learning_rate, batch_tokens=config.batch_tokens,
        training=config.training,
    )  # fmt: skip
