"""Run a study's stages, level by level, each level a run folder whose shared stages are symlinks."""

import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lasar.artifacts import MANIFEST, read_json, run_stage, write_json
from lasar.config import Recipe
from lasar.errors import ArtifactError, ConfigError
from lasar.stages import STAGES
from lasar.study.files import Study
from lasar.study.pool import Job, run_jobs

T = TypeVar("T", str, int)


def run_study(
    study: Study,
    *,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    processes: int = 1,
    say: Callable[[str], None],
) -> None:
    """Run seed by seed what is not up to date; a killed study continues.

    Args:
        study: what to run.
        seeds: only these seeds.
        arms: only these arms.
        processes: cells run at once, each in a process of its own that writes to `logs/` in the study's folder.
        say: called with one line per stage and cell.

    Raises:
        ConfigError: a seed or an arm is not of the study.
        LasarError: a stage cannot run.
    """
    seeds = _chosen(seeds, study.file.seeds, "--seed", study.path)
    arms = _chosen(arms, tuple(study.arms), "--arm", study.path)
    cells = [(seed, arm) for seed in seeds for arm in arms if seed in study.seeds_of(arm)]
    if not cells:
        raise ConfigError(f"{study.path}: only_seeds leaves nothing of what was asked for")
    first = _only(study.once(), study.shared(seeds[0], arms))
    for recipe in (first, study.of_seed(seeds[0]), *(study.of_cell(*cell) for cell in cells)):
        for stage in recipe.stages:  # a wrong path is found now, not when its stage begins
            STAGES[stage].sources(recipe.configs[stage])
    run_level(first, shared={}, say=say)
    if processes != 1:
        run_jobs(_jobs(study, cells), processes=processes, say=say)
        return
    started = set[int]()
    for number, (seed, arm) in enumerate(cells, start=1):
        if seed not in started:
            run_seed(study, seed, [other for other_seed, other in cells if other_seed == seed], say)
            started.add(seed)
        say(f"cell {number} of {len(cells)}: seed {seed}, {arm}")
        run_cell(study, seed, arm, say)


def run_seed(study: Study, seed: int, arms: Sequence[str], say: Callable[[str], None] = print) -> None:
    """Run the stages that arms share within a seed."""
    shared = study.shared(seed, arms)
    once = {stage: folder for stage, folder in shared.items() if stage in study.file.once}
    run_level(_only(study.of_seed(seed), shared), shared=once, say=say)


def run_cell(study: Study, seed: int, arm: str, say: Callable[[str], None] = print) -> None:
    """Run the stages that an arm has for itself."""
    run_level(study.of_cell(seed, arm), shared=study.shared(seed, [arm]), say=say)


def _jobs(study: Study, cells: Sequence[tuple[int, str]]) -> list[Job]:
    """What the cells share within a seed, then the cells; one that needs nothing of its seed waits for nothing."""
    needing = {cell for cell in cells if study.shared(cell[0], [cell[1]]).keys() & set(study.file.per_seed)}
    jobs = []
    for seed in dict.fromkeys(seed for seed, _ in cells):
        name, arms = f"seed-{seed}", [arm for other, arm in cells if other == seed]
        jobs.append(Job(name=name, run=run_seed, arguments=(study, seed, arms), log=_log(study, name)))
    for seed, arm in cells:
        name, after = f"seed-{seed}/{arm}", frozenset([f"seed-{seed}"] if (seed, arm) in needing else [])
        jobs.append(
            Job(name=name, run=run_cell, arguments=(study, seed, arm), log=_log(study, name), after=after)
        )
    return jobs


def _log(study: Study, name: str) -> Path:
    return study.root / "logs" / f"{name.replace('/', '-')}.log"


def _only(recipe: Recipe, needed: Container[str]) -> Recipe:
    """A recipe without the stages that nobody needs."""
    return replace(recipe, stages=tuple(stage for stage in recipe.stages if stage in needed))


def _chosen(given: Sequence[T] | None, valid: Sequence[T], option: str, path: Path) -> list[T]:
    """What was asked for, in the study's order."""
    for value in given or ():
        if value not in valid:
            known = ", ".join(map(str, valid))
            raise ConfigError(f"{option} {value}: not in {path}, which has {known}")
    return [value for value in valid if not given or value in given]


def run_level(recipe: Recipe, *, shared: Mapping[str, Path], say: Callable[[str], None]) -> None:
    """Run a recipe's stages that are not up to date, in a run folder whose shared stages are symlinks."""
    for stage, folder in shared.items():
        _link(recipe.run_dir / stage, folder)
    for stage in recipe.stages:
        folder = recipe.run_dir / stage
        if folder.is_symlink():  # it was shared when the study file said so
            folder.unlink()
        ran = run_stage(stage, STAGES[stage], recipe)
        written = recipe.run_dir / "recipe.json"
        if ran or not written.is_file():
            write_json(written, recipe.as_dict())
        seconds = read_json(folder / MANIFEST)["seconds"]
        say(f"{folder}: " + (f"done in {seconds:,.1f} s" if ran else "up to date, skipped"))


def _link(link: Path, target: Path) -> None:
    """Make `link` a relative symlink to `target`; another process may be doing the same."""
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.resolve() != target.resolve():
        link.unlink()
    try:
        link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    except FileExistsError:
        if link.resolve() != target.resolve():
            raise ArtifactError(
                f"{link}: holds an artifact of its own, but the study shares {target}; move it away"
            ) from None
