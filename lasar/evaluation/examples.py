"""A few users with titles: what they took, what came next, what was recommended."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lasar.data.interactions import EvalCases, ItemTable
from lasar.evaluation.metrics import Items, first_hit_rank, hit_matrix

_SHOWN = 10


def choose_examples(
    cases: EvalCases,
    ranked: tuple[Items, NDArray[np.float32]],
    items: ItemTable,
    user_ids: list[str],
    *,
    count: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Describe random users: half, as far as there are enough, with a hit in the top 10 and half without.

    Args:
        cases: the evaluated users.
        ranked: items_QK and scores_QK of the method to show.
        items: titles.
        user_ids: ids by user index.
        count: number of users.
        seed: of the choice.

    Returns:
        Per user: `user_id`, `hit_rank` (null for none in the top 10), the last events of the `history`,
        `targets`, and `recommended` (with `score` and `hit`); every item as `item_id` and `title`.
    """
    items_QK, scores_QK = ranked[0][:, :_SHOWN], ranked[1][:, :_SHOWN]
    hits_QK = hit_matrix(items_QK, cases.targets)
    rank_Q = first_hit_rank(hits_QK)
    rng = np.random.default_rng(seed)
    hit, missed = rng.permutation(np.flatnonzero(rank_Q > 0)), rng.permutation(np.flatnonzero(rank_Q == 0))
    num_hit = min(len(hit), max(count - count // 2, count - len(missed)))
    chosen = np.concatenate([hit[:num_hit], missed[: count - num_hit]]).astype(np.int64)

    def name(item: int) -> dict[str, Any]:
        return {"item_id": items.item_ids[item], "title": items.titles[item] or items.item_ids[item]}

    examples = []
    for query in chosen.tolist():
        places = [place for place, item in enumerate(items_QK[query].tolist()) if item >= 0]
        examples.append(
            {
                "user_index": int(cases.user_index[query]),
                "user_id": user_ids[cases.user_index[query]],
                "hit_rank": int(rank_Q[query]) or None,
                "history_length": len(cases.histories[query]),
                "history": [name(item) for item in cases.histories[query][-_SHOWN:].tolist()],
                "targets": [name(item) for item in cases.targets[query].tolist()],
                "recommended": [
                    {
                        **name(int(items_QK[query, place])),
                        "score": round(float(scores_QK[query, place]), 4),
                        "hit": bool(hits_QK[query, place]),
                    }
                    for place in places
                ],
            }
        )
    return examples
