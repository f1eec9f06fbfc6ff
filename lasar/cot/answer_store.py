"""Answers of a language model on disk: paid for once, found again by what was asked.

A folder of small Parquet shards. A shard's name is the hash of its keys, so that processes that share the folder never
write to one file, and a killed process leaves no half shard.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from lasar.errors import DataError

_FLUSH_ANSWERS = 256
_FLUSH_SECONDS = 5.0
_SCHEMA = {
    "key": pl.String, "text": pl.String, "finish_reason": pl.String, "prompt_tokens": pl.Int64,
    "completion_tokens": pl.Int64,
}  # fmt: skip


class Answer(NamedTuple):
    """What a model said, before anything was judged: rules about answers may change, answers don't.

    Attributes:
        text: the answer as it came.
        finish_reason: `stop`, `length`, `content_filter`, or `refusal` where the model says so itself.
        prompt_tokens: tokens read, as the server counts them.
        completion_tokens: tokens written.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def answer_key(request: Mapping[str, Any]) -> str:
    """Hash of everything an answer depends on: model, messages, sampling."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerStore:
    """Answers by key.

    Args:
        folder: made when missing.

    Raises:
        DataError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{folder}: cannot keep answers there: {error.strerror}") from None
        self._folder = folder
        self._unsaved: dict[str, Answer] = {}
        self._saved_at = time.monotonic()

    def find(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Those of `keys` that were answered before. A damaged shard is as good as none."""
        wanted, found = set(keys), dict[str, Answer]()
        for path in sorted(self._folder.glob("answers-*.parquet")):
            try:
                rows = pl.read_parquet(path, columns=list(_SCHEMA))
            except (OSError, pl.exceptions.PolarsError):
                continue
            found |= {row[0]: Answer(*row[1:]) for row in rows.iter_rows() if row[0] in wanted}
        return found

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer; it is on disk after at most a few seconds or answers, or after `flush`."""
        self._unsaved[key] = answer
        if len(self._unsaved) >= _FLUSH_ANSWERS or time.monotonic() - self._saved_at > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        self._saved_at = time.monotonic()
        if not self._unsaved:
            return
        rows = [(key, *self._unsaved[key]) for key in sorted(self._unsaved)]
        digest = hashlib.sha256("".join(row[0] for row in rows).encode()).hexdigest()[:24]
        path = self._folder / f"answers-{digest}.parquet"
        partial = path.with_name(f"{path.name}.partial")
        try:
            pl.DataFrame(rows, schema=_SCHEMA, orient="row").write_parquet(partial)
            partial.replace(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from None
        self._unsaved = {}
