"""What commands print: recommendations, explanations, comparisons, data sets."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lasar.artifacts import MANIFEST, read_json

if TYPE_CHECKING:
    from lasar.config import Recipe
    from lasar.cot.explain import Explanation
    from lasar.data.download import DatasetEntry
    from lasar.evaluation.compare import Compared, Comparison
    from lasar.evaluation.study_table import Quantity
    from lasar.recommender import Recommendation, Recommender

_SHOWN_HISTORY = 10


def print_history(recommender: "Recommender", orders: Sequence[Sequence[str]], console: Console) -> None:
    """The newest items of a history with their titles."""
    shown = [item_id for order in orders for item_id in order][-_SHOWN_HISTORY:]
    total = sum(map(len, orders))
    table = Table(title=f"last {len(shown)} of {total} items in the history", title_justify="left")
    table.add_column("item")
    table.add_column("title")
    for item_id in shown:
        table.add_row(escape(item_id), escape(recommender.items.titles[recommender.items.index_of(item_id)]))
    console.print(table)


def print_recommendations(found: "Sequence[Recommendation]", console: Console) -> None:
    """A ranked list with titles and scores."""
    if not found:
        console.print("no item is left to recommend: exclude fewer, or allow more")
        return
    table = Table(title="recommended next", title_justify="left")
    for column in ("", "item", "title", "score"):
        table.add_column(column)
    for rank, item in enumerate(found, start=1):
        table.add_row(str(rank), escape(item.item_id), escape(item.title), f"{item.score:.2f}")
    console.print(table)


def print_explanation(found: "Explanation", console: Console) -> None:
    """Depths, the steps in words, and how the list moves with one step fewer or more."""
    shares = "  ".join(f"{depth}: {share:.0%}" for depth, share in enumerate(found.distribution, start=1))
    chosen = f"the Policy Head's probabilities: {shares}" if shares else "fixed in training"
    console.print(f"latent steps: {found.depth}    {chosen}", highlight=False)
    table = Table(title="step by step", title_justify="left", show_lines=True)
    table.add_column("step", no_wrap=True)
    table.add_column("nearest in the rationales (cosine)")
    table.add_column("if it stopped here: leading first codes")
    for step in found.steps:
        segments = "\n".join(f"{cosine:.2f} {text}" for text, cosine in step.segments)
        directions = "\n".join(
            f"{way.probability:.0%} code {way.code}: {'; '.join(way.titles)}" for way in step.directions
        )
        table.add_row(str(step.number) if step.number else "<s>", escape(segments), escape(directions))
    console.print(table)
    lists = Table(title="the list by number of steps", title_justify="left")
    lists.add_column("", justify="right")
    for depth in found.lists:
        lists.add_column(f"{depth}" + (" (chosen)" if depth == found.depth else ""))
    listed = {item.item_id for item in found.lists[found.depth]}
    for rank in range(max(map(len, found.lists.values()))):
        cells = [
            _list_cell(items[rank], items[rank].item_id in listed) if rank < len(items) else ""
            for items in found.lists.values()
        ]
        lists.add_row(str(rank + 1), *cells)
    console.print(lists)


def _list_cell(item: "Recommendation", known: bool) -> str:
    return escape(item.title or item.item_id) + ("" if known else " [bold](new)[/]")


def print_comparison(found: "Comparison", console: Console, *, as_json: bool = False) -> None:
    """Both sides' means, and beneath them metric by metric what may be said about the difference."""
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1))
        return
    facts = found.facts
    seen = ", items of the history left out" if facts["exclude_seen"] else ""
    console.print(
        f"{facts['dataset']}, {facts['split']} split ({facts['split_kind']}), {found.num_users:,} users, "
        f"{facts['num_items']:,} items{seen}", highlight=False, markup=False,
    )  # fmt: skip
    for side, method, runs in (
        ("first", found.first, found.first_runs),
        ("second", found.second, found.second_runs),
    ):
        console.print(f"{side}: {method} of {', '.join(runs)}", highlight=False, markup=False)
    table = Table("", "first", "second")
    for name, compared in found.metrics.items():
        table.add_row(name.upper(), _mean(compared.first), _mean(compared.second))
    console.print(table)
    for name, compared in found.metrics.items():
        console.print(
            f"{name.upper()}, first minus second: {_verdict(compared)}", highlight=False, markup=False
        )
    several = len(found.first_runs) > 1
    chance = (
        "users and training runs" if several else "users alone (one seed says nothing about training runs)"
    )
    console.print(
        f"Brackets: 95 % intervals over {chance}. p: paired bootstrap, corrected by Holm's method over "
        f"{len(found.metrics)} metrics. tie: not shown to differ by these users and seeds.",
        highlight=False,
    )


def _mean(value: "Quantity") -> str:
    return f"{value.mean:.4f}" + ("" if value.sd is None else f" +- {value.sd:.4f}")


def _verdict(compared: "Compared") -> str:
    found, percent = compared.difference, compared.percent
    relative = (
        "" if percent is None else f", {percent.effect:+.1f} % [{percent.low:+.1f}, {percent.high:+.1f}]"
    )
    spread = "" if found.seed_sd is None else f", sd over seeds {found.seed_sd:.4f}"
    return (
        f"{compared.verdict}: {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}]{relative}{spread}, "
        f"p = {found.p_holm:.2g}"
    )


def print_status(recipe: "Recipe", states: Mapping[str, str], console: Console) -> None:
    """State, duration and folder of every stage of a run."""
    table = Table(title=f"{recipe.name} in {recipe.run_dir} (seed {recipe.seed})")
    for column in ("stage", "state", "seconds", "folder"):
        table.add_column(column)
    for stage, state in states.items():
        manifest = recipe.run_dir / stage / MANIFEST
        seconds = f"{read_json(manifest)['seconds']:,.1f}" if manifest.is_file() else ""
        table.add_row(stage, state, seconds, str(recipe.run_dir / stage))
    console.print(table)


def print_datasets(entries: "Sequence[DatasetEntry]") -> None:
    """What can be fetched; the categories of one family share an entry."""
    families: dict[str, list[str]] = {}
    for entry in entries:
        family, _, category = entry.name.rpartition("-")
        if family.startswith("amazon"):
            families.setdefault(f"{family}-CATEGORY: {entry.terms}", []).append(category)
        else:
            print(f"{entry.name}\n    {entry.description}; {entry.size}\n    {entry.terms}")
    for family, categories in families.items():
        name, _, terms = family.partition(": ")
        print(f"{name}\n    Amazon reviews with metadata; {terms}\n    CATEGORY: {' '.join(categories)}")
