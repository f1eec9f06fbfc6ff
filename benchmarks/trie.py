"""The trie of a catalogue of a million items, and what it costs and guarantees in a search.

Lines, those that a trained model says something about with `--run`:

- `build`: seconds of CPU and bytes for one million random semantic IDs (4 levels of 256), against the dictionary of
  prefixes with which `prefix_allowed_tokens_fn` is usually written, over the same items. `parity`: both know the same
  children of every prefix that is asked for.
- `valid`: a million recommendations of a trained run, every request's history left out and others denied at random;
  `invalid`, `repeated` and `forbidden` count what must not be there, `short` what is missing.
- `size`: the same model (500k, random weights, codes alone) on a million items and on 12,101, a request alone and a
  batch of 8, in turns: how many times as long it takes on the large catalogue. Needs no run.
- `share`: what finding the children of all beams takes of a request (batch 8), in CPU time.

Usage: python benchmarks/trie.py [--run runs/beauty] [--items 1000000] [--recommendations 1000000]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from lasar.data.interactions import SPLIT_TEST, Interactions
from lasar.decoding.ranker import Ranker
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset
from lasar.model.reasoner import without_reasoning
from lasar.prompts.vocabulary import Vocabulary
from lasar.recommender import Recommender

BEAM, LEVELS, CODES = 50, 4, 256
Line = dict[str, object]


def build_line(num_items: int) -> Line:
    """Both tries over the same random semantic IDs."""
    rng = np.random.default_rng(0)
    drawn = np.unique(rng.integers(0, CODES, size=(num_items * 21 // 20, LEVELS), dtype=np.int32), axis=0)
    codes_IL = rng.permutation(drawn)[:num_items]
    began = time.process_time()
    trie = Trie(codes_IL)
    ours = time.process_time() - began
    rows = codes_IL.tolist()
    began = time.process_time()
    allowed: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        for level in range(LEVELS):
            allowed.setdefault(tuple(row[:level]), set()).add(row[level])
    theirs = time.process_time() - began
    prefixes = [tuple(row[:level]) for row in rows[:200] for level in range(LEVELS)]
    return {
        "part": "build", "ratio": round(theirs / ours, 1), "baseline": "a dictionary of prefixes",
        "parity": all(_children(trie, prefix) == allowed[prefix] for prefix in prefixes),
        "items": len(codes_IL), "seconds": round(ours, 2), "baseline_seconds": round(theirs, 2),
        "megabytes": round(_bytes(trie) / 1e6, 1),
    }  # fmt: skip


def _children(trie: Trie, prefix: tuple[int, ...]) -> set[int]:
    node = torch.zeros(1, 1, dtype=torch.int64)
    for level, code in enumerate(prefix):
        child, real = trie.children(level, node)
        codes = trie.levels[level + 1].code[child]
        node = child[real & (codes == code)].view(1, 1)
    child, real = trie.children(len(prefix), node)
    return set(trie.levels[len(prefix) + 1].code[child][real].tolist())


def _bytes(trie: Trie) -> int:
    arrays = [trie.item_of_leaf, trie.leaf_of_item, trie.prefix_LI]
    for level in trie.levels:
        arrays += [level.code, level.child_start, level.leaf_start]
    return sum(array.numel() * array.element_size() for array in arrays)


def valid_line(recommender: Recommender, histories: list[np.ndarray], count: int) -> Line:
    """Recommendations under random filters, each looked at."""
    rng, num_items = np.random.default_rng(1), len(recommender.items)
    counts = dict.fromkeys(("recommended", "invalid", "repeated", "forbidden", "short"), 0)
    while counts["recommended"] < count:
        asked = [histories[i] for i in rng.integers(len(histories), size=256)]
        denied = [rng.integers(num_items, size=rng.integers(0, 40)).astype(np.int32) for _ in asked]
        baskets = [np.arange(len(history), dtype=np.int32) for history in asked]
        lists = recommender.ranker.rank(
            asked, baskets, k=BEAM, beam_width=BEAM, exclude_seen=True, exclude=denied
        )
        for row, history, forbidden in zip(lists.items_QK, asked, denied, strict=True):
            found = row[row >= 0]
            counts["recommended"] += len(found)
            counts["invalid"] += int((found >= num_items).sum())
            counts["repeated"] += len(found) - len(np.unique(found))
            counts["forbidden"] += int(np.isin(found, np.union1d(history, forbidden)).sum())
            counts["short"] += len(row) - len(found)
    bad = sum(counts[name] for name in ("invalid", "repeated", "forbidden", "short"))
    return {
        "part": "valid",
        "ratio": bad / counts["recommended"],
        "baseline": "none wrong",
        "parity": bad == 0,
        **counts,
    }


def size_line(num_items: int, *, few: int = 12_101, rounds: int = 40) -> Line:
    """One model, two catalogues, in turns."""
    vocabulary = Vocabulary(num_levels=LEVELS, codebook_size=CODES)
    model = without_reasoning(
        build_preset("500k", vocabulary=vocabulary, seed=0).eval(), vocabulary=vocabulary
    )
    rng = np.random.default_rng(2)
    drawn = np.unique(rng.integers(0, CODES, size=(num_items * 21 // 20, LEVELS), dtype=np.int32), axis=0)
    codes_IL = rng.permutation(drawn)[:num_items]
    rankers = {"many": Ranker(model, codes_IL=codes_IL), "few": Ranker(model, codes_IL=codes_IL[:few])}
    times: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in rankers for batch in (1, 8)}
    for number in range(rounds + 3):
        histories = [rng.integers(few, size=20).astype(np.int32) for _ in range(8)]
        baskets = [np.arange(20, dtype=np.int32)] * 8
        for (name, batch), taken in times.items():
            began = time.process_time()
            with torch.inference_mode():
                rankers[name].rank(histories[:batch], baskets[:batch], k=BEAM, beam_width=BEAM)
            if number >= 3:
                taken.append((time.process_time() - began) / batch * 1e3)
    medians = {at: statistics.median(taken) for at, taken in times.items()}
    ratios = {batch: medians["many", batch] / medians["few", batch] for batch in (1, 8)}
    return {
        "part": "size", "ratio": round(max(ratios.values()), 2), "baseline": f"{few:,} items", "parity": True,
        "items": len(codes_IL), "ratio_alone": round(ratios[1], 2), "ratio_batch_of_8": round(ratios[8], 2),
        "ms_alone": round(medians["many", 1], 2), "ms_each_of_8": round(medians["many", 8], 2),
    }  # fmt: skip


def share_line(recommender: Recommender, histories: list[np.ndarray], *, rounds: int = 30) -> Line:
    """CPU time inside `Trie.children` and of the whole request."""
    ranker = recommender.ranker
    ordered = sorted(histories, key=len)
    asked = [ordered[int((n + 0.5) / 8 * len(ordered))] for n in range(8)]
    baskets = [np.arange(len(history), dtype=np.int32) for history in asked]
    inside, plain, shares = 0.0, ranker.trie.children, []

    def timed(depth: int, nodes_BW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal inside
        began = time.process_time()
        result = plain(depth, nodes_BW)
        inside += time.process_time() - began
        return result

    ranker.trie.children = timed  # type: ignore[method-assign]
    for number in range(rounds + 3):
        inside, began = 0.0, time.process_time()
        ranker.rank(asked, baskets, k=BEAM, beam_width=BEAM)
        if number >= 3:
            shares.append(inside / (time.process_time() - began))
    return {
        "part": "share",
        "ratio": round(statistics.median(shares), 4),
        "baseline": "the whole request",
        "parity": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="a run folder with a trained model")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--recommendations", type=int, default=1_000_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def say(line: Line) -> None:
        print(json.dumps({"benchmark": "trie", **line, "threads": 1}), flush=True)

    say(build_line(arguments.items))
    say(size_line(arguments.items))
    if arguments.run:
        recommender = Recommender.load(arguments.run, device="cpu")
        histories = list(Interactions.load(Path(arguments.run) / "prepare").cases(SPLIT_TEST).histories)
        say(valid_line(recommender, histories, arguments.recommendations))
        say(share_line(recommender, histories))


if __name__ == "__main__":
    main()
