"""What the report says: sections of text, tables and figures, from the artifacts' plain data.

Pure functions from JSON values; the stage reads the files and the template lays the sections out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lasar.evaluation import report_figures as figures

Section = dict[str, Any]


def header(
    prepare: Mapping[str, Any], metrics: Mapping[str, Any] | None
) -> tuple[str, list[tuple[str, str]]]:
    """Return the opening sentence ("" without an evaluation) and the facts of the data set."""
    facts = [
        (label, f"{prepare[key]:,}")
        for label, key in (("users", "num_users"), ("items", "num_items"), ("events", "num_interactions"))
        if key in prepare
    ]
    facts += [("data set", prepare["dataset"]), ("held out", prepare["split"].replace("_", " "))]
    facts.append(("training targets", "every prefix" if prepare["train_targets"] == "all" else "last item"))
    if metrics is None:
        return "", facts
    k, model = metrics["main_k"], metrics["model"]
    if several_targets(metrics):
        count = f"{metrics['mean_targets']:.1f}"
        task = f"at least one of the user's next {count} items (on average) was in the top {k}"
    else:
        task = f"the user's next item was in the top {k}"
    others = [
        f"{name} {values[f'hr@{k}']:.1%}" for name, values in metrics["methods"].items() if name != model
    ]
    beside = f" ({', '.join(others)})" if others else ""
    share = f"{metrics['methods'][model][f'hr@{k}']:.1%}"
    users = f"{metrics['num_users']:,} {metrics['split']} users"
    sentence = f"For {share} of {users}, {task} of {metrics['num_items']:,} items{beside}."
    return sentence, facts


def several_targets(metrics: Mapping[str, Any]) -> bool:
    """Whether users have several true items, so that HR means any hit."""
    return bool(metrics["split_kind"] in ("last_basket", "temporal") or metrics["mean_targets"] > 1)


def metrics_section(metrics: Mapping[str, Any]) -> Section:
    """Metrics of every method with intervals, the paired differences, and all cutoffs."""
    several, k = several_targets(metrics), metrics["main_k"]
    methods, model = metrics["methods"], metrics["model"]
    # With one true item, recall is HR; a second column would only repeat it.
    names = [n for n in methods[model] if n != "ci" and (several or not n.startswith("recall"))]
    titles = {name: title(name, several=several) for name in names}
    main = [name for name in names if name.endswith(f"@{k}") or name == "mrr"]
    rows = []
    for method, values in methods.items():
        cells = [cell(f"{values[n]:.4f}", "{:.4f} to {:.4f}".format(*values["ci"][n])) for n in main]
        cells += [cell(f"{metrics[name][method][str(k)]:.3f}") for name in ("coverage", "gini")]
        rows.append(row([cell(method), *cells], marked=method == model))
    every = [
        row([cell(title), *(cell(f"{values[name]:.4f}") for values in methods.values())])
        for name, title in titles.items()
    ]
    text = [
        "Ranked over the full catalogue. Small print: 95 % bootstrap intervals over users. Coverage is the "
        "share of the catalogue that anyone is shown; Gini is 0 when all items are shown equally often."
    ]
    if several:
        text.append(
            "Users have several true items: any-hit HR asks whether one is in the list, Recall how many are."
        )
    if metrics.get("exclude_seen"):
        text.append("Items of the history are left out of every list.")
    columns = ["method", *(titles[name] for name in main), f"coverage@{k}", f"Gini@{k}"]
    tables = [table(f"At {k}", columns, rows)]
    if metrics["paired"]:
        tables.append(_differences(metrics, titles))
    tables.append(table("At every cutoff", ["", *methods], every))
    images = figures.metric_bars(metrics, names=[f"hr@{k}", f"ndcg@{k}"], titles=titles)
    return section("Metrics", text, tables, images)


def _differences(metrics: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    names = list(next(iter(metrics["paired"].values())))
    rows = []
    for baseline, comparison in metrics["paired"].items():
        cells = [cell(f"{metrics['model']} minus {baseline}")]
        for name in names:
            value = comparison[name]
            interval = f"{value['low']:+.4f} to {value['high']:+.4f}, p = {value['p_holm']:.3g}"
            cells.append(cell(f"{value['difference']:+.4f}", interval))
        rows.append(row(cells))
    caption = "Differences on the same users (paired bootstrap, p-values with Holm's correction)"
    return table(caption, ["", *(titles[name] for name in names)], rows)


def slices_section(metrics: Mapping[str, Any]) -> Section:
    """Tables by history length and by popularity of the true item."""
    methods, several = list(metrics["methods"]), several_targets(metrics)
    tables = []
    for key, count, caption, first in (
        ("history_length", "num_users", "By events in the history", "events"),
        (
            "target_popularity",
            "num_targets",
            "By training events of the true item (0: cold items)",
            "training events",
        ),
    ):
        rows_in = metrics["slices"][key]
        if not rows_in:
            continue
        names = list(next(iter(rows_in[0]["methods"].values())))
        columns = [first, count.removeprefix("num_")]
        columns += [f"{method} {title(name, several=several)}" for name in names for method in methods]
        rows = []
        for found in rows_in:
            values = [f"{found['methods'][method][name]:.4f}" for name in names for method in methods]
            rows.append(row([cell(found["bucket"]), cell(f"{found[count]:,}"), *map(cell, values)]))
        tables.append(table(caption, columns, rows))
    return section("Slices", [], tables, figures.slice_bars(metrics, hit="any-hit HR" if several else "HR"))


def curve_section(stage: str, records: Sequence[Mapping[str, Any]]) -> Section:
    """Learning curves of one training stage."""
    return section(f"Training: {stage}", [], [], figures.learning_curves(records))


def quality_section(quality: Mapping[str, Any], picture: str | None) -> Section:
    """Quality of the semantic IDs, published IDs beside ours where they were compared."""
    sources = {f"ours ({quality.get('kind', 'semantic IDs')})": quality}
    if quality.get("compared"):
        sources[quality["compared"].get("name", "compared")] = quality["compared"]
    rows = []
    for key, label, form in (
        ("utilisation", "codes used, per level", ".1%"),
        ("entropy_bits", "entropy per level, bits", ".2f"),
        ("conditional_bits", "information given earlier codes, bits", ".2f"),
        ("prefix_sharing", "near neighbours sharing the first 1, 2, ... codes", ".1%"),
    ):
        cells = [
            cell(" / ".join(f"{value:{form}}" for value in source.get("codes", {}).get(key, [])) or "-")
            for source in sources.values()
        ]
        rows.append(row([cell(label), *cells]))
    for key, label in (
        ("collision_rate_before", "items sharing codes before resolving"),
        ("relative_error_before", "relative reconstruction error before resolving"),
        ("relative_error_after", "relative reconstruction error after"),
    ):
        if any(key in source for source in sources.values()):
            cells = [cell(f"{source[key]:.2%}" if key in source else "-") for source in sources.values()]
            rows.append(row([cell(label), *cells]))
    text = []
    if "num_levels" in quality:
        text.append(
            f"{quality['num_items']:,} items, {quality['num_levels']} codes each, out of "
            f"{quality['codebook_size']} per level. Every ID belongs to one item; items that shared one were "
            "moved to the nearest free code."
        )
    images = []
    if picture is not None:
        images.append(f'<img alt="Use and information of the codes, level by level" src="{picture}">')
    return section("Semantic IDs", text, [table("Semantic IDs", ["", *sources], rows)], images)


def title(name: str, *, several: bool = False) -> str:
    """A metric's name as a person writes it."""
    hit = "any-hit HR@" if several else "HR@"
    for plain, shown in (("hr@", hit), ("ndcg", "NDCG"), ("recall", "Recall"), ("mrr", "MRR")):
        name = name.replace(plain, shown)
    return name


def cell(value: str, note: str = "") -> dict[str, str]:
    """A value of a table, with a small note below it."""
    return {"value": value, "note": note}


def row(cells: Sequence[Mapping[str, str]], *, marked: bool = False) -> dict[str, Any]:
    """A row of a table; marked ones stand out."""
    return {"cells": list(cells), "marked": marked}


def table(caption: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table; its caption is shown where a section has several."""
    return {"caption": caption, "header": list(columns), "rows": list(rows)}


def section(
    title: str, text: Sequence[str], tables: Sequence[Mapping[str, Any]], images: Sequence[str]
) -> Section:
    """Text, then tables, then figures under a heading."""
    return {"title": title, "text": list(text), "tables": list(tables), "figures": list(images)}
