"""sft: Stage 1 of the paper, ground the semantic IDs.

Plain next-code training over whole histories: one pass over a user trains every prefix. The backbone is a preset from
scratch or any Hugging Face causal LM. Validation is the real task, ranking by beam search, and the best epoch is kept.
Beyond the paper: text tasks (of LC-Rec and OneRec-Think) may stand among the histories; they are off by default.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.model.presets import PRESETS, check_backbone, check_start
from lasar.prompts.text_tasks import asked_sources, shares
from lasar.training.sections import Text, Validation, Weights, check_phases

if TYPE_CHECKING:
    from lasar.data.interactions import EvalCases
    from lasar.model.backbone import Backbone
    from lasar.sid.catalog import SidCatalog
    from lasar.training.fit import FitPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How to train Stage 1."""

    in_ranks = True

    backbone: str = "1m"
    """A preset trained from scratch (tiny, 500k, 1m, 4m, 12m), or the path or hub id of a causal LM."""
    weights: Weights = field(default_factory=Weights)
    """Where the weights start, and which of them are trained."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 20
    """Passes over the training histories."""
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 3e-3
    """Peak learning rate; 5e-4 is the paper's for a pre-trained 0.6B model."""
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.1
    """AdamW weight decay of matrices."""
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.15
    """Of embeddings and residual branches; presets only."""
    loss_vocab: Literal["trie", "level", "sid", "full"] = "trie"
    """What a code's probability is normalised over, in training and decoding alike: the codes that exist after its
    prefix, its level's codes, all codes, or the whole vocabulary."""
    max_history: Annotated[int, pydantic.Field(ge=1)] = 50
    """Items of a history that the model sees; the newest are kept."""
    batch_tokens: Annotated[int, pydantic.Field(ge=16)] = 4096
    """Tokens per batch, padding included."""
    accumulate: Annotated[int, pydantic.Field(ge=1)] = 1
    """Batches per optimizer step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type; `auto`: bf16 where this machine multiplies it faster."""
    ema_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """Decay of the running average of weights that is validated and kept; 0 is off."""
    split_orders: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Share of orders that are split in two at random, each epoch anew; only data with orders has any."""
    text: Text = field(default_factory=Text)
    """Text tasks among the histories."""
    validation: Validation = field(default_factory=Validation)
    """How the best epoch is found."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    extra = ("rationalize",) if "rationales" in asked_sources(config.text.tasks) else ()
    return ("prepare", "embed", "quantize", *extra)


def sources(config: Config) -> tuple[Path, ...]:
    """A backbone given as a local folder.

    Raises:
        ConfigError: the backbone is neither a preset, a folder nor a hub id, or its new rows cannot start as asked.
    """
    check_backbone(config.backbone)
    check_start(config.weights.code_init, config.backbone)
    check_phases(config.weights, config.text, backbone=config.backbone)
    folder = Path(config.backbone)
    return (folder,) if folder.is_dir() else ()


