"""The report's figures as inline SVG: equal numbers give equal bytes."""

import contextlib
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lasar.errors import require

COLOURS = ("#2f6db3", "#9aa7b4", "#c4622d", "#5a8f3d", "#7b5ea7")
_STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, and readable aloud
    "font.family": "sans-serif",
    "font.size": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def metric_bars(metrics: Mapping[str, Any], *, names: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    """Bars of every method with interval whiskers, one figure per metric."""
    methods = list(metrics["methods"])
    drawn = []
    for name in names:
        values = [metrics["methods"][method][name] for method in methods]
        ends = [metrics["methods"][method]["ci"][name] for method in methods]
        # A mean may lie outside a percentile interval by rounding; a whisker cannot be negative.
        below = [max(value - low, 0.0) for value, (low, _) in zip(values, ends, strict=True)]
        above = [max(high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)]
        label = f"{titles[name]}: " + ", ".join(
            f"{method} {value:.4f}" for method, value in zip(methods, values, strict=True)
        )
        with figure_axis(label, height=1.1 + 0.5 * len(methods)) as (axis, figure):
            axis.barh(methods, values, color=_colours(methods), height=0.6)
            axis.errorbar(values, methods, xerr=[below, above], fmt="none", ecolor="#222222", capsize=3)
            for place, (value, (_, high)) in enumerate(zip(values, ends, strict=True)):
                axis.annotate(f"{value:.4f}", (high, place), (6, 0), textcoords="offset points", va="center")
            axis.set_title(titles[name], loc="left")
            axis.set_xlim(0, 1.25 * max(1e-9, *(high for _, high in ends)))
            axis.invert_yaxis()
        drawn.append(figure[0])
    return drawn


def slice_bars(metrics: Mapping[str, Any], *, hit: str) -> list[str]:
    """Grouped bars of every method over the slices, one figure per kind of slice; `hit` names HR."""
    methods = list(metrics["methods"])
    width = 0.8 / len(methods)
    drawn = []
    for title, rows in (
        ("events in the history", metrics["slices"]["history_length"]),
        ("training events of the true item", metrics["slices"]["target_popularity"]),
    ):
        if not rows:
            continue
        name = next(iter(rows[0]["methods"][methods[0]]))
        shown = name.replace("hr@", f"{hit}@").replace("recall", "Recall")
        with figure_axis(f"{shown} by {title}: the table above as bars", height=3.0) as (axis, figure):
            for number, (method, colour) in enumerate(zip(methods, _colours(methods), strict=True)):
                places = [place + (number - (len(methods) - 1) / 2) * width for place in range(len(rows))]
                axis.bar(
                    places, [row["methods"][method][name] for row in rows], width, color=colour, label=method
                )
            axis.set_xticks(range(len(rows)), [row["bucket"] for row in rows])
            axis.set_xlabel(title)
            axis.set_title(shown, loc="left")
            axis.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.22))
        drawn.append(figure[0])
    return drawn


def depth_bars(counts: Sequence[int], *, title: str) -> str:
    """How many users get each number of latent steps."""
    total = max(1, sum(counts))
    label = f"{title}: " + ", ".join(f"{n}: {count / total:.0%}" for n, count in enumerate(counts) if count)
    with figure_axis(label, height=2.4) as (axis, figure):
        axis.bar(range(len(counts)), [count / total for count in counts], color=COLOURS[0], width=0.7)
        axis.set_title(title, loc="left")
        axis.set_xticks(range(len(counts)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return figure[0]


def step_lines(lines: Mapping[str, Sequence[float]], *, title: str) -> str:
    """Values by latent step, one line each."""
    label = f"{title}; " + "; ".join(
        f"{name}: " + ", ".join(f"{value:.3f}" for value in values) for name, values in lines.items()
    )
    with figure_axis(label, height=2.4) as (axis, figure):
        for number, (name, values) in enumerate(lines.items()):
            colour = (COLOURS[0], *COLOURS[2:])[number % (len(COLOURS) - 1)]
            axis.plot(range(1, len(values) + 1), values, marker="o", markersize=3, color=colour, label=name)
        axis.set_title(title, loc="left")
        axis.set_xlabel("latent step")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    return figure[0]


def learning_curves(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss and validation metrics over epochs (or steps); no figure for what was not recorded."""
    axis_name = "epoch" if any("epoch" in record for record in records) else "step"
    losses = [key for key in ("loss", "valid_loss") if _points(records, axis_name, key)]
    found = sorted({key for record in records for key in record if key.startswith("valid_")} - {"valid_loss"})
    metrics = [key for key in found if key.endswith("@10")] or found
    drawn = []
    for title, keys in (("loss", losses), ("validation", metrics)):
        lines = {key: _points(records, axis_name, key) for key in keys}
        if not lines:
            continue
        ends = ", ".join(f"{_line_name(key)} {points[-1][1]:.4f}" for key, points in lines.items())
        with figure_axis(f"Learning curve, {title}; at the end: {ends}", height=3.0) as (axis, figure):
            for number, (key, points) in enumerate(lines.items()):
                colour = (COLOURS[0], *COLOURS[2:])[number % (len(COLOURS) - 1)]
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=3, color=colour, label=_line_name(key)
                )
            axis.set_title(title, loc="left")
            axis.set_xlabel(axis_name)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if title == "validation":
                axis.set_ylim(bottom=0)
            axis.legend(frameon=False)
        drawn.append(figure[0])
    return drawn


def _line_name(key: str) -> str:
    name = key.removeprefix("valid_")
    return "validation loss" if key == "valid_loss" else name.replace("hr@", "HR@").replace("ndcg", "NDCG")


def _points(records: Sequence[Mapping[str, Any]], axis_name: str, key: str) -> list[tuple[float, float]]:
    return [(record[axis_name], record[key]) for record in records if key in record and axis_name in record]


def _colours(methods: Sequence[str]) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(len(methods))]


@contextlib.contextmanager
def figure_axis(label: str, *, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Yield an axis to draw on and a list that then holds its SVG, described for those who cannot see it."""
    matplotlib = require("matplotlib", extra="report")
    figures = require("matplotlib.figure", extra="report")
    done: list[str] = []
    # The salt names clip paths: it must not be random, and must differ between the figures of one page.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": label}):
        figure = figures.Figure(figsize=(5.0, height), layout="constrained")
        yield figure.subplots(), done
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    described = f'<svg role="img" aria-label="{html.escape(label)}" '
    done.append(described + text[text.index("<svg ") + len("<svg ") :].strip())
