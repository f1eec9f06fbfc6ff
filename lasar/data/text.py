"""The text of an item: real catalogue fields with their blemishes in, one clean line out."""

import html
import re
import string
from collections.abc import Mapping, Sequence

import polars as pl

from lasar.errors import DataError, nearest

DEFAULT_TEMPLATE = ("{title}", "{brand}", "{categories}")

_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_ENTITY = re.compile(r"&#?\w+;")
_SPACE = re.compile(r"[\s\x00-\x1f\x7f]+")


def clean_text(text: str | None) -> str:
    """Resolve HTML entities (also escaped twice), drop tags, scripts and comments, collapse white space."""
    if not text:
        return ""
    for _ in range(3):
        if not _ENTITY.search(text):
            break
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
    return _SPACE.sub(" ", text).strip()


def shorten(text: str, max_chars: int) -> str:
    """Cut to `max_chars`, at the last space when that keeps at least half."""
    if len(text) <= max_chars:
        return text
    cut = text[:max_chars]
    if not text[max_chars].isspace():
        space = cut.rfind(" ")
        cut = cut[:space] if space >= max_chars // 2 else cut
    return cut.rstrip(" ,;:-")


def template_fields(template: Sequence[str]) -> list[str]:
    """Names of the item columns a template uses, in order.

    Raises:
        DataError: a part is not a valid template.
    """
    fields: list[str] = []
    for part in template:
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(part) if name is not None]
        except ValueError as error:
            raise DataError(f"text.template: {part!r} is not a template: {error}") from None
        if not all(names):
            raise DataError(f"text.template: {part!r}: write the column's name between the braces")
        fields += names
    return list(dict.fromkeys(fields))


def event_columns(columns: Sequence[str], *, template: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Columns of the events that describe items: the title, those to keep, those a template uses; where they exist.

    Args:
        columns: of the events.
        template: of an item's text.
        kept: text columns that the recipe names.
    """
    names = dict.fromkeys(["title", *kept, *template_fields(template)])
    return [name for name in names if name in columns]


def render(fields: Mapping[str, str], template: Sequence[str]) -> str:
    """Fill the template's parts and join them by ". "; a part with an empty field is left out.

    >>> render({"title": "Lamp", "brand": ""}, ["{title}", "by {brand}"])
    'Lamp'
    """
    parts = []
    for part in template:
        names = [name for _, name, _, _ in string.Formatter().parse(part) if name is not None]
        if all(fields[name] for name in names):
            filled = "".join(
                literal + (fields[name] if name else "")
                for literal, name, _, _ in string.Formatter().parse(part)
            )
            parts.append(filled.strip())
    return "".join(
        part if position == 0 else (" " if parts[position - 1][-1:] in ".!?" else ". ") + part
        for position, part in enumerate(parts)
    )


def item_texts(items: pl.DataFrame, *, template: Sequence[str], max_field_chars: int) -> pl.DataFrame:
    """Clean all text columns and add each item's text.

    Args:
        items: `item_id` and any String columns.
        template: parts such as `{title}` or `Brand: {brand}`; empty takes title, brand and categories, those
            that exist.
        max_field_chars: longest field in the text, and longest title.

    Returns:
        `item_id`, `title` ("" where none), `text` ("" where none), then the remaining columns cleaned, in
        full.

    Raises:
        DataError: the template names a column the items don't have.
    """
    columns = [name for name in items.columns if name not in ("item_id", "title", "text")]
    names = [name for name in items.columns if name != "item_id"]
    if not template:
        template = [part for part in DEFAULT_TEMPLATE if part.strip("{}") in names]
    used = template_fields(template)
    for name in used:
        if name not in names:
            raise DataError(
                f"text.template: the items have no column {name!r}{nearest(name, names)}; "
                f"they have {', '.join(names) or 'none'}"
            )
    cleaned = {name: [clean_text(value) for value in items[name]] for name in names}
    short = {
        name: [shorten(value, max_field_chars) for value in cleaned[name]]
        for name in names if name in used or name == "title"
    }  # fmt: skip
    texts = [render({name: short[name][row] for name in used}, template) for row in range(len(items))]
    empty = [""] * len(items)
    return pl.DataFrame(
        {
            "item_id": items["item_id"],
            "title": pl.Series(short.get("title", empty), dtype=pl.String),
            "text": pl.Series(texts, dtype=pl.String),
            **{name: pl.Series(cleaned[name], dtype=pl.String) for name in columns},
        }
    )
