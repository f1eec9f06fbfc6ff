"""The command line: one command per stage, and what a person needs around them.

A user's mistake is one line on stderr and exit status 2; an interrupt says how to continue and exits with 130.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from lasar import __version__
from lasar.artifacts import MANIFEST, read_json, run_stage, stage_state, write_json
from lasar.config import Recipe, load_recipe
from lasar.errors import ArtifactError, DataError, LasarError, nearest
from lasar.stages import STAGES

app = typer.Typer(
    help="LASAR: generative recommendation with latent adaptive reasoning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Public data sets and models.", no_args_is_help=True)
results_app = typer.Typer(help="The results file and the document made from it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(results_app, name="results")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of the experiment.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[STAGE.KEY=VALUE]...", help="Values that replace the recipe's.")
]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder a recipe was run in, such as runs/demo.")
]


def main() -> None:
    """Entry point of the `lasar` command."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    logging.getLogger("lasar").setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except LasarError as error:
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]error:[/] {escape(str(error))}", highlight=False
        )
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print(
            "interrupted; nothing is lost: the same command continues from the last checkpoint",
            file=sys.stderr,
        )
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _version(show: bool) -> None:
    if show:
        print(f"lasar {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """LASAR: generative recommendation with latent adaptive reasoning."""


@app.command()
def run(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Run every stage of a recipe; finished ones are skipped, a killed one continues."""
    loaded = _load(recipe, overrides)
    for stage in loaded.stages:  # a wrong path or name is found now, not when its stage begins
        STAGES[stage].sources(loaded.configs[stage])
    for stage in loaded.stages:
        _run_and_show(loaded, stage)
    Console().print(f"finished; results are in [bold]{loaded.run_dir}[/]")


@app.command()
def config(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print the resolved recipe, defaults written out."""
    print(yaml.safe_dump(_load(recipe, overrides).as_dict(), sort_keys=False), end="")


@app.command()
def status(run: RunPath) -> None:
    """Say of every stage of a run whether it is done, out of date, or can be continued."""
    loaded = _recipe_of(run)
    table = Table(title=f"{loaded.name} in {run} (seed {loaded.seed})")
    for column in ("stage", "state", "seconds", "folder"):
        table.add_column(column)
    for stage in loaded.stages:
        state = stage_state(stage, STAGES[stage], loaded)
        folder = run / stage
        seconds = f"{read_json(folder / MANIFEST)['seconds']:,.1f}" if (folder / MANIFEST).is_file() else ""
        table.add_row(stage, state, seconds, str(folder))
    Console().print(table)


@app.command()
def recommend(
    run: RunPath,
    history: Annotated[
        list[str] | None, typer.Option(help="Item id, oldest first; repeat. 'A,B' is one order.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A user of the event log, instead of a history.")] = None,
    k: Annotated[int, typer.Option(help="How many items.")] = 10,
    exclude: Annotated[list[str] | None, typer.Option(help="Item id never to recommend; repeat.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Recommend only these item ids; repeat.")] = None,
    exclude_seen: Annotated[bool, typer.Option(help="Never recommend an item of the history.")] = False,
    beam_width: Annotated[int, typer.Option(help="Beams of the search.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the best next items for a history or a known user."""
    from lasar.recommender import Recommender

    if (user is None) == (history is None):
        raise typer.BadParameter("give either --history ID (repeat it) or --user ID")
    recommender = Recommender.load(run)
    orders = (
        recommender.user_history(user) if user is not None else [entry.split(",") for entry in history or []]
    )
    found = recommender.recommend(
        orders, k, exclude=exclude or (), allow=allow, exclude_seen=exclude_seen, beam_width=beam_width
    )
    if as_json:
        print(json.dumps([item._asdict() for item in found], indent=1))
        return
    console = Console()
    shown = [item_id for order in orders for item_id in order][-10:]
    past = Table(
        title=f"last {len(shown)} of {sum(map(len, orders))} items in the history", title_justify="left"
    )
    past.add_column("item")
    past.add_column("title")
    for item_id in shown:
        past.add_row(escape(item_id), escape(recommender.items.titles[recommender.items.index_of(item_id)]))
    table = Table(title="recommended next", title_justify="left")
    for column in ("", "item", "title", "score"):
        table.add_column(column)
    for rank, item in enumerate(found, start=1):
        table.add_row(str(rank), escape(item.item_id), escape(item.title), f"{item.score:.2f}")
    console.print(past)
    console.print(table)


@data_app.command("list")
def data_list() -> None:
    """List what `lasar data get` can fetch."""
    from lasar.data.download import list_datasets

    families: dict[str, list[str]] = {}
    for entry in list_datasets():
        family, _, category = entry.name.rpartition("-")
        if family.startswith("amazon"):
            families.setdefault(f"{family}-CATEGORY: {entry.terms}", []).append(category)
        else:
            print(f"{entry.name}\n    {entry.description}; {entry.size}\n    {entry.terms}")
    for family, categories in families.items():
        name, _, terms = family.partition(": ")
        print(f"{name}\n    Amazon reviews with metadata; {terms}\n    CATEGORY: {' '.join(categories)}")


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A name from `lasar data list`.")],
    folder: Annotated[Path, typer.Option(help="Where to put it.")] = Path("data"),
) -> None:
    """Fetch a data set or model, verify its checksum, say where it is."""
    from lasar.data.download import get_dataset

    print(get_dataset(name, folder))


@results_app.command("add")
def results_add(
    run: RunPath,
    recipe: Annotated[str, typer.Option(help="Recipe the run was made with.")],
    results: Annotated[Path, typer.Option(help="The results file.")] = Path("results/results.jsonl"),
) -> None:
    """Append a run's evaluation to the results file."""
    from lasar.evaluation.results import append_row, rows_from_run

    for row in rows_from_run(run, recipe=recipe):
        append_row(results, row)


@results_app.command("render")
def results_render(
    results: Annotated[Path, typer.Option(help="The results file.")] = Path("results/results.jsonl"),
    docs: Annotated[Path, typer.Option(help="The document to write.")] = Path("docs/results.md"),
) -> None:
    """Regenerate docs/results.md and its plots from the results file."""
    from lasar.evaluation.results import write_document

    if not results.is_file():
        raise DataError(f"{results}: no such file; run this from the checkout, after: lasar results add RUN")
    write_document(results, docs)


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    sections = {name: module.Config for name, module in STAGES.items()}
    return load_recipe(recipe, overrides=overrides or (), sections=sections)


def _recipe_of(run: Path) -> Recipe:
    path = run / "recipe.json"
    if not path.is_file():
        siblings = [str(p.parent) for p in run.parent.glob("*/recipe.json")] if run.parent.is_dir() else []
        raise ArtifactError(f"{run}: not a run folder (no recipe.json){nearest(str(run), siblings)}")
    sections = {name: module.Config for name, module in STAGES.items()}
    return load_recipe(path, overrides=[f"run_dir={run}"], sections=sections)


def _run_and_show(recipe: Recipe, stage: str) -> None:
    module = STAGES[stage]
    console = Console()
    ran = run_stage(stage, module, recipe)
    write_json(recipe.run_dir / "recipe.json", recipe.as_dict())
    folder = recipe.run_dir / stage
    seconds = read_json(folder / MANIFEST)["seconds"]
    console.print(
        f"[bold]{stage}[/]: " + (f"done in {seconds:,.1f} s" if ran else "up to date, skipped"),
        highlight=False,
    )
    show: Any = getattr(module, "show", None)
    if show is not None:
        show(folder, console)


def _add_stage_command(stage: str) -> None:
    def command(recipe: RecipePath, overrides: Overrides = None) -> None:
        _run_and_show(_load(recipe, overrides), stage)

    summary = (STAGES[stage].__doc__ or "").partition("\n")[0].removeprefix(f"{stage}: ")
    app.command(name=stage, help=summary)(command)


for _stage in STAGES:
    _add_stage_command(_stage)
