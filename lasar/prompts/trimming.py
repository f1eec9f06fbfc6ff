"""A pre-trained tokenizer without the tokens that a shop's texts never need.

A language model's vocabulary is most of a small model, and a shop's titles and rationales use a fraction of it. What is
kept: single bytes (so that every text can still be written), special tokens, and every token that byte-pair encoding
makes on the way to the given texts, with the merges among them. The given texts are then encoded as before: where the
original would apply a merge, that merge is there, and no other has a better rank.
"""

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from lasar.errors import ConfigError
from lasar.progress import progress

_SPACE = "\u2581"  # what SentencePiece writes for a space


class Trimmed(NamedTuple):
    """A smaller tokenizer.

    Attributes:
        tokenizer: with tokens 0 ... V - 1.
        old_ids: of every new token, its id in the original, int64 [V], ascending.
    """

    tokenizer: Tokenizer
    old_ids: NDArray[np.int64]


def trim(tokenizer: Tokenizer, texts: Iterable[str], *, name: str) -> Trimmed:
    """Keep what encodes the texts.

    Args:
        tokenizer: BPE over bytes (Llama 3, Qwen, SmolLM), or over characters with bytes for those it lacks (Gemma,
            Llama 2).
        texts: that have to be encoded as before.
        name: of the model, for messages.

    Raises:
        ConfigError: the tokenizer is of another kind.
    """
    facts = json.loads(tokenizer.to_str())
    _refuse_other_kinds(facts, name)
    model = facts["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    texts = list(texts)
    words = _words(tokenizer, texts)
    if model.get("byte_fallback"):
        crossed = _crossed(model["vocab"])
        words = {piece for word in words for piece in _pieces(word, crossed)}
        single = {f"<0x{byte:02X}>" for byte in range(256)}
    else:
        single = set(pre_tokenizers.ByteLevel.alphabet())
    found = single | _symbols(words, {pair: rank for rank, pair in enumerate(merges)})
    kept = found & model["vocab"].keys()
    special = {token["content"]: token["id"] for token in facts["added_tokens"]}
    old_ids = sorted({model["vocab"][token] for token in kept} | set(special.values()))
    new_id = {old: new for new, old in enumerate(old_ids)}
    model["vocab"] = {t: new_id[i] for t, i in model["vocab"].items() if i in new_id}
    model["merges"] = [list(m) for m in merges if kept >= {*m, "".join(m)}]
    for token in facts["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber(facts["post_processor"], new_id)
    trimmed = Trimmed(Tokenizer.from_str(json.dumps(facts)), np.array(old_ids, dtype=np.int64))
    _check(tokenizer, trimmed, texts, name)
    return trimmed


def _refuse_other_kinds(facts: Mapping[str, Any], name: str) -> None:
    kind = facts["model"]["type"]
    with_bytes = '"ByteLevel"' in json.dumps(facts["pre_tokenizer"]) or facts["model"].get("byte_fallback")
    if kind != "BPE" or not with_bytes:
        what = kind if kind != "BPE" else "BPE without bytes"
        raise ConfigError(
            f"{name}: its tokenizer is {what}; only BPE with bytes can be trimmed: leave out --texts-of"
        )


def _crossed(vocab: Collection[str]) -> set[str]:
    """Characters that some token has before a space: only there can a token reach over the beginning of a word."""
    return {
        before for token in vocab for before, space in itertools.pairwise(token) if space == _SPACE != before
    }


def _pieces(text: str, crossed: Collection[str]) -> Iterable[str]:
    """A text cut before its words, wherever no token reaches over the cut: what is merged is merged within pieces."""
    start = 0
    for place in range(1, len(text)):
        if text[place] == _SPACE and text[place - 1] != _SPACE and text[place - 1] not in crossed:
            yield text[start:place]
            start = place
    yield text[start:]


def _words(tokenizer: Tokenizer, texts: Sequence[str]) -> set[str]:
    normalise = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    split = tokenizer.pre_tokenizer.pre_tokenize_str if tokenizer.pre_tokenizer else lambda text: [(text, ())]
    words = set[str]()
    with progress("reading texts", total=len(texts), unit="texts") as advance:
        for text in texts:
            words.update(word for word, _ in split(normalise(text)))
            advance()
    return words


def _symbols(words: Collection[str], ranks: Mapping[tuple[str, ...], int]) -> set[str]:
    """Everything that byte-pair encoding makes of the words, on the way and at the end."""
    found = set[str]()
    with progress("finding tokens", total=len(words), unit="words") as advance:
        for word in words:
            found.add(word)  # some models take a word that is a token without merging
            found.update(_symbols_of(word, ranks))
            advance()
    return found


def _symbols_of(word: str, ranks: Mapping[tuple[str, ...], int]) -> set[str]:
    symbols = list(word)
    found = set(symbols)
    while True:
        pairs = [
            (ranks.get(pair, len(ranks)), place) for place, pair in enumerate(itertools.pairwise(symbols))
        ]
        rank, place = min(pairs, default=(len(ranks), 0))
        if rank == len(ranks):
            return found
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
        found.add(symbols[place])


def _renumber(processor: Any, new_id: Mapping[int, int]) -> None:
    """What puts special tokens around a text knows them by number."""
    if isinstance(processor, list):
        for part in processor:
            _renumber(part, new_id)
    elif isinstance(processor, dict):
        if isinstance(processor.get("ids"), list):
            processor["ids"] = [new_id[old] for old in processor["ids"]]
        for part in processor.values():
            _renumber(part, new_id)


def _check(tokenizer: Tokenizer, trimmed: Trimmed, texts: list[str], name: str) -> None:
    """Every text has the tokens it had."""
    before = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    after = trimmed.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    for text, old, new in zip(texts, before, after, strict=True):
        if trimmed.old_ids[new.ids].tolist() != old.ids:
            raise ConfigError(
                f"{name}: its tokenizer cannot be trimmed without change ({text[:60]!r}); leave out --texts-of"
            )
