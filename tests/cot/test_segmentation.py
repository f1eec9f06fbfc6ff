import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.cot.segmentation import (
    calibrate,
    segment_counts,
    segment_rationales,
    segment_starts,
    sentence_gaps,
    split_sentences,
    unit,
)

WORDS = st.sampled_from(
    ["Soap", "comb", "Dr.", "No.", "5", "e.g.", "3.5", "They", "\n", "1.", "!", "?\n\n", '."']
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=12).map(" ".join))


@given(TEXTS)
def test_sentences_joined_are_the_text(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentence.strip() for sentence in sentences[:-1])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("One thing", ["One thing"]),
        ("They like soap. They buy it!  Why? ", ["They like soap.", " They buy it!", "  Why? "]),
        ('"Fine." (Or not.) So.', ['"Fine."', " (Or not.)", " So."]),
        ("Costs 3.50 or more. Yes", ["Costs 3.50 or more.", " Yes"]),
        ("Dr. Bronner's and St. Ives vs. Dove.", ["Dr. Bronner's and St. Ives vs. Dove."]),
        ("J.R. Watkins, made in the U.S. Soap", ["J.R. Watkins, made in the U.S. Soap"]),
        ("An 8 oz. bottle of vitamin C. Then more", ["An 8 oz. bottle of vitamin C.", " Then more"]),
        ("Wants No. 5. They said no. Then left", ["Wants No. 5.", " They said no.", " Then left"]),
        ("1. Buys soap.\n2. Likes it\n\nEnd", ["1. Buys soap.", "\n2. Likes it", "\n\nEnd"]),
    ],
)
def test_where_a_sentence_ends(text, expected):
    assert split_sentences(text) == expected


@st.composite
def cut_problems(draw):
    """Rationales of random lengths over few distinct sentences, so that equal gaps are common."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    num_distinct = draw(st.integers(1, 5))
    count = sum(lengths)
    sentences = draw(st.lists(st.integers(0, num_distinct - 1), min_size=count, max_size=count))
    vectors = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(num_distinct, 4))
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.array(sentences, dtype=np.int32), first, unit(vectors)


@given(cut_problems())
def test_gaps_are_cosine_distances_within_a_rationale(problem):
    sentences, first, vectors = problem
    gaps = sentence_gaps(sentences, first, vectors)
    for position, gap in enumerate(gaps.tolist()):
        if position in first[:-1]:
            assert gap == np.inf
        else:
            left, right = vectors[sentences[position - 1]], vectors[sentences[position]]
            assert gap == pytest.approx(1 - float(left @ right), abs=1e-6)


@given(cut_problems(), st.floats(0, 100), st.floats(0, 100), st.integers(1, 8))
def test_fewer_segments_at_a_higher_percentile_never_more_than_the_maximum(problem, one, two, max_depth):
    sentences, first, vectors = problem
    gaps = sentence_gaps(sentences, first, vectors)

    def counts(percentile, depth):
        starts = segment_starts(gaps, first, percentile=percentile, max_depth=depth)
        return segment_counts(starts, first)

    few, many = counts(max(one, two), max_depth), counts(min(one, two), max_depth)
    assert (few <= many).all()
    assert np.array_equal(few == 0, np.diff(first) == 0)
    assert np.array_equal(few, np.minimum(counts(max(one, two), 99), max_depth))
    assert np.array_equal(counts(0, 99), np.diff(first))
    assert np.array_equal(counts(100, 99), np.minimum(np.diff(first), 1))


def test_the_tail_is_merged_into_the_last_segment():
    first = np.array([0, 4, 6])
    gaps = np.array([np.inf, 0.9, 0.8, 0.7, np.inf, 0.6], dtype=np.float32)
    starts = segment_starts(gaps, first, percentile=0, max_depth=2)
    assert starts.tolist() == [True, True, False, False, True, True]


@given(cut_problems(), st.floats(1, 8))
def test_calibration_is_as_near_as_any_percentile_gets(problem, wanted):
    sentences, first, vectors = problem
    gaps = sentence_gaps(sentences, first, vectors)
    found = calibrate(gaps, first, segments_mean=wanted, max_depth=8)

    def mean(percentile):
        counts = segment_counts(segment_starts(gaps, first, percentile=percentile, max_depth=8), first)
        return counts[counts > 0].mean() if counts.any() else 0.0

    tried = [mean(percentile) for percentile in np.linspace(0, 100, 201)]
    assert found.mean == pytest.approx(mean(found.percentile))
    assert abs(found.mean - wanted) <= min(abs(value - wanted) for value in tried) + 1e-6
    if found.attainable:
        assert min(tried) - 1e-9 <= wanted <= max(tried) + 1e-9
    else:
        assert found.mean in (pytest.approx(min(tried)), pytest.approx(max(tried)))


def spelled(sentences):
    """Vectors by subject: `Soap ...` and `Comb ...` are unrelated."""
    return np.array([[s.startswith("Soap"), s.startswith("Comb"), 0.1] for s in sentences], dtype=np.float32)


def test_a_cut_falls_where_the_subject_changes():
    calls = []

    def encode(sentences):
        calls.append(sentences)
        return spelled(sentences)

    texts = ["Soap a. Soap b. Comb a. Comb b.", "", "Comb a. Comb b. Soap a. Comb b."]
    found = segment_rationales(texts, encode, segments_mean=2.5, max_depth=8)
    assert found.texts_S == ["Soap a. Soap b.", " Comb a. Comb b.", "Comb a. Comb b.", " Soap a.", " Comb b."]
    assert found.counts_R.tolist() == [2, 0, 3]
    assert calls == [["Soap a.", "Soap b.", "Comb a.", "Comb b."]]  # each once
    assert [found.sentences_of(s).tolist() for s in range(5)] == [[0, 1], [2, 3], [2, 3], [0], [3]]
    facts = found.facts()
    assert facts["histogram"] == [1, 0, 1, 1, 0, 0, 0, 0, 0]
    assert (facts["segments_mean"], facts["sentences_mean"], facts["attainable"]) == (2.5, 4.0, True)


@given(st.lists(TEXTS.map(str.strip), min_size=1, max_size=5), st.floats(1, 5), st.integers(1, 4))
def test_segments_joined_are_the_rationales_and_nothing_is_random(texts, wanted, max_depth):
    def encode(sentences):
        return np.array([[len(s), sum(map(ord, s)) % 7 - 3, 1.0] for s in sentences], np.float32).reshape(
            -1, 3
        )

    found = segment_rationales(texts, encode, segments_mean=wanted, max_depth=max_depth)
    again = segment_rationales(texts, encode, segments_mean=wanted, max_depth=max_depth)
    assert again.texts_S == found.texts_S
    stops = np.cumsum(found.counts_R)
    joined = ["".join(found.texts_S[b - n : b]) for b, n in zip(stops, found.counts_R.tolist(), strict=True)]
    assert joined == texts
    assert found.counts_R.max() <= max_depth


def test_texts_too_short_for_the_wanted_mean_are_said_to_be(caplog):
    found = segment_rationales(["Soap a. Comb a.", "Soap b."], spelled, segments_mean=3.8, max_depth=8)
    assert (found.calibration.mean, found.calibration.attainable, found.calibration.percentile) == (
        1.5,
        False,
        0,
    )
    assert (
        "segments_mean=3.8 is out of reach of rationales with 1.50 sentences each; reached 1.50"
        in caplog.text
    )
