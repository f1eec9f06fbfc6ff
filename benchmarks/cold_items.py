"""Can a new item be recommended at once? Items held out of training, added live, and who bought them first.

A share of the items is drawn by a seed among those with enough buyers, and every event of theirs is taken out of the
log before `prepare`: vectors, codes and model never see them. A server is started on what was trained, in process, and
gets the items through `POST /admin/items`, by their titles and texts. First buyers: users whose last order holds such
an item and who bought something known before; the history is what they bought before, known items only. Each buyer
counts once; intervals are 95 % bootstrap intervals over buyers.

Methods, on the same candidates (all items; what a user has is left out where the data has no repeats): the model,
ranking everything; the lists the server gives with its usual beam; nearest items by text vector to the last order
(`text_last`) and to the whole history (`text_mean`); random order, in expectation. `percentile` is the share of the
candidates ranked before the item: 0 is the top, 0.5 is chance. `cold_recall` ranks the added items among themselves.
All of it with and without item tokens (decision 0005), which share everything up to `quantize`.

Usage: python benchmarks/cold_items.py [RECIPE] [STAGE.KEY=VALUE ...] [--stage sft] [--share 0.05] [--work DIR]
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from lasar.artifacts import read_json, run_stage, write_json
from lasar.config import Recipe, load_recipe
from lasar.data.interactions import SPLIT_TEST, Interactions, ItemTable
from lasar.data.readers import read_dataset
from lasar.errors import ConfigError, LasarError
from lasar.evaluation.significance import bootstrap_intervals, paired_bootstrap
from lasar.stages import STAGES
from lasar.stages.prepare import Config as Prepare
from lasar.stages.prepare import _reader_options

SHARED = ("prepare", "embed", "quantize")
CUTOFFS = (10, 50)
TOKEN = "only-inside-this-process"
Values = NDArray[np.float64]
Ranked = NDArray[np.int32]  # [Q, I]: items of every buyer, best first, -1 after the last one


@dataclass(frozen=True, kw_only=True)
class Buyers:
    """What first buyers had, and what they took.

    Attributes:
        histories: per buyer, earlier orders of known items, oldest first.
        cold: per buyer, the new items of the next order; never empty.
        warm: per buyer, the known items of the same order; may be empty.
        exclude_seen: whether what a buyer has can be left out of the candidates.
    """

    histories: list[list[list[str]]]
    cold: list[list[str]]
    warm: list[list[str]]
    exclude_seen: bool


def main() -> None:
    arguments = _arguments()
    sections = {name: module.Config for name, module in STAGES.items()}
    work: Path = arguments.work

    def recipe(name: str, *more: str) -> Recipe:
        overrides = [*arguments.overrides, *more, f"run_dir={work / name}"]
        return load_recipe(arguments.recipe, overrides=overrides, sections=sections)

    whole = recipe("whole")
    run_stage("prepare", STAGES["prepare"], whole)
    interactions = Interactions.load(work / "whole" / "prepare")
    items = ItemTable.load(work / "whole" / "prepare")
    cold = choose_cold(interactions, arguments)
    held_out = {items.item_ids[item] for item in cold}
    log = write_log(whole.configs["prepare"], held_out, work / "log")
    shared = recipe("shared", *log)
    for stage in SHARED:
        run_stage(stage, STAGES[stage], shared)
    known = set(ItemTable.load(work / "shared" / "prepare").item_ids)
    buyers = first_buyers(interactions, items, held_out, known=known)
    added = [
        {"item_id": items.item_ids[i], "title": items.titles[i], "text": items.texts[i]}
        for i in cold.tolist()
    ]
    results = {}
    for item_tokens in (True, False):
        name = "item_tokens" if item_tokens else "codes_only"
        tokens = f"sft.weights.item_tokens={json.dumps(item_tokens)}"
        train(recipe(name, *log, tokens), work / "shared", until=arguments.stage)
        facts = {"benchmark": "cold_items", "stage": arguments.stage, "item_tokens": item_tokens}
        results[name] = measure(work / name, arguments.stage, added, buyers)
        for line in report(results[name]):
            print(json.dumps(facts | line), flush=True)
    print(json.dumps({"benchmark": "cold_items", **compare(results)}), flush=True)


def choose_cold(interactions: Interactions, arguments: argparse.Namespace) -> NDArray[np.int64]:
    """Indices of the items to hold out, drawn among those with enough distinct buyers."""
    pairs = np.unique(np.stack([interactions.item_index, interactions.user_index]), axis=1)
    enough = np.flatnonzero(np.bincount(pairs[0], minlength=interactions.num_items) >= arguments.min_buyers)
    count = round(arguments.share * interactions.num_items)
    if not 0 < count <= len(enough):
        raise ConfigError(
            f"--share {arguments.share:g}: {count} items, but {len(enough)} have --min-buyers {arguments.min_buyers}; "
            "lower one of them"
        )
    rng = np.random.default_rng(arguments.seed)
    return np.sort(rng.choice(enough, count, replace=False))


def write_log(config: Any, held_out: set[str], folder: Path) -> list[str]:
    """Write the events, and the item table if there is one, without the held-out items.

    Returns:
        Overrides of `prepare` that read what was written as the recipe reads its source.

    Raises:
        ConfigError: the source fixes the split, which an event table cannot say.
    """
    assert isinstance(config, Prepare)
    if config.split == "given":
        raise ConfigError("prepare.split=given: cannot be held out from; use leave_one_out or last_basket")
    items_path = Path(config.items) if config.items else None
    events, table = read_dataset(config.reader, Path(config.source), items_path, _reader_options(config))
    folder.mkdir(parents=True, exist_ok=True)
    kept = _without(events.collect(), held_out, config).drop("timestamp_source", strict=False)
    timed = kept["timestamp"].null_count() < len(kept)
    kept.write_parquet(folder / "events.parquet")
    roles = {"user": "user_id", "item": "item_id", "timestamp": "timestamp" if timed else None}
    roles |= {name: name for name in ("event_type", "weight") if getattr(config.columns, name)}
    source: dict[str, Any] = {
        "source": str(folder / "events.parquet"),
        "reader": "table",
        "format": {},
        "items": None,
    }
    if table is not None:
        _without(table.collect(), held_out, config).write_parquet(folder / "items.parquet")
        source["items"], roles["item_key"] = str(folder / "items.parquet"), "item_id"
    columns: dict[str, Any] = dict(roles)  # a column `title` needs no role
    if table is None:
        columns["texts"] = list(config.columns.texts)
    return [f"prepare.{key}={json.dumps(value)}" for key, value in (source | {"columns": columns}).items()]


def _without(frame: pl.DataFrame, held_out: set[str], config: Prepare) -> pl.DataFrame:
    item_id = pl.col("item_id").str.to_uppercase() if config.clean.uppercase_items else pl.col("item_id")
    return frame.filter(~item_id.is_in(sorted(held_out)).fill_null(False))


def first_buyers(
    interactions: Interactions, items: ItemTable, held_out: set[str], *, known: set[str]
) -> Buyers:
    """Test users of the whole log who took a held-out item, and had something known before."""
    cases = interactions.cases(SPLIT_TEST)
    buyers = Buyers(histories=[], cold=[], warm=[], exclude_seen=not interactions.has_repeats)
    for history, baskets, targets in zip(cases.histories, cases.baskets, cases.targets, strict=True):
        taken = [items.item_ids[item] for item in targets]
        cold = [item_id for item_id in taken if item_id in held_out]
        orders: dict[int, list[str]] = {}
        for item, basket in zip(history.tolist(), baskets.tolist(), strict=True):
            if items.item_ids[item] in known:
                orders.setdefault(basket, []).append(items.item_ids[item])
        if cold and orders:
            buyers.histories.append(list(orders.values()))
            buyers.cold.append(cold)
            buyers.warm.append([item_id for item_id in taken if item_id in known])
    if not buyers.cold:
        raise ConfigError("no user of the test split took a held-out item; raise --share")
    return buyers


def train(recipe: Recipe, shared: Path, *, until: str) -> None:
    """Run the recipe's stages up to `until`; those before training are the shared ones."""
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    for stage in SHARED:
        link = recipe.run_dir / stage
        if not link.is_symlink():
            link.symlink_to((shared / stage).absolute(), target_is_directory=True)
    stages = ("sft",) if until == "sft" else ("rationalize", "sft", "anchor", "latent_sft")
    for stage in stages:
        run_stage(stage, STAGES[stage], recipe)
    write_json(recipe.run_dir / "recipe.json", recipe.as_dict())


