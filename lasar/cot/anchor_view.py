"""What people look at: the histogram of segments, and a few rationales with their segment boundaries."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from lasar.cot.rows import TrainingRow
from lasar.cot.segmentation import Segmentation

_EXAMPLES = 3
_TITLES = 3
_TITLE_WIDTH = 60
_BAR = 30


def segmented_examples(
    rows: Sequence[TrainingRow],
    titles: Sequence[str],
    segmentation: Segmentation,
    *,
    near: Callable[[int], Sequence[int]] | None,
) -> list[dict[str, Any]]:
    """Examples of different users, as plain JSON data.

    Args:
        rows: training rows.
        titles: of every item.
        segmentation: of the rows' rationales.
        near: the items that lie nearest to a segment in hidden space, if that is known.
    """
    counts_R = segmentation.counts_R
    long = np.flatnonzero(counts_R >= np.median(counts_R[counts_R > 0]))
    last_R = np.cumsum(counts_R)

    def named(items: Sequence[int] | NDArray[np.integer[Any]]) -> list[str]:
        return [textwrap.shorten(titles[int(item)], _TITLE_WIDTH, placeholder="...") for item in items]

    return [
        {
            "history": named(rows[r].history[-_TITLES:]),
            "targets": named(rows[r].targets[:_TITLES]),
            "segments": [
                {"text": segmentation.texts_S[s].strip(), "near": named(near(s)) if near else []}
                for s in range(last_R[r] - counts_R[r], last_R[r])
            ],
        }
        for r in long[np.linspace(0, len(long) - 1, min(_EXAMPLES, len(long))).astype(int)].tolist()
    ]


def example_lines(example: dict[str, Any]) -> list[str]:
    """One example as marked-up lines, a segment a line."""
    lines = [
        f"[dim]... {escape(' | '.join(example['history']))} -> {escape(' | '.join(example['targets']))}[/dim]"
    ]
    for number, segment in enumerate(example["segments"], start=1):
        lines.append(f"[bold]{number}[/bold] {escape(segment['text'])}")
        if segment["near"]:
            lines.append(f"  [dim]near: {escape(' | '.join(segment['near']))}[/dim]")
    return lines


def summary_table(summary: dict[str, Any]) -> Table:
    """The summary of an `anchor` artifact; its examples are left to `example_lines`."""
    table = Table(title=f"anchor: {summary['source']}, {summary['context']}", show_header=False)
    table.add_row("teacher", escape(summary["teacher"]))
    table.add_row("anchors", f"{summary['num_anchors']:,} x {summary['hidden_size']} ({summary['size']})")
    reached = f"{summary['segments_mean']:.2f} (wanted {summary['requested_segments_mean']:g})"
    table.add_row("segments a rationale", reached if summary["attainable"] else f"{reached}: out of reach")
    table.add_row("cut above", f"percentile {summary['percentile']:.1f}, distance {summary['threshold']:.3f}")
    most = max(summary["histogram"])
    for number, count in enumerate(summary["histogram"]):
        table.add_row(f"rows with {number}", f"{count:>9,} {'#' * round(_BAR * count / most)}")
    if summary["projection"]:
        learned = summary["projection"]
        table.add_row("projection, held-out R2", f"{learned['held_out_r2']:.3f} (the mean state has 0)")
        table.add_row("projection, held-out cosine", f"{learned['held_out_cosine']:.3f}")
    return table
