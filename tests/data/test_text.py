import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasar.data.text import clean_text, event_columns, item_texts, render, shorten, template_fields
from lasar.errors import DataError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (None, ""),
        ("  a \n\t b ", "a b"),
        ("Salt &amp; Pepper", "Salt & Pepper"),
        ("Salt &amp;amp; Pepper", "Salt & Pepper"),
        ("5&#39;8&quot; &lt;b&gt;mat&lt;/b&gt;", "5'8\" mat"),
        ("<p>Soft<br/>and<BR>warm</p><!-- no -->", "Soft and warm"),
        ("<script>var a = '<b>';</script>Lamp<style>b {}</style>", "Lamp"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("Q&A", "Q&A"),
    ],
)
def test_blemishes_are_removed(raw, clean):
    assert clean_text(raw) == clean


@given(st.text())
def test_cleaning_never_fails_and_leaves_one_line(text):
    cleaned = clean_text(text)
    assert cleaned == cleaned.strip()
    assert "\n" not in cleaned
    assert "  " not in cleaned


@given(st.text(alphabet="ab ,"), st.integers(1, 30))
def test_shortened_text_is_a_prefix_that_fits(text, limit):
    short = shorten(text, limit)
    assert len(short) <= limit
    assert text.startswith(short)


def test_shortening_stops_at_a_word():
    assert shorten("a pair of blue lamps", 14) == "a pair of blue"
    assert shorten("a pair of blue lamps", 17) == "a pair of blue"
    assert shorten("abcdefghijkl", 5) == "abcde"
    assert shorten("short", 5) == "short"


def test_parts_with_an_empty_field_are_left_out():
    template = ["{title}", "by {brand}", "({a} / {b})"]
    assert render({"title": "Lamp", "brand": "", "a": "x", "b": ""}, template) == "Lamp"
    assert render({"title": "Hi!", "brand": "O", "a": "x", "b": "y"}, template) == "Hi! by O. (x / y)"
    assert render({"title": "", "brand": "", "a": "", "b": ""}, template) == ""
    assert render({"title": "{brand}", "brand": "", "a": "", "b": ""}, template) == "{brand}"


def test_columns_of_events_that_describe_items():
    found = event_columns(
        ["user", "brand", "title", "x"], template=["{brand} {title}", "{size}"], kept=["x", "y"]
    )
    assert found == ["title", "x", "brand"]


def test_template_fields():
    assert template_fields(["{a} {b}", "x {a}"]) == ["a", "b"]
    with pytest.raises(DataError, match="is not a template"):
        template_fields(["{a"])
    with pytest.raises(DataError, match="between the braces"):
        template_fields(["{}"])


ITEMS = pl.DataFrame(
    {
        "item_id": ["1", "2", "3"],
        "title": ["Blue &amp; white <b>lamp</b> " + "x" * 50, None, "Chair"],
        "brand": [None, None, "Oak"],
        "size": ["L", None, "M"],
    }
)


def test_default_template_takes_what_exists():
    table = item_texts(ITEMS, template=(), max_field_chars=17)
    assert table.columns == ["item_id", "title", "text", "brand", "size"]
    assert table["title"].to_list() == ["Blue & white lamp", "", "Chair"]
    assert table["text"].to_list() == ["Blue & white lamp", "", "Chair. Oak"]
    assert table["size"].to_list() == ["L", "", "M"]


def test_items_without_any_column_have_empty_texts():
    table = item_texts(ITEMS.select("item_id"), template=(), max_field_chars=10)
    assert table["text"].to_list() == ["", "", ""]
    assert table["title"].to_list() == ["", "", ""]


def test_an_unknown_field_is_named_with_the_nearest():
    with pytest.raises(DataError, match="no column 'brnd'; did you mean 'brand'"):
        item_texts(ITEMS, template=["{brnd}"], max_field_chars=10)
