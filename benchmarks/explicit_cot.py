"""What thinking in words costs at answering time, against latent steps and against no reasoning.

Three ways to answer the same requests of a finished run: its Stage-2 model without reasoning, the same model at the
depth its Policy Head chooses, and its `explicit_cot` model, which has the same backbone (and rows for words) and writes
until it stops. Same users, same beams, same code around them: prompts are encoded once, words are written greedily and
in batches on kept keys and values, a finished text leaves the batch, and all three end in the same beam search.

One thread. Every request is answered by all ways in turn, the turns rotate, all of it `--runs` times; the first batch
of every way warms up and is not counted. Times are process CPU time, so that other processes disturb less; wall time
is given beside it. `ratio` is of sums over all requests, with the lowest and highest of the runs.

Usage: python benchmarks/explicit_cot.py RUN [--users 64] [--beam 50] [--runs 3] [--batches 1 32]
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch

from lasar.baselines.explicit_cot import WordReasoner, load_writing, write_texts
from lasar.data.interactions import SPLIT_TEST, EvalCases, Interactions
from lasar.decoding.ranker import Ranker
from lasar.model.backbone import num_parameters
from lasar.recommender import Recommender

WAYS = ("no_reasoning", "latent", "explicit_cot")


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    interactions = Interactions.load(arguments.run / "prepare")
    cases = interactions.cases(SPLIT_TEST).subset(arguments.users, 0)
    rankers, depths = _open(arguments.run)
    writer = rankers["explicit_cot"].reasoner
    assert isinstance(writer, WordReasoner)
    texts = write_texts(writer, rankers["explicit_cot"].tokens_IL, cases.histories, cases.baskets)
    written = [len(text) for text in texts]
    shared = {
        "benchmark": "explicit_cot", "users": len(cases), "beam": arguments.beam, "threads": 1,
        "prompt_tokens": round(float(np.mean([_prompt(rankers["latent"], cases, n) for n in range(len(cases))])), 1),
        "words_written": round(statistics.mean(written), 1), "words_range": [min(written), max(written)],
        "texts_cut": sum(length == writer.max_tokens for length in written),
        "engine": rankers["latent"].engine,
        "parameters": {way: num_parameters(ranker.reasoner.backbone) for way, ranker in rankers.items()},
    }  # fmt: skip
    for batch in arguments.batches:
        cpu, wall, steps = _measure(rankers, depths, cases, batch, arguments)
        totals = {way: sum(map(sum, cpu[way])) / arguments.runs for way in WAYS}
        result = shared | {"batch": batch, "latent_steps": round(steps, 2)}
        for way in WAYS:
            of_run = [sum(cpu[way][n]) / sum(cpu["no_reasoning"][n]) for n in range(arguments.runs)]
            per_batch = sorted(value for run in cpu[way] for value in run)
            result[way] = {
                "cpu_ms_per_request": round(1e3 * totals[way] / len(cases), 2),
                "wall_ms_per_request": round(1e3 * sum(map(sum, wall[way])) / arguments.runs / len(cases), 2),
                "cpu_ms_per_batch_median": round(1e3 * statistics.median(per_batch), 2),
                "ratio": round(totals[way] / totals["no_reasoning"], 2),
                "ratio_of_runs": [round(min(of_run), 2), round(max(of_run), 2)],
            }
        result["explicit_cot_over_latent"] = round(totals["explicit_cot"] / totals["latent"], 2)
        print(json.dumps(result))


def _open(run: Path) -> tuple[dict[str, Ranker], dict[str, str | int]]:
    def ranker(stage: str) -> Ranker:
        folders = {"prepare": run / "prepare", "quantize": run / "quantize", "model": run / stage}
        return Recommender.from_artifacts(**folders, device="cpu").ranker

    latent, words = ranker("latent_sft"), ranker("explicit_cot")
    words.reasoner = load_writing(run / "explicit_cot", words.reasoner.backbone)
    rankers = {"no_reasoning": latent, "latent": latent, "explicit_cot": words}
    return rankers, {"no_reasoning": 0, "latent": "auto", "explicit_cot": "auto"}


def _measure(
    rankers: dict[str, Ranker],
    depths: dict[str, str | int],
    cases: EvalCases,
    batch: int,
    arguments: argparse.Namespace,
) -> tuple[dict[str, list[list[float]]], dict[str, list[list[float]]], float]:
    """CPU and wall seconds of every run and batch, and the mean number of latent steps."""
    order = np.argsort([len(history) for history in cases.histories], kind="stable")
    groups = [order[start : start + batch] for start in range(0, len(order), batch)]
    cpu: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    wall: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    steps: list[float] = []

    def answer(way: str, group: np.ndarray) -> np.ndarray:
        return rankers[way].rank(
            [cases.histories[n] for n in group], [cases.baskets[n] for n in group], k=10, batch_size=batch,
            beam_width=arguments.beam, depth=depths[way],
        ).depths_Q  # fmt: skip

    for way in WAYS:
        answer(way, groups[0])
    turn = 0
    for _ in range(arguments.runs):
        for way in WAYS:
            cpu[way].append([])
            wall[way].append([])
        for group in groups:
            turn += 1
            for way in (*WAYS[turn % 3 :], *WAYS[: turn % 3]):
                started, started_wall = time.process_time(), time.perf_counter()
                taken = answer(way, group)
                cpu[way][-1].append(time.process_time() - started)
                wall[way][-1].append(time.perf_counter() - started_wall)
                if way == "latent":
                    steps += taken.tolist()
    return cpu, wall, statistics.mean(steps)


def _prompt(ranker: Ranker, cases: EvalCases, number: int) -> int:
    tokens = ranker.vocabulary.render_history(
        ranker.tokens_IL, cases.histories[number], cases.baskets[number], open_order=True
    )
    return len(tokens)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    return parser.parse_args()


if __name__ == "__main__":
    main()
