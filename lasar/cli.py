"""The command line: one command per stage, and what a person needs around them.

A user's mistake is one line on stderr and exit status 2; an interrupt says how to continue and exits with 130.
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from typer.exceptions import TyperException

from lasar import __version__, cli_serving, cli_studies, cli_tables
from lasar.artifacts import MANIFEST, read_json, run_stage, stage_state, write_json
from lasar.cli_serving import RunPath, depth_of
from lasar.cli_studies import Overrides
from lasar.config import Recipe, load_recipe
from lasar.errors import ArtifactError, ConfigError, DataError, LasarError, nearest
from lasar.ranks import command_of, join, ranks
from lasar.stages import BASELINES, STAGES

app = typer.Typer(
    help="LASAR: generative recommendation with latent adaptive reasoning.",
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False,
)  # fmt: skip
data_app = typer.Typer(help="Public data sets and models.", no_args_is_help=True)
results_app = typer.Typer(help="The results file and the document made from it.", no_args_is_help=True)
baseline_app = typer.Typer(help="Systems to compare with, each a stage of its own.", no_args_is_help=True)
for _group, _name in ((data_app, "data"), (results_app, "results"), (baseline_app, "baseline")):
    app.add_typer(_group, name=_name)
_INTERRUPTED = 130
_TRAINING = ("run", "study", "tune", "baseline", *STAGES)
_KERNELS = "64"
_SECTIONS = {name: module.Config for name, module in STAGES.items()}
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file of the experiment.")]


def main() -> None:
    """Entry point of the `lasar` command."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )
    logging.getLogger("lasar").setLevel(logging.INFO)
    _keep_few_kernels(sys.argv[1:])
    try:
        with join(sys.argv[1:], shared=("run", *(s for s in STAGES if s not in BASELINES), "baseline")):
            code = app(standalone_mode=False)
    except TyperException as error:  # an option, an argument or a command that there isn't
        if message := error.format_message().strip().rstrip("."):  # empty when the help was the answer
            _say_error(f"{message}; see lasar --help, lasar COMMAND --help")
        sys.exit(2)
    except LasarError as error:
        _say_error(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED:  # which is also what typer makes of an interrupt
        print(
            "interrupted; the same command goes on from what was saved (training: every 30 s)",
            file=sys.stderr,
        )
    sys.exit(code if isinstance(code, int) else 0)


def _keep_few_kernels(arguments: list[str]) -> None:
    """Bound what oneDNN keeps for products in bf16: a megabyte or two for each shape, of a thousand shapes.

    A step has about twenty shapes, in every layer the same, and no two steps have the same ones. A server's come again.
    """
    if command_of(arguments) in _TRAINING:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _KERNELS)


def _say_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)


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
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
) -> None:
    """Run every stage of a recipe; finished ones are skipped, a killed one continues."""
    loaded = _load(recipe, overrides)
    stages = loaded.stages
    if until is not None:
        if until not in stages:
            raise ConfigError(f"--until {until}: no such stage in {recipe}{nearest(until, stages)}")
        stages = stages[: stages.index(until) + 1]
    for stage in stages:  # a wrong path or name is found now, not when its stage begins
        STAGES[stage].sources(loaded.configs[stage])
        _check_inputs(loaded, stage, path=recipe)
        _check_accumulate(loaded, stage)
    for stage in stages:
        _run_and_show(loaded, stage)
    Console().print(f"finished; results are in [bold]{loaded.run_dir}[/]")


def _check_accumulate(recipe: Recipe, stage: str) -> None:
    """Refuse batches that do not divide among several processes, but for a stage that is finished."""
    config: Any = recipe.configs[stage]
    if ranks().size == 1 or not config.in_ranks or stage_state(stage, STAGES[stage], recipe) == "done":
        return
    from lasar.training.fit import refuse_uneven

    for holder in (config, getattr(config, "training", None), getattr(config, "rollouts", None)):
        if accumulate := getattr(holder, "accumulate", None):
            refuse_uneven(accumulate, stage)


def _check_inputs(recipe: Recipe, stage: str, *, path: Path) -> None:
    """Refuse a recipe whose stage reads what nothing makes, before hours are spent on the stages before it."""
    for needed in STAGES[stage].inputs(recipe.configs[stage]):
        if needed not in recipe.stages and not (recipe.run_dir / needed).is_dir():
            raise ConfigError(
                f"{path}: {stage} reads {needed!r}, which 'stages' does not list and {recipe.run_dir} does not hold; "
                f"add it to 'stages', or change what {stage} reads ({stage}'s section)"
            )


