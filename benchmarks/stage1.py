"""Stage 1's multi-position loss against one example per target: targets per second, same loss.

The peer is the usual way: every prefix of a history is an example of its own whose loss is on the last item,
bucketed by length, with as many tokens in a batch as ours. Both train the same model on the same histories in bf16
autocast; the summed losses must agree (checked in fp32, dropout off). Runs are interleaved; ratios are of process CPU
time, medians. Histories: lengths as on Amazon Beauty (mean 6.7 once cut at 50), and all of 20 items.

Usage: python benchmarks/stage1.py [--preset 1m] [--users 400] [--runs 3]
"""

import argparse
import dataclasses
import json
import statistics
import time

import numpy as np
import torch
from _beauty import beauty_lengths

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset
from lasar.prompts.batches import TreeBatch, epoch_batches
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.losses import tree_loss

NUM_ITEMS, BATCH_TOKENS = 12_000, 4096


def main() -> None:
    arguments = _arguments()
    rng = np.random.default_rng(0)
    lengths = {
        "beauty": beauty_lengths(arguments.users),
        "20": np.full(arguments.users // 3, 20),
    }
    for name, counts in lengths.items():
        print(json.dumps(_compare(name, counts, arguments, rng)))


def _compare(
    name: str, counts: np.ndarray, arguments: argparse.Namespace, rng: np.random.Generator
) -> dict[str, object]:
    vocabulary = Vocabulary(num_levels=4, codebook_size=256)
    codes = np.unique(rng.integers(0, 256, (NUM_ITEMS, 4)), axis=0).astype(np.int32)
    trie = Trie(codes)
    model = build_preset(arguments.preset, vocabulary=vocabulary, seed=0)
    histories = [
        TrainSequence(
            user, rng.integers(0, len(codes), count).astype(np.int32), np.arange(count, dtype=np.int32)
        )
        for user, count in enumerate(counts)
    ]
    prefixes = [
        TrainSequence(h.user_index, h.items[:end], h.baskets[:end])
        for h in histories
        for end in range(1, len(h.items) + 1)
    ]
    ways = {
        "ours": _batches(histories, codes, vocabulary, "all"),
        "peer": _batches(prefixes, codes, vocabulary, "last"),
    }

    def train(batches: list[TreeBatch], *, bf16: bool) -> float:
        total = 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = tree_loss(model, batch, vocabulary=vocabulary, trie=trie).total
            loss.backward()
            model.zero_grad()
            total += loss.item()
        return total

    sums = {way: train(batches, bf16=False) for way, batches in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(arguments.runs):
        for way, batches in ways.items():
            started = time.process_time()
            train(batches, bf16=True)
            seconds[way].append(time.process_time() - started)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "benchmark": "stage1",
        "histories": name,
        "ratio": round(median["peer"] / median["ours"], 2),
        "baseline": "one example per target, length-bucketed",
        "parity": abs(sums["ours"] / sums["peer"] - 1) < 1e-5,
        "ours_targets_per_second": round(float(counts.sum()) / median["ours"]),
        "baseline_targets_per_second": round(float(counts.sum()) / median["peer"]),
        "tokens_ratio": round(_tokens(ways["peer"]) / _tokens(ways["ours"]), 2),
        "preset": arguments.preset,
        "threads": torch.get_num_threads(),
    }


def _batches(
    sequences: list[TrainSequence], codes: np.ndarray, vocabulary: Vocabulary, train_targets: str
) -> list[TreeBatch]:
    return epoch_batches(
        sequences, vocabulary.item_tokens(codes), vocabulary=dataclasses.replace(vocabulary),
        batch_tokens=BATCH_TOKENS, train_targets=train_targets, seed=0, epoch=0,
    )  # fmt: skip


def _tokens(batches: list[TreeBatch]) -> int:
    return sum(batch.ids_BK.size for batch in batches)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
