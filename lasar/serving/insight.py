"""What the model thought about one history: every latent step in words and directions, and the beam as a tree.

The list itself comes from the ranker; this pass goes over the same prompt once more, alone, and reads along.

Legend: D hidden, N latent steps, L levels, W nodes of a level, M most children of a node, C codes in use on level 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lasar.cot.anchors import AnchorStore
from lasar.decoding.beam import score_children
from lasar.model.head import part_logits
from lasar.model.latent import finish_reasoning
from lasar.model.prompt import encode_prompts
from lasar.model.reasoner import Thought
from lasar.serving.catalogue import Snapshot

_SEGMENTS, _DIRECTIONS, _ITEMS_UNDER = 3, 4, 3


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A first code the model favours: the code, its probability, how many items it has, the best known of them."""

    code: int
    probability: float
    num_items: int
    items: list[int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One latent step; 0 is before any thinking. `segments` are rationale segments with their cosine."""

    number: int
    segments: list[tuple[str, float]]
    directions: list[Direction]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A prefix of a semantic ID that leads to an item of the beam.

    Attributes:
        level: codes of the prefix; 0 is the root.
        code: the last of them; None at the root.
        logprob: of that code after the ones before it.
        score: summed log-probability of the prefix; at a leaf, the item's score.
        num_items: items of the catalogue under it.
        item: at a leaf, the item's index.
        children: most probable first.
    """

    level: int
    code: int | None
    logprob: float
    score: float
    num_items: int
    item: int | None
    children: list["Node"]


@dataclass(frozen=True, kw_only=True)
class Insight:
    """Everything an explanation shows.

    Attributes:
        distribution: probability of depth 1, 2, ...; None where the Policy Head was not asked.
        steps: before thinking, and after every latent step.
        beam: root of the tree.
    """

    distribution: list[float] | None
    steps: list[Step]
    beam: Node


@torch.no_grad()
def look_inside(
    snapshot: Snapshot,
    items: NDArray[np.int32],
    baskets: NDArray[np.int32],
    beam: NDArray[np.int32],
    *,
    depth: int,
    anchors: AnchorStore | None,
) -> Insight:
    """Think once more about one history, and read along.

    Args:
        snapshot: the catalogue.
        items: history, item indices.
        baskets: order number of each.
        beam: items the search ended with.
        depth: latent steps it took.
        anchors: rationale segments; without them the steps have no words.
    """
    ranker = snapshot.recommender.ranker
    reasoner, vocabulary = ranker.reasoner, ranker.vocabulary
    device = ranker.trie.item_of_leaf.device
    tokens = vocabulary.render_history(ranker.tokens_IL, items, baskets, open_order=True)
    ids_BT = torch.from_numpy(tokens.astype(np.int64))[None].to(device)
    prompts = encode_prompts(reasoner.backbone, ids_BT, torch.tensor([len(tokens)], device=device))
    # Forced to the depth that was taken, so that a sampled one is the same here; the Policy Head is asked all the same.
    thought = reasoner.think(prompts, depth=depth)
    chosen = reasoner.settings.fixed_depth is None and thought.distribution_BN is not None
    distribution = (
        thought.distribution_BN[0].tolist() if chosen and thought.distribution_BN is not None else None
    )
    return Insight(
        distribution=distribution,
        steps=_steps(snapshot, thought, anchors),
        beam=_tree(snapshot, thought, beam),
    )


def _steps(snapshot: Snapshot, thought: Thought, anchors: AnchorStore | None) -> list[Step]:
    ranker = snapshot.recommender.ranker
    vocabulary, first = ranker.vocabulary, ranker.vocabulary.level_start(0)
    codes_C = ranker.trie.levels[1].code
    if thought.latents is None:
        states_ND = ends_ND = thought.prefix.hidden_B1D[0]
    else:
        states_ND = thought.latents.hidden_BPND[0, 0]
        # An <e> after every step: where the model would go from there.
        ends_BPD, _ = finish_reasoning(
            thought.prefix, thought.latents.index_BPN[:, 0], vocabulary=vocabulary,
            closing=ranker.reasoner.settings.closing,
        )  # fmt: skip
        ends_ND = ends_BPD[0]
    logits_NV = part_logits(ranker.reasoner.backbone, ends_ND, first, first + vocabulary.codebook_size)
    probabilities_NC = logits_NV[:, codes_C].float().softmax(-1)
    best = probabilities_NC.topk(min(_DIRECTIONS, len(codes_C)), dim=-1)
    words: list[list[tuple[str, float]]] = [[] for _ in range(len(states_ND))]
    if anchors is not None:
        found, distances = anchors.nearest(states_ND.float().cpu().numpy(), _SEGMENTS)
        words = [
            [(anchors.text_of(int(anchor)), 1 - float(far)) for anchor, far in zip(*row, strict=True)]
            for row in zip(found, distances, strict=True)
        ]
    return [
        Step(
            number=number,
            segments=words[number],
            directions=[
                _direction(snapshot, node, probability)
                for node, probability in zip(nodes, probabilities, strict=True)
            ],
        )
        for number, (nodes, probabilities) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), strict=True)
        )
    ]


