"""Users who come back with one item more: their history continued from memory, against computed again.

The same weights (random: speed does not depend on them), the same requests, in turns; the ratio is of process CPU time,
medians. Before each measured call the memory has seen the histories without their last item, and nothing else.
`parity`: the same items at every rank, but for neighbours whose scores differ by less than rounding (1e-4).

Usage: python benchmarks/returning_users.py [--preset 4m] [--items 20] [--levels 4] [--depth 4] [--beam 50] [--runs 9]
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from lasar.decoding.ranked import Ranked
from lasar.decoding.ranker import Ranker
from lasar.engine.memory import PromptMemory
from lasar.model.backbone import build_preset, num_parameters
from lasar.model.reasoner import LatentReasoner, ReasoningSettings
from lasar.prompts.vocabulary import Vocabulary


def main() -> None:
    """Print one JSON line per batch size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="4m")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    vocabulary = Vocabulary(num_levels=options.levels, codebook_size=256, max_history=options.items + 1)
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 256, (12_000, options.levels)), axis=0).astype(np.int32)
    model = build_preset(options.preset, vocabulary=vocabulary, seed=0).eval()
    with torch.no_grad():  # fresh weights score all items alike; larger ones make the lists distinct
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
    settings = ReasoningSettings(max_depth=8, head_width=256)
    reasoner = LatentReasoner(model, vocabulary=vocabulary, settings=settings).eval().requires_grad_(False)
    memory = PromptMemory(1_000_000_000)
    rankers = {
        "memory": Ranker(reasoner, codes_IL=codes, memory=memory),
        "anew": Ranker(reasoner, codes_IL=codes),
    }
    for batch in options.batches:
        histories = list(rng.integers(0, len(codes), (batch, options.items)).astype(np.int32))
        before = [history[:-1] for history in histories]
        seconds: dict[str, list[float]] = {name: [] for name in rankers}
        lists = {}
        for _ in range(options.runs + 1):  # the first round warms up
            memory.clear()
            rank(rankers["memory"], before, options)
            for name, ranker in rankers.items():
                began = time.process_time()
                lists[name] = rank(ranker, histories, options)
                seconds[name].append(time.process_time() - began)
        ours, baseline = (statistics.median(values[1:]) for values in seconds.values())
        line = {
            "benchmark": "returning_users", "ratio": round(baseline / ours, 2), "baseline": "computed anew",
            "parity": alike(lists["memory"], lists["anew"]), "ms_per_request": round(1e3 * ours / batch, 2),
            "baseline_ms_per_request": round(1e3 * baseline / batch, 2), "batch": batch, "depth": options.depth,
            "prompt_tokens": memory.last.tokens // batch, "known_tokens": memory.last.known // batch,
            "kb_per_history": round(memory.nbytes / len(memory) / 1e3), "parameters": num_parameters(model),
            "beam": options.beam, "levels": options.levels, "threads": torch.get_num_threads(),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def rank(ranker: Ranker, histories: list[np.ndarray], options: argparse.Namespace) -> Ranked:
    """Lists of ten."""
    baskets = [np.arange(len(history), dtype=np.int32) for history in histories]
    return ranker.rank(histories, baskets, k=10, beam_width=options.beam, depth=options.depth)


def alike(one: Ranked, two: Ranked) -> bool:
    """The same items, but for near ties."""
    same = one.items_QK == two.items_QK
    return bool(np.all(same | (np.abs(one.scores_QK - two.scores_QK) < 1e-4)))


if __name__ == "__main__":
    main()
