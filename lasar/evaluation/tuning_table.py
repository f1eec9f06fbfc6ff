"""A tuning's result: which settings of every method were tried on validation, at what cost, and which were chosen."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lasar.config import StageConfig, parse_section
from lasar.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Trial(StageConfig):
    """One setting, trained once."""

    changes: dict[str, Any]
    """What it changes: `stage.key: value`."""
    value: float
    """N@10 of validation users at the best epoch."""
    best_epoch: int
    """Epoch kept; 0 is the start."""
    cpu_seconds: float
    """CPU time of the stage, validation included."""
    users: int
    """Validation users."""


@dataclass(frozen=True, kw_only=True)
class MethodTuning(StageConfig):
    """All trials of a method."""

    stage: str
    """The stage tuned."""
    settings: dict[str, Any]
    """What every trial changes in the base recipe."""
    declared: int
    """Trials in the file; fewer are run where the minutes were used up."""
    trials: tuple[Trial, ...]
    """In the order they were run."""

    @property
    def chosen(self) -> int:
        """Number of the trial with the best value; the first of equals."""
        values = [trial.value for trial in self.trials]
        return values.index(max(values))


@dataclass(frozen=True, kw_only=True)
class TuningResult(StageConfig):
    """Everything that the table of a tuning says, and where it comes from."""

    name: str
    """Name of the tuning."""
    file: str
    """Its file in this repository."""
    base: str
    """The recipe that trials change."""
    dataset: str
    """Name of the data set."""
    seed: int
    """Of every trial."""
    minutes: float
    """CPU minutes of each method."""
    shared: dict[str, dict[str, Any]]
    """Every value of the stages that all trials share."""
    methods: dict[str, MethodTuning]
    """Method -> its trials."""
    device: str
    """Where it was run."""
    commit: str
    """Commit of this repository when the table was made."""


def tuning_cells(result: TuningResult) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, as text: one row per trial, the chosen one marked."""
    header = ["method", "trial", "settings", "N@10 valid", "best epoch", "CPU min", "chosen"]
    table = []
    for method, tuned in result.methods.items():
        for number, trial in enumerate(tuned.trials):
            table.append(
                [
                    method, f"{number + 1} of {tuned.declared}", _shown(tuned.settings | trial.changes),
                    f"{trial.value:.4f}", str(trial.best_epoch), f"{trial.cpu_seconds / 60:.1f}",
                    "yes" if number == tuned.chosen else "",
                ]
            )  # fmt: skip
    return header, table


def render_tuning(result: TuningResult) -> str:
    """One section of the results page, Markdown."""
    header, table = tuning_cells(result)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, ["---"] * len(header), *table)]
    rendered = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"## Tuning `{result.name}`: {result.dataset}, validation\n\n{rendered}\n\n"
        f"One training each, seed {result.seed}. A method begins no further trial once it has used "
        f"{result.minutes:g} CPU minutes. File: `{result.file}`, on `{result.base}`. "
        f"Device: {result.device}. Commit: `{result.commit}`.\n"
    )


def print_tuning(result: TuningResult, console: Console) -> None:
    """The table on a terminal, and what to copy into a study."""
    header, rows = tuning_cells(result)
    table = Table(title=f"{result.name}: {result.dataset}, validation", title_justify="left")
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for method, tuned in result.methods.items():
        chosen = json.dumps(tuned.settings | tuned.trials[tuned.chosen].changes)
        console.print(f"{method}: {chosen}", highlight=False, markup=False)


def write_tuning(path: Path, result: TuningResult) -> None:
    """Write a tuning's result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(asdict(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_tunings(folder: Path) -> list[TuningResult]:
    """Read and validate every `*.json` of a folder, by name; a missing folder has none.

    Raises:
        DataError: a file is not the result of a tuning; the message names the key.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(parse_section(TuningResult, values, where=str(path)))
        except (ValueError, ConfigError) as error:
            raise DataError(f"{path}: not the result of a tuning: {error}; run: lasar tune --save") from None
    return found


def _shown(changes: dict[str, Any]) -> str:
    return (
        ", ".join(
            f"{key.partition('.')[2]}={json.dumps(value).strip(chr(34))}" for key, value in changes.items()
        )
        or "-"
    )
