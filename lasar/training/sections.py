"""Sections of the recipe's `sft` part, some of which other training stages share; the stage's file has the rest."""

from dataclasses import dataclass, field
from typing import Annotated

import pydantic

from lasar.config import StageConfig
from lasar.errors import ConfigError
from lasar.model.presets import PRESETS, CodeStart
from lasar.prompts.text_tasks import TaskName


@dataclass(frozen=True, kw_only=True)
class Validation(StageConfig):
    """How the best epoch is found."""

    users: Annotated[int, pydantic.Field(ge=1)] = 2000
    """Validation users ranked after every epoch."""
    patience: Annotated[int, pydantic.Field(ge=0)] = 0
    """Epochs without improvement before stopping early; 0 never stops early."""


@dataclass(frozen=True, kw_only=True)
class Weights(StageConfig):
    """Where the weights start, and which of them are trained."""

    code_init: CodeStart = "vectors"
    """Where the embeddings of codes and items start: where they lie in item-vector space; in a pre-trained model also
    at the mean of their titles' tokens (`text`) or of all tokens (`mean`); in a preset also at random."""
    pretrained: bool = True
    """False gives a model folder's architecture random weights: a control for what pre-training brings."""
    new_rows_first: Annotated[int, pydantic.Field(ge=0)] = 0
    """Epochs before all others that train the embeddings of codes, items and markers alone (pre-trained models)."""
    layer_decay: Annotated[float, pydantic.Field(gt=0, le=1)] = 1.0
    """Each layer learns at this times the rate of the one above it; tables, new rows among them, at the whole rate."""
    gradient_checkpointing: bool = False
    """Compute each layer's values again in the backward pass instead of keeping them: less memory, more time."""
    lora_rank: Annotated[int, pydantic.Field(ge=0)] = 0
    """Rank of LoRA adapters on a pre-trained backbone (merged when saved); 0 trains all weights."""
    item_tokens: bool = True
    """In histories, an item's last code is a token of its own: a memory for single items (decision 0005)."""
    item_answers: bool = True
    """In answers, that token's logit is added to its last code's (decision 0008), where `loss_vocab` is `trie`."""
    forget_items: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.1
    """Share of those tokens that training replaces by plain codes, with which items added later are written."""


@dataclass(frozen=True, kw_only=True)
class Text(StageConfig):
    """Text tasks among the histories."""

    tasks: dict[TaskName, Annotated[float, pydantic.Field(gt=0)]] = field(default_factory=dict)
    """Text tasks and their weights, for example {sid_to_title: 1, title_to_sid: 1}; without any, text is off."""
    rows_per_epoch: Annotated[int, pydantic.Field(ge=1)] = 10_000
    """Prompts of all tasks together in every epoch, divided by weight."""
    align_first: Annotated[int, pydantic.Field(ge=0)] = 0
    """Epochs before training proper with text tasks, which then has none (align, then recommend); 0: never."""
    vocabulary: Annotated[int, pydantic.Field(ge=256)] = 2048
    """Tokens of a preset's own byte-level BPE; a pre-trained backbone brings its tokenizer."""
    max_tokens: Annotated[int, pydantic.Field(ge=1)] = 256
    """Longer texts are cut."""


def check_phases(weights: Weights, text: Text, *, backbone: str) -> None:
    """Refuse a phase that would have nothing to do.

    Raises:
        ConfigError: no old rows beside new ones, no text to align with, or random weights in a place that wants others.
    """
    if weights.new_rows_first and backbone in PRESETS:
        raise ConfigError(
            f"sft.weights.new_rows_first: {backbone!r} is a preset, all of whose weights are new; set 0"
        )
    if not weights.pretrained and weights.lora_rank:
        raise ConfigError(
            "sft.weights.lora_rank: adapters would stand on random layers that never learn (pretrained=false); set 0"
        )
    if not weights.pretrained and weights.code_init in ("text", "mean"):
        raise ConfigError(
            f"sft.weights.code_init={weights.code_init}: with pretrained=false no word means anything; set vectors"
        )
    if text.align_first and not text.tasks:
        raise ConfigError(
            "sft.text.align_first: there is nothing to align with; name tasks in sft.text.tasks, or set 0"
        )
