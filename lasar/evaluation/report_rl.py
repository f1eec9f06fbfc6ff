"""What the report says about reinforcement learning: what it did to the lists and to depth, step by step."""

from collections.abc import Mapping, Sequence
from typing import Any

from lasar.evaluation import report_figures as figures
from lasar.evaluation.report_content import Section, cell, row, section, table

_POINTS = 40  # of a curve: more steps than that are averaged, because single ones are noisy
_BLUES = ("#9aa7b4", "#08306b", "#2171b5", "#6baed6", "#c6dbef", "#fdd0a2", "#fd8d3c", "#d94801", "#7f2704")
_GROUPINGS = (
    ("history_length", "events", "Depth by events in the history"),
    ("target_popularity", "training events", "Depth by popularity of what the user truly took next"),
    ("first_code_entropy", "nats", "Depth by how undecided the first code is"),
)


def rl_section(records: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> Section:
    """Before and after, the curves, and which users get which depth.

    Args:
        records: of `curve.jsonl`: the start's validation, then every step.
        metrics: of `metrics.json`.
    """
    start, end = metrics["start"], metrics["end"]
    text = [metrics["verdict"] + f" (step {metrics['best_step']} of {metrics['steps']})."]
    if metrics["stopped"]:
        text.append(metrics["stopped"][0].upper() + metrics["stopped"][1:] + ".")
    rows = [
        row([cell(label), cell(f"{start[name]:{form}}"), cell(f"{end[name]:{form}}")])
        for name, label, form in (
            ("ndcg@10", "NDCG@10", ".4f"),
            ("hr@10", "HR@10", ".4f"),
            ("nll", "nats per item", ".3f"),
            ("mean_depth", "latent steps, mean", ".2f"),
        )
        if name in start and name in end
    ]
    users = f"{metrics['validation_users']:,} validation users"
    tables = [table("", [users, "Stage 2", "kept"], rows)]
    steps = [record for record in records if "reward" in record]
    images = [
        _lines(steps, {"reward": "mean reward"}, title="reward"),
        _lines(steps, {"hit_share": "with a hit", "silent_share": "without signal"}, title="share of groups"),
        _lines(steps, {"kl": "KL to Stage 2, nats per item"}, title="KL to the reference"),
        _lines(steps, {"entropy": "first code", "depth_entropy": "depth"}, title="entropy, nats"),
        _lines(records, {"valid_ndcg@10": "validation"}, title="NDCG@10", marked=metrics["best_step"]),
    ]
    if "mean_depth" in start:
        depths = {"mean_depth": "drawn, training prompts", "valid_mean_depth": "chosen, validation users"}
        images.append(_lines(records, depths, title="latent steps, mean"))
        images.append(_depth_bands(steps))
        images.append(
            figures.depth_bars(metrics["depths"], title="steps chosen in the end, validation users")
        )
        tables += _by_user(metrics["users"])
        images += [
            _user_bands(metrics["users"][name], first=first, title=caption)
            for name, first, caption in _GROUPINGS
        ]
    return section("Reinforcement learning", text, tables, [image for image in images if image])


def _by_user(users: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    tables = []
    for name, first, caption in _GROUPINGS:
        rows = [
            row([cell(r["bucket"]), cell(f"{r['num_users']:,}"), cell(f"{r['mean_depth']:.2f}")])
            for r in users[name]
        ]
        tables.append(table(caption, [first, "users", "latent steps, mean"], rows))
    return tables


def _lines(
    records: Sequence[Mapping[str, Any]], names: Mapping[str, str], *, title: str, marked: int | None = None
) -> str:
    """Lines over steps, "" where nothing was recorded."""
    lines = {
        label: _thinned([(r["step"], r[name]) for r in records if name in r]) for name, label in names.items()
    }
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return ""
    ends = "; ".join(f"{label}: {points[0][1]:.4g} to {points[-1][1]:.4g}" for label, points in lines.items())
    with figures.figure_axis(f"{title} over steps; {ends}", height=2.4) as (axis, figure):
        for number, (label, points) in enumerate(lines.items()):
            colour = (figures.COLOURS[0], *figures.COLOURS[2:])[number]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=label)
        if marked is not None:
            axis.axvline(marked, color=figures.COLOURS[1], linestyle=":", label="kept")
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.legend(frameon=False)
    return figure[0]


def _depth_bands(steps: Sequence[Mapping[str, Any]]) -> str:
    """Share of prompts at every depth, stacked, over steps."""
    if not steps:
        return ""
    places, shares = [], []
    for group in _groups(steps):
        counts = [sum(column) for column in zip(*(record["depths"] for record in group), strict=True)]
        places.append(sum(record["step"] for record in group) / len(group))
        shares.append([count / sum(counts) for count in counts])
    used = [depth for depth in range(len(shares[0])) if any(share[depth] for share in shares)]
    ends = ", ".join(f"{depth}: {shares[0][depth]:.0%} to {shares[-1][depth]:.0%}" for depth in used)
    with figures.figure_axis(f"Depths drawn over steps; {ends}", height=2.8) as (axis, figure):
        axis.stackplot(
            places,
            [[share[depth] for share in shares] for depth in used],
            labels=[str(depth) for depth in used],
            colors=[_BLUES[depth % len(_BLUES)] for depth in used],
        )
        axis.set_title("depths drawn, share of prompts", loc="left")
        axis.set_xlabel("step")
        axis.set_ylim(0, 1)
        axis.legend(frameon=False, reverse=True, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure[0]


def _user_bands(rows: Sequence[Mapping[str, Any]], *, first: str, title: str) -> str:
    """Share of the users of every bucket that get each depth, stacked; the table beside it as bars."""
    if not rows:
        return ""
    names = [found["bucket"] for found in rows]
    shares = [[count / sum(found["depths"]) for count in found["depths"]] for found in rows]
    used = [depth for depth in range(len(shares[0])) if any(share[depth] for share in shares)]
    said = "; ".join(
        f"{name}: " + ", ".join(f"{share[depth]:.0%} take {depth}" for depth in used if share[depth])
        for name, share in zip(names, shares, strict=True)
    )
    with figures.figure_axis(f"{title}; {said}", height=1.0 + 0.32 * len(rows)) as (axis, figure):
        left = [0.0] * len(rows)
        for depth in used:
            widths = [share[depth] for share in shares]
            axis.barh(
                names, widths, left=left, color=_BLUES[depth % len(_BLUES)], label=str(depth), height=0.7
            )
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel(first)
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axis.invert_yaxis()
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="steps")
    return figure[0]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours, so that at most `_POINTS` are left."""
    found = []
    for group in _groups(points):
        found.append((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)))
    return found


def _groups(values: Sequence[Any]) -> list[Sequence[Any]]:
    size = -(-len(values) // _POINTS) or 1
    return [values[start : start + size] for start in range(0, len(values), size)]
