"""Opening a trained artifact to evaluate it, whether it is our model or a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lasar.baselines.explicit_cot import WRITING_FILE, load_writing
from lasar.baselines.ranking import Items
from lasar.baselines.trained import FACTS_FILE, Trained
from lasar.decoding.counts import COUNTS_FILE, Counts
from lasar.decoding.ranked import Ranked
from lasar.errors import ConfigError
from lasar.model.backbone import best_device
from lasar.model.precision import PrecisionChoice
from lasar.model.reasoner import Depth

Rank = Callable[[list[Items], list[Items], Depth], Ranked]


@dataclass(frozen=True)
class Opened:
    """A trained model, ready.

    Attributes:
        rank: histories, baskets and depth to lists.
        engine: which path computes, in which precision.
    """

    rank: Rank
    engine: str


def open_ranker(
    folder: Path,
    *,
    prepare: Path,
    quantize: Path,
    device: str,
    k: int,
    beam_width: int,
    exclude_seen: bool,
    seed: int,
    precision: PrecisionChoice = "fp32",
) -> Opened:
    """Open a trained model.

    Args:
        folder: artifact of the stage that trained it.
        prepare: artifact with the items.
        quantize: artifact with the semantic IDs; a baseline brings its own.
        device: `auto`, `cpu`, or a torch device.
        k: length of the lists.
        beam_width: of models that search.
        exclude_seen: leave out items of the history.
        seed: of depths that are sampled.
        precision: of a generative model on CPUs; see `Recommender.load`.

    Raises:
        ArtifactError: an artifact is missing or damaged.
        ConfigError: the device does not exist; later, a depth is asked of a model that has none.
    """
    if not (folder / FACTS_FILE).is_file():
        from lasar.recommender import Recommender

        recommender = Recommender.from_artifacts(
            prepare=prepare, quantize=quantize, model=folder, device=device, precision=precision
        )
        if (folder / WRITING_FILE).is_file():
            recommender.ranker.reasoner = load_writing(folder, recommender.ranker.reasoner.backbone)
        return Opened(
            lambda histories, baskets, depth: recommender.rank(
                histories, baskets, k=k, beam_width=beam_width, exclude_seen=exclude_seen, depth=depth, seed=seed
            ),
            engine=recommender.ranker.engine,
        )  # fmt: skip
    trained = Trained.load(
        folder, device=best_device() if device == "auto" else device, beam_width=beam_width
    )
    counts = Counts.load(folder) if (folder / COUNTS_FILE).is_file() else None
    none = np.zeros(0, np.int64)

    def rank(histories: Sequence[Items], baskets: Sequence[Items], depth: Depth) -> Ranked:
        if depth not in ("auto", 0):
            raise ConfigError(f"evaluate.depth: {folder.name} has no depth to choose, got {depth}; use auto")
        wide = k if counts is None else max(k, beam_width)
        items_QK, scores_QK = trained.recommend(histories, baskets, wide, exclude_seen=exclude_seen)
        if counts is not None:
            seen = [np.unique(history).astype(np.int64) if exclude_seen else none for history in histories]
            items_QW, scores_QW = counts.blend(
                items_QK, scores_QK, histories, baskets, listed=seen, allow=False
            )
            items_QK, scores_QK = items_QW[:, :k], scores_QW[:, :k]
        return Ranked(items_QK, scores_QK, np.zeros(len(histories), dtype=np.int32))

    return Opened(rank, engine="fp32")