def measure(
    run: Path, stage: str, added: list[dict[str, str]], buyers: Buyers
) -> dict[str, dict[str, Values]]:
    """Values of every method, metric and buyer, on a server that has just been given the new items."""
    from starlette.testclient import TestClient

    from lasar.serving.app import create_app
    from lasar.serving.item_vectors import TextVectors
    from lasar.serving.service import Service
    from lasar.serving.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            run=run, model=stage, database=f"sqlite:///{folder}/state.sqlite", admin_token=TOKEN, timeout_ms=600_000
        )  # fmt: skip
        service = Service(settings)
        with TestClient(create_app(service)) as client:
            for start in range(0, len(added), 500):
                body = {"add": added[start : start + 500]}
                answer = client.post("/admin/items", json=body, headers={"authorization": f"Bearer {TOKEN}"})
                answer.raise_for_status()
            lists = served(client, buyers)
        snapshot = service.catalogue.snapshot
    assert len(snapshot.items) == snapshot.num_trained + len(added)
    recommender, index = snapshot.recommender, {i: n for n, i in enumerate(snapshot.items.item_ids)}
    pairs = [recommender.indices(history) for history in buyers.histories]
    histories, baskets = [items for items, _ in pairs], [orders for _, orders in pairs]
    everything = len(snapshot.items)
    model = recommender.ranker.rank(
        histories, baskets, k=everything, beam_width=everything, exclude_seen=buyers.exclude_seen, batch_size=8
    )  # fmt: skip
    width = read_json(run / "embed" / "summary.json")["text_width"]
    vectors_IE = TextVectors(run).vectors(snapshot.items.texts)[
        :, :width
    ]  # without what items are bought with
    vectors_IE = vectors_IE / np.linalg.norm(vectors_IE, axis=1, keepdims=True)
    last = [items[orders == orders[-1]] for items, orders in pairs]
    seen = histories if buyers.exclude_seen else None
    is_cold = np.arange(everything) >= snapshot.num_trained
    cold = [[index[i] for i in taken] for taken in buyers.cold]
    served_QK, served_scores = _as_indices(lists, index)
    assert _agree(served_QK, served_scores, model.items_QK, model.scores_QK), (
        "served scores are not the model's"
    )
    found = {
        "model": metrics(model.items_QK, cold, is_cold),
        "text_last": metrics(text_ranked(vectors_IE, last, seen), cold, is_cold),
        "text_mean": metrics(text_ranked(vectors_IE, histories, seen), cold, is_cold),
        "random": expected_of_random(model.items_QK, is_cold),
    }
    found["served"] = {f"recall@{k}": recall(served_QK, cold, k) for k in CUTOFFS}
    for name, items_QK in (("model", model.items_QK), ("served", served_QK)):
        found[name]["cold_share@10"] = is_cold[items_QK[:, :10]].mean(axis=1)
    has_warm = [row for row, taken in enumerate(buyers.warm) if taken]
    warm = [[index[i] for i in buyers.warm[row]] for row in has_warm]
    found["model, known items of the same orders"] = {
        f"recall@{k}": recall(model.items_QK[has_warm], warm, k) for k in CUTOFFS
    }
    return found


