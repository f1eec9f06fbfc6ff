"""Stage 2 on trunks and branches against one example per target: targets per second, memory, same loss.

The peer is the best honest version of the usual way: every prefix of a history is an example of its own, bucketed by
length, its prompt computed once and its latent steps cached, as many tokens in a batch as ours, our own fused forward
calls. Beside it, for scale, Coconut's way: the whole sequence again for every latent step. All train the same model in
bf16 autocast on the same histories, every target with the same depth; the summed losses must agree (fp32, no dropout).
Runs are interleaved; ratios are of process CPU time, medians. `bound` is what the counts of tokens allow. Histories:
lengths as on Amazon Beauty (mean 6.7 once cut at 50), and all of 20 items. Peak memory is of one process
per way.

Usage: python benchmarks/stage2.py [--preset 1m] [--users 300] [--runs 3] [--depth 3]
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _beauty import beauty_lengths

from lasar.data.interactions import TrainSequence
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset, input_table, trunk
from lasar.prompts.latent_batches import LatentBatch, latent_batches
from lasar.prompts.vocabulary import Vocabulary
from lasar.training.latent_losses import latent_pass
from lasar.training.losses import code_loss

NUM_ITEMS, BATCH_TOKENS = 12_000, 8192
VOCABULARY = Vocabulary(num_levels=4, codebook_size=256)
WAYS = ("ours", "peer", "naive")


class Bench:
    """One model, one set of histories, three ways to train on them."""

    def __init__(self, lengths: str, arguments: argparse.Namespace) -> None:
        """Draw histories and codes."""
        rng = np.random.default_rng(0)
        users = arguments.users
        counts = {"beauty": beauty_lengths(users), "20": np.full(users // 3, 20)}[lengths]
        self.codes = np.unique(rng.integers(0, 256, (NUM_ITEMS, 4)), axis=0).astype(np.int32)
        self.trie = Trie(self.codes)
        self.model = build_preset(arguments.preset, vocabulary=VOCABULARY, seed=0)
        self.depth = arguments.depth
        self.histories = [
            TrainSequence(
                user, rng.integers(0, len(self.codes), n).astype(np.int32), np.arange(n, dtype=np.int32)
            )
            for user, n in enumerate(counts)
        ]
        self.prefixes = [
            TrainSequence(h.user_index, h.items[:end], h.baskets[:end])
            for h in self.histories
            for end in range(1, len(h.items) + 1)
        ]

    @property
    def num_targets(self) -> int:
        """Targets of one pass."""
        return len(self.prefixes)

    def prepare(self, way: str) -> Callable[[], float]:
        """A pass over all targets, forwards and backwards; returns the summed loss."""
        if way == "naive":
            return self._naive
        batches = self.batches(way)

        def run() -> float:
            total = 0.0
            for batch in batches:
                done = latent_pass(self.model, batch, vocabulary=VOCABULARY, trie=self.trie, feedback="raw")
                done.codes.total.backward()
                self.model.zero_grad()
                total += done.codes.total.item()
            return total

        return run

    def batches(self, way: str) -> list[LatentBatch]:
        """One epoch of trunks with branches, or of single examples."""
        return latent_batches(
            self.histories if way == "ours" else self.prefixes,
            VOCABULARY.item_tokens(self.codes), vocabulary=VOCABULARY, steps=lambda user, basket: np.zeros(0, np.int32),
            max_depth=8, depth=self.depth, fallback_depth=self.depth, batch_tokens=BATCH_TOKENS,
            train_targets="all" if way == "ours" else "last", seed=0, epoch=0,
        )  # fmt: skip

    def _naive(self) -> float:
        """Every latent step recomputes the whole sequence; only equal lengths share a batch, so nothing is padded."""
        tokens_IL = VOCABULARY.item_tokens(self.codes)
        groups = defaultdict(list)
        for history in self.prefixes:
            groups[len(history.items)].append(history.items)
        total = 0.0
        for length, members in groups.items():
            size = max(1, BATCH_TOKENS // (length * 4 + self.depth + 6))
            for start in range(0, len(members), size):
                items_BI = np.stack(members[start : start + size])
                prompts_BT = torch.from_numpy(tokens_IL[items_BI[:, :-1]].reshape(len(items_BI), -1)).long()
                loss = self._naive_loss(prompts_BT, torch.from_numpy(items_BI[:, -1]).long(), tokens_IL)
                loss.backward()
                self.model.zero_grad()
                total += loss.item()
        return total

    def _naive_loss(
        self, prompts_BT: torch.Tensor, items_B: torch.Tensor, tokens_IL: np.ndarray
    ) -> torch.Tensor:
        table = input_table(self.model)
        batch = len(items_B)
        opening, start, end = (
            torch.full((batch, 1), token)
            for token in (VOCABULARY.user, VOCABULARY.latent_start, VOCABULARY.latent_end)
        )
        embedded = table[torch.cat([opening, prompts_BT, start], dim=1)]
        for _ in range(self.depth):
            hidden = trunk(self.model)(inputs_embeds=embedded, use_cache=False).last_hidden_state
            embedded = torch.cat([embedded, hidden[:, -1:]], dim=1)
        answers_BL = torch.from_numpy(tokens_IL)[items_B].long()
        embedded = torch.cat([embedded, table[torch.cat([end, answers_BL[:, :-1]], dim=1)]], dim=1)
        hidden = trunk(self.model)(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -4:]
        return code_loss(
            self.model, hidden.flatten(0, 1), answers_BL.flatten(), items_B.repeat_interleave(4),
            vocabulary=VOCABULARY, trie=self.trie,
        ).total  # fmt: skip


def main() -> None:
    """Compare, or, asked by itself, run one way and say how much memory it took."""
    arguments = _arguments()
    if arguments.memory:
        way, lengths = arguments.memory.split(":")
        with torch.autocast("cpu", torch.bfloat16):
            Bench(lengths, arguments).prepare(way)()
        print(_peak_memory())
        return
    for lengths in ("beauty", "20"):
        print(json.dumps(_compare(lengths, arguments)), flush=True)


def _compare(lengths: str, arguments: argparse.Namespace) -> dict[str, object]:
    bench = Bench(lengths, arguments)
    passes = {way: bench.prepare(way) for way in WAYS}
    sums = {way: run() for way, run in passes.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.runs):
        for way, run in passes.items():
            started = time.process_time()
            with torch.autocast("cpu", torch.bfloat16):
                run()
            seconds[way].append(time.process_time() - started)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    memory = {way: _memory(way, lengths, arguments) for way in ("ours", "peer")}
    return {
        "benchmark": "stage2",
        "histories": lengths,
        "depth": arguments.depth,
        "ratio": round(median["peer"] / median["ours"], 2),
        "bound": round(_tokens(bench, "peer") / _tokens(bench, "ours"), 2),
        "baseline": "one example per target, length-bucketed, cached latents",
        "parity": max(abs(sums[way] / sums["ours"] - 1) for way in WAYS) < 1e-5,
        "ours_targets_per_second": round(bench.num_targets / median["ours"]),
        "baseline_targets_per_second": round(bench.num_targets / median["peer"]),
        "recomputing_ratio": round(median["naive"] / median["ours"], 2),
        "peak_memory_mib": {way: round(value) for way, value in memory.items()},
        "preset": arguments.preset,
        "threads": torch.get_num_threads(),
    }


def _tokens(bench: Bench, way: str) -> int:
    """Tokens that the model computes in one pass, padding left out."""
    branch = 2 + bench.depth + VOCABULARY.num_levels - 1
    return sum(int(batch.lengths_B.sum()) + batch.num_targets * branch for batch in bench.batches(way))


def _memory(way: str, lengths: str, arguments: argparse.Namespace) -> float:
    """Peak resident memory of a process that makes one pass, MiB."""
    command = [
        sys.executable, __file__, "--memory", f"{way}:{lengths}", "--preset", arguments.preset,
        "--users", str(arguments.users), "--depth", str(arguments.depth),
    ]  # fmt: skip
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_memory() -> float:
    """Of this program, MiB; what `getrusage` says is inherited from the parent process. Linux only."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--memory", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
