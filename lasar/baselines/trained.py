"""What the trained baselines share: one way to fit, to rank, to save and to open them.

A network offers three things: its `forward` is the loss summed over a batch's targets, `rank` answers histories, and
`whole_histories` says which batches it learns from. Everything else is here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lasar.artifacts import read_json, write_json
from lasar.baselines.gru4rec import Gru4Rec
from lasar.baselines.ranking import Items, Ranked
from lasar.baselines.rearec import ReaRec
from lasar.baselines.sasrec import SasRec
from lasar.baselines.sequences import TargetBatch, pad_histories, target_batches
from lasar.baselines.tiger import Tiger
from lasar.data.interactions import EvalCases, TrainSequence
from lasar.errors import ArtifactError
from lasar.evaluation.metrics import user_metrics
from lasar.model.attention import without_plans
from lasar.model.backbone import best_device
from lasar.ranks import gather, share_of
from lasar.training.fit import FitPlan, FitResult, fit

FACTS_FILE = "baseline.json"
WEIGHTS_FILE = "baseline.safetensors"

Method = Literal["gru4rec", "sasrec", "rearec", "tiger"]
Network = Gru4Rec | SasRec | ReaRec | Tiger

NETWORKS: dict[Method, type[Network]] = {
    "gru4rec": Gru4Rec, "sasrec": SasRec, "rearec": ReaRec, "tiger": Tiger,
}  # fmt: skip


class Trained:
    """A network behind the interface of every baseline.

    Attributes:
        method: which network.
        settings: its arguments but `num_items`.
        network: set by `fit`.
        result: how the fit went.
    """

    network: Network
    result: FitResult

    def __init__(
        self,
        method: Method,
        *,
        settings: Mapping[str, Any],
        plan: FitPlan,
        batch_tokens: int = 2048,
        given: Mapping[str, Tensor] | None = None,
        validation: EvalCases | None = None,
        exclude_seen: bool = False,
        train_targets: str = "all",
        checkpoint_dir: Path | None = None,
    ) -> None:
        """Decide how to train; `fit` does it.

        Args:
            method: which network.
            settings: its arguments but `num_items`.
            plan: how to train; its seed is also that of the first weights and the batches.
            batch_tokens: history tokens per batch, padding included.
            given: buffers of the network that are not learnt (TIGER's semantic IDs).
            validation: cases that choose the best epoch; without, the last one is kept.
            exclude_seen: leave items of the history out while validating.
            train_targets: `all` or `last`; see `target_batches`.
            checkpoint_dir: survives a kill, and another `fit` continues; without, nothing is kept.
        """
        self.method, self.settings, self.plan = method, dict(settings), plan
        self._batch_tokens, self._given = batch_tokens, dict(given or {})
        self._validation, self._exclude_seen = validation, exclude_seen
        self._train_targets, self._checkpoint_dir = train_targets, checkpoint_dir

    def fit(self, sequences: Sequence[TrainSequence], num_items: int) -> "Trained":
        """Train from random weights, keep the best epoch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)
            self.network = _build(self.method, num_items, self.settings)
        self.network.load_state_dict(self._given, strict=False)
        self.network.to(best_device())

        def batches(epoch: int) -> list[TargetBatch]:
            return target_batches(
                sequences, num_items=num_items, max_history=self.network.max_history,
                train_targets=self._train_targets, whole_histories=self.network.whole_histories,
                batch_tokens=self._batch_tokens, seed=self.plan.seed, epoch=epoch,
            )  # fmt: skip

        plan = self.plan
        if not self._validation:  # one look after the last epoch, so that the last epoch is kept
            plan = dataclasses.replace(plan, validate_every=plan.epochs)
        with TemporaryDirectory() as scratch:
            self.result = fit(
                self.network, plan=plan, batches=batches,
                loss=lambda model, batch: model(batch.to(next(model.parameters()).device)),
                validate=lambda model: self._validate(), description=self.method,
                checkpoint_dir=self._checkpoint_dir or Path(scratch) / "checkpoint",
            )  # fmt: skip
        return self

    def recommend(
        self, histories: Sequence[Items], baskets: Sequence[Items], k: int, *, exclude_seen: bool = False
    ) -> Ranked:
        """Rank the catalogue for each history.

        Args:
            histories: per query, item indices, oldest first; may be empty.
            baskets: per query, the basket number of each history event; not used: orders lie one after the other.
            k: length of the lists.
            exclude_seen: leave out items of the history.

        Returns:
            Items int32 `[Q, K]` (-1 where there are none left) and scores float32 `[Q, K]`.
        """
        network = self.network.eval()
        device = next(network.parameters()).device
        items_QK = np.full((len(histories), k), -1, dtype=np.int32)
        scores_QK = np.full((len(histories), k), -np.inf, dtype=np.float32)
        order = np.argsort([len(history) for history in histories], kind="stable")
        for start in range(0, len(order), network.queries_per_batch):
            chunk = order[start : start + network.queries_per_batch]
            asked = [histories[query] for query in chunk]
            rows = pad_histories(asked, num_items=network.num_items, max_history=network.max_history)
            ranked = network.rank(rows.to(device), k, excluded=asked if exclude_seen else None)
            items_QK[chunk], scores_QK[chunk] = ranked
        return items_QK, scores_QK

    def save(self, folder: Path) -> None:
        """Write weights and settings into an existing folder."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._own_tensors().items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        facts = {"method": self.method, "num_items": self.network.num_items, "settings": self.settings}
        write_json(folder / FACTS_FILE, facts)

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu", **changed: Any) -> "Trained":
        """Open what `save` wrote, to rank with.

        Args:
            folder: the artifact.
            device: where to rank.
            changed: settings to replace, such as TIGER's `beam_width`.

        Raises:
            ArtifactError: a file is missing, damaged, or disagrees with the other.
        """
        facts = read_json(folder / FACTS_FILE)
        try:
            settings = facts["settings"] | {k: v for k, v in changed.items() if k in facts["settings"]}
            opened = cls(facts["method"], settings=settings, plan=FitPlan(epochs=0, learning_rate=1.0))
            opened.network = _build(opened.method, facts["num_items"], settings)
            own, stored = opened._own_tensors(), load_file(folder / WEIGHTS_FILE)
            missing = sorted(own.keys() ^ stored.keys())
            if missing:
                raise KeyError(missing[0])
            opened.network.load_state_dict(stored, strict=False)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise ArtifactError(
                f"{folder}: not a usable baseline ({error}); run the stage {folder.name!r} again"
            ) from None
        without_plans()
        opened.network.to(device).eval()
        return opened

    def _own_tensors(self) -> dict[str, Tensor]:
        """Every tensor of the network, shared ones once."""
        named = [*self.network.named_parameters(), *self.network.named_buffers()]
        return dict(named)

    def _validate(self) -> dict[str, float]:
        cases = self._validation
        if cases is None or len(cases) == 0:
            return {self.plan.metric: 0.0}
        mine = share_of(len(cases))
        histories, baskets = ([cases.histories[i] for i in mine], [cases.baskets[i] for i in mine])
        items_nK, _ = self.recommend(histories, baskets, 10, exclude_seen=self._exclude_seen)
        items_QK = gather(items_nK, len(cases))
        measured = user_metrics(items_QK, cases.targets, cutoffs=(10,))
        return {name: float(measured[name].mean()) for name in ("hr@10", "ndcg@10")}


def _build(method: Method, num_items: int, settings: Mapping[str, Any]) -> Network:
    return NETWORKS[method](num_items=num_items, **settings)
