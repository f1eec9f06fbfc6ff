"""What the report says about latent reasoning: how Stage 2 went, and how deep the model thinks."""

from collections.abc import Mapping
from typing import Any

from lasar.evaluation import report_figures as figures
from lasar.evaluation.report_content import Section, cell, row, section, table, title


def latent_section(stage: str, metrics: Mapping[str, Any]) -> Section:
    """Losses and geometry of the loop before and after Stage 2, from the stage's `metrics.json`."""
    start, end = metrics["start"], metrics["end"]
    text = [
        f"Rationales by {metrics['teacher']}; alignment {metrics['alignment']}, weight {metrics['alpha']:.3g}. "
        f"Before any training with latents a held-out item costs {start['nll']:.3f} nats, without latents "
        f"{start['stage1_nll']:.3f}: that is how close Stage 2 starts to what Stage 1 learned."
    ]
    rows = []
    for key, label in (
        ("nll", "validation, nats per item"),
        ("probe_ce", "training sample, nats per item"),
        ("probe_alignment", "distance of a step to its anchor"),
        ("probe_depth_accuracy", "depth accuracy of the Policy Head"),
        ("probe_norm_ratio", "norm fed back, against token embeddings"),
    ):
        if key in start and key in end:
            rows.append(row([cell(label), cell(f"{start[key]:.3f}"), cell(f"{end[key]:.3f}")]))
    images = []
    for key, label in (("alignment", "distance to the anchor"), ("step", "change from the step before")):
        lines = {
            name: values
            for name, values in (("start", _by_step(start, key)), ("best epoch", _by_step(end, key)))
            if values
        }
        if lines:
            images.append(figures.step_lines(lines, title=label))
    counts = metrics["valid_depths"]
    if sum(counts[1:]):
        images.append(figures.depth_bars(counts, title="steps chosen, validation users"))
    return section(f"Latent reasoning: {stage}", text, [table("", ["", "start", "best epoch"], rows)], images)


def depth_section(metrics: Mapping[str, Any], latency: Mapping[str, Any] | None) -> Section:
    """Quality by the depth chosen and by the depth forced, seconds beside it where they were measured."""
    depth, k = metrics["depth"], metrics["main_k"]
    names = [f"hr@{k}", f"ndcg@{k}"]
    several = metrics["mean_targets"] > 1
    columns = ["latent steps", "users", *(title(name, several=several) for name in names)]
    chosen = [
        row([cell(str(r["depth"])), cell(f"{r['num_users']:,}"), *(cell(f"{r[name]:.4f}") for name in names)])
        for r in depth["by_chosen"]
    ]
    tables = [table("By the depth the model chose (other users in every row)", columns, chosen)]
    if depth["forced"]:
        seconds = latency["seconds"] if latency else {}
        forced = []
        for r in depth["forced"]:
            cells = [cell(str(r["depth"])), cell(f"{r['num_users']:,}")]
            for name in names:
                difference, low, high = r[f"{name}_minus_chosen"]
                cells.append(cell(f"{r[name]:.4f}", f"{difference:+.4f} ({low:+.4f} to {high:+.4f})"))
            if seconds:
                cells.append(cell(f"{seconds[str(r['depth'])] / seconds[depth['choice']]:.2f}"))
            forced.append(row(cells))
        time = [f"time against chosen, {latency['users']} users at once"] if latency else []
        tables.append(
            table(
                "The same users at a forced depth (difference to the chosen depth)", [*columns, *time], forced
            )
        )
    text = [f"{depth['mean']:.2f} latent steps on average, depth chosen: {depth['choice']}."]
    return section("Depth", text, tables, [])


def _by_step(values: Mapping[str, float], key: str) -> list[float]:
    found: list[float] = []
    while f"probe_{key}_{len(found) + 1}" in values:
        found.append(values[f"probe_{key}_{len(found) + 1}"])
    return found
