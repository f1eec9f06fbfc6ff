"""Results as data: what a document quotes is a row of `results/results.jsonl` or in a file of `results/studies/`.

`docs/results.md` and its plots are generated from them; `check` says whether they still agree.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from lasar.artifacts import read_json, read_manifest
from lasar.config import StageConfig, parse_section
from lasar.errors import ConfigError, DataError
from lasar.evaluation.pareto_plot import is_timed, plot_name, render_pareto
from lasar.evaluation.results_page import render_page, render_plots
from lasar.evaluation.study_table import read_studies
from lasar.evaluation.tuning_table import read_tunings

JSONL = Path("results/results.jsonl")
STUDIES = "studies"  # folder beside the rows: one JSON file per study
TUNINGS = "tunings"  # the same of tunings
PAGE = Path("docs/results.md")
REQUIRED_METRICS = ("hr@10", "recall@10", "ndcg@10")


@dataclass(frozen=True, kw_only=True)
class ResultRow(StageConfig):
    """One evaluated method; a null says "does not apply", a key may never be left out."""

    dataset: str
    """Name of the data set."""
    split: str
    """How events were held out: `leave_one_out`, `last_basket`, `temporal` or `given`."""
    evaluated_on: str
    """`test` or `valid`."""
    method: str
    """The model's stage or the baseline."""
    seed: int
    """Seed of the run."""
    params: int | None
    """Trained parameters; null for counting methods."""
    train_targets: str
    """`all`: every prefix of a history is a sample; `last`: one sample per user."""
    metrics: dict[str, float]
    """Mean over users of every metric."""
    intervals: dict[str, tuple[float, float]]
    """95 % bootstrap interval of every metric."""
    num_users: int
    """Users evaluated."""
    exclude_seen: bool
    """Whether items of the history were left out of the lists."""
    mean_depth: float | None
    """Mean number of latent steps; null for methods without any."""
    teacher: str | None
    """What wrote the rationales the model was trained with, and with which intent; null for methods without any."""
    train_seconds: float | None
    """Wall time of the training stage; null for counting methods."""
    device: str
    """Processor and number of cores, or accelerator."""
    commit: str
    """Commit of this repository, with `-dirty` where files differed from it."""
    recipe: str
    """Path of the recipe in this repository."""


