"""Catalogue versions: the vectors and codes of new items, restarts, and several workers on one database."""

import shutil
import threading

import numpy as np
import pytest

from lasar.artifacts import read_json, write_json
from lasar.errors import DataError
from lasar.serving.catalogue import ItemText, KnownItemError, NoSuchItemError, NoSuchVersionError
from lasar.sid.ngram_encoder import encode_ngrams


def item(name, text="RED TEAPOT"):
    return ItemText(name, text, text)


def test_a_new_item_has_the_text_vector_that_embed_would_have_given_it(make_service):
    service = make_service()
    snapshot = service.catalogue.change(add=[item("new", "PINK LANTERN"), item("twin", "BLUE MUG")])
    text = encode_ngrams(["PINK LANTERN", "BLUE MUG"])
    # Text weight 2; the other numbers are those of neighbours (test_item_vectors.py).
    np.testing.assert_allclose(snapshot.vectors_IE[-2:, :-8], np.sqrt(2.0) * text, atol=1e-6)


def test_a_new_item_is_coded_as_its_vector_would_be(make_service, run):
    """Where the quantizer's own codes are free, the new item has them; a twin moves on the last level only."""
    from lasar.sid.quantizers import load_quantizer

    service = make_service()
    taken = {tuple(row) for row in service.catalogue.snapshot.catalog.codes_IL.tolist()}
    snapshot = service.catalogue.change(add=[item(f"new{n}", f"PURPLE UMBRELLA {n % 2}") for n in range(4)])
    first = load_quantizer(run / "quantize").encode(snapshot.vectors_IE[-4:]).tolist()
    codes = [tuple(row) for row in snapshot.catalog.codes_IL[-4:].tolist()]
    assert len(set(codes) | taken) == len(taken) + 4
    wanted = {tuple(row) for row in first}
    assert wanted - taken <= set(codes)


def test_changes_survive_a_restart(make_service):
    one = make_service()
    one.catalogue.change(add=[item("new1"), item("new2")], deactivate=["sku4", "new2"])
    one.catalogue.change(activate=["sku4"])
    two = make_service()
    before, after = one.catalogue.snapshot, two.catalogue.snapshot
    assert after.version == before.version == 2
    assert after.items.item_ids == before.items.item_ids
    assert after.inactive.tolist() == before.inactive.tolist() == [41]
    np.testing.assert_array_equal(after.catalog.codes_IL, before.catalog.codes_IL)
    np.testing.assert_array_equal(after.vectors_IE, before.vectors_IE)


def test_another_worker_takes_the_new_version_when_it_looks(make_service):
    one, two = make_service(), make_service()
    old = two.catalogue.snapshot
    one.catalogue.change(add=[item("new1")])
    assert two.catalogue.refresh()
    assert not two.catalogue.refresh()
    assert two.catalogue.snapshot.finder.index_of("new1") == 40
    assert old.finder.index_of("new1") is None  # requests in flight keep what they began with


def test_workers_that_write_at_once_never_share_codes_and_lose_nothing(make_service):
    workers = [make_service() for _ in range(3)]
    errors = []

    def add(number, worker):
        try:
            for n in range(4):
                worker.catalogue.change(add=[item(f"new-{number}-{n}")])  # all want the same codes
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=add, args=pair) for pair in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for worker in workers:
        worker.catalogue.refresh()
    snapshots = [worker.catalogue.snapshot for worker in workers]
    assert {s.version for s in snapshots} == {12}
    for snapshot in snapshots:
        assert len(snapshot.items) == 52
        assert len({tuple(row) for row in snapshot.catalog.codes_IL.tolist()}) == 52
        np.testing.assert_array_equal(snapshot.catalog.codes_IL, snapshots[0].catalog.codes_IL)


def test_versions_belong_to_one_trained_catalogue(make_service, run, tmp_path):
    make_service().catalogue.change(add=[item("new1")])
    other = tmp_path / "other"
    shutil.copytree(run, other)
    from safetensors.numpy import load_file, save_file

    path = other / "quantize" / "catalog.safetensors"
    codes = load_file(path)["codes"]
    save_file({"codes": np.ascontiguousarray(codes[::-1])}, path)
    assert make_service(run=other).catalogue.snapshot.version == 0


def test_what_cannot_be_done(make_service):
    catalogue = make_service().catalogue
    with pytest.raises(KnownItemError, match="sku1"):
        catalogue.change(add=[item("sku1")])
    with pytest.raises(NoSuchItemError, match="sku99"):
        catalogue.change(deactivate=["sku99"])
    with pytest.raises(NoSuchVersionError):
        catalogue.rollback(3)
    with pytest.raises(DataError, match="do not fit"):
        catalogue.change(add=[item(f"new{n}") for n in range(6**3)])
    assert catalogue.snapshot.version == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "collaborative"}, "hold no text"),
        ({"normalise": "whiten"}, "normalise=whiten"),
        ({"text_model": "./nowhere"}, "no text model there"),
    ],
)
def test_runs_that_cannot_take_new_items_say_why_and_serve_on(make_service, run, tmp_path, change, message):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "embed" / "manifest.json"
    facts = read_json(path)
    write_json(path, facts | {"config": facts["config"] | change})
    catalogue = make_service(run=other).catalogue
    with pytest.raises(DataError, match=message):
        catalogue.change(add=[item("new1")])
    assert catalogue.change(deactivate=["sku1"]).version == 1
