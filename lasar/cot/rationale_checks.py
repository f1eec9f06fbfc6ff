"""From a language model's answer to a rationale, or to the reason why it is none.

A rationale must not name what it leads to: the hidden states made from it would carry the answer, not the reasoning.
Words that many titles share, and whatever the history already says, name nothing.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from lasar.cot.rationale import Outcome, sentences
from lasar.data.interactions import ItemTable

_TOKEN = re.compile(r"\w+(?:['-]\w+)*")
_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_RECOMMENDATION = re.compile(r"^\W*(?:\d+\W+|step \d+\W+)*recommendations?\b", re.IGNORECASE | re.MULTILINE)
_LABEL = re.compile(
    r"^\W*(?:step\s+)?(?:\d+\s*[.):]\s*)?(?:behaviou?r(?: analysis)?|preferences?|intent(?:ion)?)\W*[:\-]\W*",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^(?:[-*#>\s]+|\d+[.)]\s+)+")
_REFUSAL = re.compile(
    r"\bi(?:'m| am) (?:sorry|unable|not able)\b|\bas (?:an ai|a language model)\b"
    r"|\bi (?:can't|cannot|can not|won't|will not) (?:help|assist|provide|comply|do|write|answer|fulfil)",
    re.IGNORECASE,
)
_REFUSAL_WITHIN = 120  # characters from the start; a later apology is a manner of speaking
_NGRAM = 3
_ECHO = 5
_MIN_DISTINCTIVE_CHARS = 5
_MIN_ID_CHARS = 4


def reasoning_part(answer: str, *, asked: str = "", cut_off: bool = False) -> str:
    r"""What an answer says before it recommends: one line, without labels, bullets and thinking aloud.

    Args:
        answer: behaviour, preferences, intent, recommendation; the last is dropped (METHOD section 4).
        asked: the question; sentences that repeat its instructions are dropped, as weak models like to do.
        cut_off: the model ran into its limit, so that the last sentence may be a fragment; it is dropped.

    >>> reasoning_part("Behaviour: Buys soap.\nIntent: More care.\nRecommendation: Lemon soap.")
    'Buys soap. More care.'
    """
    text = _THINKING.sub("", answer).replace("*", "")
    found = _RECOMMENDATION.search(text)
    text = text[: found.start()] if found else text
    instructions = set(_grams(_tokens(asked), size=_ECHO))
    lines = [_BULLET.sub("", _LABEL.sub("", line.strip())) for line in text.splitlines()]
    parts = sentences(" ".join(" ".join(lines).split()))
    parts = [part for part in parts if not instructions.intersection(_grams(_tokens(part), size=_ECHO))]
    if cut_off and not found and parts and parts[-1][-1] not in ".!?":
        parts = parts[:-1]
    return " ".join(parts)


def is_refusal(text: str) -> bool:
    """Whether an answer begins by declining."""
    return _REFUSAL.search(text[:_REFUSAL_WITHIN].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None


class TargetCheck:
    """Finds texts that name a target: by id, by three words of its title in a row, or by its rare words.

    Args:
        items: ids and titles by item index.
        trained: which items occur in training; only their titles decide which words are rare.
        max_items: a word or a run of words that more titles share is generic.
    """

    def __init__(self, items: ItemTable, trained: Sequence[bool], *, max_items: int = 3) -> None:
        self._ids = [item_id.lower() for item_id in items.item_ids]
        self._tokens = [_tokens(title) for title in items.titles]
        counted = [tokens for tokens, kept in zip(self._tokens, trained, strict=True) if kept]
        words = Counter(word for tokens in counted for word in set(tokens))
        grams = Counter(gram for tokens in counted for gram in set(_grams(tokens)))
        self._rare_words = {word for word, count in words.items() if count <= max_items}
        self._shared_grams = {gram for gram, count in grams.items() if count > max_items}

    def outcome(self, text: str, *, targets: Iterable[int], history: Iterable[int]) -> Outcome:
        """`empty`, `refused`, `names_target` or `ok`."""
        if not _TOKEN.search(text):
            return "empty"
        if is_refusal(text):
            return "refused"
        return "names_target" if self.names_target(text, targets=targets, history=history) else "ok"

    def names_target(self, text: str, *, targets: Iterable[int], history: Iterable[int]) -> bool:
        """Whether `text` names one of `targets` in words that the `history` does not have."""
        tokens = _tokens(text)
        words, grams = set(tokens), set(_grams(tokens))
        history = list(history)
        known_words = {word for item in history for word in (*self._tokens[item], self._ids[item])}
        known_grams = {gram for item in history for gram in _grams(self._tokens[item])}
        telling_words = (words & self._rare_words) - known_words
        telling_grams = grams - self._shared_grams - known_grams
        named = set(_names(text))
        for target in targets:
            title, item_id = self._tokens[target], self._ids[target]
            if len(item_id) >= _MIN_ID_CHARS and item_id in words and item_id not in known_words:
                return True
            if telling_grams.intersection(_grams(title)) or self._is_short_title(
                title, tokens, telling_words
            ):
                return True
            rare = {word for word in telling_words.intersection(title) if len(word) >= _MIN_DISTINCTIVE_CHARS}
            # One rare word may be chance ("comfortable"); two, or one written as a name, are not.
            if len(rare) > 1 or rare & named:
                return True
        return False

    def _is_short_title(self, title: list[str], tokens: list[str], telling_words: set[str]) -> bool:
        """A title of one or two words, in full, with a rare word among them."""
        if not 0 < len(title) < _NGRAM or not telling_words.intersection(title):
            return False
        return title[0] in tokens if len(title) == 1 else (title[0], title[1]) in pairwise(tokens)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _grams(tokens: Sequence[str], *, size: int = _NGRAM) -> Iterable[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(size)), strict=False)


def _names(text: str) -> Iterable[str]:
    """Words written with a capital letter inside a sentence, in lower case."""
    for sentence in sentences(text):
        for word in _TOKEN.findall(sentence)[1:]:
            if word[0].isupper():
                yield word.lower()