def validate_row(row: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Check one row's keys, types and values.

    Raises:
        DataError: a key is missing, unknown or empty, a value has the wrong type, or a required metric is
        missing.
    """
    try:
        parsed = parse_section(ResultRow, row, where=where)
    except ConfigError as error:
        raise DataError(str(error)) from None
    for key in ("dataset", "split", "method", "train_targets", "device", "commit", "recipe"):
        if not getattr(parsed, key):
            raise DataError(f"{where}: {key} is empty")
    for metric in REQUIRED_METRICS:
        if metric not in parsed.metrics:
            raise DataError(f"{where}: metrics lacks {metric!r}")
    for metric, value in parsed.metrics.items():
        if not 0 <= value <= 1:
            raise DataError(f"{where}: metrics[{metric!r}] is {value}, outside 0..1")
    plain: dict[str, Any] = json.loads(pydantic.TypeAdapter(ResultRow).dump_json(parsed))
    return plain


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read and validate all rows; a missing file has none.

    Raises:
        DataError: a line is not JSON or not a valid row; the message names the line.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
        rows.append(validate_row(row, where=f"{path}:{number}"))
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row.

    Raises:
        DataError: the row is incomplete or wrong, or is already there.
    """
    valid = validate_row(row, where="new row")
    if valid in read_rows(path):
        raise DataError(
            f"{path}: this row is already there: {valid['dataset']}, {valid['method']}, seed {valid['seed']}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(valid) + "\n")


def row_from_run(
    run_dir: Path, *, recipe: str, method: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """Build a row from the artifacts of a finished run.

    Args:
        run_dir: a run folder with a complete `evaluate` artifact.
        recipe: path of the recipe it was run from.
        method: the model by default, or one of the evaluated baselines.
        device: where it ran; this machine's processor by default.

    Raises:
        ArtifactError: an artifact is missing.
        DataError: the method was not evaluated in this run.
    """
    metrics = read_json(run_dir / "evaluate" / "metrics.json")
    manifest = read_manifest(run_dir / "evaluate")
    model = metrics["model"]
    method = method or model
    if method not in metrics["methods"]:
        known = ", ".join(metrics["methods"])
        raise DataError(f"{run_dir}: method {method!r} was not evaluated; there are: {known}")
    values = dict(metrics["methods"][method])
    intervals = values.pop("ci")
    folder = run_dir / method
    trained = (folder / "manifest.json").is_file()
    depth = metrics.get("depth", {}).get("mean", 0.0) if method == model else 0.0
    row = {
        "dataset": metrics["dataset"],
        "split": metrics["split_kind"],
        "evaluated_on": metrics["split"],
        "method": method,
        "seed": manifest["seed"],
        "params": parameters_of(folder) if trained else None,
        "train_targets": metrics["train_targets"],
        "metrics": {name: round(value, 6) for name, value in values.items()},
        "intervals": {name: [round(end, 6) for end in ends] for name, ends in intervals.items()},
        "num_users": metrics["num_users"],
        "exclude_seen": metrics["exclude_seen"],
        "mean_depth": round(depth, 4) if depth else None,
        "teacher": _teacher(run_dir, folder) if trained else None,
        "train_seconds": read_manifest(folder)["seconds"] if trained else None,
        "device": device or this_device(),
        "commit": current_commit(),
        "recipe": recipe,
    }
    return validate_row(row, where=str(run_dir))


def rows_from_run(run_dir: Path, *, recipe: str, device: str | None = None) -> list[dict[str, Any]]:
    """Rows of the model and of every baseline evaluated beside it."""
    methods = read_json(run_dir / "evaluate" / "metrics.json")["methods"]
    return [row_from_run(run_dir, recipe=recipe, method=method, device=device) for method in methods]


def parameters_of(folder: Path) -> int:
    """Parameters of a language model, or of a trained baseline, whose weights lie in the artifact itself."""
    return count_parameters(folder / "model" if (folder / "model").is_dir() else folder)


def _teacher(run_dir: Path, folder: Path) -> str | None:
    if not {"anchor", "rationalize"} & read_manifest(folder)["inputs"].keys():
        return None
    summary = read_json(run_dir / "rationalize" / "summary.json")
    return f"{summary['teacher']}, {summary['intent']}"


def count_parameters(model: Path) -> int:
    """Number of weights stored in a model folder (a tied weight is stored once).

    Raises:
        DataError: there is no safetensors file, or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise DataError(f"{model}: no .safetensors file to count parameters in")
    total = 0
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file}: damaged ({error}); make it again") from None
        total += sum(math.prod(shape) for shape in shapes)
    return total


def current_commit(repository: Path = Path()) -> str:
    """Short commit of the repository, `-dirty` where files differ from it.

    Raises:
        DataError: not a git repository, or it has no commit.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise DataError(f"{repository.resolve()}: no git commit to record; run inside it") from None
    return done.stdout.strip()


def this_device() -> str:
    """The GPU if there is one, the processor, and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    import torch

    processor = f"{name}, {cores} core{'s' if cores != 1 else ''}"
    return f"{torch.cuda.get_device_name()}; {processor}" if torch.cuda.is_available() else processor


def write_document(results: Path = JSONL, docs: Path = PAGE) -> list[Path]:
    """Regenerate the results page and its plots (in the page's folder) from the rows and the studies.

    Args:
        results: the rows; the studies lie in the folder `studies` beside them.
        docs: the page; only what stands between its markers is replaced.

    Returns:
        The files written.
    """
    pages = _expected(results, docs)
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(pages)


def check(results: Path = JSONL, docs: Path = PAGE) -> list[str]:
    """Say how the results page and its plots differ from the rows; empty when they agree."""
    pages = _expected(results, docs)
    problems = []
    for path, text in pages.items():
        if not path.is_file():
            problems.append(f"{path}: missing; run: make results")
        elif path.read_text(encoding="utf-8") != text:
            problems.append(f"{path}: differs from {results}; run: make results")
    for plot in sorted(docs.parent.glob("results-*.svg")):
        if plot not in pages:
            problems.append(f"{plot}: belongs to no row of {results}; delete it")
    return problems


def _expected(results: Path, docs: Path) -> dict[Path, str]:
    rows = read_rows(results)
    existing = docs.read_text(encoding="utf-8") if docs.is_file() else None
    plots = {docs.parent / name: svg for name, svg in render_plots(rows).items()}
    studies = read_studies(results.parent / STUDIES)
    tunings = read_tunings(results.parent / TUNINGS)
    plots |= {docs.parent / plot_name(study): render_pareto(study) for study in studies if is_timed(study)}
    return {docs: render_page(rows, studies=studies, tunings=tunings, existing=existing), **plots}