@app.command()
def config(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print the resolved recipe, defaults written out."""
    print(yaml.safe_dump(_load(recipe, overrides).as_dict(), sort_keys=False), end="")


@app.command()
def status(run: RunPath) -> None:
    """Say of every stage of a run whether it is done, out of date, or can be continued."""
    loaded = _recipe_of(run)
    states = {stage: stage_state(stage, STAGES[stage], loaded) for stage in loaded.stages}
    cli_tables.print_status(loaded, states, Console())


for _command in (
    cli_studies.study, cli_studies.tune, cli_studies.compare, cli_serving.score, cli_serving.serve, cli_serving.export
):  # fmt: skip
    app.command()(_command)


@app.command()
def recommend(
    run: RunPath,
    history: Annotated[
        list[str] | None, typer.Option(help="Item id, oldest first; repeat. 'A,B' is one order.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A user of the event log, instead of a history.")] = None,
    k: Annotated[int, typer.Option(help="How many items.", min=1)] = 10,
    exclude: Annotated[list[str] | None, typer.Option(help="Item id never to recommend; repeat.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Recommend only these item ids; repeat.")] = None,
    exclude_seen: Annotated[bool, typer.Option(help="Never recommend an item of the history.")] = False,
    beam_width: Annotated[int, typer.Option(help="Beams of the search.", min=1)] = 50,
    depth: Annotated[
        str, typer.Option(help="Latent steps before answering: auto, sampled, or a number.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of --depth sampled.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the best next items for a history or a known user."""
    from lasar.recommender import Recommender

    recommender = Recommender.load(run)
    orders = _orders(recommender, history, user)
    found = recommender.recommend(
        orders, k, exclude=exclude or (), allow=allow, exclude_seen=exclude_seen, beam_width=beam_width,
        depth=depth_of(depth), seed=seed,
    )  # fmt: skip
    if as_json:
        print(json.dumps([item._asdict() for item in found], indent=1))
        return
    console = Console()
    cli_tables.print_history(recommender, orders, console)
    cli_tables.print_recommendations(found, console)


@app.command()
def explain(
    run: RunPath,
    history: Annotated[
        list[str] | None, typer.Option(help="Item id, oldest first; repeat. 'A,B' is one order.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A user of the event log, instead of a history.")] = None,
    k: Annotated[int, typer.Option(help="Length of the lists compared.")] = 10,
    exclude_seen: Annotated[bool, typer.Option(help="Never recommend an item of the history.")] = False,
) -> None:
    """Print what the model thought: each latent step in words, the depths, what one step more or less changes."""
    from lasar.cot.anchors import AnchorStore
    from lasar.cot.explain import explain as explain_history
    from lasar.recommender import Recommender, last_trained, refuse_mismatch

    recommender = Recommender.load(run)
    refuse_mismatch(run / last_trained(run), run / "anchor")
    orders = _orders(recommender, history, user)
    found = explain_history(
        recommender, AnchorStore.load(run / "anchor"), orders, k=k, exclude_seen=exclude_seen
    )
    console = Console()
    cli_tables.print_history(recommender, orders, console)
    cli_tables.print_explanation(found, console)


@data_app.command("list")
def data_list() -> None:
    """List what `lasar data get` can fetch."""
    from lasar.data.download import list_datasets

    cli_tables.print_datasets(list_datasets())


@data_app.command("get")
def data_get(
    name: Annotated[str, typer.Argument(help="A name from `lasar data list`.")],
    folder: Annotated[Path, typer.Option(help="Where to put it.")] = Path("data"),
) -> None:
    """Fetch a data set or model, verify its checksum, say where it is."""
    from lasar.data.download import get_dataset

    print(get_dataset(name, folder))


@data_app.command("import-model")
def data_import_model(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a model folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, for sft.backbone.")],
    texts_of: Annotated[Path | None, typer.Option(help="Run: keep only tokens that its texts need.")] = None,
) -> None:
    """Write a pre-trained language model as a plain folder, with the vocabulary that a shop needs."""
    from lasar.cot.rationale_reader import texts_of_run
    from lasar.model.importing import import_model

    facts = import_model(source, out, texts=None if texts_of is None else texts_of_run(texts_of))
    size = "{parameters:,} parameters (of {parameters_before:,}), {tokens:,} tokens (of {tokens_before:,})"
    print(f"{out}: {facts['architecture']}, {size.format(**facts)}")


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


def _orders(recommender: Any, history: list[str] | None, user: str | None) -> list[list[str]]:
    if (user is None) == (history is None):
        raise typer.BadParameter("give either --history ID (repeat it) or --user ID")
    if user is not None:
        orders: list[list[str]] = recommender.user_history(user)
        return orders
    return [entry.split(",") for entry in history or []]


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    return load_recipe(recipe, overrides=overrides or (), sections=_SECTIONS)


def _recipe_of(run: Path) -> Recipe:
    path = run / "recipe.json"
    if not path.is_file():
        siblings = [str(p.parent) for p in run.parent.glob("*/recipe.json")] if run.parent.is_dir() else []
        raise ArtifactError(f"{run}: not a run folder (no recipe.json){nearest(str(run), siblings)}")
    return load_recipe(path, overrides=[f"run_dir={run}"], sections=_SECTIONS)


def _run_and_show(recipe: Recipe, stage: str) -> None:
    module = STAGES[stage]
    console = Console()
    ran = run_stage(stage, module, recipe)
    if ranks().rank:
        return
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
    (baseline_app if stage in BASELINES else app).command(name=stage, help=summary)(command)


for _stage in STAGES:
    _add_stage_command(_stage)
