"""The model of scale: bytes that can be counted, a queue whose answer is known, and replicas that keep the deadline."""

import sys
from pathlib import Path

import numpy as np
import pytest

from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset
from lasar.prompts.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scale_model


def test_the_trie_is_as_large_as_it_says():
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 256, (20_000, scale_model.LEVELS)), axis=0).astype(np.int32)
    trie = Trie(codes)
    tensors = [trie.item_of_leaf, trie.leaf_of_item, trie.prefix_LI]
    tensors += [part for level in trie.levels for part in (level.code, level.child_start, level.leaf_start)]
    held = sum(tensor.nbytes for tensor in tensors)
    said = (
        scale_model.memory(len(codes), 1, 10, codebook=256, model=scale_model.MODELS[0])["trie"]
        * scale_model.GB
    )
    assert said == pytest.approx(held, rel=0.5)


def test_weights_are_those_of_the_preset():
    model = build_preset("1m", vocabulary=Vocabulary(num_levels=2, codebook_size=4), seed=0)
    inside = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "head" not in name
    )
    assert scale_model.MODELS[0].weights == inside


def test_a_replica_that_has_time_answers_at_once_and_a_busy_one_queues():
    replica = scale_model.Replica("", fixed=0.010, each=0.0, batch=1, source="")
    assert scale_model.p99_seconds(replica, 0.1) == pytest.approx(0.010, rel=0.01)
    # One server, constant service, 80 % busy: waiting beyond three services is common, beyond forty is not.
    assert 0.03 < scale_model.p99_seconds(replica, 80) < 0.4


def test_the_rate_keeps_the_deadline_and_no_replica_keeps_an_impossible_one():
    replica = scale_model.Replica("", fixed=0.005, each=0.001, batch=32, source="")
    rate = scale_model.rate_within(replica, 0.05)
    assert scale_model.p99_seconds(replica, rate) <= 0.05 < scale_model.p99_seconds(replica, 1.1 * rate)
    assert scale_model.rate_within(replica, 0.004) < 1e-3
