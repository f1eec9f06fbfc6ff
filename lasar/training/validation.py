"""Validation while training: rank held-out events of a fixed sample of users."""

import numpy as np

from lasar.data.interactions import EvalCases
from lasar.decoding.ranker import Ranker
from lasar.evaluation.metrics import user_metrics


def validation_metrics(
    ranker: Ranker, cases: EvalCases, *, exclude_seen: bool, beam_width: int = 20, k: int = 10
) -> dict[str, float]:
    """Mean HR@k and NDCG@k over the cases.

    Args:
        ranker: its model is in evaluation mode.
        cases: validation users.
        exclude_seen: leave items of the history out of the lists.
        beam_width: narrower than at test time, because this only has to order checkpoints.
        k: items ranked.
    """
    items_QK, _ = ranker.rank(
        cases.histories, cases.baskets, k=k, beam_width=beam_width, exclude_seen=exclude_seen, batch_size=64
    )
    per_case = user_metrics(items_QK, cases.targets, cutoffs=(k,))
    return {name: float(np.mean(per_case[name])) for name in (f"hr@{k}", f"ndcg@{k}")}
