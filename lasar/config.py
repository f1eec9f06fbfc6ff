"""Recipes: one YAML file per experiment, holding only differences from the defaults.

A recipe has a `name`, optionally `seed`, `run_dir` and `shard_layers`, the list of `stages`, and one section per
stage whose keys are the fields of that stage's config dataclass. Overrides are `stage.key=value`, `seed=1` or
`run_dir=PATH`. Unknown keys and wrong types are errors that name the file, the key and the nearest valid
spelling.
"""

import dataclasses
import itertools
import json
import re
import typing
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pydantic
import pydantic_core
import yaml

from lasar.errors import ConfigError, nearest

TOP_LEVEL_KEYS = ("name", "seed", "run_dir", "shard_layers", "stages")

_MAX_SHOWN_CHARACTERS = 80

T = TypeVar("T")
ConfigT = TypeVar("ConfigT", bound="StageConfig")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Base of every stage's config: frozen, keyword-only, unknown keys refused."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")
    by_default: ClassVar[bool] = True
    """Whether a recipe that lists no `stages` runs this one."""
    in_ranks: ClassVar[bool] = False
    """Whether all processes of a command run this stage together (`lasar.ranks`)."""

    def as_dict(self) -> dict[str, Any]:
        """Every field as plain JSON data: paths become strings, tuples become lists."""
        plain: dict[str, Any] = pydantic_core.to_jsonable_python(dataclasses.asdict(self))
        return plain


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A resolved experiment: what to run, where, and every value of every stage.

    `shard_layers`: several processes hold parts of a trained model's layers (`lasar.training.shards`). What comes out
    is the same, so it is in no fingerprint.
    """

    name: str
    seed: int
    run_dir: Path
    stages: tuple[str, ...]
    configs: Mapping[str, StageConfig]
    shard_layers: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON data, defaults written out."""
        return {
            "name": self.name,
            "seed": self.seed,
            "run_dir": str(self.run_dir),
            "shard_layers": self.shard_layers,
            "stages": list(self.stages),
            **{stage: config.as_dict() for stage, config in self.configs.items()},
        }


