"""Our beam search against `generate()` of transformers, same model, same beams, same ranked lists.

The peer is what generative recommenders use today: `generate(num_beams=W, prefix_allowed_tokens_fn=...)` with a
dictionary trie, key-value cache on, sampling off, no length penalty (all answers are equally long). Both search the
same 12,000 random IDs with the same randomly initialised model in fp32 and normalise over the full vocabulary, which
is the only choice the peer has. Runs are interleaved; the ratio is of process CPU time, medians.

Usage: python benchmarks/beam_search.py [--preset 4m] [--batch 8] [--items 20] [--beam 50] [--runs 3]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from lasar.decoding.beam import beam_search
from lasar.decoding.trie import Trie
from lasar.model.backbone import build_preset, num_parameters
from lasar.model.prompt import encode_prompts
from lasar.prompts.vocabulary import Vocabulary


def main() -> None:
    arguments = _arguments()
    vocabulary = Vocabulary(num_levels=4, codebook_size=256, max_history=arguments.items, normalise="full")
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, 256, (12_000, 4)), axis=0).astype(np.int32)
    tokens = vocabulary.item_tokens(codes)
    histories = rng.integers(0, len(codes), (arguments.batch, arguments.items)).astype(np.int32)
    order = np.arange(arguments.items, dtype=np.int32)
    prompts = [vocabulary.render_history(tokens, history, order, open_order=True) for history in histories]
    ids = torch.tensor(np.stack(prompts).astype(np.int64))
    lengths = torch.full((arguments.batch,), ids.shape[1])
    model = build_preset(arguments.preset, vocabulary=vocabulary, seed=0).eval()
    with torch.no_grad():  # fresh weights score all items alike; larger ones make the lists distinct
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
    trie = Trie(codes)

    def ours() -> list[list[tuple[int, ...]]]:
        with torch.no_grad():
            prefix = encode_prompts(model, ids, lengths)
        beams = beam_search(prefix, vocabulary=vocabulary, trie=trie, beam_width=arguments.beam)
        return [[tuple(tokens[i].tolist()) for i in row] for row in beams.items_BW.tolist()]

    peer = _peer(model, ids, tokens, arguments.beam)
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    lists: dict[str, list[list[tuple[int, ...]]]] = {}
    for _ in range(arguments.runs + 1):  # the first round warms up
        for name, search in (("ours", ours), ("peer", peer)):
            started = time.process_time()
            lists[name] = search()
            seconds[name].append(time.process_time() - started)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    same = sum(a[:10] == b[:10] for a, b in zip(lists["ours"], lists["peer"], strict=True))
    result = {
        "benchmark": "beam_search",
        "ratio": round(median["peer"] / median["ours"], 2),
        "baseline": "transformers generate() with prefix_allowed_tokens_fn",
        "parity": same == arguments.batch,
        "ours_ms_per_request": round(1e3 * median["ours"] / arguments.batch, 2),
        "baseline_ms_per_request": round(1e3 * median["peer"] / arguments.batch, 2),
        "parameters": num_parameters(model),
        "batch": arguments.batch,
        "prompt_tokens": ids.shape[1],
        "beam": arguments.beam,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def _peer(
    model: torch.nn.Module, ids: Tensor, tokens: np.ndarray, beam: int
) -> Callable[[], list[list[tuple[int, ...]]]]:
    allowed: dict[tuple[int, ...], list[int]] = {}
    for path in sorted({tuple(row[:length]) for row in tokens.tolist() for length in range(1, 5)}):
        allowed.setdefault(path[:-1], []).append(path[-1])
    prompt_length = ids.shape[1]
    config = GenerationConfig(
        num_beams=beam, num_return_sequences=beam, max_new_tokens=4, min_new_tokens=4, do_sample=False,
        length_penalty=0.0, use_cache=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip

    def follow(_: int, sentence: Tensor) -> list[int]:
        return allowed[tuple(sentence[prompt_length:].tolist())]

    def search() -> list[list[tuple[int, ...]]]:
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config,
            prefix_allowed_tokens_fn=follow,
        )  # fmt: skip
        return [
            [tuple(answer) for answer in group]
            for group in found[:, prompt_length:].reshape(len(ids), beam, 4).tolist()
        ]

    return search


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="4m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
