"""tiger: a baseline, an encoder-decoder on the same semantic IDs (see docs/stages/baseline.md)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pydantic

from lasar.artifacts import StageContext
from lasar.config import StageConfig
from lasar.stages.baseline import Training, show, train

__all__ = ["Config", "inputs", "run", "show", "sources"]

_VALIDATION_BEAMS = 20  # as in Stage 1; evaluate has its own


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How to train TIGER."""

    by_default = False  # only recipes that list it run it
    in_ranks = True

    max_history: Annotated[int, pydantic.Field(ge=1)] = 20
    """Items of a history that the model sees; the newest are kept."""
    hidden_size: Annotated[int, pydantic.Field(ge=1)] = 128
    """Width of item embeddings and hidden states."""
    num_layers: Annotated[int, pydantic.Field(ge=1)] = 4
    """Blocks of the encoder, and of the decoder."""
    num_heads: Annotated[int, pydantic.Field(ge=1)] = 6
    """Attention heads; their width is `head_size`."""
    head_size: Annotated[int, pydantic.Field(ge=1)] = 64
    """Width of a head."""
    feed_size: Annotated[int, pydantic.Field(ge=1)] = 1024
    """Width inside the feed-forward layers."""
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1
    """Everywhere in the T5."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 30
    """Passes over the training histories."""
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 2e-3
    """Peak learning rate."""
    batch_tokens: Annotated[int, pydantic.Field(ge=2)] = 1024
    """History items per batch, padding included; every item is as many tokens as it has codes."""
    training: Training = field(default_factory=Training)
    """What is the same for every baseline."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare", "quantize")


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Train, keep the best epoch on validation N@10, save."""
    import torch

    from lasar.sid.catalog import SidCatalog

    catalog = SidCatalog.load(context.inputs["quantize"])
    ids = {"num_levels": catalog.num_levels, "codebook_size": catalog.codebook_size}
    names = ("max_history", "hidden_size", "num_layers", "num_heads", "head_size", "feed_size", "dropout")
    train(
        "tiger", context, settings={name: getattr(config, name) for name in names}
        | {**ids, "beam_width": _VALIDATION_BEAMS},
        epochs=config.epochs, learning_rate=config.learning_rate, batch_tokens=config.batch_tokens,
        training=config.training,
        given={"codes_IL": torch.tensor(catalog.codes_IL)},
    )  # fmt: skip
