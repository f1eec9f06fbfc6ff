"""The commands of somebody who compares: studies, tunings, two runs user by user."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lasar import cli_tables
from lasar.errors import ArtifactError

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Values that replace the recipe's.")
]


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY", help="YAML file of the study.")],
    overrides: Overrides = None,
    seed: Annotated[list[int] | None, typer.Option(help="Run only this seed; repeat.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Run only this arm; repeat.")] = None,
    processes: Annotated[int, typer.Option(help="Cells run at once, each in a process.")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Run nothing, print the table.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Run nothing, print the table and save it.")] = False,
    latency: Annotated[
        bool, typer.Option("--latency", help="Run nothing, time the finished arms in turns.")
    ] = False,
    results: Annotated[Path, typer.Option(help="Where --save puts it.")] = Path("results/studies"),
    device: Annotated[str | None, typer.Option(help="What trained it, for --save; else this one.")] = None,
) -> None:
    """Run an experiment's arms over several seeds, and print how they compare."""
    from lasar.evaluation.results import current_commit, this_device
    from lasar.evaluation.study_table import write_study
    from lasar.evaluation.study_view import print_study
    from lasar.study.files import load_study
    from lasar.study.reading import finished_cells, study_result
    from lasar.study.running import run_study
    from lasar.study.timing import time_arms

    loaded, console = load_study(file, overrides=overrides or ()), Console()
    if latency:
        time_arms(loaded, say=lambda line: console.print(line, highlight=False))
    elif not (table or save):
        run_study(
            loaded, seeds=seed, arms=arm, processes=processes,
            say=lambda line: console.print(line, highlight=False, markup=False),
        )  # fmt: skip
    cells, stale = finished_cells(loaded)
    for line in stale:
        console.print(f"out of date, not in the table: {line}", highlight=False, markup=False)
    done, planned = (
        sum(cell.kind == "arm" for cell in cells),
        sum(len(loaded.seeds_of(arm)) for arm in loaded.arms),
    )
    console.print(f"{done} of {planned} cells are finished in {loaded.root}", highlight=False)
    if not done and save:
        raise ArtifactError(f"{loaded.root}: nothing to save; run: lasar study {file}")
    if done:
        result = study_result(
            loaded, cells, device=device or this_device(), commit=current_commit() if save else ""
        )
        print_study(result, console)
        if save:
            write_study(results / f"{result.name}.json", result)


def tune(
    file: Annotated[Path, typer.Argument(metavar="TUNING", help="YAML file of the tuning.")],
    overrides: Overrides = None,
    method: Annotated[list[str] | None, typer.Option(help="Run only this method; repeat.")] = None,
    processes: Annotated[int, typer.Option(help="Trials run at once, each in a process.")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Run nothing, print the table.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Run nothing, print the table and save it.")] = False,
    results: Annotated[Path, typer.Option(help="Where --save puts it.")] = Path("results/tunings"),
    device: Annotated[str | None, typer.Option(help="What trained it, for --save; else this one.")] = None,
) -> None:
    """Try every method's declared settings on validation, within the same CPU minutes, and print the best."""
    from lasar.evaluation.results import current_commit, this_device
    from lasar.evaluation.tuning_table import print_tuning, write_tuning
    from lasar.study.tuning import load_tuning, run_tuning, tuning_result

    loaded, console = load_tuning(file, overrides=overrides or ()), Console()
    if not (table or save):
        run_tuning(
            loaded, methods=method, processes=processes,
            say=lambda line: console.print(line, highlight=False, markup=False),
        )  # fmt: skip
    result, stale = tuning_result(
        loaded, device=device or this_device(), commit=current_commit() if save else ""
    )
    for line in stale:
        console.print(f"out of date, not in the table: {line}", highlight=False, markup=False)
    if not result.methods and save:
        raise ArtifactError(f"{loaded.root}: nothing to save; run: lasar tune {file}")
    print_tuning(result, console)
    if save:
        write_tuning(results / f"{result.name}.json", result)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN... [against] RUN...", help="Evaluated runs.")],
    model: Annotated[list[str] | None, typer.Option(help="Which model; twice: one of each side.")] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric to compare, such as mrr; repeat.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare two runs user by user; several seeds of each: RUN... against RUN..."""
    from lasar.evaluation.compare import compare_runs

    found = compare_runs(runs, models=model or (), metrics=metric or ())
    cli_tables.print_comparison(found, Console(), as_json=as_json)
