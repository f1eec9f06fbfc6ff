"""The metrics of an evaluation as tables on a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Every method with its intervals, the model against the others, and depth where the model reasons."""
    k = metrics["main_k"]
    several = metrics["split_kind"] in ("last_basket", "temporal")
    hit = "any-hit HR" if several else "HR"
    table = Table(
        title=f"{metrics['dataset']}, {metrics['split']} split ({metrics['split_kind']}), "
        f"{metrics['num_users']:,} users, {metrics['num_items']:,} items, 95 % intervals",
        title_justify="left",
    )
    names = {f"hr@{k}": f"{hit}@{k}", f"ndcg@{k}": f"NDCG@{k}", "mrr": "MRR"}
    if several:
        names[f"recall@{k}"] = f"Recall@{k}"
    table.add_column("method", no_wrap=True)
    for title in names.values():
        table.add_column(title, justify="right", no_wrap=True)
    for method, values in metrics["methods"].items():
        ends = {name: values["ci"][name] for name in names}
        table.add_row(method, *(f"{values[name]:.4f}" for name in names))
        table.add_row("", *(f"{low:.4f}-{high:.4f}" for low, high in ends.values()), style="dim")
    console.print(table)
    if "cooccurrence" in metrics["methods"]:
        console.print("transitions: what followed in later orders; cooccurrence: also what shared an order")
    for other, comparison in metrics["paired"].items():
        for name, value in comparison.items():
            console.print(
                f"{metrics['model']} - {other}: {names.get(name, name)} {value['difference']:+.4f} "
                f"[{value['low']:+.4f}, {value['high']:+.4f}], p = {value['p_holm']:.3g} (Holm)",
                highlight=False,
            )
    if metrics["depth"]["mean"] > 0:
        _print_depth(metrics["depth"], console, hr=f"hr@{k}", ndcg=f"ndcg@{k}", names=names)


def _print_depth(
    depth: Mapping[str, Any], console: Console, *, hr: str, ndcg: str, names: Mapping[str, str]
) -> None:
    table = Table(
        title=f"latent steps: {depth['mean']:.2f} on average ({depth['choice']})", title_justify="left"
    )
    for column in ("depth", "users", names[hr], names[ndcg], "NDCG against chosen"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in depth["by_chosen"]:
        table.add_row(
            f"chosen {row['depth']}", f"{row['num_users']:,}", f"{row[hr]:.4f}", f"{row[ndcg]:.4f}", ""
        )
    for row in depth["forced"]:
        difference, low, high = row[f"{ndcg}_minus_chosen"]
        table.add_row(
            f"forced {row['depth']}", f"{row['num_users']:,}", f"{row[hr]:.4f}", f"{row[ndcg]:.4f}",
            f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]",
        )  # fmt: skip
    console.print(table)
