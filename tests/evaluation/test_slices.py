"""Slices partition the users or the targets, and their means add up to the overall one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.evaluation.metrics import user_metrics
from lasar.evaluation.slices import (
    HISTORY_EDGES,
    POPULARITY_EDGES,
    bucket_labels,
    bucket_of,
    by_history_length,
    by_target_popularity,
)


def test_labels():
    assert bucket_labels((0, 1, 4, 5)) == ["0", "1-3", "4", "5+"]


@given(st.integers(0, 2000), st.sampled_from([HISTORY_EDGES, POPULARITY_EDGES]))
def test_every_value_is_in_the_bucket_that_its_label_names(value, edges):
    label = bucket_labels(edges)[int(bucket_of(np.array([value]), edges)[0])]
    low, _, high = label.rstrip("+").partition("-")
    assert int(low) <= value
    assert label.endswith("+") or value <= int(high or low)


def example():
    rng = np.random.default_rng(0)
    items_QK = np.stack([rng.permutation(50)[:20] for _ in range(80)]).astype(np.int32)
    targets = [rng.permutation(50)[: rng.integers(1, 4)].astype(np.int32) for _ in range(80)]
    return items_QK, targets, rng


def test_history_slices_partition_the_users():
    items_QK, targets, rng = example()
    per_user = user_metrics(items_QK, targets)
    rows = by_history_length(rng.integers(0, 70, size=80), {"m": per_user}, metrics=("hr@10",))
    assert sum(row["num_users"] for row in rows) == 80
    total = sum(row["num_users"] * row["methods"]["m"]["hr@10"] for row in rows)
    assert total == pytest.approx(per_user["hr@10"].sum())
    assert all(row["num_users"] > 0 for row in rows)


def test_popularity_slices_partition_the_targets_and_show_cold_items():
    items_QK, targets, rng = example()
    counts = rng.integers(0, 700, size=50)
    counts[:5] = 0
    rows = by_target_popularity(targets, counts, {"m": items_QK}, k=10)
    flat = [(q, t) for q, target in enumerate(targets) for t in target.tolist()]
    assert sum(row["num_targets"] for row in rows) == len(flat)
    cold = [(q, t) for q, t in flat if counts[t] == 0]
    found = sum(t in items_QK[q, :10].tolist() for q, t in cold)
    assert rows[0]["bucket"] == "0"
    assert rows[0]["num_targets"] == len(cold)
    assert rows[0]["methods"]["m"]["recall@10"] == pytest.approx(found / len(cold))
