"""The picture of code quality: our codes, and published ones beside them, level by level."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        axes.flat[0].legend(frameon=False)
    figure.savefig(path, dpi=100, format="png", metadata={"Software": None})
