"""latent_sft: Stage 2 of the paper, reason in hidden states before answering.

Every prefix of every training history becomes a branch: `<s>`, as many latent steps as its rationale has segments,
`<e>`, the answer. The loss is the answer's cross-entropy, plus the distance of every latent step to its anchor, plus
the Policy Head's cross-entropy against the depth (paper section 3). Starts from the Stage-1 checkpoint.
"""

import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.errors import ConfigError
from lasar.training.sections import Validation

if TYPE_CHECKING:
    from lasar.data.interactions import TrainSequence
    from lasar.model.reasoner import LatentReasoner


@dataclass(frozen=True, kw_only=True)
class Loop(StageConfig):
    """The latent loop and the Policy Head."""

    depth: Literal["rationale"] | Annotated[int, pydantic.Field(ge=0)] = "rationale"
    """Latent steps: as many as the rationale has segments, later chosen by the Policy Head; or a number, 0: none."""
    feedback: Literal["raw", "norm_matched", "soft_token"] = "raw"
    """What a slot receives: the hidden state before it, that at token embeddings' norm, or the expected embedding."""
    early_answers: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """Share of training samples answered after a random number of their steps: the model learns to stop early."""
    train_tokens: bool = True
    """Train the rows of tokens, too; false keeps what Stage 1 learnt about items and codes, and trains the layers."""
    step_embeddings: bool = False
    """Add an embedding of its own to what each slot receives (ReaRec's; the paper has none)."""
    markers: Literal["opening", "mean"] = "opening"
    """Where `<s>` and `<e>` start, if untrained: at the embedding of what precedes an answer, or at the mean."""
    closing: Literal["marker", "opening"] = "marker"
    """Between the last step and the answer: `<e>`, as in the paper, or once more the token that reasoning left from."""
    head_width: Annotated[int, pydantic.Field(ge=1)] = 256
    """Hidden width of the Policy Head."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """How to train Stage 2."""

    in_ranks = True
    loop: Loop = field(default_factory=Loop)
    """The latent loop and the Policy Head."""
    alignment: Literal["kl", "mse", "cosine", "none"] = "kl"
    """Distance of a latent step to its anchor; `kl` is the paper's, bidirectional, over the hidden dimensions."""
    alignment_share: Annotated[float, pydantic.Field(ge=0)] = 0.2
    """Alignment term as a share of the cross-entropy at the start; fixes its weight (the paper's alpha)."""
    depth_weight: Annotated[float, pydantic.Field(ge=0)] = 0.1
    """Weight of the Policy Head's cross-entropy (the paper's beta)."""
    epochs: Annotated[int, pydantic.Field(ge=1)] = 4
    """Passes over the training histories."""
    learning_rate: Annotated[float, pydantic.Field(gt=0)] = 6e-4
    """Peak learning rate; a tenth of Stage 1's is the paper's choice for a pre-trained model (5e-5)."""
    weight_decay: Annotated[float, pydantic.Field(ge=0)] = 0.1
    """AdamW weight decay of matrices."""
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.15
    """Of embeddings and residual branches; 0 suits a pre-trained model."""
    batch_tokens: Annotated[int, pydantic.Field(ge=16)] = 8192
    """Tokens per batch, branches and padding included."""
    accumulate: Annotated[int, pydantic.Field(ge=1)] = 1
    """Batches per optimizer step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type; `auto`: bf16 where this machine multiplies it faster."""
    ema_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """Decay of the running average of weights that is validated and kept; 0 is off."""
    split_orders: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.5
    """Share of orders that are split in two at random, each epoch anew; only data with orders has any."""
    probe_users: Annotated[int, pydantic.Field(ge=1)] = 300
    """Training users on which the loop is measured after every epoch."""
    validation: Validation = field(default_factory=Validation)
    """How the best epoch is found."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare", "quantize", "sft", "anchor")


def sources(config: Config) -> tuple[Path, ...]:
    """Files read outside the run folder: none."""
    return ()


def run(config: Config, context: StageContext) -> None:
    """Train, keep the best epoch on validation N@10, save model, Policy Head and settings."""
    import torch

    from lasar.cot.anchors import AnchorStore
    from lasar.data.interactions import SPLIT_VALID, Interactions
    from lasar.decoding.ranker import Ranker
    from lasar.model.reasoner import save_reasoner
    from lasar.prompts.latent_batches import LatentBatch, latent_batches
    from lasar.prompts.text_tokens import TOKENIZER_FILE
    from lasar.sid.catalog import SidCatalog
    from lasar.training.estimate import Phase, rehearse_and_fit, say
    from lasar.training.fit import FitPlan, write_curve
    from lasar.training.latent_objective import LatentObjective
    from lasar.training.validation import answer_nll, validation_metrics

    interactions = Interactions.load(context.inputs["prepare"])
    catalog = SidCatalog.load(context.inputs["quantize"])
    store = AnchorStore.load(context.inputs["anchor"])
    if config.loop.depth == "rationale" or (config.loop.depth and config.alignment != "none"):
        store.require(f"loop.depth={config.loop.depth}, alignment={config.alignment}")
    reasoner = _initial_reasoner(config, context, max_depth=store.max_depth)
    depth = reasoner.settings.fixed_depth
    ranker = Ranker(reasoner, codes_IL=catalog.codes_IL)
    sequences = interactions.train_sequences(reserved=False)
    valid = interactions.cases(SPLIT_VALID).subset(config.validation.users, context.seed)

    def batches(
        epoch: int, chosen: "list[TrainSequence]" = sequences, plain: bool = False
    ) -> list[LatentBatch]:
        return latent_batches(
            chosen, ranker.tokens_IL, vocabulary=reasoner.vocabulary, steps=store.steps, max_depth=store.max_depth,
            depth=depth, fallback_depth=store.typical_depth, batch_tokens=config.batch_tokens, seed=context.seed,
            train_targets=interactions.train_targets, epoch=epoch, split_orders=0.0 if plain else config.split_orders,
            early_answers=0.0 if plain else config.loop.early_answers,
        )  # fmt: skip

    objective = LatentObjective(
        reasoner=reasoner, trie=ranker.trie, fetch=lambda index_S: torch.from_numpy(store.vectors_AD[index_S.numpy()]),
        alignment=config.alignment, alpha=0.0, beta=config.depth_weight if depth is None else 0.0,
    )  # fmt: skip
    some = sequences[:: max(1, len(sequences) // config.probe_users)]
    probe = partial(objective.probe, batches(0, some, plain=True))
    say("latent_sft: measures where it begins")
    start = {"stage1_nll": answer_nll(ranker, valid, depth=0), "nll": answer_nll(ranker, valid)} | probe()
    if config.alignment != "none" and start.get("probe_alignment"):
        alpha = config.alignment_share * start["probe_ce"] / start["probe_alignment"]
        objective = replace(objective, alpha=alpha)
    plan = FitPlan(
        epochs=config.epochs, learning_rate=config.learning_rate, weight_decay=config.weight_decay,
        accumulate=config.accumulate, precision=config.precision, ema_decay=config.ema_decay,
        patience=config.validation.patience, seed=context.seed,
    )  # fmt: skip
    (result,) = rehearse_and_fit(
        reasoner, phases=[Phase(name="latent_sft", plan=plan, batches=batches)], loss=objective, cases=valid,
        scratch=context.scratch, shard=context.shard_layers, always=probe,
        validate=lambda few: {"nll": answer_nll(ranker, few)}
        | validation_metrics(ranker, few, exclude_seen=not interactions.has_repeats),
    )  # fmt: skip
    save_reasoner(reasoner, context.output)
    if (context.inputs["sft"] / TOKENIZER_FILE).is_file():
        shutil.copy(context.inputs["sft"] / TOKENIZER_FILE, context.output / TOKENIZER_FILE)
    write_curve(context.output / "curve.jsonl", result.curve)
    depths_Q = ranker.rank(valid.histories, valid.baskets, k=1, beam_width=1).depths_Q
    facts = {
        **result.facts(), "validation_users": len(valid), "end": {"nll": answer_nll(ranker, valid)} | probe(),
        "valid_depths": [int((depths_Q == n).sum()) for n in range(store.max_depth + 1)],
        "teacher": read_json(context.inputs["anchor"] / "summary.json")["teacher"],
        "alignment": config.alignment, "alpha": objective.alpha, "start": start,
    }  # fmt: skip
    write_json(context.output / "metrics.json", facts)


def _initial_reasoner(config: Config, context: StageContext, *, max_depth: int) -> "LatentReasoner":
    import torch

    from lasar.model.backbone import add_residual_dropout, best_device, freeze_tokens, load_backbone
    from lasar.model.reasoner import LatentReasoner, ReasoningSettings, place_markers
    from lasar.prompts.text_tokens import TOKENIZER_FILE
    from lasar.prompts.vocabulary import Vocabulary

    fixed = None if config.loop.depth == "rationale" else config.loop.depth
    if fixed is not None and fixed > max_depth:
        raise ConfigError(
            f"latent_sft.loop.depth={fixed}: the anchors are for at most {max_depth} steps (anchor.max_depth)"
        )
    folder = context.inputs["sft"]
    backbone = load_backbone(folder / "model", device=best_device())
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    add_residual_dropout(backbone, config.dropout)
    # With text, they stand around that already, as they will around latents.
    if not (folder / TOKENIZER_FILE).is_file():
        place_markers(backbone, vocabulary, how=config.loop.markers)
    if not config.loop.train_tokens:
        freeze_tokens(backbone)
    settings = ReasoningSettings(
        max_depth=max_depth, head_width=config.loop.head_width, feedback=config.loop.feedback,
        step_embeddings=config.loop.step_embeddings, fixed_depth=fixed, closing=config.loop.closing,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        return LatentReasoner(backbone, vocabulary=vocabulary, settings=settings).eval()


def show(folder: Path, console: Console) -> None:
    """Print how Stage 2 began, how it ended, and which depths it chooses."""
    metrics = read_json(folder / "metrics.json")
    start, end = metrics["start"], metrics["end"]
    title = f"latent_sft: Stage 2, rationales by {metrics['teacher']}"
    table = Table("", "start", "best epoch", title=title, title_justify="left")
    table.add_row("validation nats per item without latents (Stage 1)", f"{start['stage1_nll']:.3f}", "")
    for name, label in (
        ("nll", "validation nats per item"),
        ("probe_alignment", "distance of a step to its anchor"),
        ("probe_depth_accuracy", "depth accuracy on training rows"),
        ("probe_norm_ratio", "norm fed back / token embedding"),
    ):
        if name in end:
            table.add_row(label, f"{start[name]:.3f}", f"{end[name]:.3f}")
    table.add_row("validation N@10", "", f"{metrics['valid_ndcg@10']:.4f}")
    console.print(table)
    total = sum(metrics["valid_depths"]) or 1
    shares = [f"{depth}: {count / total:.0%}" for depth, count in enumerate(metrics["valid_depths"]) if count]
    console.print(f"depth chosen on validation users: {', '.join(shares)}", highlight=False)
