"""Rationales as they lie on disk, matched to the training rows they were written for."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from lasar.cot.rows import TrainingRow
from lasar.data.interactions import ItemTable
from lasar.errors import ArtifactError, DataError


def read_rationales(folder: Path, rows: Sequence[TrainingRow]) -> list[str]:
    """The rationale of every training row, "" where there is none.

    Args:
        folder: the `rationalize` artifact.
        rows: the training rows.

    Raises:
        ArtifactError: the file is missing or damaged, or holds a rationale of no training row.
        DataError: there is no rationale at all.
    """
    path = folder / "rationales.parquet"
    try:
        table = pl.read_parquet(path, columns=["user_index", "basket", "text", "outcome"])
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ArtifactError(f"{path}: not readable ({error}); run the stage 'rationalize' again") from None
    texts = {
        (user, basket): text.strip() for user, basket, text, outcome in table.iter_rows() if outcome == "ok"
    }
    keys = [(row.user_index, row.basket) for row in rows]
    strangers = len(texts.keys() - set(keys))
    if strangers:
        raise ArtifactError(
            f"{path}: {strangers:,} rationales are of no training row; run the stage 'rationalize' again"
        )
    if not any(texts.values()):
        raise DataError(f"{path}: no rationale is ok; the summary.json beside it counts what became of them")
    return [texts.get(key, "") for key in keys]


def texts_of_run(run: Path) -> list[str]:
    """Every title, item text and rationale of a run, each once.

    Raises:
        ArtifactError: there is no such run, it has no `prepare` artifact, or a file is damaged.
    """
    if not run.is_dir():
        raise ArtifactError(f"{run}: no such run folder; make it first: lasar run RECIPE --until rationalize")
    items = ItemTable.load(run / "prepare")
    texts = dict.fromkeys([*items.titles, *items.texts])
    path = run / "rationalize" / "rationales.parquet"
    if path.is_file():
        try:
            texts |= dict.fromkeys(
                pl.read_parquet(path, columns=["text"])["text"].unique(maintain_order=True)
            )
        except (OSError, pl.exceptions.PolarsError) as error:
            raise ArtifactError(
                f"{path}: not readable ({error}); run the stage 'rationalize' again"
            ) from None
    return [text for text in texts if text]
