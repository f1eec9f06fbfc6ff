import polars as pl
import pytest

from lasar.cot.item_facts import item_facts, readable
from lasar.errors import ConfigError


def facts(columns, trained=None, **options):
    items = pl.DataFrame(columns)
    options = {"min_items": 2, "max_share": 0.5, **options}
    return item_facts(items, [True] * len(items) if trained is None else trained, **options)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("WHITE HANGING HEART T-LIGHT HOLDER", "white hanging heart t-light holder"),
        ("OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce", "OPI Nail Lacquer"),
        ("Body Scrub - One of the Best", "Body Scrub"),
        ("Dr. Bronner's Soap 1.5 oz. Rose", "Dr Bronner's Soap 1.5 oz Rose"),
        ("Cup, blue", "Cup, blue"),
        ('CHARLIE+LOLA"EXTREMELY BUSY" SIGN', "charlie+lola extremely busy sign"),
        ("word " * 40, ("word " * 12).strip()),
        ("", ""),
    ],
)
def test_titles_fit_into_a_sentence(title, expected):
    assert readable(title) == expected


def test_kinds_are_the_deepest_nodes_with_enough_items_and_areas_the_first_below_the_root():
    paths = ["Shop > Bath > Soap"] * 2 + ["Shop > Bath > Salt"] + ["Shop > Hair > Soap"] * 2 + ["Shop", ""]
    found = facts({"title": ["x"] * 7, "categories": paths})
    assert found.kinds == ["soap (bath)"] * 2 + ["bath"] + ["soap (hair)"] * 2 + ["", ""]
    assert found.areas == ["bath"] * 3 + ["hair"] * 2 + ["", ""]
    assert found.num_sharing["bath", ""] == 3
    assert found.num_sharing["soap (bath)", ""] == 2


def test_bars_separate_levels_too_and_flat_categories_are_kinds():
    found = facts(
        {"title": ["x"] * 4, "genre": ["Comedy", "Comedy", "Drama|War", "Drama|War"]}, category_column="genre"
    )
    assert found.kinds == ["comedy", "comedy", "war", "war"]
    assert found.areas == ["comedy", "comedy", "drama", "drama"]


def test_nouns_of_titles_are_kinds_where_there_are_no_categories():
    titles = [
        "RED TEA MUG", "BLUE TEA MUG", "RED GARDEN MUGS", "BLUE METAL SIGN", "RED METAL SIGN", "GREEN SIGN",
        "RED THING 7", "ODD",
    ]  # fmt: skip
    found = facts({"title": titles})
    assert found.kinds[:6] == ["tea mugs", "tea mugs", "mugs", "metal sign", "metal sign", "sign"]
    assert found.kinds[6:] == ["red items", ""]
    assert found.areas == found.kinds
    assert found.styles[1] == ("blue",)
    assert found.num_sharing["tea mugs", "blue"] == 1
    assert found.num_sharing["", "blue"] == 2


def test_words_of_nearly_all_titles_or_of_few_are_no_styles():
    found = facts(
        {
            "title": ["soft rare towel", "soft plain towel", "soft plain rug", "soft rug"],
            "categories": ["A"] * 4,
        }
    )
    assert [set(styles) for styles in found.styles] == [
        {"towel"},
        {"plain", "towel"},
        {"plain", "rug"},
        {"rug"},
    ]


def test_words_of_a_brand_are_no_styles():
    titles = ["silky zorro gel", "zorro wax", "gel of zorro", "silky wax", "silky soap", "silky oil"]
    brands = ["Zorro", "Zorro", "", "Acme", "Bolt", "Acme"]
    categories = ["Hair"] * 6
    plain = facts({"title": titles, "categories": categories}, max_share=0.9)
    known = facts({"title": titles, "categories": categories, "brand": brands}, max_share=0.9)
    assert "zorro" in plain.styles[0]
    assert "zorro" not in {style for styles in known.styles for style in styles}


def test_prices_fall_into_thirds_of_what_is_sold_in_training():
    prices = ["$1", "$2.50", "3", "4.00", "5", "1,000", "", "999999"]
    found = facts({"title": ["x"] * 8, "price": prices}, trained=[True] * 7 + [False])
    assert found.prices == ["low", "low", "middle", "middle", "high", "high", "", "high"]
    assert facts({"title": ["x"] * 3, "price": ["2", "2", "2"]}).prices == ["", "", ""]


def test_a_column_that_is_named_must_exist_and_a_usual_one_need_not():
    assert facts({"title": ["x", "y"]}).brands == ["", ""]
    with pytest.raises(ConfigError, match=r"items.parquet has no column 'brnad'; did you mean 'brand'"):
        facts({"title": ["x"], "brand": ["y"]}, brand_column="brnad")


def test_items_outside_training_change_no_fact_of_the_others():
    titles = [
        "red tea mug",
        "blue tea mug",
        "red metal sign",
        "green metal sign",
        "red odd mug",
        "sign of green",
    ]
    columns = {
        "title": titles,
        "categories": ["A > B", "A > B", "A > C", "A > C", "A > B", ""],
        "brand": ["X", "", "X", "Y", "", "Y"],
        "price": ["1", "2", "3", "4", "5", "6"],
    }
    for names in (("title",), tuple(columns)):
        known = {name: columns[name] for name in names}
        before = facts(
            {name: values + ["tea"] * 9 for name, values in known.items()}, [True] * 6 + [False] * 9
        )
        after = facts(
            {name: values + ["red > Z"] * 9 for name, values in known.items()}, [True] * 6 + [False] * 9
        )
        for field in ("titles", "kinds", "areas", "brands", "styles", "prices"):
            assert getattr(before, field)[:6] == getattr(after, field)[:6], field
        assert before.num_sharing == after.num_sharing
        assert before.num_items == 6
