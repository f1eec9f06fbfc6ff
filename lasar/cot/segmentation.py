"""Rationales into segments: sentences, and a cut wherever the subject changes (paper section 3).

Two neighbouring sentences belong to different segments when their vectors are further apart than a threshold. The
threshold is one percentile of all such distances in the data, and the percentile is found by bisection so that a
rationale has as many segments as wanted, on average.

Legend: P sentences of all rationales in a row, R rationales, E text vector width, S segments of all rationales.
"""

import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Int64Array = NDArray[np.int64]

_BISECTIONS = 40  # halvings of 0..100: far finer than the gap between two percentiles of any real data

# What ends a sentence: a stop with its closing quotes or brackets, and white space; or a line break.
_END = re.compile(r"[.!?]+[\"')\]]*\s+|[.!?]*\s*\n\s*")
# A stop that never ends one: after a title or an abbreviation that needs a word behind it, or a list entry's number.
_NEVER = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|prof|vs|approx|fig|al|(?:[a-z]\.)+[a-z])|^\s*\d{1,3})\.$", re.IGNORECASE
)
# A stop that ends one unless a number follows, as in "No. 5".
_NOT_BEFORE_NUMBER = re.compile(r"\b(?:no|nos|vol|ca|size|pp?)\.$", re.IGNORECASE)


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences; joined again they are the text, white space and all.

    A sentence ends with a line break, or with `.`, `!` or `?` before white space and anything but a small letter.
    Titles, abbreviations, decimals and the numbers of a list end nothing. White space opens the sentence behind it, as
    it opens a token in most language models' vocabularies.
    """
    sentences, start = [], 0
    for match in _END.finditer(text):
        end = match.start() + len(match.group().rstrip())
        sentence = text[start:end]
        if match.end() == len(text) or not sentence.strip():
            continue
        if "\n" in match.group() or _ends(sentence, following=text[match.end()]):
            sentences.append(sentence)
            start = end
    return [*sentences, text[start:]] if text else []


def _ends(sentence: str, *, following: str) -> bool:
    if following.islower() or _NEVER.search(sentence):
        return False
    return not (following.isdigit() and _NOT_BEFORE_NUMBER.search(sentence))


def sentence_gaps(
    sentences_P: NDArray[np.int32], first_R1: Int64Array, vectors_E: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Cosine distance of every sentence to the one before it in the same rationale.

    Args:
        sentences_P: number of each sentence's text in `vectors_E`, rationale after rationale.
        first_R1: rationale r owns sentences `first_R1[r]` to `first_R1[r + 1]`.
        vectors_E: unit vectors of the distinct sentences.

    Returns:
        float32 [P]; infinity for the first sentence of a rationale, which always opens a segment.
    """
    gaps_P = np.full(len(sentences_P), np.inf, dtype=np.float32)
    if len(sentences_P) < 2:
        return gaps_P
    # Once for each pair of texts: equal pairs then have equal distances to the last bit, and templates repeat a lot.
    pairs = sentences_P[:-1].astype(np.int64) * len(vectors_E) + sentences_P[1:]
    distinct, position_of = np.unique(pairs, return_inverse=True)
    left, right = np.divmod(distinct, len(vectors_E))
    similarity = np.concatenate(
        [
            np.einsum("pe,pe->p", vectors_E[left[a : a + 65536]], vectors_E[right[a : a + 65536]])
            for a in range(0, len(distinct), 65536)
        ]
    )
    gaps_P[1:] = np.maximum(1.0 - similarity, 0.0)[position_of]
    gaps_P[first_R1[:-1][np.diff(first_R1) > 0]] = np.inf
    return gaps_P


def segment_starts(
    gaps_P: NDArray[np.float32], first_R1: Int64Array, *, percentile: float, max_depth: int
) -> NDArray[np.bool_]:
    """Which sentences open a segment.

    Args:
        gaps_P: as `sentence_gaps` gives them.
        first_R1: bounds of the rationales.
        percentile: a gap opens a segment when it exceeds this percentile of all gaps; 0 cuts everywhere.
        max_depth: segments of a rationale at most; the tail is merged into the last one.
    """
    starts_P = gaps_P > _threshold(gaps_P, percentile)
    earlier_P1 = np.concatenate([[0], np.cumsum(starts_P)])
    rank_P = earlier_P1[:-1] - np.repeat(earlier_P1[first_R1[:-1]], np.diff(first_R1))
    return np.asarray(starts_P & (rank_P < max_depth))


