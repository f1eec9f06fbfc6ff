"""quantize: a unique semantic ID for every item.

Reads `embed` (and `prepare`, to match published IDs); writes the catalogue, the fitted quantizer (which gives
IDs to items that come later), and numbers and a plot of how good the IDs are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.errors import ArtifactError, ConfigError, DataError, require

QUALITY_FILE = "quality.json"


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Fields of the recipe section `quantize`."""

    kind: Literal["rq_kmeans", "rq_vae"] = "rq_kmeans"
    """Residual k-means, or a residual-quantized autoencoder."""
    num_levels: int = 4
    """Codes per item, the extra level of `dedup: extra_level` included."""
    codebook_size: int = 256
    """Codes per level."""
    dedup: Literal["last_level", "extra_level"] = "last_level"
    """Items with equal codes: move all but one to free codes of the last level, or number them on a level of
    its own."""
    balanced: bool = True
    """Spread items evenly over the codes of each level."""
    fit_items: int = 0
    """Items that the codebooks are learned from at most, drawn by the seed; 0: all. Every item is then assigned."""
    num_iterations: int = 25
    """`rq_kmeans`: iterations per level."""
    latent_width: int = 64
    """`rq_vae`: width of the quantized vector."""
    hidden_widths: tuple[int, ...] = (512, 256)
    """`rq_vae`: hidden layers of the encoder; the decoder mirrors them."""
    num_epochs: int = 100
    """`rq_vae`: passes over the items."""
    batch_size: int = 1024
    """`rq_vae`: items per step."""
    learning_rate: float = 1e-3
    """`rq_vae`: of Adam."""
    commitment: float = 0.25
    """`rq_vae`: weight of the commitment loss."""
    num_neighbours: int = 10
    """Quality: nearest items per item that are looked at."""
    compare_with: str | None = None
    """Quality: a file of published IDs (`.jsonl` with `id` and `sid`, or `.index.json`) to set beside
    ours."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare", "embed") if config.compare_with else ("embed",)


def sources(config: Config) -> tuple[Path, ...]:
    """The published IDs, when there are any to compare with."""
    _check(config)
    if config.compare_with is None:
        return ()
    path = Path(config.compare_with).expanduser()
    if not path.is_file():
        raise DataError(f"quantize.compare_with: {path}: no such file; give its path, or leave the field out")
    return (path,)


def run(config: Config, context: StageContext) -> None:
    """Fit, assign unique IDs, measure, write."""
    from lasar.sid.assignment import assign_items
    from lasar.sid.catalog import SidCatalog
    from lasar.sid.quality import code_quality, nearest_items, relative_error
    from lasar.sid.quality_view import plot_quality
    from lasar.sid.quantizers import QUANTIZERS, save_quantizer

    _check(config)
    require("matplotlib", extra="report")
    embeddings = _load_embeddings(context.inputs["embed"])
    capacity = config.codebook_size**config.num_levels
    if len(embeddings) > capacity:
        raise DataError(
            f"{len(embeddings):,} items do not fit into quantize.codebook_size {config.codebook_size} ** "
            f"quantize.num_levels {config.num_levels} = {capacity:,} semantic IDs; raise one of them"
        )
    extra_level = config.dedup == "extra_level"
    quantizer = QUANTIZERS[config.kind](
        num_levels=config.num_levels - extra_level,
        codebook_size=config.codebook_size,
        seed=context.seed,
        balanced=config.balanced,
        **_kind_arguments(config),
    )
    fitted = _sample(embeddings, config.fit_items, context.seed)
    quantizer.fit(fitted)
    assignment = assign_items(quantizer, embeddings, extra_level=extra_level)
    catalog = SidCatalog(assignment.codes_IL, config.codebook_size)
    catalog.save(context.output)
    save_quantizer(quantizer, context.output)

    neighbours, queries = nearest_items(embeddings, num_neighbours=config.num_neighbours, seed=context.seed)
    ours = code_quality(
        catalog.codes_IL, codebook_size=config.codebook_size, neighbours_QK=neighbours, queries_Q=queries
    )
    quality: dict[str, Any] = {
        "kind": config.kind,
        "dedup": config.dedup,
        "num_items": catalog.num_items,
        "fitted_items": len(fitted),
        "num_levels": catalog.num_levels,
        "codebook_size": catalog.codebook_size,
        "num_neighbours": config.num_neighbours,
        "collision_rate_before": round(assignment.colliding / max(catalog.num_items, 1), 6),
        "moved_items": list(assignment.moved),
        "relative_error_before": relative_error(assignment.squared_error_before, embeddings),
        "relative_error_after": relative_error(assignment.squared_error_after, embeddings),
        "codes": ours,
    }
    series: dict[str, Any] = {config.kind: ours}
    if config.compare_with is not None:
        quality["compared"] = _compare(config, context, embeddings)
        series[quality["compared"]["name"]] = quality["compared"]["codes"]
    write_json(context.output / QUALITY_FILE, quality)
    plot_quality(series, context.output / "quality.png")


def show(folder: Path, console: Console) -> None:
    """Print the quality of a `quantize` artifact, published IDs beside ours."""
    from lasar.sid.quality_view import quality_table

    console.print(quality_table(read_json(folder / QUALITY_FILE)))


def _sample(embeddings: Any, count: int, seed: int) -> Any:
    if not 0 < count < len(embeddings):
        return embeddings
    return embeddings[np.sort(np.random.default_rng(seed).choice(len(embeddings), count, replace=False))]


def _check(config: Config) -> None:
    minimum = 2 if config.dedup == "extra_level" else 1
    if config.num_levels < minimum:
        raise ConfigError(
            f"quantize.num_levels: at least {minimum} with dedup={config.dedup}, got {config.num_levels}"
        )
    for field in (
        "codebook_size",
        "num_iterations",
        "latent_width",
        "num_epochs",
        "batch_size",
        "num_neighbours",
    ):
        least = 2 if field == "codebook_size" else 1
        if getattr(config, field) < least:
            raise ConfigError(f"quantize.{field}: must be at least {least}, got {getattr(config, field)}")
    if 0 < config.fit_items < config.codebook_size or config.fit_items < 0:
        raise ConfigError(
            f"quantize.fit_items: 0 for all, or at least codebook_size={config.codebook_size}, got {config.fit_items}"
        )
    if config.learning_rate <= 0 or min(config.hidden_widths, default=1) < 1:
        raise ConfigError("quantize.learning_rate and quantize.hidden_widths: must be positive")


def _kind_arguments(config: Config) -> dict[str, Any]:
    """The constructor arguments that only one kind has."""
    if config.kind == "rq_kmeans":
        return {"num_iterations": config.num_iterations}
    return {
        "latent_width": config.latent_width,
        "hidden_widths": config.hidden_widths,
        "num_epochs": config.num_epochs,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "commitment": config.commitment,
    }


def _load_embeddings(folder: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / "embeddings.safetensors"
    try:
        return load_file(path)["item_embeddings"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); run the stage 'embed' again") from None


def _compare(config: Config, context: StageContext, embeddings: Any) -> dict[str, Any]:
    """The same numbers for published IDs, over the items they cover."""
    from lasar.sid.published import load_published_codes, match_items
    from lasar.sid.quality import code_quality, nearest_items

    (path,) = sources(config)
    items_file = context.inputs["prepare"] / "items.parquet"
    rows, codes = match_items(load_published_codes(path), items_file, path=path)
    neighbours, queries = nearest_items(
        embeddings[rows], num_neighbours=config.num_neighbours, seed=context.seed
    )
    codebook_size = int(codes.max()) + 1
    numbers = code_quality(codes, codebook_size=codebook_size, neighbours_QK=neighbours, queries_Q=queries)
    return {
        "name": path.name.split(".")[0],
        "num_items": len(rows),
        "num_levels": codes.shape[1],
        "codebook_size": codebook_size,
        "codes": numbers,
    }
