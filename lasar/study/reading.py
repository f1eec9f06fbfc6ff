"""Read what a study has finished, and make its table."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lasar.artifacts import MANIFEST, content_hash, read_json, read_manifest
from lasar.config import Recipe, parse_section
from lasar.errors import DataError, LasarError
from lasar.evaluation.results import parameters_of
from lasar.evaluation.study_table import METRICS, Cell, Kind, StudyResult, build_rows
from lasar.stages import STAGES, evaluate
from lasar.study.files import Study, needed_stages
from lasar.study.timing import read_latency

_LATEST = 10  # records of a curve that a reported number is the mean of


def finished_cells(study: Study) -> tuple[list[Cell], list[str]]:
    """Read what is finished with the settings that the study file has now.

    Returns:
        The cells; and one line for each that was made with other settings, naming the first difference.

    Raises:
        DataError: an evaluation lacks a metric.
        ArtifactError: a file of `also_report` is missing.
    """
    cells: dict[tuple[int, str], Cell] = {}
    stale = []
    order = sorted(study.arms, key=lambda arm: arm != study.file.reference)
    for seed in study.file.seeds:
        for arm in order:
            recipe = study.of_cell(seed, arm)
            if seed not in study.seeds_of(arm) or not (recipe.run_dir / "evaluate" / MANIFEST).is_file():
                continue
            needed = needed_stages(recipe, "evaluate")
            parts = (study.once(), study.of_seed(seed), recipe)
            made = [(part, stage) for part in parts for stage in part.stages if stage in needed]
            reason = next((found for part, stage in made if (found := stale_reason(part, stage))), "")
            if reason:
                stale.append(f"seed {seed}, {arm}: {reason}")
                continue
            config = recipe.configs["evaluate"]
            assert isinstance(config, evaluate.Config)
            cells[seed, arm] = _cell(study, recipe, config, arm=arm, method=study.model_of(arm))
            evaluated = read_json(recipe.run_dir / "evaluate" / "metrics.json")["methods"]
            for method in (*config.also, *config.baselines):
                name = f"{arm}/{method}" if method in recipe.stages else method
                if method in evaluated and method != study.model_of(arm) and (seed, name) not in cells:
                    cells[seed, name] = _cell(study, recipe, config, arm=name, method=method)
    return list(cells.values()), stale


def study_result(study: Study, cells: Sequence[Cell], *, device: str, commit: str) -> StudyResult:
    """The table of the finished cells, with where it comes from.

    Args:
        study: the study.
        cells: at least one.
        device: where it was trained.
        commit: of this repository.

    Raises:
        DataError: the cells do not belong in one table.
    """
    done = [cell for cell in cells if cell.kind == "arm"]
    folders = [study.of_cell(cell.seed, cell.arm).run_dir for cell in done]
    facts = {
        folder: {
            "dataset": metrics["dataset"], "split": metrics["split_kind"], "evaluated_on": metrics["split"],
            "exclude_seen": metrics["exclude_seen"], "num_users": metrics["num_users"],
        }
        for folder in folders
        for metrics in [read_json(folder / "evaluate" / "metrics.json")]
    }  # fmt: skip
    first = facts[folders[0]]
    for folder, others in facts.items():
        for key, value in others.items():
            if value != first[key]:
                raise DataError(
                    f"{folder}: {key} is {value}, but {first[key]} in {folders[0]}; arms must be evaluated alike"
                )
    versions = {
        json.dumps(read_manifest(folder / study.model_of(cell.arm))["versions"]): None
        for folder, cell in zip(folders, done, strict=True)
    }
    seed = done[0].seed
    return StudyResult(
        name=study.file.name,
        file=plain_path(study.path),
        base=plain_path(study.base),
        **first,
        model=study.file.model,
        reference=study.file.reference,
        planned_seeds=study.file.seeds,
        shared=settings_of(study.once()) | settings_of(study.of_seed(seed)),
        rows=build_rows(
            cells, study.file.reference, changes=study.arms, latency=read_latency(study),
            settings={arm: settings_of(study.of_cell(seed, arm)) for arm in study.arms},
        ),
        device=device,
        commit=commit,
        versions=tuple(json.loads(text) for text in versions),
    )  # fmt: skip


def stale_reason(recipe: Recipe, stage: str) -> str:
    """Why an artifact is not the one that the recipe describes; empty if it is.

    By settings, seed and inputs, without hashing sources: tables are printed where the data need not be, and a key
    that was added with a default since is not a difference.
    """
    folder, now = recipe.run_dir / stage, recipe.configs[stage]
    try:
        manifest = read_manifest(folder)
        then = parse_section(type(now), manifest["config"], where=f"{folder}: config")
        if manifest["seed"] != recipe.seed:
            return f"{stage} was run with seed {manifest['seed']}"
        for upstream in STAGES[stage].inputs(now):
            if manifest["inputs"].get(upstream) != content_hash(recipe.run_dir / upstream):
                return f"{stage} was run on another {upstream}"
    except LasarError as error:
        return str(error)
    was, is_now = _flat(then.as_dict()), _flat(now.as_dict())
    keys = [key for key in is_now | was if was.get(key) != is_now.get(key)]
    return f"{stage}.{keys[0]} was {was.get(keys[0])}, is {is_now.get(keys[0])}" if keys else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _cell(study: Study, recipe: Recipe, config: evaluate.Config, *, arm: str, method: str) -> Cell:
    import polars as pl

    run_dir = recipe.run_dir
    found = pl.read_parquet(run_dir / "evaluate" / "per_user.parquet").filter(pl.col("method") == method)
    for metric in METRICS:
        if metric not in found.columns:
            raise DataError(f"{run_dir / 'evaluate'}: no {metric!r}; a study needs evaluate.k=10 or more")
    trained = method in STAGES
    kind: Kind = "untrained" if not trained else "arm" if arm in study.arms else "before"
    depth = read_json(run_dir / "evaluate" / "metrics.json")["depth"]["mean"]
    all_stages = needed_stages(recipe, method) - {"prepare"} if trained else set()
    return Cell(
        arm=arm,
        kind=kind,
        seed=recipe.seed,
        users_U=found["user_index"].to_numpy().astype(np.int32),
        values={metric: found[metric].to_numpy().astype(np.float64) for metric in METRICS},
        depth=depth if method == config.model else None,
        seconds=read_manifest(run_dir / method)["seconds"] if trained else None,
        pipeline_seconds=sum(read_manifest(run_dir / s)["seconds"] for s in all_stages) if trained else None,
        parameters=parameters_of(run_dir / method) if trained else None,
        reported={
            label: _reported(run_dir, place) if kind == "arm" else None
            for label, place in study.file.also_report.items()
        },
    )


def _reported(run_dir: Path, place: str) -> float | None:
    file, _, keys = place.partition(":")
    if not (run_dir / file).parent.is_dir():
        return None  # a stage that this arm does not have
    if file.endswith(".jsonl"):
        records = [json.loads(line) for line in (run_dir / file).read_text(encoding="utf-8").splitlines()]
        latest = [record[keys] for record in records if keys in record][-_LATEST:]
        return float(np.mean(latest)) if latest else None
    value = read_json(run_dir / file)
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def settings_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Resolved values of a recipe's stages; of paths on this machine, only the last part."""
    return {stage: _plain(dataclasses.asdict(recipe.configs[stage])) for stage in recipe.stages}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path | str):
        return Path(value).name if str(value).startswith(("/", "..", "~")) else str(value)
    return value


def plain_path(path: Path) -> str:
    """A path as seen from the checkout, or its last part."""
    inside = path.resolve().is_relative_to(Path.cwd())
    return path.resolve().relative_to(Path.cwd()).as_posix() if inside else path.name
