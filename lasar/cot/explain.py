"""Reading the thoughts: latents live beside anchors, so each step can be put into words.

For every latent step: the rationale segments nearest to its hidden state, and the first codes the model would favour if
it stopped thinking there. For the whole: how deep the Policy Head wants to go, and what one step more or less changes.

Legend: D hidden, N latent steps, C codes of the first level.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lasar.cot.anchors import AnchorStore
from lasar.errors import ConfigError
from lasar.model.head import part_logits
from lasar.model.latent import finish_reasoning
from lasar.model.prompt import encode_prompts
from lasar.recommender import History, Recommendation, Recommender


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A first code the model favours.

    Attributes:
        code: on the first level.
        probability: of the code.
        titles: of the best-known items under it.
    """

    code: int
    probability: float
    titles: list[str]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One latent step; step 0 is `<s>`, before any thinking.

    Attributes:
        number: 0 ... N.
        segments: nearest rationale segments, and cosine to each.
        directions: leading first codes if the model stopped here.
    """

    number: int
    segments: list[tuple[str, float]]
    directions: list[Direction]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a model thought about one history.

    Attributes:
        depth: steps it took.
        distribution: probability of depth 1, 2, ...; empty where the depth is fixed.
        steps: `<s>` and every step.
        lists: depth -> recommendations; one step fewer, the chosen depth, one step more.
    """

    depth: int
    distribution: list[float]
    steps: list[Step]
    lists: dict[int, list[Recommendation]]


@torch.no_grad()
def explain(
    recommender: Recommender,
    store: AnchorStore,
    history: History,
    *,
    k: int = 10,
    segments: int = 3,
    directions: int = 3,
    exclude_seen: bool = False,
) -> Explanation:
    """Explain what is recommended for a history.

    Args:
        recommender: of a model that reasons.
        store: the anchors it was trained towards.
        history: item ids, as in `Recommender.recommend`.
        k: length of the lists.
        segments: rationale segments per step.
        directions: first codes per step.
        exclude_seen: leave items of the history out of the lists.

    Raises:
        ConfigError: the model doesn't reason.
        UnknownItemError: an id is not in the catalogue.
    """
    ranker = recommender.ranker
    settings = ranker.reasoner.settings
    if settings.max_depth == 0 or settings.fixed_depth == 0:
        raise ConfigError("this model answers without latent steps; explain needs one trained by latent_sft")
    items, baskets = recommender.indices(history)
    tokens = ranker.vocabulary.render_history(ranker.tokens_IL, items, baskets, open_order=True)
    device = ranker.trie.item_of_leaf.device
    ids_BT = torch.from_numpy(tokens.astype(np.int64))[None].to(device)
    prompts = encode_prompts(ranker.reasoner.backbone, ids_BT, torch.tensor([len(tokens)], device=device))
    thought = ranker.reasoner.think(prompts)
    assert thought.latents is not None
    # An <e> after every step: where the model would go from there.
    end_BPD, _ = finish_reasoning(
        thought.prefix,
        thought.latents.index_BPN[:, 0],
        vocabulary=ranker.vocabulary,
        closing=settings.closing,
    )
    states_ND = thought.latents.hidden_BPND[0, 0].float().cpu().numpy()
    depth = int(thought.depths_B[0])
    depths = sorted({max(0, depth - 1), depth, min(depth + 1, settings.max_depth)})
    return Explanation(
        depth=depth,
        distribution=[] if thought.distribution_BN is None else thought.distribution_BN[0].tolist(),
        steps=_steps(states_ND, end_BPD[0], recommender, store, segments=segments, directions=directions),
        lists={n: recommender.recommend(history, k, exclude_seen=exclude_seen, depth=n) for n in depths},
    )


def _steps(
    states_ND: NDArray[np.float32],
    ends_ND: torch.Tensor,
    recommender: Recommender,
    store: AnchorStore,
    *,
    segments: int,
    directions: int,
) -> list[Step]:
    trie, vocabulary = recommender.ranker.trie, recommender.ranker.vocabulary
    codes_C = trie.levels[1].code
    first = vocabulary.level_start(0)
    model = recommender.ranker.reasoner.backbone
    logits_NV = part_logits(model, ends_ND, first, first + vocabulary.codebook_size)
    probabilities_NC = logits_NV[:, codes_C].float().softmax(-1)
    best = probabilities_NC.topk(min(directions, len(codes_C)), dim=-1)
    found, distances = store.nearest(states_ND, segments)
    steps = []
    for number in range(len(states_ND)):
        steps.append(
            Step(
                number=number,
                segments=[
                    (store.text_of(int(anchor)), 1 - float(distance))
                    for anchor, distance in zip(found[number], distances[number], strict=True)
                ],
                directions=[
                    Direction(
                        code=int(codes_C[node]),
                        probability=float(probability),
                        titles=_titles_under(recommender, int(node)),
                    )
                    for probability, node in zip(best.values[number], best.indices[number], strict=True)
                ],
            )
        )
    return steps


def _titles_under(recommender: Recommender, node: int, count: int = 3) -> list[str]:
    """Titles of the items under a first code that were taken most often in training."""
    trie = recommender.ranker.trie
    first, last = trie.levels[1].leaf_start[node : node + 2].tolist()
    items = trie.item_of_leaf[first:last].cpu().numpy()
    popular = items[np.argsort(-recommender.train_counts[items], kind="stable")][:count]
    return [recommender.items.titles[item] or recommender.items.item_ids[item] for item in popular]
