"""rationalize: one chain of thought per training row, from a teacher.

Reads `prepare`; writes the texts that anchors are made from. The teacher is the catalogue itself (free,
deterministic) or a language model behind an OpenAI-compatible endpoint, as in the paper (METHOD section 4).
Training rows only; nothing of it is needed at inference.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pydantic
from rich.console import Console
from rich.table import Table

from lasar.artifacts import StageContext, read_json, write_json
from lasar.config import StageConfig
from lasar.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lasar.cot.teachers import Teacher
    from lasar.data.interactions import Interactions

RATIONALES_FILE = "rationales.parquet"

_SHOWN_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Catalogue(StageConfig):
    """The teacher that needs no model."""

    min_items: Annotated[int, pydantic.Field(ge=1)] = 20
    """Items that have to share whatever the intent sentence says, so that it never points at one."""
    max_share: Annotated[float, pydantic.Field(gt=0, le=1)] = 0.1
    """A title word that a larger share of the items has says nothing."""
    category_column: str | None = None
    """Item column with the category path, levels separated by `>` or `|`; `categories` where that exists. Without any,
    kinds are nouns that many titles share."""
    brand_column: str | None = None
    """Item column with the brand; `brand` where that exists."""
    price_column: str | None = None
    """Item column with the price; `price` where that exists."""


@dataclass(frozen=True, kw_only=True)
class EndpointSection(StageConfig):
    """The teacher behind an OpenAI-compatible chat endpoint."""

    url: str = ""
    """Base address, such as `http://localhost:8000/v1`."""
    model: str = ""
    """The server's name of the model."""
    api_key_variable: str = "LASAR_TEACHER_API_KEY"
    """Environment variable that holds the key, where the server wants one. The key itself is never stored."""
    temperature: Annotated[float, pydantic.Field(ge=0)] | None = None
    """Sampling temperature; the server's own when not given."""
    max_tokens: Annotated[int, pydantic.Field(ge=16)] = 400
    """Longest answer."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls that limit; newer OpenAI models want `max_completion_tokens`."""
    concurrency: Annotated[int, pydantic.Field(ge=1)] = 8
    """Requests in flight at most."""
    attempts: Annotated[int, pydantic.Field(ge=1)] = 6
    """Per request: overloaded servers, errors of theirs and timeouts are tried again after a growing pause."""
    pause_seconds: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """Pause before the second attempt, doubled each time; a server's Retry-After counts more."""
    timeout_seconds: Annotated[float, pydantic.Field(gt=0)] = 120.0
    """Longest wait for one answer."""
    token_budget: Annotated[int, pydantic.Field(ge=0)] = 0
    """Tokens read and written in all; rows beyond it are `over_budget`. 0 sets no cap."""
    cache: str | None = None
    """Folder that keeps answers across recipes and runs; when not given, they last until the stage is complete."""


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Who writes the rationales, and from what."""

    teacher: Literal["catalogue", "endpoint"] = "catalogue"
    """The catalogue's own fields, or a language model."""
    intent: Literal["from_target", "history_only"] = "from_target"
    """Whether the teacher sees what was chosen next (as the paper's does) or not."""
    max_history: Annotated[int, pydantic.Field(ge=1)] = 50
    """Newest items of a history that the teacher sees."""
    max_rows: Annotated[int, pydantic.Field(ge=0)] = 0
    """Rows to ask about at most, drawn by the seed, the same for all teachers; the others are `over_budget`. 0: all."""
    catalogue: Catalogue = field(default_factory=Catalogue)
    """The teacher that needs no model."""
    endpoint: EndpointSection = field(default_factory=EndpointSection)
    """The teacher behind an endpoint."""


def inputs(config: Config) -> tuple[str, ...]:
    """Upstream stages."""
    return ("prepare",)


def sources(config: Config) -> tuple[Path, ...]:
    """Nothing outside the run folder is read: a cache saves time, it decides nothing.

    Raises:
        ConfigError: the endpoint is asked for and not described.
    """
    if config.teacher == "endpoint":
        for name in ("url", "model"):
            if not getattr(config.endpoint, name):
                raise ConfigError(f"rationalize.endpoint.{name}: needed by teacher=endpoint")
        if not config.endpoint.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"rationalize.endpoint.url: must begin with http:// or https://, got {config.endpoint.url!r}"
            )
    return ()