def segment_counts(starts_P: NDArray[np.bool_], first_R1: Int64Array) -> Int64Array:
    """Number of segments of every rationale, int64 [R]."""
    return np.asarray(np.diff(np.concatenate([[0], np.cumsum(starts_P)])[first_R1]), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the search for a percentile found.

    Attributes:
        percentile: of all gaps between neighbouring sentences.
        threshold: the cosine distance it stands for; -1 where every sentence is cut.
        mean: segments per rationale that it gives, over the rationales that have any sentence.
        attainable: whether the wanted mean lies between one segment each and one segment per sentence (after the
            clip to the greatest depth).
    """

    percentile: float
    threshold: float
    mean: float
    attainable: bool


def calibrate(
    gaps_P: NDArray[np.float32], first_R1: Int64Array, *, segments_mean: float, max_depth: int
) -> Calibration:
    """Find the percentile whose cuts give about `segments_mean` segments per rationale.

    The mean falls as the percentile rises. Where equal gaps make it jump over the wanted value, the nearer side is
    taken.

    Args:
        gaps_P: as `sentence_gaps` gives them.
        first_R1: bounds of the rationales; one without a sentence does not count.
        segments_mean: wanted mean.
        max_depth: segments of a rationale at most.
    """

    def mean(percentile: float) -> float:
        starts_P = segment_starts(gaps_P, first_R1, percentile=percentile, max_depth=max_depth)
        counts_R = segment_counts(starts_P, first_R1)
        return float(counts_R[counts_R > 0].mean()) if counts_R.any() else 0.0

    low, high = 0.0, 100.0
    most, least = mean(low), mean(high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) > segments_mean else (low, middle)
    if most <= segments_mean:
        low = high = 0.0
    best = min((low, high), key=lambda percentile: abs(mean(percentile) - segments_mean))
    return Calibration(
        percentile=best,
        threshold=_threshold(gaps_P, best),
        mean=mean(best),
        attainable=least <= segments_mean <= most,
    )


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Rationales cut into segments.

    Attributes:
        texts_S: the words of each segment, rationale after rationale; joined they are the rationales.
        counts_R: segments of each rationale; 0 for an empty one.
        sentences_P: number of each sentence's text in `vectors_E`.
        bounds_S1: segment s consists of sentences `bounds_S1[s]` to `bounds_S1[s + 1]`.
        vectors_E: unit vectors of the distinct sentences.
        calibration: how the percentile was found.
        max_depth: segments of a rationale at most.
    """

    texts_S: list[str]
    counts_R: Int64Array
    sentences_P: NDArray[np.int32]
    bounds_S1: Int64Array
    vectors_E: NDArray[np.float32]
    calibration: Calibration
    max_depth: int

    def sentences_of(self, segment: int) -> NDArray[np.int32]:
        """Numbers of a segment's sentences."""
        return self.sentences_P[self.bounds_S1[segment] : self.bounds_S1[segment + 1]]

    def facts(self) -> dict[str, Any]:
        """What a summary says, as plain JSON data; means are over the rationales that are not empty."""
        num_rationales = max(int((self.counts_R > 0).sum()), 1)
        return {
            "rows_with_rationale": num_rationales,
            "num_segments": len(self.texts_S),
            "num_distinct_sentences": len(self.vectors_E),
            "sentences_mean": len(self.sentences_P) / num_rationales,
            "segments_mean": self.calibration.mean,
            "attainable": self.calibration.attainable,
            "percentile": self.calibration.percentile,
            "threshold": self.calibration.threshold,
            "histogram": np.bincount(self.counts_R, minlength=self.max_depth + 1).tolist(),
        }


def segment_rationales(
    rationales: Sequence[str],
    encode: Callable[[list[str]], NDArray[np.float32]],
    *,
    segments_mean: float,
    max_depth: int,
) -> Segmentation:
    """Cut rationales into segments.

    Args:
        rationales: texts; "" where there is none.
        encode: distinct sentences to vectors.
        segments_mean: wanted mean number of segments.
        max_depth: segments of a rationale at most.
    """
    pieces = [split_sentences(text) for text in rationales]
    first_R1 = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype(np.int64)
    flat = [piece for row in pieces for piece in row]
    number_of: dict[str, int] = {}
    for piece in flat:
        number_of.setdefault(piece.strip(), len(number_of))
    sentences_P = np.array([number_of[piece.strip()] for piece in flat], dtype=np.int32)
    vectors_E = unit(encode(list(number_of)))
    gaps_P = sentence_gaps(sentences_P, first_R1, vectors_E)
    found = calibrate(gaps_P, first_R1, segments_mean=segments_mean, max_depth=max_depth)
    starts_P = segment_starts(gaps_P, first_R1, percentile=found.percentile, max_depth=max_depth)
    bounds_S1 = np.append(np.flatnonzero(starts_P), len(flat)).astype(np.int64)
    if not found.attainable:
        sentences_mean = len(flat) / max(sum(1 for row in pieces if row), 1)
        logger.warning(
            "segments_mean=%g is out of reach of rationales with %.2f sentences each; reached %.2f",
            segments_mean, sentences_mean, found.mean,
        )  # fmt: skip
    return Segmentation(
        texts_S=["".join(flat[start:stop]) for start, stop in itertools.pairwise(bounds_S1.tolist())],
        counts_R=segment_counts(starts_P, first_R1),
        sentences_P=sentences_P,
        bounds_S1=bounds_S1,
        vectors_E=vectors_E,
        calibration=found,
        max_depth=max_depth,
    )


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors of length 1 along the last axis; a zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def _threshold(gaps_P: NDArray[np.float32], percentile: float) -> float:
    inner = gaps_P[np.isfinite(gaps_P)]
    # Below every distance, so that percentile 0 really is one segment per sentence, even where all gaps are equal.
    return -1.0 if percentile == 0 or len(inner) == 0 else float(np.percentile(inner, percentile))
