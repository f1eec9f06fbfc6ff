"""Explanations against brute force over the whole catalogue, and against `lasar explain`."""

import math

import numpy as np
import pytest

from lasar.cot.anchors import AnchorStore
from lasar.cot.explain import explain as explain_history

HISTORY = ["sku1", ["sku12", "sku30"]]


def explained(client, **body):
    request = {"history": HISTORY, "explain": True, "k": 5, "beam_width": 200} | body
    answer = client.post("/v1/recommend", json=request).json()
    return answer, answer["explanation"]


def leaves(node):
    return [leaf for child in node["children"] for leaf in leaves(child)] if node["children"] else [node]


@pytest.mark.parametrize("depth", [0, 1, 3, "auto"])
def test_the_beam_is_a_tree_whose_leaves_are_the_ranked_items(client, recommender, depth):
    answer, explanation = explained(client, depth=depth)
    every = {i.item_id: i.score for i in recommender.recommend(HISTORY, 40, beam_width=200, depth=depth)}
    found = leaves(explanation["beam"])
    assert {leaf["item"]["item_id"] for leaf in found} == set(every)
    for leaf in found:
        assert leaf["score"] == pytest.approx(every[leaf["item"]["item_id"]], abs=1e-4)
    assert {leaf["rank"] for leaf in found} == {1, 2, 3, 4, 5, None}
    ranked = sorted((leaf for leaf in found if leaf["rank"]), key=lambda leaf: leaf["rank"])
    assert [leaf["item"]["item_id"] for leaf in ranked] == [item["item_id"] for item in answer["items"]]


def test_inner_nodes_sum_over_what_lies_beneath(client, recommender, run):
    """Trie-normalised: a prefix is as probable as all its items together, and children sum to 1."""
    from lasar.sid.catalog import SidCatalog

    _, explanation = explained(client)
    codes_IL = SidCatalog.load(run / "quantize").codes_IL
    every = {i.item_id: i.score for i in recommender.recommend(HISTORY, 40, beam_width=200)}
    scores_I = np.array([every[item_id] for item_id in recommender.items.item_ids])

    def check(node, prefix):
        below = np.all(codes_IL[:, : len(prefix)] == prefix, axis=1) if prefix else np.ones(40, bool)
        assert node["num_items"] == below.sum()
        assert node["score"] == pytest.approx(math.log(np.exp(scores_I[below]).sum()), abs=1e-4)
        if node["children"]:
            assert sum(child["probability"] for child in node["children"]) == pytest.approx(1, abs=1e-4)
            assert [c["score"] for c in node["children"]] == sorted(
                (c["score"] for c in node["children"]), reverse=True
            )
        for child in node["children"]:
            check(child, [*prefix, child["code"]])

    check(explanation["beam"], [])


def test_a_narrow_beam_is_a_narrow_tree(client):
    answer, explanation = explained(client, beam_width=4, k=2, exclude_seen=True)
    assert len(leaves(explanation["beam"])) == 4
    assert not {"sku1", "sku12", "sku30"} & {leaf["item"]["item_id"] for leaf in leaves(explanation["beam"])}
    assert len(answer["items"]) == 2


def test_thoughts_are_those_of_lasar_explain(client, recommender, run):
    answer, explanation = explained(client)
    theirs = explain_history(recommender, AnchorStore.load(run / "anchor"), HISTORY, segments=3, directions=4)
    assert answer["depth"] == theirs.depth
    assert [d["probability"] for d in explanation["distribution"]] == pytest.approx(
        theirs.distribution, abs=1e-6
    )
    assert [step["number"] for step in explanation["steps"]] == [step.number for step in theirs.steps]
    for ours, other in zip(explanation["steps"], theirs.steps, strict=True):
        assert [s["text"] for s in ours["segments"]] == [text for text, _ in other.segments]
        assert [s["similarity"] for s in ours["segments"]] == pytest.approx(
            [c for _, c in other.segments], abs=1e-5
        )
        assert [d["code"] for d in ours["directions"]] == [d.code for d in other.directions]
        for direction, their in zip(ours["directions"], other.directions, strict=True):
            assert direction["probability"] == pytest.approx(their.probability, abs=1e-6)
            assert [item["title"] for item in direction["items"]] == their.titles


def test_every_depth_shows_its_steps(client):
    for depth in range(4):
        answer, explanation = explained(client, depth=depth)
        assert answer["depth"] == depth
        assert len(explanation["steps"]) == depth + 1
        assert (explanation["distribution"] is None) == (depth == 0)


def test_nothing_to_return_is_explained_too(client):
    answer, explanation = explained(client, allow=[])
    assert answer["items"] == explanation["beam"]["children"] == []
