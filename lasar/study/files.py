"""Study files: what they may say, and everything that can be checked before anything runs."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lasar.config import Recipe, StageConfig, load_recipe, parse_section, read_yaml
from lasar.errors import ConfigError, nearest
from lasar.stages import STAGES, evaluate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class StudyFile(StageConfig):
    """What a study file may say."""

    name: str
    """Name of the study."""
    base: Path
    """The recipe that the arms change, relative to the study file."""
    seeds: tuple[int, ...]
    """Every arm is run with each of them."""
    once: tuple[str, ...] = ()
    """Stages run once, with the first seed."""
    per_seed: tuple[str, ...] = ()
    """Stages run once per seed, shared by all arms."""
    per_arm: tuple[str, ...]
    """Stages run for every arm and seed; `evaluate` is one."""
    reference: str
    """The arm that every other is compared with."""
    model: str = ""
    """The stage whose model is compared; without, each arm's own `evaluate.model`."""
    arms: dict[str, dict[str, Any] | None]
    """Arm -> what it changes: `stage.key: value`."""
    only_seeds: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Arm -> the seeds it is run with, where not all."""
    also_report: dict[str, str] = field(default_factory=dict)
    """Label -> `stage/file.json:key.path` of a further number; of a `.jsonl` the mean of its last ten records."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A validated study."""

    path: Path
    file: StudyFile
    root: Path
    overrides: tuple[str, ...]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """Arm -> what it changes."""
        return {arm: dict(changes or {}) for arm, changes in self.file.arms.items()}

    @property
    def base(self) -> Path:
        """Path of the base recipe."""
        return self.path.parent / self.file.base

    def once(self) -> Recipe:
        """The stages shared by all seeds, as a recipe of its own."""
        return self._recipe(self.root / "once", self.file.once, seed=self.file.seeds[0])

    def of_seed(self, seed: int) -> Recipe:
        """The stages shared by all arms of a seed."""
        return self._recipe(self.root / f"seed-{seed}", self.file.per_seed, seed=seed)

    def of_cell(self, seed: int, arm: str) -> Recipe:
        """An arm's own stages: of `per_arm`, what its evaluation reads and what reads its evaluation."""
        folder = self.root / f"seed-{seed}" / arm
        try:
            recipe = self._recipe(folder, self.file.per_arm, seed=seed, changes=self.arms[arm])
        except ConfigError as error:
            raise ConfigError(f"{self.path}: arms.{arm}: {error}") from None
        needed = needed_stages(recipe, "evaluate")
        after = {s for s in recipe.stages if "evaluate" in STAGES[s].inputs(recipe.configs[s])}
        return replace(recipe, stages=tuple(s for s in recipe.stages if s in needed | after))

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """Seeds that an arm is run with."""
        return self.file.only_seeds.get(arm, self.file.seeds)

    def model_of(self, arm: str) -> str:
        """The stage whose model an arm is compared by."""
        config = self.of_cell(self.file.seeds[0], arm).configs["evaluate"]
        assert isinstance(config, evaluate.Config)
        return self.file.model or config.model

    def shared(self, seed: int, arms: Iterable[str] | None = None) -> dict[str, Path]:
        """Folder of every stage that the arms of a seed share; with `arms`, of those that they need."""
        once = {stage: self.root / "once" / stage for stage in self.file.once}
        every = once | {stage: self.root / f"seed-{seed}" / stage for stage in self.file.per_seed}
        if arms is None:
            return every
        needed = set[str]().union(*(needed_stages(self.of_cell(seed, arm), "evaluate") for arm in arms))
        return {stage: folder for stage, folder in every.items() if stage in needed}

    def _recipe(
        self,
        run_dir: Path,
        stages: Sequence[str],
        *,
        seed: int,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> Recipe:
        own = {"name": self.file.name, "seed": seed, "run_dir": str(run_dir), "stages": list(stages)}
        return recipe_of(self.base, self.overrides, changes, own)


def needed_stages(recipe: Recipe, stage: str) -> set[str]:
    """A stage and everything that it reads, directly or through others."""
    needed, waiting = set[str](), [stage]
    while waiting:
        name = waiting.pop()
        if name not in needed and name in STAGES:
            needed.add(name)
            waiting += STAGES[name].inputs(recipe.configs[name])
    return needed


def recipe_of(
    base: Path, overrides: Sequence[str], changes: Mapping[str, Any], own: Mapping[str, Any]
) -> Recipe:
    """A recipe made from a base, a person's overrides, what a file changes, and what the file decides."""
    fixed = [f"{key}={json.dumps(value)}" for key, value in (*changes.items(), *own.items())]  # JSON is YAML
    sections = {name: module.Config for name, module in STAGES.items()}
    return load_recipe(base, overrides=[*overrides, *fixed], sections=sections)


def split_run_dir(
    overrides: Iterable[str], *, default: Path, decided: Sequence[str]
) -> tuple[Path, tuple[str, ...]]:
    """Where the runs go, and the other overrides.

    Raises:
        ConfigError: an override is for what the file decides.
    """
    root, others = default, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in decided:
            raise ConfigError(
                f"override {override!r}: the file decides it; choose with --seed, --arm or --method"
            )
        if key == "run_dir":
            root = Path(value).expanduser()
        else:
            others.append(override)
    return root, tuple(others)


def is_folder_name(value: str) -> bool:
    """Whether a name can be that of a folder, without surprises."""
    return _NAME.fullmatch(value) is not None


def load_study(path: Path, *, overrides: Iterable[str] = ()) -> Study:
    """Read a study file and check everything that can be checked before anything runs.

    Args:
        path: the YAML file.
        overrides: `run_dir=PATH` moves the study; `stage.key=value` changes the base recipe of every arm.

    Raises:
        ConfigError: the file, an arm's change, the base recipe or an override is wrong.
    """
    file = parse_section(StudyFile, read_yaml(path), where=str(path))
    root, others = split_run_dir(
        overrides, default=Path("runs/study") / file.name, decided=("name", "seed", "stages")
    )
    study = Study(path=path, file=file, root=root, overrides=others)
    _check_names(study)
    _check_stages(study)
    for arm in study.arms:
        _check_arm(study, arm)
    return study


def _check_names(study: Study) -> None:
    path, file = study.path, study.file
    for key, value in (("name", file.name), *(("arms", arm) for arm in file.arms)):
        if not is_folder_name(value):
            raise ConfigError(f"{path}: {key}: {value!r} is no folder name; use letters, digits, '_', '-'")
        if key == "arms" and value in STAGES:
            raise ConfigError(f"{path}: arms: {value!r} is the name of a stage; call the arm something else")
    for key in ("seeds", "arms"):
        if not getattr(file, key):
            raise ConfigError(f"{path}: {key}: give at least one")
    if len(set(file.seeds)) != len(file.seeds):
        raise ConfigError(f"{path}: seeds: {list(file.seeds)} names a seed twice")
    if file.reference not in file.arms:
        raise ConfigError(
            f"{path}: reference: no arm is called {file.reference!r}{nearest(file.reference, file.arms)}"
        )
    for arm, seeds in file.only_seeds.items():
        if arm not in file.arms:
            raise ConfigError(f"{path}: only_seeds: no arm is called {arm!r}{nearest(arm, file.arms)}")
        if not seeds or len(set(seeds)) != len(seeds) or set(seeds) - set(file.seeds):
            raise ConfigError(
                f"{path}: only_seeds.{arm}: {list(seeds)}: give some of the seeds {list(file.seeds)}"
            )
    for label, place in file.also_report.items():
        if not re.fullmatch(r"[^:]+/[^:]+\.jsonl?:.+", place):
            raise ConfigError(
                f"{path}: also_report.{label}: expected stage/file.json:key.path or stage/file.jsonl:key, got {place!r}"
            )


def _check_stages(study: Study) -> None:
    """Every stage is in one list, and reads only what its own or an outer level has made before it."""
    path, seen = study.path, dict[str, str]()
    for key in ("once", "per_seed", "per_arm"):
        for stage in getattr(study.file, key):
            if stage not in STAGES:
                raise ConfigError(f"{path}: {key}: unknown stage {stage!r}{nearest(stage, STAGES)}")
            if stage in seen:
                raise ConfigError(f"{path}: {key}: {stage!r} is in {seen[stage]!r} already; name it once")
            seen[stage] = key
    if seen.get("evaluate") != "per_arm":
        raise ConfigError(f"{path}: per_arm: must hold 'evaluate', which measures the arms")
    levels, read = [study.once(), study.of_seed(study.file.seeds[0])], set[str]()
    for arm in study.arms:
        made = set[str]()
        for recipe in (*levels, study.of_cell(study.file.seeds[0], arm)):
            for stage in recipe.stages:
                for upstream in STAGES[stage].inputs(recipe.configs[stage]):
                    if upstream not in made:
                        raise ConfigError(
                            f"{path}: {seen[stage]}: {stage!r} reads {upstream!r}; "
                            f"name it in the same list or in one before it"
                        )
                made.add(stage)
        read |= made
    for stage in study.file.per_arm:
        if stage not in read:
            raise ConfigError(f"{path}: per_arm: no arm's evaluation reads {stage!r}; leave it out")


def _check_arm(study: Study, arm: str) -> None:
    path, file = study.path, study.file
    for key in study.arms[arm]:
        stage = key.partition(".")[0]
        if stage not in file.per_arm:
            raise ConfigError(
                f"{path}: arms.{arm}: {key!r} changes nothing that is run per arm; "
                f"per_arm holds {', '.join(file.per_arm)}{nearest(stage, file.per_arm)}"
            )
    for seed in file.seeds:
        config = study.of_cell(seed, arm).configs["evaluate"]
        assert isinstance(config, evaluate.Config)
        evaluated = (config.model, *config.also)
        if file.model and file.model not in evaluated:
            raise ConfigError(
                f"{path}: model: {file.model!r} is not evaluated in arm {arm!r}{nearest(file.model, evaluated)}; "
                f"set evaluate.model or evaluate.also in {study.base}"
            )
