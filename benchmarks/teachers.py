"""What rationales of several teachers say about the same training rows: do their words lead to what was bought next?

For every row that each of the runs has a usable rationale for, the target's rank among all items by cosine of text
vectors: to the rationale (mean of its sentences), and to the items of the history. A rank is given as the share of
items that are nearer than the target: 0 is the first, .5 is chance. Differences are paired over rows, with a bootstrap
interval. Nothing is trained; what anchors made from them are worth, `latent_sft` has to say.

Usage: python benchmarks/teachers.py --runs runs/catalogue runs/teacher [--text-model data/all-minilm-l6-v2]
       (runs with the stages `prepare` and `rationalize` of the same data)
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lasar.artifacts import read_json
from lasar.cot.rationale import sentences
from lasar.cot.rationale_reader import read_rationales
from lasar.cot.rows import TrainingRow, training_rows
from lasar.cot.segmentation import unit
from lasar.data.interactions import Interactions, ItemTable
from lasar.sid.text_encoder import Encode, load_text_encoder

SAMPLES = 2000


def main() -> None:
    """Print one JSON line per teacher, and one per difference from the first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--text-model", default="data/all-minilm-l6-v2")
    options = parser.parse_args()
    encode = load_text_encoder(options.text_model, batch_size=32, max_tokens=128)
    prepared = options.runs[0] / "prepare"
    rows, items = training_rows(Interactions.load(prepared)), ItemTable.load(prepared)
    texts = [read_rationales(run / "rationalize", rows) for run in options.runs]
    kept = [number for number in range(len(rows)) if all(written[number] for written in texts)]
    kept = [number for number in kept if len(rows[number].history)]
    vectors_ID = unit(encode([text or "an item" for text in items.texts]))
    some = [rows[number] for number in kept]
    history_QD = np.stack([vectors_ID[row.history].mean(0) for row in some])
    nearer = {"history": shares(history_QD, some, vectors_ID)}
    for run, written in zip(options.runs, texts, strict=True):
        facts = read_json(run / "rationalize" / "summary.json")
        name = facts["teacher"]
        mine = [written[number] for number in kept]
        nearer[name] = shares(spoken(mine, encode), some, vectors_ID)
        asked = sum(count for outcome, count in facts["outcomes"].items() if outcome != "over_budget")
        line = {
            "benchmark": "teachers", "teacher": name, "asked": asked, "outcomes": facts["outcomes"],
            "sentences": facts["mean_sentences"], "distinct_sentences": facts["num_distinct_sentences"],
            "completion_tokens_per_answer": round(facts["completion_tokens"] / asked, 1), "rows_compared": len(kept),
            "nearer_than_target": round(float(nearer[name].mean()), 4),
            "target_in_nearest_100": round(float((nearer[name] * len(vectors_ID) < 100).mean()), 4),
        }  # fmt: skip
        print(json.dumps(line))
    names = list(nearer)
    for other in names[1:]:
        for first in names[: names.index(other)]:
            low, high = interval(nearer[other] - nearer[first])
            change = float((nearer[other] - nearer[first]).mean())
            line = {
                "benchmark": "teachers", "of": other, "minus": first, "nearer_than_target": round(change, 4),
                "interval": [round(low, 4), round(high, 4)],
            }  # fmt: skip
            print(json.dumps(line))


def spoken(texts: list[str], encode: Encode) -> NDArray[np.float32]:
    """Mean vector of a rationale's sentences, [Q, D]."""
    parts = [sentences(text) for text in texts]
    flat = sorted({sentence for part in parts for sentence in part})
    vectors_SD, row_of = unit(encode(flat)), {sentence: row for row, sentence in enumerate(flat)}
    return np.stack([vectors_SD[[row_of[sentence] for sentence in part]].mean(0) for part in parts])


def shares(
    queries_QD: NDArray[np.float32], rows: list[TrainingRow], vectors_ID: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Share of items nearer to the query than the row's nearest target, items of the history left out, [Q]."""
    found = []
    for query_D, row in zip(queries_QD, rows, strict=True):
        scores_I = vectors_ID @ query_D
        best = scores_I[row.targets].max()
        scores_I[row.history] = -np.inf
        found.append(float((scores_I > best).mean()))
    return np.array(found)


def interval(differences_Q: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over rows."""
    random = np.random.default_rng(0)
    means = [random.choice(differences_Q, len(differences_Q)).mean() for _ in range(SAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main()
