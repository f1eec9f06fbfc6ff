"""Tuning files: every method's settings chosen on validation, within the same CPU time.

A method is one stage and a declared list of trials, in the order in which they are run. It begins no further trial
once it has used its minutes; the trial under way is finished. What decides is the stage's own `valid_ndcg@10`, that of
its best epoch, on validation users. Nothing here reads a test event.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic

from lasar.artifacts import MANIFEST, read_json, read_manifest
from lasar.config import Recipe, StageConfig, parse_section, read_yaml
from lasar.errors import ConfigError, nearest
from lasar.evaluation.tuning_table import MethodTuning, Trial, TuningResult
from lasar.stages import STAGES
from lasar.study.files import is_folder_name, recipe_of, split_run_dir
from lasar.study.pool import Job, run_jobs
from lasar.study.reading import plain_path, settings_of, stale_reason
from lasar.study.running import run_level

_METRIC = "valid_ndcg@10"


@dataclass(frozen=True, kw_only=True)
class Method(StageConfig):
    """One method of a tuning file."""

    stage: str
    """The stage that is tuned; its `metrics.json` has `valid_ndcg@10`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What every trial changes: `stage.key: value`."""
    trials: tuple[dict[str, Any], ...]
    """What each trial changes beyond that, in the order in which they are run."""


@dataclass(frozen=True, kw_only=True)
class TuningFile(StageConfig):
    """What a tuning file may say."""

    name: str
    """Name of the tuning."""
    base: Path
    """The recipe that trials change, relative to the tuning file."""
    seed: int = 0
    """Of every trial."""
    minutes: Annotated[float, pydantic.Field(gt=0)]
    """CPU minutes of each method."""
    shared: tuple[str, ...]
    """Stages run once, charged to no method."""
    methods: dict[str, Method]
    """Method -> its trials."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A validated tuning file."""

    path: Path
    file: TuningFile
    root: Path
    overrides: tuple[str, ...]

    def shared(self) -> Recipe:
        """The stages that all trials share."""
        return self._recipe(self.root / "shared", self.file.shared, {})

    def trial(self, method: str, number: int) -> Recipe:
        """One trial of a method, from 0."""
        declared = self.file.methods[method]
        changes = declared.settings | declared.trials[number]
        try:
            return self._recipe(self.root / f"{method}-{number}", (declared.stage,), changes)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: methods.{method}: trial {number}: {error}") from None

    def _recipe(self, run_dir: Path, stages: Sequence[str], changes: dict[str, Any]) -> Recipe:
        own = {
            "name": self.file.name,
            "seed": self.file.seed,
            "run_dir": str(run_dir),
            "stages": list(stages),
        }
        return recipe_of(self.path.parent / self.file.base, self.overrides, changes, own)


def load_tuning(path: Path, *, overrides: Iterable[str] = ()) -> Tuning:
    """Read a tuning file and check everything that can be checked before anything runs.

    Args:
        path: the YAML file.
        overrides: `run_dir=PATH` moves the tuning; `stage.key=value` changes the base recipe of every trial.

    Raises:
        ConfigError: the file, a trial, the base recipe or an override is wrong.
    """
    file = parse_section(TuningFile, read_yaml(path), where=str(path))
    root, others = split_run_dir(
        overrides, default=Path("runs/tuning") / file.name, decided=("name", "seed", "stages")
    )
    tuning = Tuning(path=path, file=file, root=root, overrides=others)
    for key, value in (("name", file.name), *(("methods", method) for method in file.methods)):
        if not is_folder_name(value):
            raise ConfigError(f"{path}: {key}: {value!r} is no folder name; use letters, digits, '_', '-'")
    if not file.methods:
        raise ConfigError(f"{path}: methods: give at least one")
    for stage in file.shared:
        if stage not in STAGES:
            raise ConfigError(f"{path}: shared: unknown stage {stage!r}{nearest(stage, STAGES)}")
    for method, declared in file.methods.items():
        _check_method(tuning, method, declared)
    return tuning


def _check_method(tuning: Tuning, method: str, declared: Method) -> None:
    where = f"{tuning.path}: methods.{method}"
    if declared.stage not in STAGES:
        raise ConfigError(f"{where}: unknown stage {declared.stage!r}{nearest(declared.stage, STAGES)}")
    if declared.stage in tuning.file.shared:
        raise ConfigError(
            f"{where}: {declared.stage!r} is in 'shared', too; a stage that is tuned is not shared"
        )
    if not declared.trials:
        raise ConfigError(f"{where}: trials: give at least one, such as {{}} for the defaults")
    for key in {key for changes in (declared.settings, *declared.trials) for key in changes}:
        if key.partition(".")[0] != declared.stage:
            raise ConfigError(f"{where}: {key!r} does not change {declared.stage!r}, the stage that is tuned")
    for number in range(len(declared.trials)):
        config = tuning.trial(method, number).configs[declared.stage]
        for upstream in STAGES[declared.stage].inputs(config):
            if upstream not in tuning.file.shared:
                raise ConfigError(f"{where}: {declared.stage!r} reads {upstream!r}; name it in 'shared'")


