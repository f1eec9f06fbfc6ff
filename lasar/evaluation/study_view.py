"""A study's table as text: a section of the results page, and the same on a terminal."""

import json

from rich.console import Console
from rich.table import Table

from lasar.evaluation.pareto_plot import is_timed, plot_name
from lasar.evaluation.study_table import METRICS, Quantity, StudyResult, StudyRow

_KINDS = {"before": "before", "untrained": "no training"}
_NOTE = (
    "Plus-minus and sd: standard deviation over seeds. A difference is over the same seeds and users; brackets are "
    "its 95 % interval over users and training runs (over users alone where there is one seed), p is corrected by "
    "Holm's method over the table. *tie*: the interval contains 0, p is 0.05 or more, or the difference is below its "
    "sd over seeds."
)


def study_cells(result: StudyResult) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table, as text."""
    labels = list(result.rows[0].reported) if result.rows else []
    names = [metric.upper() for metric in METRICS]
    sizes = sorted({size for row in result.rows if row.latency for size in row.latency.milliseconds})
    sized = any(row.parameters for row in result.rows)
    header = ["arm", "changes", "seeds", *names, "depth", *labels, "training"]
    header += ["with all stages", "parameters"] if sized else []
    header += [f"ms, batch {size}" for size in sizes]
    header += [f"{name} minus {result.reference}" for name in names]
    table = []
    for row in result.rows:
        trained = {key: value for key, value in row.changes.items() if not key.startswith("evaluate.")}
        changes = ", ".join(f"{key}={json.dumps(value).strip(chr(34))}" for key, value in trained.items())
        table.append(
            [
                row.arm,
                changes or "-" if row.kind == "arm" else _KINDS[row.kind],
                ", ".join(map(str, row.seeds)),
                *(_shown(row.metrics[metric], 4) for metric in METRICS),
                _shown(row.depth, 2),
                *(_shown(row.reported[label], 3) for label in labels),
                _minutes(row.seconds),
                *([_minutes(row.pipeline_seconds), _millions(row.parameters)] if sized else []),
                *(_latency(row, size) for size in sizes),
                *(_verdict(row, metric, result.reference) for metric in METRICS),
            ]
        )
    return header, table


def render_study(result: StudyResult) -> str:
    """One section of the results page, Markdown."""
    header, table = study_cells(result)
    rules = ["---"] * 3 + ["---:"] * (len(header) - 5) + ["---"] * 2
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, rules, *table)]
    rendered = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    seen = ", items of the history left out" if result.exclude_seen else ""
    where = (
        f"{result.dataset}: {result.split}, {result.evaluated_on}, {result.num_users:,} users per seed{seen}"
    )
    plot = f"![Quality and latency of {result.name}]({plot_name(result)})\n\n" if is_timed(result) else ""
    return (
        f"## Study `{result.name}`: {where}\n\n{rendered}\n\n{_NOTE}\n\n{plot}"
        f"Study: `{result.file}`, on `{result.base}`. Device: {result.device}. Commit: `{result.commit}`.\n"
    )


def print_study(result: StudyResult, console: Console) -> None:
    """The table on a terminal, the comparisons beneath it."""
    header, rows = study_cells(result)
    compared = range(len(header) - len(METRICS), len(header))
    shown = [index for index, name in enumerate(header) if name != "changes" and index not in compared]
    table = Table(
        title=f"{result.name}: {result.dataset}, {result.evaluated_on}, {result.num_users:,} users per seed",
        title_justify="left",
    )
    for index in shown:
        table.add_column(header[index])
    for row in rows:
        table.add_row(*(row[index] for index in shown))
    console.print(table)
    for row in rows:
        for index in compared:
            if row[index] not in ("-", "reference"):
                console.print(f"{row[0]}: {header[index]}: {row[index]}", highlight=False, markup=False)


def _shown(value: Quantity | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.{digits}f}" + ("" if value.sd is None else f" +- {value.sd:.{digits}f}")


def _minutes(seconds: Quantity | None) -> str:
    return "-" if seconds is None else f"{seconds.mean / 60:.1f} min"


def _millions(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.2f} M"


def _latency(row: StudyRow, size: int) -> str:
    if row.latency is None or size not in row.latency.milliseconds:
        return "-"
    return f"{row.latency.milliseconds[size]:.2f}"


def _verdict(row: StudyRow, metric: str, reference: str) -> str:
    if row.against_reference is None:
        return "reference" if row.arm == reference else "-"
    found = row.against_reference[metric]
    sd = "one seed" if found.seed_sd is None else f"sd {found.seed_sd:.4f}"
    fewer = "" if found.seeds == row.seeds else f", seeds {', '.join(map(str, found.seeds))}"
    return (
        f"{found.verdict}: {found.difference:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {sd}, "
        f"p = {found.p_holm:.2g}{fewer}"
    )
