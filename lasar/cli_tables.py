"""What `lasar recommend` and `lasar explain` print."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from lasar.cot.explain import Explanation
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
