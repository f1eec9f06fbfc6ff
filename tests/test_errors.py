"""The error tree, the nearest spelling and the optional extras."""

import sys
from pathlib import Path

import pytest

from lasar import errors
from lasar.errors import LasarError, MissingExtraError, nearest, require


def _tree() -> set[type[LasarError]]:
    return set(LasarError.__subclasses__())


def test_every_error_is_drawn_in_the_module_docstring() -> None:
    assert errors.__doc__ is not None
    drawn = {line.split()[1] for line in errors.__doc__.splitlines() if line.startswith("+--")}
    assert drawn == {kind.__name__ for kind in _tree()}


def test_every_error_is_documented() -> None:
    assert all(kind.__doc__ for kind in _tree())


def test_errors_are_not_confused_with_builtin_ones() -> None:
    # "except ValueError" around library code must not swallow an error meant for the user.
    assert all(kind.__mro__[1] is LasarError for kind in _tree())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rat", "; did you mean 'learning_rate'?"),
        ("leraning_rate", "; did you mean 'learning_rate'?"),
        ("epoch", "; did you mean 'epochs'?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_nearest_spelling(name: str, expected: str) -> None:
    assert nearest(name, ["epochs", "learning_rate", "seed"]) == expected


def test_nearest_takes_any_iterable() -> None:
    assert nearest("prepar", iter(["prepare", "embed"])) == "; did you mean 'prepare'?"
    assert nearest("prepare", []) == ""


def test_require_returns_the_module() -> None:
    assert require("json", extra="train").loads("1") == 1
    assert require("os.path", extra="train").sep


@pytest.mark.parametrize("module", ["lasar_no_such_module", "lasar_no_such_module.part"])
def test_require_names_the_extra(module: str) -> None:
    with pytest.raises(MissingExtraError) as caught:
        require(module, extra="quantize")
    assert str(caught.value) == f"'{module}' is not installed; run: pip install 'lasar[quantize]'"


@pytest.mark.parametrize("missing", ["lasar_no_such_module", "brok"])
def test_require_does_not_hide_a_broken_installation(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is installed but lacks a dependency of its own is not "not installed"."""
    (tmp_path / "broken_peer.py").write_text(f"import {missing}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught:
        require("broken_peer", extra="train")
    assert caught.value.name == missing
    assert "broken_peer" not in sys.modules