def load_recipe(
    path: Path, *, overrides: Iterable[str] = (), sections: Mapping[str, type[StageConfig]]
) -> Recipe:
    """Read a recipe, apply overrides, validate every section.

    Args:
        path: the YAML file.
        overrides: strings `stage.key=value`, `stage.section.key=value`, `seed=1`, `run_dir=PATH`; values are
            YAML.
        sections: the config type of every stage, in pipeline order.

    Raises:
        ConfigError: the file, a key, a type or an override is wrong.
    """
    values = read_yaml(path)
    for override in overrides:
        _apply_override(values, override, path, sections)
    if "base" in values:
        raise ConfigError(
            f"{path}: no recipe, but a study or a grid on {values['base']}; run: lasar study {path} (or tune)"
        )
    for key in values:
        if key not in TOP_LEVEL_KEYS and key not in sections:
            valid = [*TOP_LEVEL_KEYS, *sections]
            raise ConfigError(f"{path}: unknown key {key!r}{nearest(str(key), valid)}")
    name = _typed(values.get("name", path.stem), str, f"{path}: name")
    seed = _typed(values.get("seed", 0), int, f"{path}: seed")
    if not 0 <= seed < 2**32:  # what numpy accepts
        raise ConfigError(f"{path}: seed: must be from 0 to 2**32 - 1, got {seed}")
    usual = [stage for stage, kind in sections.items() if kind.by_default]
    stages = _typed(values.get("stages", usual), tuple[str, ...], f"{path}: stages")
    for stage in stages:
        if stage not in sections:
            raise ConfigError(f"{path}: stages: unknown stage {stage!r}{nearest(stage, sections)}")
    run_dir = _typed(values.get("run_dir", f"runs/{name}"), str, f"{path}: run_dir")
    return Recipe(
        name=name,
        seed=seed,
        run_dir=Path(run_dir).expanduser(),
        shard_layers=_typed(values.get("shard_layers", False), bool, f"{path}: shard_layers"),
        stages=tuple(stage for stage in sections if stage in stages),
        configs={
            stage: parse_section(kind, _section(values, stage), where=f"{path}: {stage}")
            for stage, kind in sections.items()
        },
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping, or a JSON one (`.json`, the resolved recipe in a run folder).

    Raises:
        ConfigError: the file is missing, is not YAML or JSON, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such recipe{nearest(str(path), siblings)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    values = _parse_json(text, path) if path.suffix == ".json" else _parse_yaml(text, where=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level")
    return values


def parse_section(kind: type[ConfigT], values: Mapping[str, Any], *, where: str) -> ConfigT:
    """Validate one section against its dataclass.

    Args:
        kind: the config dataclass.
        values: the section as plain data.
        where: how errors name the section, for example `recipes/demo.yaml: sft`.

    Raises:
        ConfigError: an unknown key, a missing key, or a value of the wrong type.
    """
    _refuse_unknown_keys(kind, values, where)
    return _typed(dict(values), kind, where)


def _refuse_unknown_keys(kind: type[StageConfig], values: Any, where: str) -> None:
    """Look before pydantic does, because only we name the nearest valid key. Sections may hold sections."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected 'key: value' lines, got {_shown(values)}")
    for key, value in values.items():
        nested = _subsection(kind, key, where=where)
        if nested is not None:
            _refuse_unknown_keys(nested, value, f"{where}.{key}")


def _subsection(kind: type[StageConfig], key: Any, *, where: str) -> type[StageConfig] | None:
    """The config type of a field that is a section of its own, None for any other field."""
    fields = [field.name for field in dataclasses.fields(kind)]
    if key not in fields:
        raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), fields)}")
    hint = typing.get_type_hints(kind)[key]
    return hint if isinstance(hint, type) and issubclass(hint, StageConfig) else None


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML ships no types
    """Safe YAML that reads 3e-4 as a number and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            if isinstance(key_node, yaml.ScalarNode):
                seen.add(key_node.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


# YAML 1.1 wants a dot in the mantissa and a sign in the exponent, and takes 3e-4 for a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, *, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2011-13-45
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None


def _typed(value: Any, kind: type[T], where: str) -> T:
    """Validate strictly, through JSON so that lists become tuples but strings never become numbers."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError) as error:  # a date as a key, an anchor that contains itself
        raise ConfigError(f"{where}: {error}") from None
    try:
        return pydantic.TypeAdapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        errors = error.errors()
        first, loc, said = errors[0], errors[0]["loc"], errors[0]["msg"]
        # Of a field that takes a word or a number pydantic names each alternative as if it were a key below it.
        beside = [found for found in errors if found["loc"][:-1] == loc[:-1]]
        if loc and str(loc[-1]).startswith("literal["):
            loc, said = (
                loc[:-1],
                ", or ".join(found["msg"][:1].lower() + found["msg"][1:] for found in beside),
            )
        location = ".".join(str(part) for part in loc)
        key = f"{where}.{location}" if location else where
        given = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
        hint = ""
        if first["type"] == "literal_error" and isinstance(first["input"], str):
            hint = nearest(first["input"], re.findall(r"'([^']*)'", first["ctx"]["expected"]))
        message = said[:1].lower() + said[1:]
        raise ConfigError(f"{key}: {message}{given}{hint}") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."


def _section(values: Mapping[str, Any], stage: str) -> Any:
    """A section; a bare `sft:` line (YAML null) means all defaults."""
    section = values.get(stage)
    return {} if section is None else section


def _apply_override(
    values: dict[str, Any], override: str, path: Path, sections: Mapping[str, type[StageConfig]]
) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: expected stage.key=value")
    value = _parse_yaml(text, where=f"override {override!r}")
    stage, *keys = key.split(".")
    if not keys:
        if key in sections:
            raise ConfigError(f"override {override!r}: name a key of the stage, as in {key}.key=value")
        if key not in TOP_LEVEL_KEYS:
            raise ConfigError(f"override {override!r}: unknown key {key!r}{nearest(key, TOP_LEVEL_KEYS)}")
        values[key] = value
        return
    if stage not in sections:
        raise ConfigError(f"override {override!r}: unknown stage {stage!r}{nearest(stage, sections)}")
    kind: type[StageConfig] | None = sections[stage]
    section, where = values, str(path)
    for outer, inner in itertools.pairwise((stage, *keys)):
        if kind is None:
            raise ConfigError(f"override {override!r}: {outer!r} is a value and has no keys")
        kind = _subsection(kind, inner, where=f"override {override!r}")
        where = f"{where}: {outer}" if section is values else f"{where}.{outer}"
        found = _section(section, outer)
        if not isinstance(found, dict):
            raise ConfigError(f"{where}: expected 'key: value' lines, got {_shown(found)}")
        section[outer] = dict(found)  # a copy: a YAML anchor may show the same section elsewhere
        section = section[outer]
    section[keys[-1]] = value
