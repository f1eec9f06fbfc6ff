"""Every error a user can cause, in one tree.

LasarError
+-- ConfigError        a recipe or an override is wrong
+-- DataError          an input file is missing, unreadable or has wrong content
+-- ArtifactError      an artifact folder is missing, damaged, busy or from another format version
+-- MissingExtraError  an optional dependency is not installed
+-- UnknownItemError   an item or a user is not in the catalogue
+-- TrainingError      training broke down: its numbers left the range of numbers

A message names the file, the value and the fix. The command line prints it as one line and exits with
status 2; a traceback is always a defect of ours.
"""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

_REASON = 300  # characters of another library's message


class LasarError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(LasarError):
    """A recipe, a key, a value or an override is wrong."""


class DataError(LasarError):
    """An input file is missing, cannot be read, or its content cannot be used."""


class ArtifactError(LasarError):
    """An artifact folder is missing, damaged, in use, or written by another format version."""


class MissingExtraError(LasarError):
    """A command needs an optional dependency that is not installed."""


class UnknownItemError(LasarError):
    """An item id or a user id is not known to the catalogue."""


class TrainingError(LasarError):
    """Training broke down; the message says which value to change."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid name closest to `name` (case aside), or an empty string."""
    spelled = {candidate.lower(): candidate for candidate in valid}
    matches = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f"; did you mean {spelled[matches[0]]!r}?" if matches else ""


def reason_of(error: Exception) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= _REASON else f"{words[: _REASON - 3]}..."


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or say in one line which extra installs it.

    Raises:
        MissingExtraError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingExtraError(f"{module!r} is not installed; run: pip install 'lasar[{extra}]'") from error
