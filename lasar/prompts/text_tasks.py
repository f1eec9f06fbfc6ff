"""Text tasks: what ties semantic IDs to words. A task is a pair of functions, one renders the prompt, one the target.

A stretch of text always stands between `<s>` and `<e>`, where latent reasoning will stand later: `<s>` says "in words
from here", `<e>` says "the words are over, codes may follow". A sequence that opens with `<user>` is about a history
and what comes next; one that does not is about an item::

    sid_to_title           c0 c1 c2 <s> | title <e>
    title_to_sid           <s> title <e> | c0 c1 c2
    history_to_title       <user> items [<order>] <s> | title <e>
    titles_to_sid          <user> <s> titles, one a line <e> | c0 c1 c2
    history_to_rationale   <user> items [<order>] <s> | rationale <e>
    history_to_reasoned_sid  the same, and then the codes: explicit chain of thought

Only what stands behind the bar is predicted. Legend: B batch, T tokens, P predictions, L levels, I items.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lasar.data.interactions import Int32Array
from lasar.errors import DataError
from lasar.prompts.batches import bucket_by_length
from lasar.prompts.vocabulary import Vocabulary, pad_right

if TYPE_CHECKING:
    from lasar.prompts.text_tokens import TextTokenizer

Int64Array = NDArray[np.int64]
Source = Literal["items", "histories", "rationales"]
TaskName = Literal[
    "sid_to_title", "title_to_sid", "history_to_title", "titles_to_sid", "history_to_rationale",
    "history_to_reasoned_sid",
]  # fmt: skip

T = TypeVar("T")
S = TypeVar("S")


class TextRow(NamedTuple):
    """What a task is rendered from.

    Attributes:
        history: item indices, oldest first; empty where the task is about an item.
        baskets: basket number of each.
        targets: right answers, at least one; each time the row is used, one of them is drawn.
        rationale: why, in words; "" where there is none.
    """

    history: Int32Array
    baskets: Int32Array
    targets: Int32Array
    rationale: str = ""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """Writes items, histories and texts as tokens.

    Attributes:
        vocabulary: markers and codes; its `base_size` holds the tokenizer's ids.
        tokens_IL: tokens of every item.
        titles: of every item, "" where none.
        tokenizer: of texts.
        max_tokens: of one text; longer ones are cut.
    """

    vocabulary: Vocabulary
    tokens_IL: NDArray[np.int32]
    titles: Sequence[str]
    tokenizer: "TextTokenizer"
    max_tokens: int

    def sid(self, item: int) -> list[int]:
        """An item's codes."""
        codes: list[int] = self.tokens_IL[item].tolist()
        return codes

    def history(self, row: TextRow) -> list[int]:
        """A history, rendered as everywhere, with the question open."""
        ids: list[int] = self.vocabulary.render_history(
            self.tokens_IL, row.history, row.baskets, open_order=True
        ).tolist()
        return ids

    @property
    def opened(self) -> list[int]:
        """`<s>`: text follows."""
        return [self.vocabulary.latent_start]

    def text(self, text: str) -> list[int]:
        """A text and its `<e>`."""
        return [*self.tokenizer.encode(text)[: self.max_tokens], self.vocabulary.latent_end]

    def history_titles(self, row: TextRow) -> list[int]:
        """The titles of a history, one a line, the newest kept, and their `<e>`."""
        titles = (self.titles[item] for item in row.history[-self.vocabulary.max_history :])
        ids = self.tokenizer.encode("\n".join(title for title in titles if title))
        return [*ids[-self.max_tokens :], self.vocabulary.latent_end]


