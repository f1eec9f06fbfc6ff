"""prepare: raw events and items in; indexed, ordered and split interactions out.

source -> reader -> clean -> repeats -> k-core -> order, baskets -> split -> interactions, users
items  -> reader -> unique ids -> those in the core -> clean text -> items
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.data import splits
from lasar.data.catalogue import catalogue_items, index_events, keep_core, write_tables
from lasar.data.cleaning import clean_events, drop_repeats, most_frequent_texts, refuse_empty, slice_users
from lasar.data.download import hint_for
from lasar.data.readers import read_dataset
from lasar.data.tables import reading
from lasar.data.text import event_columns, item_texts
from lasar.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Columns(StageConfig):
    """Which column of the source plays which role (readers `table` and `recbole`)."""

    user: str | None = None
    """Who; `user_id` when not given."""
    item: str | None = None
    """What; `item_id` when not given."""
    timestamp: str | None = None
    """When; `timestamp` where that exists, otherwise the order of the rows counts."""
    event_type: str | None = None
    """Kind of event, for `clean.event_types`."""
    weight: str | None = None
    """A number that `clean.above` can bound, such as a rating."""
    title: str | None = None
    """Name of an item, in the item table or on every event; `title` where that exists."""
    item_key: str | None = None
    """Id column of the item table, when it is named differently than in the events."""
    texts: tuple[str, ...] = ()
    """Further text columns to keep; empty keeps all of a separate item table, none of the events."""


@dataclass(frozen=True, kw_only=True)
class Format(StageConfig):
    """How the values of a text table are written (reader `table`; `encoding` also `recbole`)."""

    encoding: str | None = None
    """Encoding of CSV files; UTF-8 when not given."""
    separator: str | None = None
    """CSV column separator; chosen by the suffix when not given."""
    time_format: str | None = None
    """`seconds`, `milliseconds` or a strptime pattern; date types, numbers and ISO 8601 need none."""


@dataclass(frozen=True, kw_only=True)
class Clean(StageConfig):
    """Which events to drop; columns by the source's own names or by their role's."""

    event_types: tuple[str, ...] = ()
    """Event types to keep; empty keeps all."""
    above: dict[str, float] = field(default_factory=dict)
    """Column to bound: keeps events whose number is strictly above it."""
    drop_matching: dict[str, str] = field(default_factory=dict)
    """Column to regular expression: drops events whose value matches anywhere."""
    uppercase_items: bool = False
    """Compare item ids in upper case."""


@dataclass(frozen=True, kw_only=True)
class Text(StageConfig):
    """How an item's text is put together."""

    template: tuple[str, ...] = ()
    """Parts such as `{title}` or `Brand: {brand}`, each left out when a field is empty; empty takes title,
    brand and categories, those that exist."""
    max_field_chars: int = 300
    """Longest field in the text, and longest title."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Values of the `prepare` stage."""

    dataset: str = ""
    """Name in tables and results; the source's name when empty."""
    source: str = ""
    """File or folder with the events."""
    reader: Literal["table", "s3rec", "amazon", "recbole", "minionerec"] = "table"
    """Layout of the source."""
    items: str | None = None
    """File with the items; when not given, what the reader finds beside the source, or the events' own
    columns."""
    columns: Columns = field(default_factory=Columns)
    """Which column plays which role."""
    format: Format = field(default_factory=Format)
    """How values are written."""
    clean: Clean = field(default_factory=Clean)
    """Which events to drop."""
    duplicates: Literal["keep", "drop_repeats", "first_only"] = "drop_repeats"
    """`drop_repeats` counts a user's item once per basket (one timestamp), `first_only` once at all."""
    k_core: Annotated[int, pydantic.Field(ge=0)] = 5
    """Keep users with this many distinct items and items with this many distinct users, repeatedly; 0 keeps
    all and leaves items without events in the catalogue."""
    split: Literal["leave_one_out", "last_basket", "temporal", "given"] = "leave_one_out"
    """Held out: each user's last event; each user's last basket; everything after a moment; what the source
    says."""
    cuts: tuple[float | str, float | str] = (0.8, 0.9)
    """Start of validation and of test for `temporal`: quantiles of all times, or ISO dates."""
    train_targets: Literal["all", "last"] = "all"
    """Whether every prefix of a training history is a sample, or one per user."""
    rl_share: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    """Share of users whose last training order is kept for `rl` to ask about: `sft` and `latent_sft` never see it."""
    users: Annotated[int, pydantic.Field(ge=1)] | None = None
    """A slice: so many users of the core with all their events, always the same ones; all when not given."""
    text: Text = field(default_factory=Text)
    """How an item's text is put together."""


