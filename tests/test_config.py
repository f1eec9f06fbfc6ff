"""Recipes: defaults, overrides, and one clear line for every mistake."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lasar.config import Recipe, StageConfig, load_recipe, parse_section
from lasar.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Clean(StageConfig):
    above: dict[str, float] = field(default_factory=dict)
    uppercase: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepare(StageConfig):
    path: Path = Path("events.csv")
    min_events: int = 5
    split: Literal["leave_one_out", "last_basket", "Temporal"] = "leave_one_out"
    columns: tuple[str, ...] = ("user", "item")
    clean: Clean = field(default_factory=Clean)


@dataclass(frozen=True, kw_only=True)
class Sft(StageConfig):
    learning_rate: float = 1e-3
    epochs: int = 10
    ema: bool = False
    limit: int | None = None


SECTIONS: dict[str, type[StageConfig]] = {"prepare": Prepare, "sft": Sft}

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "demo.yaml"
        path.write_text(text, encoding="utf-8")
        return load_recipe(path, overrides=overrides, sections=SECTIONS)

    return write_and_load


@pytest.fixture
def message(load: Load, tmp_path: Path) -> Callable[..., str]:
    """The error of a recipe, less the folder; always one line."""

    def error_of(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        line = str(caught.value)
        assert "\n" not in line
        return line.replace(f"{tmp_path}/", "")

    return error_of


def test_defaults(load: Load) -> None:
    recipe = load("name: x\n")
    assert recipe == Recipe(
        name="x",
        seed=0,
        run_dir=Path("runs/x"),
        stages=("prepare", "sft"),
        configs={"prepare": Prepare(), "sft": Sft()},
    )


def test_name_defaults_to_the_file_name(load: Load) -> None:
    assert load("seed: 3\n").name == "demo"
    assert load("seed: 3\n").run_dir == Path("runs/demo")


@dataclass(frozen=True, kw_only=True)
class Either(StageConfig):
    depth: Literal["auto", "sampled"] | Annotated[int, pydantic.Field(ge=0)] = "auto"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "autoo",
            "input should be 'auto' or 'sampled', or input should be a valid integer.*did you mean 'auto'",
        ),
        (-1, "input should be 'auto' or 'sampled', or input should be greater than or equal to 0, got -1"),
    ],
)
def test_a_word_or_a_number_is_asked_for_as_such(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^latent\.depth: {message}"):
        parse_section(Either, {"depth": value}, where="latent")


def test_values_replace_defaults(load: Load) -> None:
    recipe = load(
        "run_dir: /elsewhere\nstages: [sft]\n"
        "prepare:\n  path: a/b.csv\n  split: last_basket\n  columns: [u, i, t]\n"
        "sft:\n  learning_rate: 3\n  ema: true\n  limit: 7\n"
    )
    assert recipe.run_dir == Path("/elsewhere")
    assert recipe.stages == ("sft",)
    assert recipe.configs["prepare"] == Prepare(
        path=Path("a/b.csv"), split="last_basket", columns=("u", "i", "t")
    )
    assert recipe.configs["sft"] == Sft(learning_rate=3.0, ema=True, limit=7)


def test_stages_run_in_pipeline_order(load: Load) -> None:
    assert load("stages: [sft, prepare]\n").stages == ("prepare", "sft")


def test_an_empty_section_means_defaults(load: Load) -> None:
    assert load("name: x\nsft:\n").configs["sft"] == Sft()


def test_home_is_expanded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert load("name: x\n", "run_dir=~/runs/x").run_dir == Path("/home/someone/runs/x")


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", ".0003", "+3e-4", "0.3e-3"])
def test_floats_as_people_write_them(load: Load, text: str) -> None:
    assert load(f"sft:\n  learning_rate: {text}\n").configs["sft"] == Sft(learning_rate=3e-4)
    assert load("name: x\n", f"sft.learning_rate={text}").configs["sft"] == Sft(learning_rate=3e-4)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_any_float_round_trips_through_an_override(
    tmp_path_factory: pytest.TempPathFactory, value: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text("name: x\n")
    recipe = load_recipe(path, overrides=[f"sft.learning_rate={value!r}"], sections=SECTIONS)
    assert recipe.configs["sft"] == Sft(learning_rate=value)


def test_overrides(load: Load) -> None:
    recipe = load(
        "name: x\nsft:\n  epochs: 3\n",
        "sft.epochs=4",
        "sft.ema=true",
        "seed=9",
        "run_dir=there",
        "prepare.columns=[a, b]",
        "prepare.path=x=y.csv",
        "stages=[sft]",
    )
    assert recipe.configs["sft"] == Sft(epochs=4, ema=True)
    assert recipe.configs["prepare"] == Prepare(columns=("a", "b"), path=Path("x=y.csv"))
    assert (recipe.seed, recipe.run_dir, recipe.stages) == (9, Path("there"), ("sft",))


def test_overrides_reach_into_a_section_of_a_section(load: Load) -> None:
    text = "prepare:\n  clean:\n    above: {quantity: 0}\n"
    recipe = load(text, "prepare.clean.uppercase=true")
    assert recipe.configs["prepare"] == Prepare(clean=Clean(above={"quantity": 0.0}, uppercase=True))
    recipe = load("name: x\n", "prepare.clean.above={price: 1.5}")
    assert recipe.configs["prepare"] == Prepare(clean=Clean(above={"price": 1.5}))


def test_an_override_changes_one_of_two_sections_that_share_an_anchor(tmp_path: Path) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text("one: &same\n  epochs: 1\ntwo: *same\n")
    recipe = load_recipe(path, overrides=["one.epochs=5"], sections={"one": Sft, "two": Sft})
    assert recipe.configs == {"one": Sft(epochs=5), "two": Sft(epochs=1)}


def test_wrong_type_in_a_section_of_a_section(message: Callable[..., str]) -> None:
    line = message("prepare:\n  clean:\n    above: {price: much}\n")
    assert line.startswith("demo.yaml: prepare.clean.above.price: ")
    assert line.endswith("got 'much'")


def test_the_last_override_wins(load: Load) -> None:
    assert load("name: x\n", "sft.epochs=4", "sft.epochs=5").configs["sft"] == Sft(epochs=5)


def test_null_override_resets_an_optional_field(load: Load) -> None:
    assert load("sft:\n  limit: 3\n", "sft.limit=null").configs["sft"] == Sft(limit=None)
    assert load("sft:\n  limit: 3\n", "sft.limit=").configs["sft"] == Sft(limit=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sfd:\n  epochs: 3\n", "demo.yaml: unknown key 'sfd'; did you mean 'sft'?"),
        ("name: x\nsead: 3\n", "demo.yaml: unknown key 'sead'; did you mean 'seed'?"),
        ("on: 3\n", "demo.yaml: unknown key True"),
        ("1: 3\n", "demo.yaml: unknown key 1"),
        (
            "base: b.yaml\n",
            "demo.yaml: no recipe, but a study or a grid on b.yaml; run: lasar study demo.yaml (or tune)",
        ),
        ("sft:\n  epoch: 3\n", "demo.yaml: sft: unknown key 'epoch'; did you mean 'epochs'?"),
        ("sft:\n  12: 3\n", "demo.yaml: sft: unknown key 12"),
        (
            "prepare:\n  clean:\n    upercase: true\n",
            "demo.yaml: prepare.clean: unknown key 'upercase'; did you mean 'uppercase'?",
        ),
        ("prepare:\n  clean: 3\n", "demo.yaml: prepare.clean: expected 'key: value' lines, got 3"),
        ("sft: [1]\n", "demo.yaml: sft: expected 'key: value' lines, got [1]"),
        ("sft: false\n", "demo.yaml: sft: expected 'key: value' lines, got False"),
        ("sft: []\n", "demo.yaml: sft: expected 'key: value' lines, got []"),
        ("stages: [sfft]\n", "demo.yaml: stages: unknown stage 'sfft'; did you mean 'sft'?"),
        ("seed: -1\n", "demo.yaml: seed: must be from 0 to 2**32 - 1, got -1"),
        ("seed: 4294967296\n", "demo.yaml: seed: must be from 0 to 2**32 - 1, got 4294967296"),
        ("- a\n", "demo.yaml: expected 'key: value' lines at the top level"),
        ("", "demo.yaml: expected 'key: value' lines at the top level"),
    ],
)
def test_mistakes_in_structure(message: Callable[..., str], text: str, expected: str) -> None:
    assert message(text) == expected


@pytest.mark.parametrize(
    ("section", "where", "given"),
    [
        ("sft:\n  epochs: '3'", "sft.epochs", "got '3'"),
        ("sft:\n  epochs: 3.5", "sft.epochs", "got 3.5"),
        ("sft:\n  epochs: true", "sft.epochs", "got True"),
        ("sft:\n  epochs: null", "sft.epochs", "got None"),
        ("sft:\n  ema: 1", "sft.ema", "got 1"),
        ("sft:\n  learning_rate: fast", "sft.learning_rate", "got 'fast'"),
        ("prepare:\n  path: 3", "prepare.path", "got 3"),
        ("prepare:\n  columns: user", "prepare.columns", "got 'user'"),
        ("prepare:\n  columns: [a, 1]", "prepare.columns.1", "got 1"),
        ("name: 3", "name", "got 3"),
        ("seed: one", "seed", "got 'one'"),
        ("seed: true", "seed", "got True"),
        ("run_dir: [a]", "run_dir", "got ['a']"),
        ("stages: sft", "stages", "got 'sft'"),
    ],
)
def test_wrong_types_name_the_key_and_the_value(
    message: Callable[..., str], section: str, where: str, given: str
) -> None:
    line = message(f"{section}\n")
    assert line.startswith(f"demo.yaml: {where}: ")
    assert line.endswith(given)


def test_wrong_choice_names_the_choices_as_spelled_and_the_nearest(message: Callable[..., str]) -> None:
    line = message("prepare:\n  split: temporal\n")
    assert "'leave_one_out', 'last_basket' or 'Temporal'" in line
    assert line.endswith("got 'temporal'; did you mean 'Temporal'?")


def test_long_values_are_cut(message: Callable[..., str]) -> None:
    assert len(message(f"sft:\n  epochs: {'x' * 5000}\n")) < 200


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.epochs", "override 'sft.epochs': expected stage.key=value"),
        ("sfft.epochs=3", "override 'sfft.epochs=3': unknown stage 'sfft'; did you mean 'sft'?"),
        ("sft.epoch=3", "override 'sft.epoch=3': unknown key 'epoch'; did you mean 'epochs'?"),
        ("sft.epochs.x=3", "override 'sft.epochs.x=3': 'epochs' is a value and has no keys"),
        (
            "prepare.clean.upper=true",
            "override 'prepare.clean.upper=true': unknown key 'upper'; did you mean 'uppercase'?",
        ),
        (
            "prepare.claen.upper=1",
            "override 'prepare.claen.upper=1': unknown key 'claen'; did you mean 'clean'?",
        ),
        ("sead=3", "override 'sead=3': unknown key 'sead'; did you mean 'seed'?"),
        ("sft=3", "override 'sft=3': name a key of the stage, as in sft.key=value"),
        ("=3", "override '=3': unknown key ''"),
    ],
)
def test_mistakes_in_overrides(message: Callable[..., str], override: str, expected: str) -> None:
    assert message("name: x\n", override) == expected


def test_wrong_type_in_an_override(message: Callable[..., str]) -> None:
    assert message("name: x\n", "sft.epochs=many").endswith("got 'many'")


def test_override_into_a_broken_section_names_the_file(message: Callable[..., str]) -> None:
    expected = "demo.yaml: sft: expected 'key: value' lines, got 'fast'"
    assert message("sft: fast\n", "sft.epochs=3") == expected


@pytest.mark.parametrize(
    "text",
    [
        "sft: {epochs: 3",
        "a: b: c\n",
        "\tname: x\n",
        "prepare:\n  path: 2011-13-45\n",
        "name: !!python/object/apply:os.system ['true']\n",
        "sft: !!map x\n",
        "name: \x00\n",
    ],
)
def test_broken_yaml_is_one_line(message: Callable[..., str], text: str) -> None:
    assert message(text).startswith("demo.yaml: not valid YAML: ")


def test_broken_yaml_says_where(message: Callable[..., str]) -> None:
    assert "line 2" in message("name: x\nsft: {epochs: 3\n")
    assert message("name: x\n", "sft.epochs={").startswith("override 'sft.epochs={': not valid YAML: ")


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "sft:\n  epochs: 1\n  epochs: 1\n"])
def test_a_key_given_twice_is_refused(message: Callable[..., str], text: str) -> None:
    assert "given twice" in message(text)


def test_dates_stay_text(load: Load) -> None:
    config = load("prepare:\n  columns: [2011-12-09]\n").configs["prepare"]
    assert config == Prepare(columns=("2011-12-09",))


@pytest.mark.parametrize("value", ["{2011-12-09: x}", "&a [*a]"])
def test_values_that_are_not_json(message: Callable[..., str], value: str) -> None:
    assert message(f"prepare:\n  columns: {value}\n").startswith("demo.yaml: prepare")


def test_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    (tmp_path / "beauty.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path / "beuty.yaml", sections=SECTIONS)
    near = tmp_path / "beauty.yaml"
    assert str(caught.value) == f"{tmp_path / 'beuty.yaml'}: no such recipe; did you mean '{near}'?"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such recipe$"):
        load_recipe(tmp_path / "none" / "x.yaml", sections=SECTIONS)


def test_unreadable_recipes(tmp_path: Path) -> None:
    binary = tmp_path / "latin.yaml"
    binary.write_bytes("name: é\n".encode("latin-1"))
    for path in (binary, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
            load_recipe(path, sections=SECTIONS)


def test_a_field_without_default_must_be_given() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Strict(StageConfig):
        path: str

    with pytest.raises(ConfigError, match=r"^x.yaml: prepare.path: .*required"):
        parse_section(Strict, {}, where="x.yaml: prepare")


def test_configs_refuse_positional_arguments_and_change() -> None:
    with pytest.raises(TypeError):
        Sft(3e-4)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sft().epochs = 3  # type: ignore[misc]


def test_resolved_recipe_is_plain_and_loads_to_itself(load: Load, tmp_path: Path) -> None:
    recipe = load("seed: 4\nprepare:\n  path: a.csv\nsft:\n  learning_rate: 3e-4\n")
    resolved = recipe.as_dict()
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["prepare"] == {
        "path": "a.csv",
        "min_events": 5,
        "split": "leave_one_out",
        "columns": ["user", "item"],
        "clean": {"above": {}, "uppercase": False},
    }
    for file, text in (("r.yaml", yaml.safe_dump(resolved)), ("r.json", json.dumps(resolved))):
        (tmp_path / file).write_text(text)
        assert load_recipe(tmp_path / file, sections=SECTIONS) == recipe


def test_broken_json(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(ConfigError, match=r"recipe\.json: not valid JSON: "):
        load_recipe(tmp_path / "recipe.json", sections=SECTIONS)
