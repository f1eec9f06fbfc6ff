"""explicit_cot: a baseline, a rationale in words before every answer (see docs/stages/explicit_cot.md).

Starts from the Stage-1 checkpoint, like Stage 2, and learns from the same rationales: to write them token by token, and
to answer after them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.training.sections import Validation

if TYPE_CHECKING:
    from lasar.data.interactions import EvalCases, ItemTable
    from lasar.decoding.ranker import Ranker
    from lasar.model.backbone import Backbone
    from lasar.prompts.text_tasks import TextRow
    from lasar.prompts.text_tokens import TextTokenizer

_LOOKED_AT = 200  # validation users whose texts are measured; a few of them are kept
_KEPT = 5


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How to train explicit chain of thought."""

    by_default = False  # only recipes that list it run it
    in_ranks = True

    max_tokens: Annotated[int, pydantic.Field(ge=1)] = 128
    """Tokens of a rationale at most, in training and when answering; longer ones are cut."""
    text_vocabulary: Annotated[int, pydantic.Field(ge=256)] = 2048
    """Tokens of the byte-level BPE, where Stage 1 was trained from scratch and without text."""
    text_weight: Annotated[float, pydantic.Field(ge=0)] = 1.0
    """Weight of a word's cross-entropy; that of a code is 1."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 4
    """Passes over the training samples that have a rationale."""
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 2e-3
    """Peak learning rate; words are learnt from nothing, so a preset needs more than in Stage 2."""
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.1
    """AdamW weight decay of matrices."""
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.1
    """Of embeddings and residual branches; 0 suits a pre-trained model."""
    batch_tokens: Annotated[int, pydantic.Field(ge=16)] = 8192
    """Tokens per batch, answers and padding included."""
    accumulate: Annotated[int, pydantic.Field(ge=1)] = 1
    """Batches per optimizer step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type; `auto`: bf16 where this machine multiplies it faster."""
    ema_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """Decay of the running average of weights that is validated and kept; 0 is off."""
    validation: Validation = field(default_factory=Validation)
    """How the best epoch is found; every validation user's text is written first."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare", "quantize", "rationalize", "sft")


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Train, keep the best epoch on validation N@10, save the model, its tokenizer and what it writes."""
    from lasar.baselines.explicit_cot import WordReasoner, save_writing
    from lasar.baselines.explicit_cot_training import CotBatch, cot_batches, cot_loss
    from lasar.data.interactions import SPLIT_VALID, Interactions, ItemTable
    from lasar.decoding.ranker import Ranker
    from lasar.model.backbone import add_residual_dropout, best_device, move, num_parameters, save_backbone
    from lasar.prompts.text_tasks import Renderer
    from lasar.sid.catalog import SidCatalog
    from lasar.training.fit import FitPlan, fit, write_curve
    from lasar.training.text_sources import text_sources
    from lasar.training.validation import answer_nll, validation_metrics

    interactions = Interactions.load(context.inputs["prepare"])
    items = ItemTable.load(context.inputs["prepare"])
    catalog = SidCatalog.load(context.inputs["quantize"])
    rows = text_sources(
        ["rationales"], items=items, interactions=interactions, rationalized=context.inputs["rationalize"]
    )["rationales"]
    backbone, tokenizer = _initial_backbone(config, context, items, rows)
    move(backbone.model, best_device())
    add_residual_dropout(backbone.model, config.dropout)
    reasoner = WordReasoner(
        backbone.model, vocabulary=backbone.vocabulary, max_tokens=config.max_tokens
    ).eval()
    ranker = Ranker(reasoner, codes_IL=catalog.codes_IL)
    valid = interactions.cases(SPLIT_VALID).subset(config.validation.users, context.seed)
    render = Renderer(
        vocabulary=backbone.vocabulary, tokens_IL=ranker.tokens_IL, titles=items.titles, tokenizer=tokenizer,
        max_tokens=config.max_tokens,
    )  # fmt: skip

    def batches(epoch: int) -> list[CotBatch]:
        return cot_batches(rows, render, batch_tokens=config.batch_tokens, seed=context.seed, epoch=epoch)

    result = fit(
        backbone.model,
        plan=FitPlan(
            epochs=config.epochs, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
            accumulate=config.accumulate, precision=config.precision, ema_decay=config.ema_decay,
            patience=config.validation.patience, seed=context.seed,
        ),
        batches=batches,
        loss=lambda model, batch: cot_loss(
            model, batch, vocabulary=backbone.vocabulary, trie=ranker.trie, text_weight=config.text_weight
        ),
        validate=lambda _: {"nll": answer_nll(ranker, valid)}
        | validation_metrics(ranker, valid, exclude_seen=not interactions.has_repeats),
        checkpoint_dir=context.scratch / "checkpoint", description="explicit_cot",
    )  # fmt: skip
    save_backbone(backbone, context.output)
    tokenizer.save(context.output)
    save_writing(context.output, max_tokens=config.max_tokens)
    write_curve(context.output / "curve.jsonl", result.curve)
    lengths = [len(tokenizer.encode(row.rationale)) for row in rows]
    facts = {
        **result.facts(),
        "parameters": num_parameters(backbone.model), "validation_users": len(valid),
        "teacher": read_json(context.inputs["rationalize"] / "summary.json")["teacher"],
        "training_rows": len(rows), "rationale_tokens": sum(lengths) / len(lengths),
        "rationales_cut": sum(length > config.max_tokens for length in lengths) / len(lengths),
        "written": _looked_at(ranker, valid, tokenizer, items),
    }  # fmt: skip
    write_json(context.output / "metrics.json", facts)


def _initial_backbone(
    config: Config, context: StageContext, items: "ItemTable", rows: "list[TextRow]"
) -> "tuple[Backbone, TextTokenizer]":
    """Stage 1's model and its words; words are added where Stage 1 had none."""
    from lasar.artifacts import read_manifest
    from lasar.baselines.explicit_cot_training import with_text
    from lasar.model.backbone import Backbone, load_backbone
    from lasar.model.reasoner import place_markers
    from lasar.prompts.text_tokens import TOKENIZER_FILE, TextTokenizer, pretrained_tokenizer, train_tokenizer
    from lasar.prompts.vocabulary import Vocabulary
    from lasar.training.text_sources import tokenizer_texts

    folder = context.inputs["sft"]
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    model = load_backbone(folder / "model")
    if (folder / TOKENIZER_FILE).is_file():  # `<s>` and `<e>` stand around text already
        return Backbone(model=model, vocabulary=vocabulary), TextTokenizer.load(folder)
    place_markers(model, vocabulary, how="opening")
    if vocabulary.base_size:
        tokenizer = pretrained_tokenizer(read_manifest(folder)["config"]["backbone"])
        return Backbone(model=model, vocabulary=vocabulary), tokenizer
    tokenizer = train_tokenizer(tokenizer_texts(items, rows), config.text_vocabulary)
    return with_text(model, vocabulary, text_size=tokenizer.size, seed=context.seed), tokenizer