def _direction(snapshot: Snapshot, node: int, probability: float) -> Direction:
    trie = snapshot.recommender.ranker.trie
    start, stop = trie.levels[1].leaf_start[node : node + 2].tolist()
    below = [i for i in trie.item_of_leaf[start:stop].tolist() if snapshot.is_active(i)]
    return Direction(
        code=int(trie.levels[1].code[node]),
        probability=probability,
        num_items=stop - start,
        items=snapshot.finder.best_known(below, limit=_ITEMS_UNDER) if below else [],
    )


def _tree(snapshot: Snapshot, thought: Thought, beam: NDArray[np.int32]) -> Node:
    """Score every prefix of the beam's items, level by level, and hang them together."""
    trie = snapshot.recommender.ranker.trie
    prefix = thought.prefix
    hidden_WD, tips_W = prefix.hidden_B1D[0], prefix.tip_B1[0]
    root = Node(level=0, code=None, logprob=0.0, score=0.0, num_items=trie.num_items, item=None, children=[])
    made = {0: root}
    beam_items = torch.from_numpy(beam.astype(np.int64)).to(trie.item_of_leaf.device)
    for level in range(trie.num_levels if len(beam) else 0):
        parents_W = torch.tensor(sorted(made), device=beam_items.device)
        last = level == trie.num_levels - 1
        reached = trie.leaf_of_item[beam_items] if last else trie.prefix_LI[level + 1, beam_items]
        children = reached.unique()
        logprobs_WM = _child_logprobs(snapshot, hidden_WD, parents_W, level)
        starts = trie.levels[level].child_start
        parent_of = torch.searchsorted(starts, children, right=True) - 1
        at_W = torch.searchsorted(parents_W, parent_of)
        below = trie.levels[level + 1]
        made_below: dict[int, Node] = {}
        columns = (
            children,
            parent_of,
            logprobs_WM[at_W, children - starts[parent_of]],
            below.code[children],
            below.leaf_start[children + 1] - below.leaf_start[children],
            trie.item_of_leaf[children] if last else children,
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for child, parent, logprob, code, num_items, item in rows:
            made_below[child] = Node(
                level=level + 1,
                code=code,
                logprob=logprob,
                score=made[parent].score + logprob,
                num_items=num_items,
                item=item if last else None,
                children=[],
            )
            made[parent].children.append(made_below[child])
        for parent_node in made.values():
            parent_node.children.sort(key=lambda node: -node.score)
        if not last:
            tokens = below.code[children] + snapshot.recommender.ranker.vocabulary.level_start(level)
            hidden_BWD, grown = prefix.grow(tips_W[at_W][None], input_ids=tokens[None])
            hidden_WD, tips_W = hidden_BWD[0], grown.index_BQ[0]
        made = made_below
    return root


def _child_logprobs(snapshot: Snapshot, hidden_WD: Tensor, nodes_W: Tensor, level: int) -> Tensor:
    """Log-probability of every child of every node, [W, M], normalised as the beam search does."""
    ranker = snapshot.recommender.ranker
    _, logprobs_1WM, _ = score_children(
        ranker.reasoner.backbone, hidden_WD[None], nodes_W[None], level,
        vocabulary=ranker.vocabulary, trie=ranker.trie, item_filter=None,
    )  # fmt: skip
    return logprobs_1WM[0]