Render = Callable[[Renderer, TextRow, int], list[int]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: what it is made from, and how prompt and target are written for a row and one of its answers."""

    source: Source
    prompt: Render
    target: Render


def _reading_history(render: Renderer, row: TextRow, item: int) -> list[int]:
    return render.history(row) + render.opened


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "sid_to_title": Task(
            source="items",
            prompt=lambda render, row, item: render.sid(item) + render.opened,
            target=lambda render, row, item: render.text(render.titles[item]),
        ),
        "title_to_sid": Task(
            source="items",
            prompt=lambda render, row, item: render.opened + render.text(render.titles[item]),
            target=lambda render, row, item: render.sid(item),
        ),
        "history_to_title": Task(
            source="histories",
            prompt=_reading_history,
            target=lambda render, row, item: render.text(render.titles[item]),
        ),
        "titles_to_sid": Task(
            source="histories",
            prompt=lambda render, row, item: (
                [render.vocabulary.user, *render.opened, *render.history_titles(row)]
            ),
            target=lambda render, row, item: render.sid(item),
        ),
        "history_to_rationale": Task(
            source="rationales",
            prompt=_reading_history,
            target=lambda render, row, item: render.text(row.rationale),
        ),
        "history_to_reasoned_sid": Task(
            source="rationales",
            prompt=_reading_history,
            target=lambda render, row, item: render.text(row.rationale) + render.sid(item),
        ),
    }
)


def asked_sources(tasks: Iterable[str]) -> set[Source]:
    """The kinds of rows that tasks are made from."""
    return {TASKS[name].source for name in tasks}


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Prompts and targets of several tasks as one padded block.

    Attributes:
        ids_BT: tokens, padded on the right.
        sources_P: which token predicts, as an index into the flattened ids.
        targets_P: the token to be predicted: text, `<e>`, or a code.
        items_P: item index a code belongs to; -1 where the target is text or `<e>`.
    """

    ids_BT: Int64Array
    sources_P: Int64Array
    targets_P: Int64Array
    items_P: Int64Array

    @property
    def num_targets(self) -> int:
        """Number of predictions."""
        return len(self.targets_P)


def text_batches(
    sources: Mapping[Source, Sequence[TextRow]],
    render: Renderer,
    *,
    num_rows: Mapping[str, int],
    batch_tokens: int,
    seed: int,
    epoch: int,
) -> list[TextBatch]:
    """The text batches of one epoch; a pure function of its arguments.

    Args:
        sources: rows of each kind that a task asks for.
        render: writes them as tokens.
        num_rows: rows of each task; a source is used up before any of its rows comes again.
        batch_tokens: tokens of a batch at most, padding included (one row may exceed it).
        seed: of the run.
        epoch: counts from 0.

    Raises:
        DataError: a task has nothing to be made from.
    """
    rng = np.random.default_rng([seed, epoch, 1])  # not the stream of the history batches
    rendered: list[tuple[list[int], list[int], int]] = []
    for name, count in num_rows.items():
        task = TASKS[name]
        rows = sources[task.source]
        if not rows:
            raise DataError(f"sft.text.tasks: {name}: {_NOTHING[task.source]}; leave the task out")
        for index in _draw(len(rows), count, rng).tolist():
            row = rows[index]
            item = int(row.targets[rng.integers(len(row.targets))])
            rendered.append((task.prompt(render, row, item), task.target(render, row, item), item))
    lengths = [len(prompt) + len(target) for prompt, target, _ in rendered]
    groups = bucket_by_length(lengths, batch_tokens, rng)
    return [_stack([rendered[index] for index in group], render.vocabulary) for group in groups]


def shares(weights: Mapping[TaskName, float], total: int) -> dict[str, int]:
    """Divide `total` rows by weight, by largest remainder: the counts sum to `total`."""
    exact = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts: dict[str, int] = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def interleave(main: Sequence[T], guests: Sequence[S], *, seed: int, epoch: int) -> list[T | S]:
    """Both lists as one, each in its own order, the guests at random places; a pure function of its arguments."""
    rng = np.random.default_rng([seed, epoch, 2])
    is_guest = rng.permutation(np.arange(len(main) + len(guests)) < len(guests))
    mains, others = iter(main), iter(guests)
    return [next(others) if guest else next(mains) for guest in is_guest.tolist()]


_NOTHING: Mapping[Source, str] = {
    "items": "no item has a title",
    "histories": "no training history has two orders (events)",
    "rationales": "there is no rationale whose outcome is ok",
}


def _draw(size: int, count: int, rng: np.random.Generator) -> Int64Array:
    laps = [rng.permutation(size) for _ in range(-(-count // size))]
    return np.concatenate([np.zeros(0, dtype=np.int64), *laps])[:count]


def _stack(rows: Sequence[tuple[list[int], list[int], int]], vocabulary: Vocabulary) -> TextBatch:
    ids_BT, _ = pad_right(
        [np.array(prompt + target, dtype=np.int32) for prompt, target, _ in rows], vocabulary.pad
    )
    sources, targets, items = [], [], []
    for number, (prompt, target, item) in enumerate(rows):
        first = number * ids_BT.shape[1] + len(prompt) - 1
        sources.append(np.arange(first, first + len(target)))
        targets.append(np.array(target, dtype=np.int64))
        items.append(np.where(targets[-1] >= vocabulary.first_code, item, -1))
    return TextBatch(
        ids_BT=ids_BT,
        sources_P=np.concatenate(sources),
        targets_P=np.concatenate(targets),
        items_P=np.concatenate(items),
    )