def inputs(config: Config) -> tuple[str, ...]:
    """The first stage has no upstream artifact."""
    return ()


def sources(config: Config) -> tuple[Path, ...]:
    """The event and item files.

    Raises:
        ConfigError: no source is named.
        DataError: a file does not exist; the message says how to fetch a known data set.
    """
    if config.rl_share and config.train_targets == "last":
        raise ConfigError("prepare.rl_share: takes what train_targets=last trains on; set one of them back")
    if not config.source:
        raise ConfigError("prepare.source: name the file or folder with the events")
    paths = tuple(Path(path) for path in dict.fromkeys((config.source, config.items)) if path)
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder{hint_for(path)}")
    return paths


def run(config: Config, context: StageContext) -> None:
    """Write items.parquet, users.parquet, interactions.parquet and summary.json."""
    source = Path(config.source)
    raw_events, raw_items = read_dataset(
        config.reader, source, Path(config.items) if config.items else None, _reader_options(config)
    )
    columns = [] if raw_items is not None else raw_events.collect_schema().names()
    texts = event_columns(columns, template=config.text.template, kept=config.columns.texts)
    events, dropped = clean_events(
        raw_events, path=source, event_types=config.clean.event_types, above=config.clean.above,
        drop_matching=config.clean.drop_matching, uppercase_items=config.clean.uppercase_items, texts=texts,
    )  # fmt: skip
    warnings = {}
    if raw_items is not None:
        with reading(Path(config.items or source)):
            table = raw_items.collect()
    else:
        table, warnings["items_with_several_texts"] = most_frequent_texts(events, texts)
    if config.duplicates != "keep":
        events, dropped["repeats"] = drop_repeats(events, first_only=config.duplicates == "first_only")

    timed = config.split == "temporal" and len(events) > 0
    cuts = splits.cut_times(events["timestamp"], config.cuts) if timed else None
    events, below_k = keep_core(events, config.k_core, count_before=cuts[0] if cuts else None)
    dropped |= below_k
    if config.users:
        events, dropped["other_users"] = slice_users(events, config.users)
    refuse_empty(events, dropped, path=source)
    listed, doubtful = catalogue_items(
        table, events, keep_unused=config.k_core == 0, uppercase_items=config.clean.uppercase_items
    )
    items = item_texts(listed, template=config.text.template, max_field_chars=config.text.max_field_chars)
    warnings |= doubtful
    for column in ("title", "text"):
        warnings[f"items_without_{column}"] = int((items[column] == "").sum())
    interactions, users = index_events(events, items)
    interactions = interactions.with_columns(split=splits.assign_splits(interactions, config.split, cuts))
    warnings |= splits.split_warnings(interactions, config.split)

    sizes = write_tables(context.output, items=items, users=users, interactions=interactions)
    write_json(
        context.output / "summary.json",
        {
            "dataset": config.dataset or source.name, "split": config.split,
            "train_targets": config.train_targets, **({"rl_share": config.rl_share} if config.rl_share else {}),
            **sizes, "warnings": warnings, "dropped": dropped,
        },
    )  # fmt: skip


def show(folder: Path, console: Console) -> None:
    """Print the size of the data set and what was dropped or doubtful."""
    summary = read_json(folder / "summary.json")
    table = Table(
        "users", "items", "events", "train", "valid", "test", title=f"prepare: {summary['dataset']}"
    )
    names = ("users", "items", "interactions", "train", "valid", "test")
    table.add_row(*(f"{summary[f'num_{name}']:,}" for name in names))
    console.print(table)
    console.print(f"split {summary['split']}, train_targets {summary['train_targets']}")
    for kind in ("dropped", "warnings"):
        counts = [f"{name} {count:,}" for name, count in summary[kind].items() if count]
        if counts:
            console.print(f"{kind}: {', '.join(counts)}", highlight=False)


def _reader_options(config: Config) -> dict[str, Any]:
    """What the recipe gives, so that a reader can refuse what its format fixes."""
    columns = {role: name for role, name in dataclasses.asdict(config.columns).items() if name}
    texts = columns.pop("texts", ())
    given = {"columns": columns, "texts": texts, **dataclasses.asdict(config.format)}.items()
    return {name: value for name, value in given if value}
