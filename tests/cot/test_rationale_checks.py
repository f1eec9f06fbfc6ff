import pytest

from lasar.cot.rationale_checks import TargetCheck, is_refusal, reasoning_part
from lasar.data.interactions import ItemTable

TITLES = [
    "Nivara Desert Rose Hand Cream", "Velvet Rose Hand Cream", "Rose Hand Cream Classic", "Rose Hand Cream Mini",
    "Zephyrine", "Cream", "Comfortable Weekend Slippers", "Cream Jar 22812", "", "Blue Moon",
]  # fmt: skip
IDS = ["B004756YJA", "B1", "22812", "85123A", "a", "b", "c", "d", "e", "f"]


def names(text, target, history=(), **options):
    check = TargetCheck(ItemTable(item_ids=IDS, titles=TITLES, texts=TITLES), [True] * 10, **options)
    return check.names_target(text, targets=[target], history=history)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("They want a nivara desert rose cream.", 0),  # three words in a row, in any case
        ("Something like B004756YJA would do.", 0),
        ("Something like b004756yja.", 0),
        ("Item 22812 comes next.", 2),
        ("Perhaps a Zephyrine, at last.", 4),  # a title of one rare word
        ("a zephyrine", 4),
        ("Perhaps a blue moon tonight.", 9),
        ("They like Nivara best.", 0),  # one rare word, written as a name
        ("They want slippers for a weekend.", 6),  # two rare words
    ],
)
def test_naming_is_found(text, target):
    assert names(text, target)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("They want a rose hand cream.", 0),  # three words in a row that four titles share
        ("More cream.", 5),  # a title that is one common word
        ("Something comfortable to wear.", 6),  # one rare word may be chance
        ("Nothing is said here.", 8),
        ("B1 and B2 vitamins.", 1),  # an id too short to mean anything
        ("A moon that is blue.", 9),
        ("They like Nivara best.", 1),
    ],
)
def test_generic_words_name_nothing(text, target):
    assert not names(text, target)


def test_what_the_history_says_may_be_said():
    assert not names("They like Nivara best, after the Nivara desert rose cream.", 0, history=[0])
    assert names("They like Nivara best.", 0, history=[1])
    assert not names("Item 22812 again.", 2, history=[7])


def test_only_titles_in_training_make_a_word_common():
    table = ItemTable(
        item_ids=["p", "q", "r"], titles=["Zephyrine one", "Zephyrine two", "Zephyrine"], texts=[""] * 3
    )
    text = "Perhaps Zephyrine."
    for trained, expected in (([True, True, True], False), ([False, False, True], True)):
        check = TargetCheck(table, trained, max_items=1)
        assert check.names_target(text, targets=[2], history=[]) is expected


def test_outcomes_in_order_of_gravity():
    check = TargetCheck(ItemTable(item_ids=IDS, titles=TITLES, texts=TITLES), [True] * 10)
    outcomes = [
        check.outcome(text, targets=[4], history=[])
        for text in ("", " .. ", "I'm sorry, no Zephyrine.", "A Zephyrine.", "Calm scents.")
    ]
    assert outcomes == ["empty", "empty", "refused", "names_target", "ok"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, no.", True),
        ("As an AI, I have no tastes.", True),
        ("I cannot provide this.", True),
        ("The customer cannot help buying soap.", False),
        ("The customer is sorry to see it go.", False),
        ("x" * 200 + " I'm sorry.", False),
    ],
)
def test_refusals(text, expected):
    assert is_refusal(text) is expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Behaviour: A.\nPreferences: B.\nIntent: C.\nRecommendation: D.", "A. B. C."),
        ("**Behavior analysis:** A.\n\n**Recommendation:** D.", "A."),
        ("1. Behaviour - A.\n2. Preference: B.\n4. **Recommendations**\nD.", "A. B."),
        ("Step 1: Intent: A.\nStep 4: Recommendation: D", "A."),
        ("- A.\n* B.\n## C.", "A. B. C."),
        ("They follow every recommendation of friends.", "They follow every recommendation of friends."),
        ("<think>Say D? No.</think>Intent: A.", "A."),
        ("<think>Never ends. D", ""),
        ("Recommendation: D.", ""),
        ("", ""),
    ],
)
def test_the_recommendation_and_all_markup_are_cut_off(answer, expected):
    assert reasoning_part(answer) == expected


def test_a_fragment_at_the_limit_is_dropped():
    assert reasoning_part("Intent: A b. And then the", cut_off=True) == "A b."
    assert reasoning_part("Intent: A b. Recommendation", cut_off=True) == "A b."
    assert reasoning_part("Intent: A b. No stop\nRecommendation: D", cut_off=True) == "A b. No stop"
    assert reasoning_part("Intent: A b. And then the") == "A b. And then the"


def test_sentences_that_repeat_the_instructions_are_dropped():
    asked = "Intent: what kind of thing the customer is after next."
    answer = "Intent: What kind of thing the customer is after. Soap of some kind."
    assert reasoning_part(answer, asked=asked) == "Soap of some kind."
