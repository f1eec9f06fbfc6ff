"""What a teacher gives for one training row: a text, how it went, what it cost."""

from typing import Literal, NamedTuple, get_args

from lasar.cot.segmentation import split_sentences

Outcome = Literal["ok", "refused", "empty", "names_target", "failed", "over_budget"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

Intent = Literal["from_target", "history_only"]


class Rationale(NamedTuple):
    """One chain of thought.

    Attributes:
        text: the chain; "" unless the outcome is ok.
        outcome: `ok`; the teacher `refused` or answered with nothing (`empty`); the text `names_target`; the request
            `failed`; nobody was asked because the rows or tokens allowed were used up (`over_budget`).
        prompt_tokens: tokens the teacher read for it; 0 for a teacher that has none, or from a cache.
        completion_tokens: tokens the teacher wrote.
    """

    text: str
    outcome: Outcome
    prompt_tokens: int = 0
    completion_tokens: int = 0


def sentences(text: str) -> list[str]:
    """Sentences of a rationale, without the white space around them; see `split_sentences`.

    >>> sentences("Bought 1.5 oz of cream. Likes it!")
    ['Bought 1.5 oz of cream.', 'Likes it!']
    """
    return [part.strip() for part in split_sentences(text) if part.strip()]