def served(client: Any, buyers: Buyers) -> list[list[dict[str, Any]]]:
    """What the server recommends to every buyer with its usual beam."""
    requests = [
        {"history": history, "k": max(CUTOFFS), "exclude_seen": buyers.exclude_seen}
        for history in buyers.histories
    ]
    lists: list[list[dict[str, Any]]] = []
    for start in range(0, len(requests), 64):
        answer = client.post("/v1/recommend/batch", json={"requests": requests[start : start + 64]})
        answer.raise_for_status()
        lists += [result["response"]["items"] for result in answer.json()["results"]]
    return lists


def _as_indices(
    lists: Sequence[Sequence[Mapping[str, Any]]], index: Mapping[str, int]
) -> tuple[Ranked, Values]:
    items_QK = np.full((len(lists), max(CUTOFFS)), -1, dtype=np.int32)
    scores_QK = np.full(items_QK.shape, -np.inf)
    for row, entries in enumerate(lists):
        items_QK[row, : len(entries)] = [index[entry["item_id"]] for entry in entries]
        scores_QK[row, : len(entries)] = [entry["score"] for entry in entries]
    return items_QK, scores_QK


def _agree(items_QK: Ranked, scores_QK: Values, all_QI: Ranked, scores_QI: NDArray[np.float32]) -> bool:
    """Whether every item has the score in a list that it has in the ranking of everything."""
    for row, listed in enumerate(items_QK):
        score_of = dict(zip(all_QI[row].tolist(), scores_QI[row].tolist(), strict=True))
        known = listed >= 0
        expected = np.array([score_of[item] for item in listed[known].tolist()])
        if not np.allclose(scores_QK[row, known], expected, atol=1e-3):
            return False
    return True