def run_tuning(
    tuning: Tuning, *, methods: Sequence[str] | None = None, processes: int = 1, say: Callable[[str], None]
) -> None:
    """Run the trials that are not up to date, method by method; a killed tuning continues.

    Args:
        tuning: what to run.
        methods: only these.
        processes: trials run at once, each in a process of its own that writes to `logs/` in the tuning's folder.
        say: called with one line per stage and trial.

    Raises:
        ConfigError: a method is not in the file.
        LasarError: a stage cannot run.
    """
    for method in methods or ():
        if method not in tuning.file.methods:
            raise ConfigError(
                f"--method {method}: not in {tuning.path}{nearest(method, tuning.file.methods)}"
            )
    shared = tuning.shared()
    run_level(shared, shared={}, say=say)
    chosen = [method for method in tuning.file.methods if not methods or method in methods]
    if processes != 1:
        run_jobs([job for method in chosen for job in _jobs(tuning, method)], processes=processes, say=say)
        return
    for method in chosen:
        trials = tuning.file.methods[method].trials
        for number in range(len(trials)):
            if not _within_budget(tuning, method, number):
                left = len(trials) - number
                say(f"{method}: {tuning.file.minutes:g} CPU minutes used, {left} trials left out")
                break
            say(f"{method}: trial {number + 1} of {len(trials)}: {trials[number] or 'as it is'}")
            run_trial(tuning, method, number, say)


def run_trial(tuning: Tuning, method: str, number: int, say: Callable[[str], None] = print) -> None:
    """Run one trial, from 0, after the shared stages."""
    shared, recipe = tuning.shared(), tuning.trial(method, number)
    run_level(recipe, shared={stage: shared.run_dir / stage for stage in shared.stages}, say=say)
    found = read_json(_folder(tuning, method, number) / "metrics.json")[_METRIC]
    say(f"{method}: N@10 {found:.4f} on validation users")


def _within_budget(tuning: Tuning, method: str, number: int) -> bool:
    """Whether the finished trials before this one have left any of the method's minutes."""
    folders = [_folder(tuning, method, before) for before in range(number)]
    used = sum(read_manifest(f)["cpu_seconds"] for f in folders if (f / MANIFEST).is_file())
    return bool(used < 60 * tuning.file.minutes)


def _jobs(tuning: Tuning, method: str) -> list[Job]:
    names = [f"{method}-{number}" for number in range(len(tuning.file.methods[method].trials))]
    return [
        Job(
            name=name, run=run_trial, arguments=(tuning, method, number), log=tuning.root / "logs" / f"{name}.log",
            wanted=functools.partial(_within_budget, tuning, method, number),
        )
        for number, name in enumerate(names)
    ]  # fmt: skip


def _folder(tuning: Tuning, method: str, number: int) -> Path:
    return tuning.root / f"{method}-{number}" / tuning.file.methods[method].stage


def tuning_result(tuning: Tuning, *, device: str, commit: str) -> tuple[TuningResult, list[str]]:
    """What is finished with the settings that the file has now.

    Returns:
        The result; and one line for each trial that was made with other settings, naming the first difference.
    """
    methods, stale = {}, []
    for method, declared in tuning.file.methods.items():
        trials = []
        for number, changes in enumerate(declared.trials):
            recipe = tuning.trial(method, number)
            folder = recipe.run_dir / declared.stage
            if not (folder / MANIFEST).is_file():
                continue
            if reason := stale_reason(recipe, declared.stage):
                stale.append(f"{method}, trial {number}: {reason}")
                continue
            facts, manifest = read_json(folder / "metrics.json"), read_manifest(folder)
            trials.append(
                Trial(
                    changes=dict(changes), value=facts[_METRIC], best_epoch=facts["best_epoch"],
                    cpu_seconds=manifest["cpu_seconds"], users=facts["validation_users"],
                )
            )  # fmt: skip
        if trials:
            methods[method] = MethodTuning(
                stage=declared.stage, settings=dict(declared.settings), declared=len(declared.trials),
                trials=tuple(trials),
            )  # fmt: skip
    result = TuningResult(
        name=tuning.file.name, file=plain_path(tuning.path), base=plain_path(tuning.path.parent / tuning.file.base),
        dataset=_dataset(tuning), seed=tuning.file.seed, minutes=tuning.file.minutes,
        shared=settings_of(tuning.shared()), methods=methods, device=device, commit=commit,
    )  # fmt: skip
    return result, stale


def _dataset(tuning: Tuning) -> str:
    summary = tuning.root / "shared" / "prepare" / "summary.json"
    return str(read_json(summary)["dataset"]) if summary.is_file() else tuning.file.name
