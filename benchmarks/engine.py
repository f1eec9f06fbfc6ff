"""The fused path against our generic one and two peers: same model, same beams, same ranked lists, real histories.

Peers: `generate()` of transformers with `prefix_allowed_tokens_fn` (a dictionary trie), as generative recommenders use
it; and what a careful engineer writes instead: the prompt computed once, its cache repeated for every beam, a trie in
arrays, three cached steps on all beams with the cache reordered by parent between them. Both leave padding on the left.
Neither knows logits of items in answers: of a model that has them, their lines are left out. All search the same
catalogue, take no latent steps, and normalise over the children of a prefix as the model was trained to
(`renormalize_logits` of `generate`). Further lines: lists of 10 and 20 against lists of all beams, 32 requests at once;
the fused path in bf16, its lists compared with fp32 (`overlap@10` and the largest difference of a score); what latent
steps add to the fused path, at the depths the model chooses and at 8; and its arithmetic as a share of what matrix
products of this machine reach in the same run.

Histories: as they are, and 200 tokens long (cut from the histories of several users in a row). `--preset` puts random
weights on the same catalogue. Ways are interleaved; times are process CPU time, one thread, medians; `noise` is the
interquartile range over the median, of the fused path.

Usage: python benchmarks/engine.py --run runs/beauty [--preset 4m] [--runs 5] [--beam 50]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _engine_peers import Lists, Way, careful_peer, generate_peer
from torch import Tensor

from lasar.data.interactions import SPLIT_TEST, Interactions
from lasar.decoding.ranker import Ranker
from lasar.model.backbone import build_preset, num_parameters
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.recommender import Recommender
from lasar.sid.catalog import SidCatalog

TOLERANCE = 1e-4  # of scores: items nearer to each other than that may change places


class Bench:
    """One model, one catalogue, four ways to rank."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Open a run; with a preset, put random weights on its catalogue."""
        recommender = Recommender.load(arguments.run, device="cpu")
        self.codes_IL = SidCatalog.load(Path(arguments.run) / "quantize").codes_IL
        self.reasoner = recommender.ranker.reasoner
        self.vocabulary = self.reasoner.vocabulary
        if arguments.preset:
            backbone = build_preset(arguments.preset, vocabulary=self.vocabulary, seed=0).eval()
            with torch.no_grad():  # fresh weights score all items alike; larger ones make the lists distinct
                for parameter in backbone.parameters():
                    if parameter.ndim >= 2:
                        parameter.mul_(2.0)
            self.reasoner = LatentReasoner(
                backbone, vocabulary=self.vocabulary, settings=ReasoningSettings()
            ).eval()
        self.reasoner.backbone.requires_grad_(False)
        self.fused = Ranker(self.reasoner, codes_IL=self.codes_IL)
        self.rounded = Ranker(self.reasoner, codes_IL=self.codes_IL, precision="bf16")
        self.generic = Ranker(self.reasoner, codes_IL=self.codes_IL, fused=False)
        self.tokens_IL = self.vocabulary.item_tokens(self.codes_IL)
        self.beam, self.runs = arguments.beam, arguments.runs
        cases = Interactions.load(Path(arguments.run) / "prepare").cases(SPLIT_TEST)
        chosen = np.random.default_rng(0).permutation(len(cases))[:1000]
        self._real = sorted((cases.histories[i] for i in chosen), key=len)
        tokens = np.array([len(self._render(history)) for history in self._real])
        self.mean_tokens = float(tokens.mean())

    def histories(self, batch: int, length: int | None) -> list[np.ndarray]:
        """Of users whose lengths are quantiles of all; with one, of users in a row up to that many tokens."""
        if length is None:
            return [self._real[int((number + 0.5) / batch * len(self._real))] for number in range(batch)]
        items = length // self.vocabulary.num_levels
        return np.split(np.concatenate(self._real)[: batch * items], batch)

    def ranked(
        self, ranker: Ranker, histories: list[np.ndarray], depth: int | str = 0, *, k: int | None = None
    ) -> Way:
        """One of our two paths; all beams are items by default."""
        baskets = [np.arange(len(history), dtype=np.int32) for history in histories]

        def rank() -> Lists:
            self.last = ranker.rank(
                histories, baskets, k=k or self.beam, beam_width=self.beam, depth=depth, batch_size=len(histories)
            )  # fmt: skip
            return self.last.items_QK.tolist()

        return rank

    def left_padded(self, histories: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Prompts and their attention mask, [B, T]."""
        rows = [self._render(history) for history in histories]
        width = max(len(row) for row in rows)
        ids = np.full((len(rows), width), self.vocabulary.pad)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = row
        ids_BT = torch.from_numpy(ids).long()
        return ids_BT, (ids_BT != self.vocabulary.pad).long()

    def _render(self, history: np.ndarray) -> np.ndarray:
        baskets = np.arange(len(history), dtype=np.int32)
        return self.vocabulary.render_history(self.tokens_IL, history, baskets, open_order=True)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    bench = Bench(arguments)
    shared = {
        "preset": arguments.preset or "of the run", "parameters": num_parameters(bench.reasoner.backbone),
        "mean_prompt_tokens": round(bench.mean_tokens, 1), "beam": bench.beam, "threads": 1,
    }  # fmt: skip
    for line in _few(bench):
        print(json.dumps({"benchmark": "engine", **line, **shared}), flush=True)
    for batch in (1, 8):
        for length in (None, 200):
            sizes = {"batch": batch, "prompt_tokens": length or "as in data"}
            lines = [*_against_peers(bench, batch, length), _latents(bench, batch, length)]
            for line in lines:
                print(json.dumps({"benchmark": "engine", **line, **sizes, **shared}), flush=True)


def _against_peers(bench: Bench, batch: int, length: int | None) -> list[dict[str, object]]:
    histories = bench.histories(batch, length)
    ways = {
        "fused": bench.ranked(bench.fused, histories),
        "bf16": bench.ranked(bench.rounded, histories),
        "generic": bench.ranked(bench.generic, histories),
    }
    if not bench.vocabulary.item_answers:
        ways |= {"careful": careful_peer(bench, histories), "generate": generate_peer(bench, histories)}
    gemm = _peak_gemm()
    seconds, results = _interleaved(ways | {"gemm": gemm}, bench.runs)
    bench.ranked(bench.generic, histories)()
    scores = bench.last.scores_QK
    names = {
        "generic": "our generic tree-attention path",
        "careful": "prefill once, repeat and reorder the cache, vectorised trie",
        "generate": "transformers generate() with prefix_allowed_tokens_fn",
    }
    lines: list[dict[str, object]] = [
        {
            "ratio": round(_median(seconds[name]) / _median(seconds["fused"]), 2),
            "baseline": names[name],
            "parity": _same(results["fused"], results[name], scores),
            "identical_lists": sum(a == b for a, b in zip(results["fused"], results[name], strict=True)),
            "ours_ms_per_request": round(1e3 * _median(seconds["fused"]) / batch, 2),
            "baseline_ms_per_request": round(1e3 * _median(seconds[name]) / batch, 2),
            "noise": _noise(seconds["fused"]),
        }
        for name in names
        if name in ways
    ]
    assert all(line["parity"] for line in lines), lines
    lines += _in_bf16(bench, histories, seconds)
    flops = _flops(bench, histories)
    peak = 2 * 1024**3 / _median(seconds["gemm"])
    achieved = flops / _median(seconds["fused"])
    lines.append(
        {
            "ratio": round(achieved / peak, 3),
            "baseline": "peak of a 1024 x 1024 x 1024 product, same run",
            "parity": True,
            "gflops": round(achieved / 1e9, 1),
            "peak_gflops": round(peak / 1e9, 1),
            "counted": "linear layers and attention of all tokens and beams, last prompt layer once",
        }
    )
    return lines


def _in_bf16(
    bench: Bench, histories: list[np.ndarray], seconds: dict[str, list[float]]
) -> list[dict[str, object]]:
    """Against fp32 and against `generate()`; parity: every top 10 shares at least eight items, on average nine."""
    lists, scores = {}, {}
    for name, ranker in (("fp32", bench.fused), ("bf16", bench.rounded)):
        bench.ranked(ranker, histories)()
        lists[name], scores[name] = bench.last.items_QK, bench.last.scores_QK
    overlaps = [len({*a[:10]} & {*b[:10]}) for a, b in zip(lists["fp32"], lists["bf16"], strict=True)]
    same = lists["fp32"] == lists["bf16"]
    facts = {
        "parity": min(overlaps) >= 8 and statistics.mean(overlaps) >= 9,
        "overlap@10": round(statistics.mean(overlaps) / 10, 3),
        "score_difference": round(float(np.abs(scores["fp32"] - scores["bf16"])[same].max(initial=0.0)), 4),
    }
    return [
        {
            "ratio": round(_median(seconds[peer]) / _median(seconds["bf16"]), 2),
            "baseline": words,
            "ours": "fused, bf16",
        }
        | facts
        for peer, words in (
            ("fused", "the fused path in fp32"),
            ("generate", "transformers generate() in fp32"),
        )
        if peer in seconds
    ]


def _latents(bench: Bench, batch: int, length: int | None) -> dict[str, object]:
    histories = bench.histories(batch, length)
    depths: tuple[int | str, ...] = (0, "auto", 8)
    ways = {str(depth): bench.ranked(bench.fused, histories, depth) for depth in depths}
    seconds, results = _interleaved(ways, bench.runs)
    parity = True
    for depth in depths:
        expected = bench.ranked(bench.generic, histories, depth)()
        parity &= _same(results[str(depth)], expected, bench.last.scores_QK)
        if depth == "auto":
            mean_depth = float(bench.last.depths_Q.mean())
    assert parity
    base = _median(seconds["0"])
    return {
        "ratio": round(_median(seconds["auto"]) / base, 3),
        "ratio_at_8": round(_median(seconds["8"]) / base, 3),
        "baseline": "the fused path without latent steps",
        "parity": parity,
        "mean_depth": round(mean_depth, 2),
        "noise": _noise(seconds["0"]),
    }


def _few(bench: Bench) -> list[dict[str, object]]:
    """Lists shorter than the beam is wide, of 32 requests, against lists as long; they must be the same lists, cut."""
    histories = bench.histories(32, None)
    ways = {k: bench.ranked(bench.fused, histories, k=int(k)) for k in ("10", "20")}
    seconds, results = _interleaved(ways | {"all": bench.ranked(bench.fused, histories)}, bench.runs)
    scores = bench.last.scores_QK
    lines: list[dict[str, object]] = [
        {
            "ratio": round(_median(seconds["all"]) / _median(seconds[k]), 2), "items": int(k),
            "baseline": "all beams as items, fused path",
            "parity": _same(results[k], [row[: int(k)] for row in results["all"]], scores[:, : int(k)]),
            "ours_ms_per_request": round(1e3 * _median(seconds[k]) / len(histories), 2), "batch": len(histories),
        }
        for k in ways
    ]  # fmt: skip
    assert all(line["parity"] for line in lines), lines
    return lines


def _interleaved(
    ways: dict[str, Callable[[], object]], runs: int
) -> tuple[dict[str, list[float]], dict[str, Lists]]:
    """CPU seconds of each way, `runs` times each in turn after a round to warm up, and what each found."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for number in range(runs + 1):
        for name, way in ways.items():
            repeats = (
                1 if name == "generate" or not number else 3
            )  # the quick ones more often, for a steadier median
            for _ in range(repeats):
                started = time.process_time()
                results[name] = way()
                if number:
                    seconds[name].append(time.process_time() - started)
    return seconds, results  # type: ignore[return-value]


def _same(ours: Lists, theirs: Lists, scores_QK: np.ndarray) -> bool:
    """Identical lists, but for items whose scores are equal to rounding."""
    for mine, other, scores_K in zip(ours, theirs, scores_QK, strict=True):
        for place in np.flatnonzero(np.array(mine) != np.array(other)):
            near = np.abs(scores_K - scores_K[place]) < TOLERANCE
            if near.sum() < 2 and place < len(mine) - 1:
                return False
    return True


def _flops(bench: Bench, histories: list[np.ndarray]) -> int:
    """Of the request's own arithmetic; padding and recomputation don't count as work done."""
    config = bench.reasoner.backbone.config
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    mixing = config.hidden_size * (wide + 2 * narrow)
    rest = wide * config.hidden_size + 3 * config.hidden_size * config.intermediate_size
    layers, levels = config.num_hidden_layers, bench.codes_IL.shape[1]
    total = 0
    for history in histories:
        length = len(bench._render(history))
        total += length * (layers * mixing + (layers - 1) * rest)  # the last layer: keys and values
        total += rest - (length - 1) * config.hidden_size * wide
        total += (layers - 1) * wide * length * (length + 1)
        for generation in range(1, levels):
            total += bench.beam * layers * (mixing + rest + 2 * wide * (length + generation))
        total += bench.beam * (levels - 1) * config.hidden_size * bench.vocabulary.codebook_size
    return 2 * total


def _peak_gemm() -> Callable[[], None]:
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)

    def multiply() -> None:
        torch.mm(left, right, out=out)

    return multiply


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _noise(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return round((high - low) / _median(values), 3)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="a run folder with a trained model")
    parser.add_argument("--preset", default="")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--beam", type=int, default=50)
    return parser.parse_args()


if __name__ == "__main__":
    main()
