"""How rationales turned out, and a few of them beside the titles they are about, for a person to judge."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lasar.cot.rationale import OUTCOMES, Rationale, sentences
from lasar.cot.rows import TrainingRow
from lasar.data.text import shorten

_NUM_EXAMPLES = 5
_SHOWN_ITEMS = 5
_MAX_TITLE_CHARS = 80


def summarise(rationales: Sequence[Rationale]) -> dict[str, Any]:
    """Counts of rows, outcomes, sentences and tokens, as JSON data; sentences are those of ok rationales."""
    parts = [sentences(rationale.text) for rationale in rationales if rationale.outcome == "ok"]
    lengths = Counter(len(part) for part in parts)
    outcomes = Counter(rationale.outcome for rationale in rationales)
    return {
        "num_rows": len(rationales),
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
        "num_distinct_sentences": len({sentence for part in parts for sentence in part}),
        "mean_sentences": round(sum(len(part) for part in parts) / max(len(parts), 1), 4),
        "rows_by_sentences": {str(length): lengths[length] for length in sorted(lengths)},
        "prompt_tokens": sum(rationale.prompt_tokens for rationale in rationales),
        "completion_tokens": sum(rationale.completion_tokens for rationale in rationales),
    }


def examples(
    rows: Sequence[TrainingRow], rationales: Sequence[Rationale], titles: Sequence[str], *, seed: int
) -> list[dict[str, Any]]:
    """A few rows that have a history and an ok rationale, drawn by `seed`."""
    short = [shorten(title, _MAX_TITLE_CHARS) for title in titles]
    usable = [
        n for n, rationale in enumerate(rationales) if rationale.outcome == "ok" and len(rows[n].history)
    ]
    drawn = np.random.default_rng(seed).permutation(np.array(usable, dtype=np.int64))[:_NUM_EXAMPLES]
    return [
        {
            "user_index": rows[n].user_index,
            "basket": rows[n].basket,
            "history": [short[item] for item in rows[n].history[-_SHOWN_ITEMS:].tolist()],
            "targets": [short[item] for item in rows[n].targets[:_SHOWN_ITEMS].tolist()],
            "text": rationales[n].text,
        }
        for n in drawn.tolist()
    ]
