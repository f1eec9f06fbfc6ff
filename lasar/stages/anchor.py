"""anchor: cut rationales into segments, and find where each lies in the hidden space of the Stage-1 backbone.

Reads `prepare`, `quantize`, `rationalize` and `sft`; writes a vector for every step that Stage 2 aligns with (paper
section 3). The backbone is frozen: the anchors are computed once.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray
from rich.console import Console

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.errors import ArtifactError, ConfigError
from lasar.sid.text_encoder import DEFAULT_TEXT_MODEL, Encode, local_model_folder, sharded_encoder

if TYPE_CHECKING:
    from lasar.cot.anchor_sources import Source
    from lasar.cot.rows import TrainingRow
    from lasar.cot.segmentation import Segmentation
    from lasar.data.interactions import Interactions, ItemTable
    from lasar.model.backbone import Backbone

logger = logging.getLogger(__name__)

Near = Callable[[int], list[int]]

_FIELD = "anchor.text_model"
_SHARD_SIZE = 512  # texts; a killed stage repeats at most one shard


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Fields of the recipe section `anchor`."""

    in_ranks = True
    source: Literal["encoder", "backbone", "none"] = "encoder"
    """Segment vectors of the text model through a learned projection; hidden states of the backbone itself (which
    needs one that knows text); or no anchors, for a catalogue without text."""
    context: Literal["alone", "in_context"] = "alone"
    """What the backbone reads: the segment alone, or the history and the rationale up to the segment's end."""
    text_model: str = DEFAULT_TEXT_MODEL
    """sentence-transformers model that segments, and is the source `encoder`: a local folder, a hub id, or `ngrams`."""
    max_tokens: Annotated[int, pydantic.Field(ge=1)] = 128
    """Longer sentences and item texts are cut."""
    batch_size: Annotated[int, pydantic.Field(ge=1)] = 32
    """Sentences per forward pass of the text model."""
    cache: Path | None = None
    """Folder where the text model's vectors outlive the stage, for other runs with the same texts; null: nowhere."""
    segments_mean: Annotated[float, pydantic.Field(ge=1)] = 3.8
    """Wanted mean number of segments of a rationale; the paper's is 3.5 to 4.2."""
    max_depth: Annotated[int, pydantic.Field(ge=1)] = 8
    """Segments of a rationale at most, and with them latent steps; the tail is merged into the last."""
    projection_users: Annotated[int, pydantic.Field(ge=1)] = 25_000
    """`encoder`: training histories that the projection is learned from at most."""
    projection_items: Annotated[int, pydantic.Field(ge=20)] = 8000
    """`encoder`: items that the projection is learned from at most."""
    rescale: bool = True
    """`encoder`: spread anchors as widely as the backbone's own states; a ridge alone leaves them near the mean."""
    batch_tokens: Annotated[int, pydantic.Field(ge=16)] = 4096
    """Tokens per batch of the backbone, padding included."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    read = () if config.source == "none" else ("rationalize",)
    return ("prepare", "quantize", *read, "sft")


def sources(config: Config) -> tuple[Path, ...]:
    """The text model's folder, when it is local.

    Raises:
        ConfigError: a sentence encoder is asked to read in context.
        DataError: there is no text model in the folder.
    """
    if config.source == "encoder" and config.context == "in_context":
        raise ConfigError(
            "anchor.context=in_context: a sentence encoder cannot read a history of semantic IDs; "
            "set anchor.context=alone, or anchor.source=backbone"
        )
    folder = None if config.source == "none" else local_model_folder(config.text_model, field=_FIELD)
    return () if folder is None else (folder,)


def run(config: Config, context: StageContext) -> None:
    """Segment, say how large the anchors will be, compute them, write them."""
    from lasar.cot import anchors
    from lasar.cot.anchor_view import segmented_examples
    from lasar.cot.rationale_reader import read_rationales
    from lasar.cot.rows import training_rows
    from lasar.cot.segmentation import segment_rationales
    from lasar.data.interactions import Interactions, ItemTable

    interactions = Interactions.load(context.inputs["prepare"])
    items = ItemTable.load(context.inputs["prepare"])
    rows = training_rows(interactions)
    backbone = _backbone(context)
    width = int(backbone.model.config.hidden_size)
    if config.source == "none":
        anchors.write_none(context.output, rows, hidden_size=width)
        facts = {"source": "none", "teacher": "nobody", "max_depth": config.max_depth, "num_rows": len(rows)}
        write_json(context.output / "summary.json", facts)
        return
    rationales = read_rationales(context.inputs["rationalize"], rows)
    encode = sharded_encoder(
        config.text_model, batch_size=config.batch_size, max_tokens=config.max_tokens,
        folder=config.cache or context.scratch / "texts", shard_size=_SHARD_SIZE, field=_FIELD,
    )  # fmt: skip
    segmentation = segment_rationales(
        rationales, encode, segments_mean=config.segments_mean, max_depth=config.max_depth
    )
    texts, anchors_S = anchors.number_anchors(segmentation.texts_S, shared=config.context == "alone")
    size = anchors.readable_size(anchors.anchor_bytes(len(texts), width))
    logger.info("anchors: %d segments, %d distinct, %d wide: %s", len(anchors_S), len(texts), width, size)
    anchors.check_disk(context.scratch, anchors.anchor_bytes(len(texts), width))
    projection: dict[str, float] | None = None
    near: Near | None = None
    if config.source == "encoder":
        source, projection, near = _encoder_source(
            config, context, backbone, interactions, items, segmentation, anchors_S, encode
        )
    else:
        source = _backbone_source(config, context, backbone, segmentation, texts, rows)
    target = context.output / anchors.ANCHORS_FILE
    anchors.write_anchors(target, source, hidden_size=width, scratch=context.scratch)
    anchors.write_rows(
        context.output,
        user_index_R=np.array([row.user_index for row in rows], dtype=np.int32),
        basket_R=np.array([row.basket for row in rows], dtype=np.int32),
        counts_R=segmentation.counts_R, anchors_S=anchors_S, texts=texts,
    )  # fmt: skip
    summary = {
        **{key: getattr(config, key) for key in ("source", "context", "text_model", "max_depth")},
        "teacher": read_json(context.inputs["rationalize"] / "summary.json")["teacher"],
        "num_rows": len(rows), "num_anchors": len(texts), "hidden_size": width, "size": size,
        "requested_segments_mean": config.segments_mean, **segmentation.facts(), "projection": projection,
        "examples": segmented_examples(rows, items.titles, segmentation, near=near),
    }  # fmt: skip
    write_json(context.output / "summary.json", summary)


def show(folder: Path, console: Console) -> None:
    """Print the histogram of segments, and a few segmented rationales."""
    from lasar.cot.anchor_view import example_lines, summary_table

    summary = read_json(folder / "summary.json")
    if summary["source"] == "none":
        console.print(f"anchor: no anchors for {summary['num_rows']:,} training rows", highlight=False)
        return
    console.print(summary_table(summary))
    for example in summary["examples"]:
        console.print("\n".join(example_lines(example)), soft_wrap=True)


def _backbone(context: StageContext) -> "Backbone":
    from lasar.model.backbone import Backbone, best_device, load_backbone
    from lasar.prompts.vocabulary import Vocabulary

    folder = context.inputs["sft"]
    model = load_backbone(folder / "model", device=best_device())
    return Backbone(model=model, vocabulary=Vocabulary.load(folder / "vocabulary.json"))


def _encoder_source(
    config: Config, context: StageContext, backbone: "Backbone", interactions: "Interactions", items: "ItemTable",
    segmentation: "Segmentation", anchors_S: NDArray[np.int32], encode: Encode,
) -> "tuple[Source, dict[str, float], Near]":  # fmt: skip
    """Learn the projection; also gives what it is worth, and a way to find the items near a segment."""
    from lasar.cot import projection
    from lasar.sid.catalog import SidCatalog

    states = projection.item_states(
        backbone.model, interactions.train_sequences(),
        backbone.vocabulary.item_tokens(SidCatalog.load(context.inputs["quantize"]).codes_IL),
        vocabulary=backbone.vocabulary, train_targets=interactions.train_targets,
        batch_tokens=config.batch_tokens, max_users=config.projection_users, seed=context.seed,
    )  # fmt: skip
    learned = projection.fit_projection(
        items.texts, encode, states, max_items=config.projection_items, seed=context.seed,
    )  # fmt: skip
    source, place = projection.place_by_encoder(
        segmentation, anchors_S, projection=learned, mean_D=states.mean_D,
        spread=states.spread if config.rescale else None,
    )  # fmt: skip

    def near(segment: int) -> list[int]:
        vectors = projection.segment_vectors([segmentation.sentences_of(segment)], segmentation.vectors_E)
        return projection.nearest_items(place(vectors), states, k=3)[0]

    return source, {**learned.facts(), "scale": place.scale, "state_spread": states.spread}, near


def _backbone_source(
    config: Config, context: StageContext, backbone: "Backbone", segmentation: "Segmentation", texts: list[str],
    rows: "list[TrainingRow]",
) -> "Source":  # fmt: skip
    from lasar.cot.anchor_sources import read_by_backbone, rows_alone, rows_in_context
    from lasar.prompts.text_tokens import load_reader
    from lasar.sid.catalog import SidCatalog

    try:
        encode = load_reader(context.inputs["sft"]).encode
    except ArtifactError as error:
        raise ArtifactError(f"anchor.source=backbone: {error}; or set anchor.source=encoder") from None
    vocabulary = backbone.vocabulary
    if config.context == "alone":
        tokens, ends = rows_alone(texts, encode, vocabulary=vocabulary)
    else:
        tokens_IL = vocabulary.item_tokens(SidCatalog.load(context.inputs["quantize"]).codes_IL)
        tokens, ends = rows_in_context(rows, segmentation, encode, vocabulary=vocabulary, tokens_IL=tokens_IL)
    return read_by_backbone(
        backbone.model, tokens, ends, pad=vocabulary.pad, batch_tokens=config.batch_tokens
    )
