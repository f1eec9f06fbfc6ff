"""What the text tasks of a training run are made from: titles, training histories, rationales."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lasar.cot.rationale_reader import read_rationales
from lasar.cot.rows import reserved_baskets, training_rows
from lasar.data.interactions import Interactions, ItemTable
from lasar.model.presets import PRESETS
from lasar.prompts.text_tasks import (
    Renderer,
    Source,
    TextBatch,
    TextRow,
    asked_sources,
    interleave,
    text_batches,
)
from lasar.prompts.text_tokens import TextTokenizer, pretrained_tokenizer, train_tokenizer
from lasar.prompts.vocabulary import Vocabulary

B = TypeVar("B")

_MAX_RATIONALES = 20_000  # that a BPE is trained on: more of the same sentences teach it no new word


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Everything that makes the text batches of a run.

    Attributes:
        tokenizer: of texts.
        titles: of every item, "" where none.
        sources: rows that the tasks are made from.
        num_rows: rows of each task in an epoch.
        max_tokens: of one text; longer ones are cut.
        batch_tokens: of a batch, padding included.
        seed: of the run.
    """

    tokenizer: TextTokenizer
    titles: Sequence[str]
    sources: Mapping[Source, Sequence[TextRow]]
    num_rows: Mapping[str, int]
    max_tokens: int
    batch_tokens: int
    seed: int

    @property
    def size(self) -> int:
        """Text tokens that the model must have."""
        return self.tokenizer.size

    def among(
        self, histories: Sequence[B], vocabulary: Vocabulary, tokens_IL: NDArray[np.int32], *, epoch: int
    ) -> list[B | TextBatch]:
        """The batches of an epoch: histories in their order, and text batches at random places between them."""
        render = Renderer(
            vocabulary=vocabulary,
            tokens_IL=tokens_IL,
            titles=self.titles,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
        )
        texts = text_batches(
            self.sources, render,
            num_rows=self.num_rows, batch_tokens=self.batch_tokens, seed=self.seed, epoch=epoch,
        )  # fmt: skip
        return interleave(histories, texts, seed=self.seed, epoch=epoch)

    def facts(self) -> dict[str, Any]:
        """What a summary should say."""
        return {"text_tokens": self.size, "text_rows_per_epoch": dict(self.num_rows)}


def load_text(
    inputs: Mapping[str, Path],
    *,
    num_rows: Mapping[str, int],
    backbone: str,
    vocabulary_size: int,
    max_tokens: int,
    batch_tokens: int,
    seed: int,
) -> TextData | None:
    """Read titles and, where a task needs them, rationales; train a tokenizer or take the backbone's.

    Args:
        inputs: artifact folders by stage: `prepare`, and `rationalize` where a task needs it.
        num_rows: rows of each task in an epoch.
        backbone: a preset, or the folder or hub id of a pre-trained model.
        vocabulary_size: tokens of a tokenizer that is trained.
        max_tokens: of one text.
        batch_tokens: of a batch, padding included.
        seed: of the run.

    Returns:
        None without tasks; nothing is read then.

    Raises:
        ArtifactError: an artifact is damaged, or the rationales are not of its training rows.
        ConfigError: the pre-trained model has no usable tokenizer.
    """
    if not num_rows:
        return None
    items = ItemTable.load(inputs["prepare"])
    sources = text_sources(
        asked_sources(num_rows),
        items=items,
        interactions=Interactions.load(inputs["prepare"]),
        rationalized=inputs.get("rationalize"),
    )
    tokenizer = (
        train_tokenizer(tokenizer_texts(items, sources.get("rationales", [])), vocabulary_size)
        if backbone in PRESETS
        else pretrained_tokenizer(backbone)
    )
    return TextData(
        tokenizer=tokenizer, titles=items.titles, sources=sources, num_rows=num_rows,
        max_tokens=max_tokens, batch_tokens=batch_tokens, seed=seed,
    )  # fmt: skip


def text_sources(
    asked: Iterable[Source], *, items: ItemTable, interactions: Interactions, rationalized: Path | None
) -> dict[Source, list[TextRow]]:
    """Rows of every kind asked for; histories and rationales are of training rows only.

    Args:
        asked: kinds of rows.
        items: titles of the items.
        interactions: events of the users.
        rationalized: the `rationalize` artifact; read when rationales are asked for.

    Raises:
        ArtifactError: the rationales cannot be read, or are not of these training rows.
    """
    sources: dict[Source, list[TextRow]] = {}
    for source in sorted(asked):
        if source == "items":
            sources[source] = _item_rows(items.titles)
            continue
        histories, reserved = training_rows(interactions), reserved_baskets(interactions)
        texts = [""] * len(histories)
        if source == "rationales":
            assert rationalized is not None
            texts = read_rationales(rationalized, histories)
        sources[source] = [
            TextRow(row.history, row.baskets, row.targets, text)
            for row, text in zip(histories, texts, strict=True)
            if (text if source == "rationales" else len(row.history))
            and (row.user_index, row.basket) not in reserved
        ]
    return sources


def tokenizer_texts(items: ItemTable, rationales: Sequence[TextRow]) -> list[str]:
    """Texts that a tokenizer is trained on: titles, item texts, and rationales evenly picked."""
    step = -(-len(rationales) // _MAX_RATIONALES) or 1
    return [*items.titles, *items.texts, *(row.rationale for row in rationales[::step])]


def _item_rows(titles: Sequence[str]) -> list[TextRow]:
    nothing = np.zeros(0, dtype=np.int32)
    return [
        TextRow(nothing, nothing, np.array([item], dtype=np.int32))
        for item, title in enumerate(titles)
        if title
    ]
