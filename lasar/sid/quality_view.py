"""Code quality as a picture and as a table: our codes, and published ones beside them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from lasar.errors import require

_PANELS = (
    ("entropy_bits", "entropy, bits"),
    ("conditional_bits", "information given earlier codes, bits"),
    ("utilisation", "share of codes used"),
    ("prefix_sharing", "near neighbours sharing the prefix"),
)
_COLORS = ("#2b6cb0", "#dd8452")


def plot_quality(series: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw grouped bars per level; the same numbers give the same bytes.

    Args:
        series: name -> result of `code_quality`, at most two.
        path: PNG to write.
    """
    figures = require("matplotlib.figure", extra="report")
    figure = figures.Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    width = 0.8 / len(series)
    for (key, title), axis in zip(_PANELS, axes.flat, strict=True):
        for number, (name, numbers) in enumerate(series.items()):
            positions = [
                level + (number - (len(series) - 1) / 2) * width for level in range(len(numbers[key]))
            ]
            axis.bar(positions, numbers[key], width, label=name, color=_COLORS[number])
        num_levels = max(len(numbers[key]) for numbers in series.values())
        axis.set_xticks(range(num_levels), [f"level {level + 1}" for level in range(num_levels)])
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(series), frameon=False)
    figure.savefig(path, dpi=100, format="png", metadata={"Software": None})


def quality_table(quality: Mapping[str, Any]) -> Table:
    """The content of `quality.json` as a table, with a column for published codes if there are any."""
    compared = quality.get("compared")
    table = Table(title=f"semantic IDs: {quality['num_levels']} x {quality['codebook_size']}")
    table.add_column("")
    table.add_column(f"ours ({quality['kind']})", justify="right")
    if compared:
        table.add_column(compared["name"], justify="right")

    def add(label: str, mine: str, theirs: str = "-") -> None:
        table.add_row(label, mine, *([theirs] if compared else []))

    def add_levels(label: str, key: str, form: str) -> None:
        cells = [
            "  ".join(f"{value:{form}}" for value in source["codes"][key])
            for source in (quality, compared)
            if source
        ]
        add(label, *cells)

    add("items", f"{quality['num_items']:,}", f"{compared['num_items']:,}" if compared else "-")
    if quality["fitted_items"] < quality["num_items"]:
        add("items that codebooks are learned from", f"{quality['fitted_items']:,}", "-")
    add_levels("codes used, per level", "utilisation", ".1%")
    add_levels("entropy, bits", "entropy_bits", ".2f")
    add_levels("information given earlier codes, bits", "conditional_bits", ".2f")
    add_levels(f"{quality['num_neighbours']} nearest sharing 1, 2, ... codes", "prefix_sharing", ".1%")
    add("items sharing codes, before", f"{quality['collision_rate_before']:.2%}")
    shared = [f"{source['codes']['collision_rate']:.2%}" for source in (quality, compared) if source]
    add("items sharing an ID", *shared)
    add("items moved, per level", "  ".join(f"{count:,}" for count in quality["moved_items"]))
    add("relative error, before", f"{quality['relative_error_before']:.4f}")
    add("relative error, after", f"{quality['relative_error_after']:.4f}")
    return table
