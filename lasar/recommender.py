"""The trained recommender as a Python object: item ids in, titles and scores out."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lasar.artifacts import content_hash, read_json
from lasar.data.interactions import Interactions, ItemTable, load_user_ids
from lasar.decoding.counts import COUNTS_FILE, Counts
from lasar.decoding.ranked import Ranked
from lasar.decoding.ranker import Ranker
from lasar.engine.memory import PromptMemory
from lasar.errors import ArtifactError, ConfigError, UnknownItemError, nearest
from lasar.model.backbone import best_device
from lasar.model.precision import PrecisionChoice, choose_precision
from lasar.model.reasoner import Depth, load_reasoner
from lasar.ranks import tell
from lasar.sid.catalog import SidCatalog

_BF16_WIDTH = 256  # of a model from which on bf16 is faster at every batch size (benchmarks/engine.py)

Int32Array = NDArray[np.int32]
History = Sequence[str | Sequence[str]]

POLICY_STAGES = ("sft", "latent_sft", "rl", "blend")


class Recommendation(NamedTuple):
    """One recommended item.

    Attributes:
        item_id: the shop's id.
        title: the item's title, empty where it has none.
        score: summed log-probability of the item's codes, or the log of its mixed probability where counts are mixed in
            (`lasar.decoding.counts`); higher is better, at most 0.
    """

    item_id: str
    title: str
    score: float


class Recommender:
    """Recommends items for histories.

    Example::

        recommender = Recommender.load("runs/demo")
        recommender.recommend(["85123A", "71053"], k=5)
    """

    def __init__(self, ranker: Ranker, *, items: ItemTable, prepare: Path) -> None:
        """Combine a ranker with item ids and titles; `Recommender.load` is the usual way in."""
        self.ranker = ranker
        self.items = items
        self._prepare = prepare
        self._users: tuple[list[str], Interactions] | None = None

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        model: str | None = None,
        device: str = "auto",
        precision: PrecisionChoice = "fp32",
        prompt_memory_mb: int = 0,
    ) -> "Recommender":
        """Open a run folder.

        Args:
            run: the folder a recipe was run in.
            model: the training stage to use; the last one that has an artifact by default.
            device: `auto`, `cpu` or `cuda`.
            precision: of matrix products on CPUs: `fp32`, `bf16`, or `auto`, bf16 where that is faster. In bf16
                scores are off in the third digit.
            prompt_memory_mb: megabytes for histories seen lately, so that a user who comes back is answered faster;
                on the fused path. Scores then differ by rounding.

        Raises:
            ArtifactError: the folder is not a run, or has no trained model.
            ConfigError: `model` is not a training stage of LASAR's.
        """
        run = Path(run)
        if model is not None and model not in POLICY_STAGES:
            raise ConfigError(f"model={model!r}: not a training stage; one of {', '.join(POLICY_STAGES)}")
        if not run.is_dir():
            raise ArtifactError(
                f"{run}: no such run folder; run a recipe first, for example: lasar run recipes/demo.yaml"
            )
        stage = model or last_trained(run)
        return cls.from_artifacts(
            prepare=run / "prepare", quantize=run / "quantize", model=run / stage, device=device,
            precision=precision, prompt_memory_mb=prompt_memory_mb,
        )  # fmt: skip

    @classmethod
    def from_artifacts(
        cls,
        *,
        prepare: Path,
        quantize: Path,
        model: Path,
        device: str = "auto",
        precision: PrecisionChoice = "fp32",
        prompt_memory_mb: int = 0,
    ) -> "Recommender":
        """Open three artifacts that belong together; the rest as in `load`.

        Raises:
            ArtifactError: one is missing, or the model was trained on another catalogue.
            ConfigError: the device does not exist.
        """
        catalog = SidCatalog.load(quantize)
        refuse_mismatch(model, quantize)
        reasoner = load_reasoner(model, device=_device(device)).requires_grad_(
            False
        )  # frozen: see decision 0004
        chosen = tell(choose_precision(precision, reasoner.backbone, narrowest=_BF16_WIDTH))
        counts = Counts.load(model) if (model / COUNTS_FILE).is_file() else None
        memory = PromptMemory(prompt_memory_mb * 1_000_000) if prompt_memory_mb else None
        ranker = Ranker(reasoner, codes_IL=catalog.codes_IL, precision=chosen, counts=counts, memory=memory)
        return cls(ranker, items=ItemTable.load(prepare), prepare=prepare)

    def recommend(
        self,
        history: History,
        k: int = 10,
        *,
        exclude: Sequence[str] = (),
        allow: Sequence[str] | None = None,
        exclude_seen: bool = False,
        beam_width: int = 50,
        depth: Depth = "auto",
        seed: int = 0,
    ) -> list[Recommendation]:
        """Recommend the next items.

        Args:
            history: item ids, oldest first; a nested list is one order. May be empty.
            k: how many.
            exclude: item ids never to return.
            allow: if given, the only item ids to choose from.
            exclude_seen: never return an item of the history.
            beam_width: beams of the search (raised to `k` where smaller).
            depth: latent steps before answering: `auto` (the model chooses), `sampled`, or a number, 0 for none.
            seed: of a `sampled` depth.

        Returns:
            At most `k` recommendations, best first; fewer only if fewer items are allowed.

        Raises:
            UnknownItemError: an id is not in the catalogue; the message names the closest one.
            ConfigError: `k` is below 1, or the model was not trained for that depth.
        """
        for name, value in (("history", history), ("exclude", exclude), ("allow", allow)):
            if isinstance(value, str):
                raise ConfigError(f"{name}={value!r}: expected a list of item ids; write [{value!r}]")
        items, baskets = self.indices(history)
        return self._recommend(
            items, baskets, k, exclude=exclude, allow=allow, exclude_seen=exclude_seen, beam_width=beam_width,
            depth=depth, seed=seed,
        )  # fmt: skip

    def recommend_user(
        self,
        user_id: str,
        k: int = 10,
        *,
        exclude: Sequence[str] = (),
        allow: Sequence[str] | None = None,
        exclude_seen: bool = False,
        beam_width: int = 50,
        depth: Depth = "auto",
        seed: int = 0,
    ) -> list[Recommendation]:
        """Recommend for a user of the event log, from everything the user did; see `recommend`.

        Raises:
            UnknownItemError: the user or an item is unknown.
        """
        items, baskets = self._user_history(user_id)
        return self._recommend(
            items, baskets, k, exclude=exclude, allow=allow, exclude_seen=exclude_seen, beam_width=beam_width,
            depth=depth, seed=seed,
        )  # fmt: skip

    def indices(self, history: History) -> tuple[Int32Array, Int32Array]:
        """Item index and order number of every entry of a history.

        Raises:
            UnknownItemError: an id is not in the catalogue.
        """
        orders = [[entry] if isinstance(entry, str) else list(entry) for entry in history]
        items = self._indices([item_id for order in orders for item_id in order])
        return items, np.repeat(np.arange(len(orders), dtype=np.int32), [len(order) for order in orders])

    @cached_property
    def train_counts(self) -> NDArray[np.int64]:
        """Training events per item, [I]."""
        return Interactions.load(self._prepare).train_counts()

    def user_history(self, user_id: str) -> list[list[str]]:
        """Item ids of a known user's orders, oldest first.

        Raises:
            UnknownItemError: the user is unknown.
        """
        items, baskets = self._user_history(user_id)
        splits = np.flatnonzero(np.diff(baskets)) + 1
        return (
            [[self.items.item_ids[i] for i in order] for order in np.split(items, splits)]
            if len(items)
            else []
        )

    def rank(
        self,
        histories: Sequence[Int32Array],
        baskets: Sequence[Int32Array],
        *,
        k: int,
        beam_width: int,
        exclude_seen: bool = False,
        depth: Depth = "auto",
        seed: int = 0,
    ) -> Ranked:
        """Rank by item index, many queries at once; see `Ranker.rank`."""
        return self.ranker.rank(
            histories, baskets, k=k, beam_width=beam_width, exclude_seen=exclude_seen, depth=depth, seed=seed
        )

    def _recommend(
        self,
        items: Int32Array,
        baskets: Int32Array,
        k: int,
        *,
        exclude: Sequence[str],
        allow: Sequence[str] | None,
        exclude_seen: bool,
        beam_width: int,
        depth: Depth,
        seed: int,
    ) -> list[Recommendation]:
        if k < 1:
            raise ConfigError(f"k={k}: ask for at least 1 item")
        items_QK, scores_QK, _ = self.ranker.rank(
            [items],
            [baskets],
            k=k,
            beam_width=max(beam_width, k),
            exclude_seen=exclude_seen,
            exclude=[self._indices(exclude)],
            allow=None if allow is None else [self._indices(allow)],
            depth=depth,
            seed=seed,
        )
        return [
            Recommendation(self.items.item_ids[item], self.items.titles[item], float(score))
            for item, score in zip(items_QK[0], scores_QK[0], strict=True)
            if item >= 0
        ]

    def _indices(self, item_ids: Sequence[str]) -> Int32Array:
        return np.array([self.items.index_of(item_id) for item_id in item_ids], dtype=np.int32)

    def _user_history(self, user_id: str) -> tuple[Int32Array, Int32Array]:
        if self._users is None:
            self._users = (load_user_ids(self._prepare), Interactions.load(self._prepare))
        user_ids, events = self._users
        if user_id not in user_ids:
            raise UnknownItemError(f"no user {user_id!r} in the event log{nearest(user_id, user_ids)}")
        first, last = np.searchsorted(
            events.user_index, [user_ids.index(user_id), user_ids.index(user_id) + 1]
        )
        return events.item_index[first:last], events.basket[first:last]


def _device(name: str) -> torch.device:
    if name == "auto":
        return best_device()
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': no GPU is visible to PyTorch; use 'cpu' or 'auto'")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r}: not a PyTorch device; use 'auto', 'cpu' or 'cuda'") from None


def last_trained(run: Path) -> str:
    """The training stage that `Recommender.load` takes when it is told none.

    Raises:
        ArtifactError: the run has no trained model.
    """
    trained = [stage for stage in POLICY_STAGES if (run / stage / "vocabulary.json").is_file()]
    if not trained:
        raise ArtifactError(f"{run}: no trained model; run the stage {POLICY_STAGES[0]!r} first")
    return trained[-1]


def refuse_mismatch(model: Path, artifact: Path) -> None:
    """Refuse an artifact that a model was not trained with; nothing is known where the model has no manifest.

    Raises:
        ArtifactError: they do not belong together, or the artifact is missing or damaged.
    """
    manifest = model / "manifest.json"
    if not manifest.is_file():
        return
    trained_on = read_json(manifest)["inputs"].get(artifact.name)
    if trained_on is not None and trained_on != content_hash(artifact):
        raise ArtifactError(
            f"{model}: trained with another {artifact.name!r} than {artifact} holds; run the stage {model.name!r} again"
        )