def text_ranked(
    vectors_IE: NDArray[np.float32], queries: Sequence[Ranked], seen: Sequence[Ranked] | None
) -> Ranked:
    """Items by cosine to the mean vector of some items, [Q, I]; seen ones are left out."""
    ranked_QI = np.full((len(queries), len(vectors_IE)), -1, dtype=np.int32)
    for row, items in enumerate(queries):
        similarity_I = vectors_IE @ vectors_IE[items].mean(axis=0)
        if seen is not None:
            similarity_I[seen[row]] = -np.inf
        best = np.argsort(-similarity_I, kind="stable")
        best = best[np.isfinite(similarity_I[best])]
        ranked_QI[row, : len(best)] = best
    return ranked_QI


def metrics(
    ranked_QI: Ranked, targets: Sequence[Sequence[int]], is_cold_I: NDArray[np.bool_]
) -> dict[str, Values]:
    """Recall, mean percentile, and recall among the new items alone, of every buyer [Q]."""
    cold_QI = np.full(ranked_QI.shape, -1, dtype=np.int32)
    percentiles = np.empty(len(targets))
    for row, taken in enumerate(targets):
        ranked = ranked_QI[row][ranked_QI[row] >= 0]
        before = np.flatnonzero(np.isin(ranked, taken))
        assert len(before) == len(taken), "a target is not among the candidates"
        percentiles[row] = (before / (len(ranked) - 1)).mean()
        cold = ranked[is_cold_I[ranked]]
        cold_QI[row, : len(cold)] = cold
    values = {f"recall@{k}": recall(ranked_QI, targets, k) for k in CUTOFFS}
    values["percentile"] = percentiles
    return values | {f"cold_recall@{k}": recall(cold_QI, targets, k) for k in CUTOFFS}


def recall(ranked_QK: Ranked, targets: Sequence[Sequence[int]], k: int) -> Values:
    """Share of a buyer's targets among the first `k`, [Q]."""
    return np.array(
        [np.isin(taken, row[:k]).mean() for row, taken in zip(ranked_QK, targets, strict=True)],
        dtype=np.float64,
    )


def expected_of_random(ranked_QI: Ranked, is_cold_I: NDArray[np.bool_]) -> dict[str, Values]:
    """What a random order of the same candidates gives in expectation, [Q]."""
    all_Q, cold_Q = (ranked_QI >= 0).sum(axis=1), np.full(len(ranked_QI), is_cold_I.sum())
    values = {f"recall@{k}": np.minimum(1.0, k / all_Q) for k in CUTOFFS}
    values["percentile"] = np.full(len(ranked_QI), 0.5)
    return values | {f"cold_recall@{k}": np.minimum(1.0, k / cold_Q) for k in CUTOFFS}


def report(found: Mapping[str, Mapping[str, Values]]) -> list[dict[str, Any]]:
    """One line a method: mean and interval of every metric; and the model against the better text-kNN."""
    lines: list[dict[str, Any]] = []
    for method, values in found.items():
        intervals = bootstrap_intervals(values)
        shown = {name: [_mean(values[name]), *map(_round, intervals[name])] for name in values}
        lines.append({"method": method, "buyers": len(next(iter(values.values()))), **shown})
    for name in ("recall@10", "recall@50", "cold_recall@10"):
        rival = max(("text_last", "text_mean"), key=lambda method: found[method][name].mean())
        other, test = found[rival][name], paired_bootstrap(found["model"][name], found[rival][name])
        lines.append(
            {
                "metric": name, "baseline": rival, "parity": True,
                "ratio": round(float(found["model"][name].mean() / other.mean()), 2) if other.any() else None,
                "difference": [_round(test.difference), _round(test.low), _round(test.high)],
            }
        )  # fmt: skip
    return lines


def compare(results: Mapping[str, Mapping[str, Mapping[str, Values]]]) -> dict[str, Any]:
    """With item tokens minus without, on the same buyers; mean and interval."""
    line: dict[str, Any] = {"difference": "item tokens minus codes only", "parity": True}
    for name, ours in results["item_tokens"]["model"].items():
        test = paired_bootstrap(ours, results["codes_only"]["model"][name])
        line[name] = [_round(test.difference), _round(test.low), _round(test.high)]
    return line


def _mean(values: Values) -> float:
    return _round(float(values.mean()))


def _round(value: float) -> float:
    return round(value, 4)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("overrides", nargs="*", help="values that replace the recipe's, such as sft.epochs=4")
    parser.add_argument("--stage", choices=("sft", "latent_sft"), default="sft")
    parser.add_argument("--share", type=float, default=0.05, help="of the items, held out")
    parser.add_argument("--min-buyers", type=int, default=10, help="of an item that may be held out")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of items")
    parser.add_argument("--work", type=Path, default=Path("runs/cold_items"))
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    try:
        main()
    except LasarError as error:
        raise SystemExit(f"error: {error}") from None
