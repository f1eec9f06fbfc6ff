"""The free teacher: a chain of short sentences made from a user's own history and the catalogue's fields.

Deterministic, without any model. Every sentence states one or two facts from a closed vocabulary (kinds, brands,
styles, sizes) or quotes one item, so that the number of distinct sentences stays near the number of items and each is
encoded once. A chain is as long as there is something to say: that length is what later supervises depth.

The last sentence is the privileged one of the paper (METHOD section 4). With `intent="from_target"` it says which kind
and style come next, in words that at least `min_items` items share; with `history_only` it is a guess from the history.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import polars as pl

from lasar.cot.item_facts import ItemFacts, item_facts
from lasar.cot.rationale import Intent, Rationale
from lasar.cot.rows import TrainingRow
from lasar.data.interactions import Int32Array
from lasar.progress import progress

_WORD = re.compile(r"\w+")
_NUMBERS = ("no", "one", "two", "three", "four", "five")
_MAX_MIDDLE = 3  # sentences between the opening two and the intent
_HALF_LIFE = 3.0  # choices after which an earlier one counts half in a guess from the history
_MIN_STYLE_SHARE = 0.15
_MIN_PRICE_SHARE = 0.6
_MIN_GAIN = 0.15  # of a kind's share, for a shift

Pair = tuple[str, str]
Number = TypeVar("Number", int, float)


class CatalogueTeacher:
    """Writes rationales from `items.parquet`.

    Args:
        items: columns `title` and any others, by item index.
        trained: which items occur in training; only they are counted.
        intent: `from_target` or `history_only`.
        has_orders: whether baskets hold several items.
        max_history: newest items of a history that are read.
        min_items: items that have to share what the intent sentence says.
        max_share: a title word that a larger share of the items has is no style and no kind.
        category_column, brand_column, price_column: see `item_facts`.

    Raises:
        ConfigError: a column that was named does not exist.
    """

    def __init__(
        self,
        *,
        items: pl.DataFrame,
        trained: Sequence[bool],
        intent: Intent = "from_target",
        has_orders: bool = False,
        max_history: int = 50,
        min_items: int = 20,
        max_share: float = 0.1,
        category_column: str | None = None,
        brand_column: str | None = None,
        price_column: str | None = None,
    ) -> None:
        self._facts = item_facts(
            items, trained, min_items=min_items, max_share=max_share, category_column=category_column,
            brand_column=brand_column, price_column=price_column,
        )  # fmt: skip
        self._wordings = [_spaced(title) for title in items["title"]]
        self._trained = trained
        self._num_worded: dict[str, int] = {}
        self._intent = intent
        self._has_orders = has_orders
        self._max_history = max_history
        self._min_items = min_items

    @property
    def name(self) -> str:
        """`catalogue`."""
        return "catalogue"

    def write(self, rows: Sequence[TrainingRow]) -> list[Rationale]:
        """One rationale per row; every outcome is ok."""
        found = []
        with progress("writing rationales", total=len(rows), unit="rows") as advance:
            for row in rows:
                found.append(Rationale(self._chain(row), "ok"))
                advance()
        return found

    def _chain(self, row: TrainingRow) -> str:
        history = row.history[-self._max_history :].tolist()
        if not history:
            return " ".join(
                ("There is no earlier choice to learn from.", self._intent_sentence([], row.targets))
            )
        facts = self._facts
        newest_order = len(history) - int((row.baskets == row.baskets[-1]).sum())
        middle = (
            _leaning(history[max(newest_order, 0) :], facts), _shift(history, facts), _habit(history, facts),
            _brand(history, facts), _style(history, facts), _price(history, facts),
        )  # fmt: skip
        chain = [
            _opening(history, facts, in_all=len(row.history)),
            _latest(history, facts, has_orders=self._has_orders),
            *[sentence for sentence in middle if sentence][:_MAX_MIDDLE],
            self._intent_sentence(history, row.targets),
        ]
        return " ".join(chain)

    def _intent_sentence(self, history: list[int], targets: Int32Array) -> str:
        """What comes next, in words that at least `min_items` items share."""
        facts = self._facts
        known = {facts.kinds[item] for item in history} | {facts.areas[item] for item in history}
        if self._intent == "from_target":
            pairs = self._shared_pairs(Counter(targets.tolist()), at_most=2 if self._has_orders else 1)
        else:
            age = range(len(history) - 1, -1, -1)
            weights: dict[int, float] = {}
            for item, steps in zip(history, age, strict=True):
                weights[item] = weights.get(item, 0.0) + 0.5 ** (steps / _HALF_LIFE)
            pairs = self._shared_pairs(weights, at_most=1)
        if not pairs:
            return (
                "So the next choice could be anything."
                if not history
                else "So the next choice is hard to tell."
            )
        verb = "stays with" if all(kind in known for kind, _ in pairs) else "turns to"
        return f"So the next choice probably {verb} {_listed(_phrase(pair) for pair in pairs)}."

    def _shared_pairs(self, weights: Mapping[int, float], *, at_most: int) -> list[Pair]:
        """The most telling (kind, style) pairs of some items: much weight, few other items, never below `min_items`.

        A second pair is of another kind and nearly as telling as the first.
        """
        facts, total = self._facts, max(sum(weights.values()), 1e-9)
        scores: dict[Pair, float] = {}
        for item, weight in weights.items():
            kind = facts.kinds[item]
            name = kind if facts.num_sharing[kind, ""] >= self._min_items else facts.areas[item]
            for pair in ((name, style) for style in ("", *facts.styles[item]) if name or style):
                sharing = facts.num_sharing[pair]
                if sharing >= self._min_items and not self._repeats_title(pair, item):
                    telling = math.log(1 + facts.num_items / sharing)
                    scores[pair] = scores.get(pair, 0.0) + weight / total * telling
        ranked = sorted(scores, key=lambda pair: (-scores[pair], pair))
        chosen = ranked[:1]
        for pair in ranked[1:]:
            if len(chosen) < at_most and pair[0] != chosen[0][0] and scores[pair] > 0.6 * scores[chosen[0]]:
                chosen.append(pair)
        return sorted(chosen)

    def _repeats_title(self, pair: Pair, item: int) -> bool:
        """Whether kind and style together are words of this item's title that few titles have in a row."""
        phrase = _spaced(_phrase(pair))
        if not all(pair) or phrase not in self._wordings[item]:
            return False
        if phrase not in self._num_worded:
            worded = (
                kept and phrase in title for title, kept in zip(self._wordings, self._trained, strict=True)
            )
            self._num_worded[phrase] = sum(worded)
        return self._num_worded[phrase] < self._min_items


