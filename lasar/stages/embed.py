"""embed: one vector per item, from its text, from who is bought with it, or from both.

Reads `prepare`; writes `item_embeddings` [num_items, width]. Collaborative vectors use training events only.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.errors import ConfigError, DataError
from lasar.ranks import ranks
from lasar.sid.given import given_vectors
from lasar.sid.text_encoder import DEFAULT_TEXT_MODEL, local_model_folder, sharded_encoder

EMBEDDINGS_FILE = "embeddings.safetensors"


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Fields of the recipe section `embed`."""

    in_ranks = True
    kind: Literal["text", "collaborative", "fused", "given"] = "fused"
    """Vectors from item text, from co-occurrence in training histories, from both side by side, or from a file."""
    vectors: str | None = None
    """`given`: Parquet with `item_id` and `vector` (a list of numbers), a row for every item at least."""
    text_model: str = DEFAULT_TEXT_MODEL
    """sentence-transformers model: a local folder or a hub id. `lasar data get all-minilm-l6-v2` fetches the
    default; `ngrams` needs none, and sees shared words only."""
    max_tokens: int = 128
    """Longer texts are cut (at most at the model's own limit)."""
    batch_size: int = 64
    """Texts per forward pass of the text model."""
    shard_size: int = 512
    """Distinct texts per shard; a killed stage repeats at most one shard."""
    window: int = 5
    """Two items co-occur when one user took them at most this many orders (events, without timestamps)
    apart."""
    collaborative_width: int = 96
    """Width of the collaborative vectors."""
    normalise: Literal["l2", "whiten"] = "l2"
    """How each part is scaled: every vector to length 1, or whitened (equal variance in every direction)."""
    text_weight: float = 1.0
    """`fused`: share of the text part in squared distances."""
    collaborative_weight: float = 1.0
    """`fused`: share of the collaborative part in squared distances."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare",)


def sources(config: Config) -> tuple[Path, ...]:
    """The text model's folder, when it is local and used."""
    _check(config)
    if config.kind == "given":
        path = Path(config.vectors or "")
        if not path.is_file():
            raise DataError(f"embed.vectors: {config.vectors}: no such file")
        return (path,)
    folder = None if config.kind == "collaborative" else local_model_folder(config.text_model)
    return () if folder is None else (folder,)


def run(config: Config, context: StageContext) -> None:
    """Compute, scale and join the vectors; write them with a summary of what was missing."""
    from safetensors.numpy import save_file

    from lasar.data.interactions import ItemTable
    from lasar.sid.fusion import concatenate, normalise

    _check(config)
    prepared = context.inputs["prepare"]
    parts: list[tuple[float, NDArray[np.float32]]] = []
    summary: dict[str, object] = {"kind": config.kind}
    if config.kind == "given":
        given = given_vectors(Path(config.vectors or ""), ItemTable.load(prepared).item_ids)
        parts.append((1.0, normalise(given, np.ones(len(given), dtype=bool), how=config.normalise)))
    if config.kind in ("text", "fused"):
        text_vectors, has_text = _text_part(config, prepared, context.scratch)
        parts.append((config.text_weight, normalise(text_vectors, has_text, how=config.normalise)))
        summary |= {"text_width": text_vectors.shape[1], "items_without_text": int((~has_text).sum())}
    if ranks().rank:
        return  # texts are what processes share
    if config.kind in ("collaborative", "fused"):
        vectors, has_company = _collaborative_part(config, prepared)
        scaled = normalise(vectors, has_company, how=config.normalise)
        # No co-occurrence is not an average taste: such items sit at the origin, told apart by their text.
        scaled[~has_company] = 0
        parts.append((config.collaborative_weight, scaled))
        summary |= {
            "collaborative_width": vectors.shape[1],
            "items_without_cooccurrence": int((~has_company).sum()),
        }
    embeddings = concatenate(parts) if config.kind == "fused" else parts[0][1]
    save_file({"item_embeddings": np.ascontiguousarray(embeddings)}, context.output / EMBEDDINGS_FILE)
    summary |= {"num_items": embeddings.shape[0], "width": embeddings.shape[1]}
    write_json(context.output / "summary.json", summary)


def show(folder: Path, console: Console) -> None:
    """Print the summary of an `embed` artifact."""
    table = Table(title="item vectors", show_header=False)
    for key, value in read_json(folder / "summary.json").items():
        table.add_row(key.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    console.print(table)


def _check(config: Config) -> None:
    for field in ("max_tokens", "batch_size", "shard_size", "collaborative_width"):
        if getattr(config, field) < 1:
            raise ConfigError(f"embed.{field}: must be at least 1, got {getattr(config, field)}")
    if (config.kind == "given") != (config.vectors is not None):
        raise ConfigError(
            "embed.vectors: is the file of kind=given, and of no other kind; set both or neither"
        )
    if config.window < 0:
        raise ConfigError(f"embed.window: must not be negative, got {config.window}")
    weights = (config.text_weight, config.collaborative_weight)
    if min(weights) < 0 or max(weights) <= 0:
        raise ConfigError(f"embed.text_weight, embed.collaborative_weight: not both positive or 0: {weights}")


def _text_part(
    config: Config, prepared: Path, scratch: Path
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Vector of every item's text, and which items have one."""
    from lasar.data.interactions import ItemTable

    texts = [text.strip() for text in ItemTable.load(prepared).texts]
    has_text = np.array([bool(text) for text in texts], dtype=bool)
    if not has_text.any():
        raise DataError(f"{prepared / 'items.parquet'}: no item has text; set embed.kind=collaborative")
    encode = sharded_encoder(
        config.text_model, batch_size=config.batch_size, max_tokens=config.max_tokens,
        folder=scratch / "texts", shard_size=config.shard_size,
    )  # fmt: skip
    encoded = encode([text for text in texts if text])
    vectors = np.zeros((len(texts), encoded.shape[1]), dtype=np.float32)
    vectors[has_text] = encoded
    return vectors, has_text


def _collaborative_part(config: Config, prepared: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Vector of every item's company in training events, and which items have company at all."""
    from lasar.data.interactions import SPLIT_TRAIN, Interactions
    from lasar.sid.collaborative import collaborative_vectors

    events = Interactions.load(prepared)
    trained = events.split == SPLIT_TRAIN
    vectors = collaborative_vectors(
        events.user_index[trained],
        events.basket[trained],
        events.item_index[trained],
        num_items=events.num_items,
        width=config.collaborative_width,
        window=config.window,
    )
    has_company = np.asarray(vectors.any(axis=1))
    if config.kind == "collaborative" and not has_company.any():
        raise DataError(
            f"{prepared / 'interactions.parquet'}: no two items co-occur in training; use embed.kind=text"
        )
    return vectors, has_company
