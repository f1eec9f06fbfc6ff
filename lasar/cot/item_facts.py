"""What can be said of each item: kind, area, brand, style words, price level, and how many items share it.

A *kind* is a node of the category path, or, where there are no categories, a noun that many titles are about. A
*style* is a word that many titles share and that is neither. Both hold for at least `min_items` items, so a sentence
made of them never points at one item. Every count is over items that occur in training: an item that is only ever
held out changes nothing.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from lasar.cot.item_words import FreeWords, named_words, title_kinds, title_words
from lasar.data.text import shorten
from lasar.errors import ConfigError, nearest

PRICE_LEVELS = ("low", "middle", "high")

_MAX_TITLE_CHARS = 60
_MIN_TITLE_CHARS = 8
_LEVEL_SEPARATOR = re.compile(r"\s*[>|]\s*")
_TITLE_TAIL = re.compile(r"\s*(?:[(\[;:,|]|\s[-/]+\s).*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")

Path = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ItemFacts:
    """Facts by item index; "" where nothing is known.

    Attributes:
        titles: shortened titles, in lower case where the source shouts; never with the end of a sentence inside.
        kinds: narrowest kind that at least `min_items` items share.
        areas: broadest kind; equal to the kind where there is one level.
        brands: brand as the source writes it.
        styles: style words of the title, each shared by at least `min_items` items.
        prices: one of `PRICE_LEVELS`.
        num_sharing: items in training by (kind or area, style); "" in a place leaves it open.
        num_items: items in training.
    """

    titles: Sequence[str]
    kinds: Sequence[str]
    areas: Sequence[str]
    brands: Sequence[str]
    styles: Sequence[tuple[str, ...]]
    prices: Sequence[str]
    num_sharing: Counter[tuple[str, str]]
    num_items: int


def item_facts(
    items: pl.DataFrame,
    trained: Sequence[bool],
    *,
    min_items: int,
    max_share: float,
    category_column: str | None = None,
    brand_column: str | None = None,
    price_column: str | None = None,
) -> ItemFacts:
    """Derive the facts.

    Args:
        items: columns `title` and any others, by item index.
        trained: which items occur in training; only they are counted.
        min_items: items that have to share a kind, a style word, or a pair of them.
        max_share: a title word that a larger share of the items has says nothing.
        category_column: levels separated by `>` or `|`, broadest first; None takes `categories` where that exists.
        brand_column: None takes `brand` where that exists.
        price_column: None takes `price` where that exists.

    Raises:
        ConfigError: a column that was named does not exist.
    """
    paths = [_path(text) for text in _column(items, category_column, "categories")]
    brands = [_SENTENCE_END.sub("", text) for text in _column(items, brand_column, "brand")]
    words = [title_words(title) for title in items["title"]]
    free = FreeWords(words, trained, min_items=min_items, max_share=max_share, brands=brands)
    if any(path for path, kept in zip(paths, trained, strict=True) if kept):
        kinds, areas = _path_kinds(paths, trained, min_items)
    else:
        kinds = title_kinds(words, trained, free)
        areas = kinds
    named = (" ".join((*path, kind)) for path, kind, kept in zip(paths, kinds, trained, strict=True) if kept)
    taken = named_words(named)
    styles = [free.styles(of_item, taken) for of_item in words]
    num_sharing: Counter[tuple[str, str]] = Counter()
    for kind, area, style, kept in zip(kinds, areas, styles, trained, strict=True):
        if kept:
            pairs = {(name, word) for name in (kind, area, "") for word in style}
            num_sharing.update({(kind, ""), (area, ""), *pairs})
    return ItemFacts(
        titles=[readable(title) for title in items["title"]],
        kinds=kinds,
        areas=areas,
        brands=brands,
        styles=styles,
        prices=_price_levels(_column(items, price_column, "price"), trained),
        num_sharing=num_sharing,
        num_items=sum(trained),
    )


def readable(title: str) -> str:
    """A title to quote inside a sentence.

    >>> readable("WHITE HANGING HEART T-LIGHT HOLDER")
    'white hanging heart t-light holder'
    >>> readable("OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce")
    'OPI Nail Lacquer'
    """
    head = _TITLE_TAIL.sub("", title)
    text = head if len(head) >= _MIN_TITLE_CHARS else title
    text = " ".join(_SENTENCE_END.sub("", text.replace('"', " ")).split())
    text = shorten(text, _MAX_TITLE_CHARS).strip()
    return text.lower() if text.isupper() else text


def _column(items: pl.DataFrame, name: str | None, usual: str) -> list[str]:
    if name is not None and name not in items.columns:
        raise ConfigError(f"items.parquet has no column {name!r}{nearest(name, items.columns)}")
    if (name or usual) not in items.columns:
        return [""] * len(items)
    return [value or "" for value in items[name or usual].cast(pl.String)]


def _path(text: str) -> Path:
    return tuple(part for part in _LEVEL_SEPARATOR.split(text.strip()) if part)


def _path_kinds(
    paths: Sequence[Path], trained: Sequence[bool], min_items: int
) -> tuple[list[str], list[str]]:
    """Per item, the deepest node of its path with enough items, and the first node below a common root."""
    known = [path for path, kept in zip(paths, trained, strict=True) if kept and path]
    root = int(len({path[0] for path in known}) == 1 and any(len(path) > 1 for path in known))
    sizes = Counter(path[:depth] for path in known for depth in range(root + 1, len(path) + 1))
    kept_nodes = {node for node, size in sizes.items() if size >= min_items}
    leaves = Counter(node[-1].lower() for node in kept_nodes)

    def name(node: Path) -> str:
        leaf = _SENTENCE_END.sub("", node[-1].lower())
        return (
            f"{leaf} ({node[-2].lower()})" if leaves[node[-1].lower()] > 1 and len(node) > root + 1 else leaf
        )

    kinds, areas = [], []
    for path in paths:
        nodes = [path[:depth] for depth in range(root + 1, len(path) + 1) if path[:depth] in kept_nodes]
        kinds.append(name(nodes[-1]) if nodes else "")
        areas.append(name(nodes[0]) if nodes else "")
    return kinds, areas


def _price_levels(texts: Sequence[str], trained: Sequence[bool]) -> list[str]:
    """Which third of the prices in training an item's price is in."""
    found = [_NUMBER.search(text.replace(",", "")) for text in texts]
    prices = [float(match.group()) if match else None for match in found]
    known = sorted(price for price, kept in zip(prices, trained, strict=True) if kept and price is not None)
    if len(known) < len(PRICE_LEVELS) or known[0] == known[-1]:
        return [""] * len(texts)
    bounds = [known[len(known) * part // len(PRICE_LEVELS)] for part in range(1, len(PRICE_LEVELS))]
    return ["" if p is None else PRICE_LEVELS[sum(p >= bound for bound in bounds)] for p in prices]