def run(config: Config, context: StageContext) -> None:
    """Train, keep the best epoch on validation N@10, save a model folder."""
    import torch

    from lasar.data.interactions import SPLIT_VALID, Interactions
    from lasar.decoding.ranker import Ranker
    from lasar.model.backbone import best_device, move, num_parameters, save_backbone
    from lasar.model.reasoner import without_reasoning
    from lasar.prompts.batches import TreeBatch, epoch_batches
    from lasar.prompts.text_tasks import TextBatch
    from lasar.prompts.text_tokens import keep_tokenizer
    from lasar.sid.catalog import SidCatalog
    from lasar.training.estimate import rehearse_and_fit
    from lasar.training.fit import write_curve
    from lasar.training.losses import tree_loss
    from lasar.training.phases import stage1_phases
    from lasar.training.text_loss import text_loss
    from lasar.training.text_sources import load_text
    from lasar.training.validation import validation_metrics

    interactions = Interactions.load(context.inputs["prepare"])
    catalog = SidCatalog.load(context.inputs["quantize"])
    text = load_text(
        context.inputs, num_rows=shares(config.text.tasks, config.text.rows_per_epoch), backbone=config.backbone,
        vocabulary_size=config.text.vocabulary, max_tokens=config.text.max_tokens, seed=context.seed,
        batch_tokens=config.batch_tokens,
    )  # fmt: skip
    orders, text_size = interactions.split_kind == "last_basket", text.size if text else 0
    backbone = _initial_backbone(config, context, catalog, orders=orders, text_size=text_size)
    vocabulary = backbone.vocabulary
    tokens_IL = vocabulary.item_tokens(catalog.codes_IL)
    sequences = interactions.train_sequences(reserved=False)
    valid = interactions.cases(SPLIT_VALID).subset(config.validation.users, context.seed)
    move(backbone.model, best_device())
    if config.weights.gradient_checkpointing:
        backbone.model.activation_checkpointing_enable({"use_reentrant": False})
    ranker = Ranker(without_reasoning(backbone.model, vocabulary=vocabulary), codes_IL=catalog.codes_IL)

    def validate(cases: "EvalCases") -> dict[str, float]:
        return validation_metrics(ranker, cases, exclude_seen=not interactions.has_repeats)

    def batches(epoch: int, words: bool = True) -> Sequence[TreeBatch | TextBatch]:
        histories = epoch_batches(
            sequences, tokens_IL, vocabulary=vocabulary, batch_tokens=config.batch_tokens, epoch=epoch,
            train_targets=interactions.train_targets, seed=context.seed, split_orders=config.split_orders,
        )  # fmt: skip
        return text.among(histories, vocabulary, tokens_IL, epoch=epoch) if text and words else histories

    def loss(model: torch.nn.Module, batch: TreeBatch | TextBatch) -> torch.Tensor:
        if isinstance(batch, TextBatch):
            return text_loss(model, batch, vocabulary=vocabulary, trie=ranker.trie)
        forget = config.weights.forget_items
        return tree_loss(model, batch, vocabulary=vocabulary, trie=ranker.trie, forget=forget).total

    phases = stage1_phases(
        _plan(config, context.seed), new_rows_first=config.weights.new_rows_first, align_first=config.text.align_first,
        backbone=backbone, batches=batches,
    )  # fmt: skip
    *before, result = rehearse_and_fit(
        backbone.model, phases=phases, loss=loss, validate=validate, cases=valid, scratch=context.scratch,
        shard=context.shard_layers,
    )  # fmt: skip
    save_backbone(backbone, context.output)
    write_curve(context.output / "curve.jsonl", result.curve)
    for phase, earlier in zip(phases, before, strict=False):
        write_curve(context.output / f"curve_{phase.name.removeprefix('sft_')}.jsonl", earlier.curve)
    if text:
        text.tokenizer.save(context.output)
    elif config.backbone not in PRESETS:
        keep_tokenizer(config.backbone, context.output)
    targets = sum(batch.num_targets for batch in batches(0) if isinstance(batch, TreeBatch))
    facts = {
        **result.facts(), "earlier": {phase.name: done.facts() for phase, done in zip(phases, before, strict=False)},
        "parameters": num_parameters(backbone.model), "validation_users": len(valid),
        "training_targets": targets // catalog.num_levels, **(text.facts() if text else {}),
    }  # fmt: skip
    write_json(context.output / "metrics.json", facts)


def _plan(config: Config, seed: int) -> "FitPlan":
    from lasar.training.fit import FitPlan

    return FitPlan(
        epochs=config.epochs, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        accumulate=config.accumulate, precision=config.precision, ema_decay=config.ema_decay,
        patience=config.validation.patience, seed=seed, layer_decay=config.weights.layer_decay,
    )  # fmt: skip


def _initial_backbone(
    config: Config, context: StageContext, catalog: "SidCatalog", *, orders: bool, text_size: int
) -> "Backbone":
    from lasar.model.backbone import build_backbone
    from lasar.model.capability import check_tree_attention
    from lasar.training.starting_rows import place_new_rows

    backbone = build_backbone(
        config.backbone, num_levels=catalog.num_levels, codebook_size=catalog.codebook_size, orders=orders,
        max_history=config.max_history, normalise=config.loss_vocab, dropout=config.dropout,
        lora_rank=config.weights.lora_rank, seed=context.seed, pretrained=config.weights.pretrained,
        text_size=text_size,
        num_items=len(catalog.codes_IL) if config.weights.item_tokens else 0,
        item_answers=config.weights.item_answers,
    )  # fmt: skip
    if config.backbone not in PRESETS:
        if config.dropout:
            logger.info("sft.dropout=%g: of presets only, a pre-trained model trains without", config.dropout)
        check_tree_attention(backbone.model, max_tokens=backbone.vocabulary.max_tokens)
    place_new_rows(
        backbone, config.weights.code_init, name=config.backbone, codes_IL=catalog.codes_IL,
        codebook_size=catalog.codebook_size, prepared=context.inputs["prepare"], embedded=context.inputs["embed"],
    )  # fmt: skip
    return backbone


def show(folder: Path, console: Console) -> None:
    """Print what was trained and how well it validates."""
    metrics = read_json(folder / "metrics.json")
    table = Table(title="sft: Stage 1", show_header=False)
    for name in ("parameters", "training_targets", "best_epoch"):
        table.add_row(name.replace("_", " "), f"{metrics[name]:,}")
    for task, count in metrics.get("text_rows_per_epoch", {}).items():
        table.add_row(f"text rows per epoch: {task}", f"{count:,}")
    label = f"N@10 of {metrics['validation_users']:,} validation users"
    table.add_row(label, f"{metrics['valid_ndcg@10']:.4f}")
    console.print(table)