def run(config: Config, context: StageContext) -> None:
    """Write a rationale for every training row, and how they turned out."""
    import polars as pl

    from lasar.cot.rationale_summary import examples, summarise
    from lasar.cot.rows import training_rows
    from lasar.cot.teachers import write_some
    from lasar.data.interactions import Interactions, ItemTable

    prepared = context.inputs["prepare"]
    interactions = Interactions.load(prepared)
    rows = training_rows(interactions)
    teacher = _teacher(config, context, interactions, has_orders=any(len(row.targets) > 1 for row in rows))
    rationales = write_some(teacher, rows, max_rows=config.max_rows, seed=context.seed)
    summary = summarise(rationales)
    if not summary["outcomes"]["ok"]:
        counts = ", ".join(f"{name} {count:,}" for name, count in summary["outcomes"].items() if count)
        raise DataError(
            f"rationalize: {teacher.name} wrote no usable rationale ({counts or 'no training rows'})"
        )
    table = {
        "user_index": np.array([row.user_index for row in rows], dtype=np.int32),
        "basket": np.array([row.basket for row in rows], dtype=np.int32),
        "text": [rationale.text for rationale in rationales],
        "outcome": [rationale.outcome for rationale in rationales],
    }
    pl.DataFrame(table).write_parquet(context.output / RATIONALES_FILE)
    facts = {"teacher": teacher.name, "intent": config.intent, "max_rows": config.max_rows}
    drawn = examples(rows, rationales, ItemTable.load(prepared).titles, seed=context.seed)
    write_json(context.output / "summary.json", facts | summary | {"examples": drawn})


def show(folder: Path, console: Console) -> None:
    """Print how the rationales turned out, and a few of them to judge."""
    summary = read_json(folder / "summary.json")
    table = Table(title=f"rationales by {summary['teacher']}, intent {summary['intent']}", show_header=False)
    table.add_row("training rows", f"{summary['num_rows']:,}")
    for outcome, count in summary["outcomes"].items():
        if count or outcome == "ok":
            table.add_row(outcome.replace("_", " "), f"{count:,}")
    table.add_row("distinct sentences", f"{summary['num_distinct_sentences']:,}")
    table.add_row("sentences per rationale", f"{summary['mean_sentences']:.2f}")
    table.add_row(
        "rows by sentences", ", ".join(f"{n}: {c:,}" for n, c in summary["rows_by_sentences"].items())
    )
    if summary["prompt_tokens"] or summary["completion_tokens"]:
        table.add_row("tokens read", f"{summary['prompt_tokens']:,}")
        table.add_row("tokens written", f"{summary['completion_tokens']:,}")
    console.print(table)
    for example in summary["examples"][:_SHOWN_EXAMPLES]:
        console.print(
            f"\n{' | '.join(example['history']) or '(no history)'}",
            style="dim",
            highlight=False,
            markup=False,
        )
        console.print(f"-> {' | '.join(example['targets'])}", style="dim", highlight=False, markup=False)
        console.print(example["text"], highlight=False, markup=False)


def _teacher(
    config: Config, context: StageContext, interactions: "Interactions", *, has_orders: bool
) -> "Teacher":
    import dataclasses

    import polars as pl

    from lasar.cot.chat import Endpoint
    from lasar.cot.teachers import TEACHERS
    from lasar.data.interactions import ItemTable

    prepared = context.inputs["prepare"]
    trained = (interactions.train_counts() > 0).tolist()
    table = ItemTable.load(prepared)
    shared = {"trained": trained, "intent": config.intent, "max_history": config.max_history}
    if config.teacher == "catalogue":
        items = pl.read_parquet(prepared / "items.parquet")
        kind = dataclasses.asdict(config.catalogue)
        return TEACHERS["catalogue"](items=items, has_orders=has_orders, **shared, **kind)
    section = config.endpoint
    names = ("url", "model", "concurrency", "attempts", "timeout_seconds", "pause_seconds", "token_budget")
    endpoint = Endpoint(
        **{name: getattr(section, name) for name in names},
        api_key=os.environ.get(section.api_key_variable, ""),
        key_source=f"the environment variable {section.api_key_variable}",
    )
    cache = Path(section.cache).expanduser() if section.cache else context.scratch / "answers"
    return TEACHERS["endpoint"](
        items=table, endpoint=endpoint, cache=cache, max_tokens=section.max_tokens,
        limit_field=section.limit_field, temperature=section.temperature, **shared,
    )  # fmt: skip
