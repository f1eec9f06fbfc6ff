"""From item indices to what a client reads."""

from math import exp

from lasar.serving.catalogue import Snapshot
from lasar.serving.insight import Insight, Node
from lasar.serving.schemas import (
    BeamNode,
    DepthProbability,
    DirectionOut,
    Explanation,
    ItemOut,
    ItemRef,
    SegmentOut,
    StepOut,
)


def item_ref(snapshot: Snapshot, item: int) -> ItemRef:
    """An item by name."""
    return ItemRef(item_id=snapshot.items.item_ids[item], title=snapshot.items.titles[item])


def item_out(snapshot: Snapshot, item: int) -> ItemOut:
    """An item in full."""
    return ItemOut(
        **item_ref(snapshot, item).model_dump(),
        text=snapshot.items.texts[item],
        codes=snapshot.catalog.codes_IL[item].tolist(),
        active=snapshot.is_active(item),
        added=item >= snapshot.num_trained,
    )


def explanation(snapshot: Snapshot, insight: Insight, items: list[int]) -> Explanation:
    """What the model thought; `items` is the list that was returned."""
    ranks = {item: rank for rank, item in enumerate(items, start=1)}
    distribution = None
    if insight.distribution is not None:
        distribution = [
            DepthProbability(depth=depth, probability=probability)
            for depth, probability in enumerate(insight.distribution, start=1)
        ]
    return Explanation(
        distribution=distribution,
        steps=[
            StepOut(
                number=step.number,
                segments=[SegmentOut(text=text, similarity=near) for text, near in step.segments],
                directions=[
                    DirectionOut(
                        code=direction.code,
                        probability=direction.probability,
                        num_items=direction.num_items,
                        items=[item_ref(snapshot, item) for item in direction.items],
                    )
                    for direction in step.directions
                ],
            )
            for step in insight.steps
        ],
        beam=_node(snapshot, insight.beam, ranks),
    )


def _node(snapshot: Snapshot, node: Node, ranks: dict[int, int]) -> BeamNode:
    return BeamNode(
        level=node.level,
        code=node.code,
        probability=exp(node.logprob),
        score=node.score,
        num_items=node.num_items,
        item=None if node.item is None else item_ref(snapshot, node.item),
        rank=None if node.item is None else ranks.get(node.item),
        children=[_node(snapshot, child, ranks) for child in node.children],
    )
