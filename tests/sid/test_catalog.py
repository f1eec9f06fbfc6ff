import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lasar.errors import ArtifactError, DataError, UnknownItemError
from lasar.sid.catalog import SidCatalog

CODES = np.array([[0, 1], [1, 0], [2, 2]])


@settings(deadline=None, max_examples=50)
@given(npst.arrays(np.int64, st.tuples(st.integers(1, 20), st.integers(1, 3)), elements=st.integers(0, 3)))
def test_every_item_is_found_by_its_codes_and_duplicates_are_refused(codes):
    rows = [tuple(row) for row in codes.tolist()]
    if len(set(rows)) < len(rows):
        with pytest.raises(DataError, match="share the semantic ID"):
            SidCatalog(codes, 4)
        return
    catalog = SidCatalog(codes, 4)
    assert [catalog.item_of(row) for row in rows] == list(range(len(rows)))


def test_duplicate_message_names_both_items():
    with pytest.raises(DataError, match=r"items 0 and 2 share the semantic ID \[0, 1\]"):
        SidCatalog([[0, 1], [1, 1], [0, 1]], 2)


@pytest.mark.parametrize("code", [-1, 4])
def test_code_out_of_range_is_refused(code):
    with pytest.raises(DataError, match=f"item 1, level 0: code {code} is not in 0..3"):
        SidCatalog([[0, 0], [code, 0]], 4)


@pytest.mark.parametrize("codes", [np.zeros((2, 2)), np.zeros(3, int), np.zeros((2, 0), int)])
def test_what_is_not_a_table_of_integers_is_refused(codes):
    with pytest.raises(DataError, match="must be integers"):
        SidCatalog(codes, 4)


def test_unknown_codes_are_not_an_item():
    with pytest.raises(UnknownItemError, match=r"\[2, 1\]"):
        SidCatalog(CODES, 3).item_of([2, 1])
    with pytest.raises(UnknownItemError):
        SidCatalog(CODES, 3).item_of([0])


def test_codes_are_a_read_only_copy():
    source = CODES.copy()
    catalog = SidCatalog(source, 3)
    source[0, 0] = 2
    assert catalog.codes_IL.tolist() == CODES.tolist()
    with pytest.raises(ValueError, match="read-only"):
        catalog.codes_IL[0, 0] = 1


def test_with_items_appends_and_leaves_the_old_one_alone():
    catalog = SidCatalog(CODES, 3)
    larger = catalog.with_items([[0, 0]])
    assert (catalog.num_items, larger.num_items, larger.num_levels) == (3, 4, 2)
    assert larger.item_of([0, 0]) == 3
    assert larger.codes_IL[:3].tolist() == CODES.tolist()
    with pytest.raises(DataError, match="items 1 and 3"):
        catalog.with_items([[1, 0]])
    with pytest.raises(DataError, match=r"must be \[items, 2\]"):
        catalog.with_items([[1, 0, 0]])


def test_save_and_load(tmp_path):
    SidCatalog(CODES, 7).save(tmp_path)
    loaded = SidCatalog.load(tmp_path)
    assert loaded.codes_IL.tolist() == CODES.tolist()
    assert loaded.codes_IL.dtype == np.int32
    assert loaded.codebook_size == 7
    facts = json.loads((tmp_path / "catalog.json").read_text())
    assert facts == {"num_levels": 2, "codebook_size": 7, "num_items": 3}


@pytest.mark.parametrize("damage", ["codes", "facts", "size", "codebook"])
def test_damage_is_named(tmp_path, damage):
    SidCatalog(CODES, 3).save(tmp_path)
    facts = {"num_levels": 2, "codebook_size": 3, "num_items": 3}
    if damage == "codes":
        (tmp_path / "catalog.safetensors").write_bytes(b"nonsense")
    elif damage == "facts":
        (tmp_path / "catalog.json").unlink()
    elif damage == "size":
        (tmp_path / "catalog.json").write_text(json.dumps(facts | {"num_items": 4}))
    else:
        (tmp_path / "catalog.json").write_text(json.dumps(facts | {"codebook_size": 2}))
    with pytest.raises(ArtifactError, match="catalog"):
        SidCatalog.load(tmp_path)