def _looked_at(
    ranker: "Ranker", valid: "EvalCases", tokenizer: "TextTokenizer", items: "ItemTable"
) -> dict[str, object]:
    """Lengths of what is written for validation users, and a few of the texts."""
    from lasar.baselines.explicit_cot import WordReasoner, write_texts

    assert isinstance(ranker.reasoner, WordReasoner)
    some = valid.subset(_LOOKED_AT, 0)
    texts = write_texts(ranker.reasoner, ranker.tokens_IL, some.histories, some.baskets)
    lengths = [len(text) for text in texts]
    return {
        "users": len(some),
        "mean_tokens": sum(lengths) / max(1, len(lengths)),
        "cut": sum(length == ranker.reasoner.max_tokens for length in lengths) / max(1, len(lengths)),
        "distinct": len({tuple(text) for text in texts}),
        "examples": [
            {
                "history": [items.titles[item] for item in history[-5:]],
                "targets": [items.titles[item] for item in targets[:5]],
                "text": tokenizer.decode(text),
            }
            for history, targets, text in zip(some.histories, some.targets, texts[:_KEPT], strict=False)
        ],
    }


def show(folder: Path, console: Console) -> None:
    """Print what was trained, how well it validates, and what it writes."""
    metrics = read_json(folder / "metrics.json")
    written = metrics["written"]
    table = Table(title=f"explicit_cot: rationales by {metrics['teacher']}", show_header=False)
    for name in ("parameters", "training_rows", "best_epoch"):
        table.add_row(name.replace("_", " "), f"{metrics[name]:,}")
    table.add_row(
        "tokens of a rationale / of a text written",
        f"{metrics['rationale_tokens']:.1f} / {written['mean_tokens']:.1f}",
    )
    table.add_row("texts written / different ones", f"{written['users']:,} / {written['distinct']:,}")
    table.add_row(
        f"N@10 of {metrics['validation_users']:,} validation users", f"{metrics['valid_ndcg@10']:.4f}"
    )
    console.print(table)
    for example in written["examples"][:2]:
        console.print(
            f"{escape('; '.join(example['history'][-2:]))} -> {escape(example['text'])}", highlight=False
        )
