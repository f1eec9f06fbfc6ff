"""Which users get which depth: by history length, by popularity of what follows, by how undecided the model is.

Legend: Q users, N depths.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lasar.data.interactions import EvalCases
from lasar.decoding.ranker import Ranker
from lasar.evaluation.slices import HISTORY_EDGES, POPULARITY_EDGES, bucket_labels, bucket_of
from lasar.model.prompt import encode_prompts
from lasar.prompts.vocabulary import pad_right
from lasar.rl.scoring import first_code_entropy

_QUARTILES = (0.25, 0.5, 0.75)


@torch.no_grad()
def chosen_depths(
    ranker: Ranker, cases: EvalCases, *, batch_size: int = 64
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The depth of every user, and the entropy of the first code after that much thought, nats; each [Q].

    Args:
        ranker: its model is in evaluation mode.
        cases: the users.
        batch_size: users computed together.
    """
    reasoner, vocabulary = ranker.reasoner, ranker.vocabulary
    device = ranker.trie.item_of_leaf.device
    depths_Q = np.zeros(len(cases), np.int64)
    entropy_Q = np.zeros(len(cases))
    order = np.argsort([len(history) for history in cases.histories], kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [
            vocabulary.render_history(ranker.tokens_IL, cases.histories[q], cases.baskets[q], open_order=True)
            for q in chosen
        ]
        ids_BT, lengths_B = (torch.from_numpy(a).to(device) for a in pad_right(rows, vocabulary.pad))
        thought = reasoner.think(encode_prompts(reasoner.backbone, ids_BT, lengths_B))
        depths_Q[chosen] = thought.depths_B.cpu().numpy()
        opening_BD = thought.prefix.hidden_B1D[:, 0]
        entropy_B = first_code_entropy(reasoner.backbone, opening_BD, vocabulary=vocabulary, trie=ranker.trie)
        entropy_Q[chosen] = entropy_B.cpu().numpy()
    return depths_Q, entropy_Q


def depths_by_user(
    depths_Q: NDArray[np.int64],
    entropy_Q: NDArray[np.float64],
    cases: EvalCases,
    *,
    train_counts: NDArray[np.int64],
    max_depth: int,
) -> dict[str, list[dict[str, Any]]]:
    """Mean depth and depth histogram of the users of every bucket.

    Args:
        depths_Q: depth of every user.
        entropy_Q: entropy of the first code.
        cases: the users.
        train_counts: training events of every item.
        max_depth: N_max.

    Returns:
        `history_length` (events), `target_popularity` (mean training events of the true items) and
        `first_code_entropy` (quarters of the users): rows with `bucket`, `num_users`, `mean_depth`, `depths`.
    """
    lengths_Q = np.array([len(history) for history in cases.histories], np.int64)
    popularity_Q = np.array([train_counts[targets].mean() for targets in cases.targets])
    edges = np.unique(np.quantile(entropy_Q, _QUARTILES)) if len(entropy_Q) else np.zeros(0)
    borders = [f"{edge:.2f}" for edge in edges]
    between = [f"{low} to {high}" for low, high in itertools.pairwise(borders)]
    quarters = [f"below {borders[0]}", *between, f"from {borders[-1]}"] if borders else ["all"]
    return {
        "history_length": _rows(
            depths_Q, bucket_of(lengths_Q, HISTORY_EDGES), bucket_labels(HISTORY_EDGES), max_depth
        ),
        "target_popularity": _rows(
            depths_Q, bucket_of(popularity_Q.astype(np.int64), POPULARITY_EDGES),
            bucket_labels(POPULARITY_EDGES), max_depth,
        ),
        "first_code_entropy": _rows(
            depths_Q, np.searchsorted(edges, entropy_Q, side="right"), quarters, max_depth
        ),
    }  # fmt: skip


def _rows(
    depths_Q: NDArray[np.int64], bucket_Q: NDArray[np.int64], labels: Sequence[str], max_depth: int
) -> list[dict[str, Any]]:
    rows = []
    for number, label in enumerate(labels):
        depths = depths_Q[bucket_Q == number]
        if len(depths):
            counts = np.bincount(depths, minlength=max_depth + 1).tolist()
            rows.append(
                {
                    "bucket": label,
                    "num_users": len(depths),
                    "mean_depth": float(depths.mean()),
                    "depths": counts,
                }
            )
    return rows
