"""How long each arm takes to answer: the same requests, the arms in turns, in one process."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lasar.artifacts import MANIFEST, content_hash, read_json, write_json
from lasar.config import parse_section
from lasar.data.interactions import SPLIT_TEST, EvalCases, Interactions
from lasar.errors import ArtifactError
from lasar.evaluation.study_table import Latency
from lasar.stages import evaluate
from lasar.study.files import Study, needed_stages

SIZES = (1, 32)  # requests ranked together
_BATCHES = 20  # of each size; the median is reported
FILE = "latency.json"


def time_arms(study: Study, *, say: Callable[[str], None], batches: int = _BATCHES) -> Path:
    """Time the finished arms of the first seed and write `latency.json` into the study's folder.

    Every batch is answered by one arm after the other before the next batch begins, so that what else the machine does
    falls on all of them.

    Args:
        study: which.
        say: called with one line per arm.
        batches: of each size.

    Raises:
        ArtifactError: no arm of the first seed is finished.
    """
    seed = study.file.seeds[0]
    arms = [arm for arm in study.arms if (study.of_cell(seed, arm).run_dir / "evaluate" / MANIFEST).is_file()]
    if not arms:
        raise ArtifactError(f"{study.root}: no arm of seed {seed} is finished; run: lasar study {study.path}")
    ranks = {arm: _rank(study, seed, arm) for arm in arms}
    cases = Interactions.load(study.of_cell(seed, arms[0]).run_dir / "prepare").cases(SPLIT_TEST)
    cases = cases.subset(max(SIZES) * batches, seed)
    seconds: dict[tuple[str, int], list[float]] = {(arm, size): [] for arm in arms for size in SIZES}
    steps: dict[str, list[float]] = {arm: [] for arm in arms}
    for size in SIZES:
        for number in range(-1, min(batches, len(cases) // size)):  # the one before the first warms up
            for arm, rank in ranks.items():
                started = time.perf_counter()
                depths_Q = _answer(rank, cases, max(number, 0) * size, size)
                if number >= 0:
                    seconds[arm, size].append((time.perf_counter() - started) / size)
                    steps[arm].extend(depths_Q)
    found = {}
    for arm in arms:
        folder = study.of_cell(seed, arm).run_dir / study.model_of(arm)
        written = read_json(folder / "metrics.json").get("written", {}).get("mean_tokens")
        latency = Latency(
            milliseconds={size: 1000 * float(np.median(seconds[arm, size])) for size in SIZES if seconds[arm, size]},
            steps=float(np.mean(steps[arm])) if written is None else written,
        )  # fmt: skip
        found[arm] = {"model": content_hash(folder), **asdict(latency)}
        shown = ", ".join(f"{ms:.2f} ms at batch {size}" for size, ms in latency.milliseconds.items())
        say(f"{arm}: {shown}; {latency.steps:.2f} steps")
    write_json(study.root / FILE, {"seed": seed, "arms": found})
    return study.root / FILE


def read_latency(study: Study) -> dict[str, Latency]:
    """What was timed, of the models that are there now."""
    if not (study.root / FILE).is_file():
        return {}
    timed = read_json(study.root / FILE)
    found = {}
    for arm, facts in timed["arms"].items():
        model = facts.pop("model")
        if arm in study.arms and model == content_hash(
            study.of_cell(timed["seed"], arm).run_dir / study.model_of(arm)
        ):
            found[arm] = parse_section(Latency, facts, where=str(study.root / FILE))
    return found


def _rank(study: Study, seed: int, arm: str) -> Any:
    recipe = study.of_cell(seed, arm)
    config = recipe.configs["evaluate"]
    assert isinstance(config, evaluate.Config)
    inputs = {stage: recipe.run_dir / stage for stage in needed_stages(recipe, "evaluate")}
    return evaluate.open_stage(study.model_of(arm), config, inputs, seed=seed).rank


def _answer(rank: Any, cases: EvalCases, start: int, size: int) -> Sequence[float]:
    histories, baskets = cases.histories[start : start + size], cases.baskets[start : start + size]
    depths: Sequence[float] = rank(histories, baskets, "auto").depths_Q.tolist()
    return depths