def _opening(history: list[int], facts: ItemFacts, *, in_all: int) -> str:
    areas = _counts(facts.areas, history)
    start = f"So far there {'is' if in_all == 1 else 'are'} {_amount(in_all)} choice{'s' * (in_all != 1)}"
    if not areas:
        return f"{start}."
    area, count = _most(areas)
    if count == len(history):
        return f"{start}, {'in' if in_all == 1 else 'all in'} {area}."
    return f"{start}, mostly {area}." if count * 2 >= len(history) else f"{start}, of many kinds."


def _latest(history: list[int], facts: ItemFacts, *, has_orders: bool) -> str:
    title, kind = facts.titles[history[-1]], facts.kinds[history[-1]]
    start = "The latest order includes" if has_orders else "The latest choice is"
    if title and kind and not kind.endswith(" items"):
        return f'{start} "{title}", which counts as {kind}.'
    return f'{start} "{title}".' if title else f"{start} {kind or 'an item without a name'}."


def _shift(history: list[int], facts: ItemFacts) -> str:
    """What is new in the latest third: a broad kind that took over, or a kind that came up."""
    cut = len(history) - max(len(history) // 3, 2)
    if cut < 2:
        return ""
    before, lately = _counts(facts.areas, history[:cut]), _counts(facts.areas, history[cut:])
    if before and lately:
        (old, _), (new, count) = _most(before), _most(lately)
        if new != old and count * 2 > len(history) - cut and before[new] * 2 < before[old]:
            return f"Lately the interest has moved from {old} to {new}."
    before, lately = _counts(facts.kinds, history[:cut]), _counts(facts.kinds, history[cut:])
    gains = {kind: count / (len(history) - cut) - before[kind] / cut for kind, count in lately.items()}
    kind, gain = _most(gains) if gains else ("", 0.0)
    return f"Lately there is more interest in {kind}." if gain >= _MIN_GAIN and lately[kind] > 1 else ""


def _leaning(order: list[int], facts: ItemFacts) -> str:
    """What an order of three items or more is mostly about."""
    kinds = _counts(facts.kinds, order)
    kind, count = _most(kinds) if kinds else ("", 0)
    return f"That order leans towards {kind}." if len(order) > 2 and count > 1 else ""


def _habit(history: list[int], facts: ItemFacts) -> str:
    """The kinds that come again and again; where none does, what came before the latest choice."""
    kinds = _counts(facts.kinds, history)
    repeated = sorted((kind for kind in kinds if kinds[kind] > 1), key=lambda kind: (-kinds[kind], kind))
    if len(kinds) == 1 and repeated:
        return f"Every choice is of the same kind, {repeated[0]}."
    if repeated:
        return f"The choices keep returning to {_listed(sorted(repeated[:2]))}."
    earlier = dict.fromkeys(facts.kinds[item] for item in reversed(history[:-1]) if facts.kinds[item])
    return f"Before that came {_listed(sorted(list(earlier)[:2]))}." if earlier else ""


def _brand(history: list[int], facts: ItemFacts) -> str:
    brands = _counts(facts.brands, history)
    if len(history) < 2 or not brands:
        return ""
    brand, count = _most(brands)
    if count > 1 and count * 3 >= sum(brands.values()):
        return f"{brand} is a brand that is chosen again and again."
    return "Almost every choice is of another brand." if len(brands) > 3 and count * 4 <= len(history) else ""


def _style(history: list[int], facts: ItemFacts) -> str:
    """The style words that are frequent here and rarer elsewhere."""
    counts = Counter(style for item in history for style in facts.styles[item])
    lift = {
        style: count
        * math.log(facts.num_items * count / (len(history) * max(facts.num_sharing["", style], 1)))
        for style, count in counts.items()
        if count >= max(2, _MIN_STYLE_SHARE * len(history))
    }
    telling = (style for style in lift if lift[style] >= counts[style] * math.log(2))  # twice the usual share
    ranked = sorted(telling, key=lambda style: (-lift[style], style))[:2]
    return f"Many choices are described as {_listed(sorted(ranked))}." if ranked else ""


def _price(history: list[int], facts: ItemFacts) -> str:
    levels = _counts(facts.prices, history)
    if sum(levels.values()) < 2:
        return ""
    level, count = _most(levels)
    return f"Prices are mostly {level}." if count >= _MIN_PRICE_SHARE * sum(levels.values()) else ""


def _counts(names: Sequence[str], items: Sequence[int]) -> Counter[str]:
    """How often each known name comes among some items."""
    return Counter(names[item] for item in items if names[item])


def _most(counts: Mapping[str, Number]) -> tuple[str, Number]:
    """The most frequent name; of several, the first in the alphabet."""
    return min(counts.items(), key=lambda named: (-named[1], named[0]))


def _amount(number: int) -> str:
    if number < len(_NUMBERS):
        return _NUMBERS[number]
    bounds = ((10, "more than five"), (20, "more than ten"), (50, "more than twenty"))
    return next((words for bound, words in bounds if number <= bound), "more than fifty")


def _phrase(pair: Pair) -> str:
    kind, style = pair
    return f"{style} {kind}".strip() if kind else f"{style} items"


def _spaced(text: str) -> str:
    """Words with one space around each, so that a phrase is found whatever stands between its words."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)
